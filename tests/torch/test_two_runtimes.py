# SPDX-License-Identifier: MIT
"""Two and three OpenMP runtimes in one process: torch, scikit-learn and this package.

They are imported in several orders. Each wheel brings its own copy of libgomp. Whether this package
shares one with another depends on its build. Each library must find its threads, compute the same
results as alone, and respect thread limits, both its own and global ones.
"""

from __future__ import annotations

import pytest
from fresh_python import output_of

pytest.importorskip("torch")
pytest.importorskip("sklearn")

OURS, TORCH, SKLEARN = "fusedadam", "torch", "sklearn.cluster"
# Each library is once first and once last. This package is also between the others.
ORDERS = [(OURS, SKLEARN), (SKLEARN, OURS), (OURS, TORCH), (TORCH, OURS), (TORCH, OURS, SKLEARN)]
# What each library computes on several threads, and a check of the result.
WORKS = """
    import concurrent.futures
    import numpy as np, oracle, threadpoolctl
    from helpers import assert_all_same_bits
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, 100_000)).astype("float32")
    samples = rng.standard_normal((2_000, 8)).astype("float32")
    reference, optimizer = oracle.OracleAdam([p]), fusedadam.Adam()

    def step():
        reference.step([g])
        optimizer.apply_gradients([(g, p)])
        assert_all_same_bits([p, *optimizer.weights], [*reference.params, *reference.weights()])

    def product():
        x = torch.ones(400, 400)
        assert (x @ x).sum().item() == 400.0**3
        assert torch.ones(1_000_000).add(1).sum().item() == 2_000_000

    def k_means():
        # Lloyd's iteration assigns each sample to the nearest centre.
        model = sklearn.cluster.KMeans(4, n_init=1, max_iter=5, random_state=0).fit(samples)
        distances = ((samples[:, None] - model.cluster_centers_) ** 2).sum(2)
        assert (model.predict(samples) == distances.argmin(1)).mean() > 0.999  # but for ties

    def counts():
        infos = threadpoolctl.threadpool_info()
        return {i["filepath"]: i["num_threads"] for i in infos if i["user_api"] == "openmp"}
"""
DOES = {OURS: "step", TORCH: "product", SKLEARN: "k_means"}


def run(order: tuple[str, ...], body: str) -> None:
    """Import the libraries in this order, then run the body. `works` has the same order."""
    imports = "".join(f"    import {name}\n" for name in order)
    works = ", ".join(DOES[name] for name in order)
    code = f"{imports}{WORKS}\n    works = [{works}]\n{body}\n    print('same')"
    assert output_of(code, environment={"OMP_NUM_THREADS": "3"}) == "same"


@pytest.mark.parametrize("order", ORDERS, ids=", ".join)
def test_orders_of_imports(order: tuple[str, ...]) -> None:
    # In turn, so that threads of one runtime still spin when those of the next are wanted.
    run(order, "    for work in (works + works[::-1]) * 2:\n        work()")


@pytest.mark.parametrize("order", [(OURS, TORCH, SKLEARN), (SKLEARN, TORCH, OURS)], ids=", ".join)
def test_limits_and_threads_of_their_own(order: tuple[str, ...]) -> None:
    body = """
    for work in works:
        work()
    before, of_runtimes = (fusedadam.get_num_threads(), torch.get_num_threads()), counts()
    assert before[0] > 1
    assert len(of_runtimes) > 1, "scikit-learn has one of its own"
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert set(counts().values()) == {1}
        assert fusedadam.get_num_threads() == 1
        for work in works:
            work()
    assert (fusedadam.get_num_threads(), torch.get_num_threads()) == before
    assert counts() == of_runtimes
    # A number of threads for steps is for steps alone.
    fusedadam.set_num_threads(2)
    for work in works:
        work()
    assert counts() == of_runtimes
    with threadpoolctl.threadpool_limits(1, user_api="openmp"):
        assert fusedadam.get_num_threads() == 1
    assert fusedadam.get_num_threads() == 2
    with concurrent.futures.ThreadPoolExecutor(len(works)) as pool:
        list(pool.map(lambda work: [work() for _ in range(5)], works))
    """
    run(order, body)
