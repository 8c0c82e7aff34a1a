# SPDX-License-Identifier: MIT
"""Keras 3 on TensorFlow and on PyTorch: `keras.optimizers.Adam.apply`, and ours in its place.

On TensorFlow in a graph compiled by XLA, as by the default of `Model.compile`; on PyTorch eagerly
and without autograd (https://keras.io/guides/writing_a_custom_training_loop_in_torch/).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from peers import Array, Contender, Work, copies_to
from peers.tensorflow_adam import assigns_to, set_tensorflow_threads, tensorflow
from peers.torch_adam import set_threads


def keras(backend: str) -> Any:
    """Import Keras with a backend. A process can choose only one."""
    os.environ["KERAS_BACKEND"] = backend
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras

    return keras


def optimizer(work: Work, params: list[Any], kind: Any) -> Any:
    """Return a built optimizer, whose scalars have the precision of its parameters."""
    keras(os.environ["KERAS_BACKEND"]).config.set_floatx(work.dtype)
    h = work.hyper
    adam = kind(learning_rate=h.lr, beta_1=h.beta_1, beta_2=h.beta_2, epsilon=h.epsilon)
    adam.build(params)
    return adam


def make(names: Sequence[str], work: Work, threads: int) -> dict[str, Contender]:
    """Make the contender."""
    (name,) = names
    on_tensorflow = name == "keras tensorflow"
    if on_tensorflow:
        set_tensorflow_threads(threads)
    else:
        set_threads(threads)
    module = keras("tensorflow" if on_tensorflow else "torch")
    params = [module.Variable(array, dtype=work.dtype) for array in work.params()]

    def as_arrays() -> list[Array]:
        return [np.asarray(module.ops.convert_to_numpy(param)) for param in params]

    if on_tensorflow:
        tf = tensorflow()
        variables = [tf.Variable(array) for array in work.grads()]
        adam = optimizer(work, params, module.optimizers.Adam)

        def apply() -> None:
            adam.apply([variable.read_value() for variable in variables], params)

        step = tf.function(apply, reduce_retracing=True, jit_compile=True)
        # This backend rounds Python constants to float32.
        return {name: Contender("hat", step, assigns_to(variables), as_arrays, scalars="float32")}

    import torch

    kind = module.optimizers.Adam
    if name == "fusedadam.keras":
        import fusedadam.keras

        kind = fusedadam.keras.Adam
    fused = optimizer(work, params, kind)
    grads = [torch.from_numpy(array).clone() for array in work.grads()]
    apply_eagerly = torch.no_grad()(lambda: fused.apply(grads, params))
    copy = copies_to([grad.numpy() for grad in grads])
    return {name: Contender("hat", apply_eagerly, copy, as_arrays)}
