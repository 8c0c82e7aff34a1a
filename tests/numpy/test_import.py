# SPDX-License-Identifier: MIT
"""The effects of `import fusedadam`."""

from __future__ import annotations

from fresh_python import output_of


def test_import_brings_in_no_framework() -> None:
    code = """
        import sys
        import numpy as np
        import fusedadam
        p, g = np.ones(3), np.ones(3)
        optimizer = fusedadam.Adam(clipnorm=1.0)
        optimizer.get_updates([g], [p])
        optimizer.apply_gradients([(g, p)])
        optimizer.get_gradients([g], [p])
        frameworks = {"torch", "autograd", "keras", "tf_keras", "jax", "tensorflow", "scipy"}
        print(sorted(frameworks & {name.partition(".")[0] for name in sys.modules}))
    """
    assert output_of(code) == "[]"
