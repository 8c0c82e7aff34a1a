# SPDX-License-Identifier: MIT
"""Public calls in every floating-point environment: same bits, and the environment stays unchanged.

A caller may have set a rounding mode, FTZ and DAZ, the x87 precision, exception flags to be read
later, and traps. A trap ends the process with SIGFPE if a step raises the exception.
"""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import pickle
import platform
import signal
import tempfile
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import fusedadam
import numpy as np
import pytest
from fresh_python import output_of, run_python
from fusedadam import Adam, adam_step, global_norm
from helpers import Array, assert_all_same_bits, running, values
from processor_state import MODES, Processor, needs_fenv, processor_restored

pytestmark = needs_fenv

# Steps on one thread and on several.
SIZES = [1_000, 40_000]
THREADS = 3

EVERYTHING: dict[str, Any] = {
    "lr": 0.7,
    "decay": 0.3,
    "bias_corrected_epsilon": True,
    "amsgrad": True,
    "weight_decay": 0.1,
    "l2": 0.01,
    "clipnorm": 0.9,
    "clipvalue": 0.1,
    "use_ema": True,
    "ema_overwrite_frequency": 4,
    "loss_scale": 3.0,
    "maximize": True,
    "zero_grad": True,
    "flush_denormals": False,
}


def telling(rng: np.random.Generator, shape: int | tuple[int, ...], dtype: str) -> Array:
    """Numbers that reveal every rounding mode, FTZ and DAZ, and that raise each exception."""
    x = values(rng, shape, dtype)
    info = np.finfo(x.dtype)
    flat = x.reshape(-1)
    flat[::3] *= info.smallest_normal
    flat[1:2], flat[4:5], flat[7:8] = np.inf, np.nan, info.max
    return x


class Scene:
    """The objects used by the calls below, the same each time."""

    def __init__(self, size: int) -> None:
        rng = np.random.default_rng(8)
        self.size = size
        self.params = [telling(rng, size, "float32"), telling(rng, size // 8, "float64")]
        self.grads = [telling(rng, size, "float32"), values(rng, size // 8, "float64")]
        self.finite = [values(rng, p.shape, str(p.dtype)) for p in self.params]
        self.moments = [[telling(rng, p.shape, str(p.dtype)) for p in self.params] for _ in "mv"]
        self.table = telling(rng, (size // 8, 8), "float32")
        self.rows = rng.integers(0, size // 8, size // 16)
        self.row_grads = telling(rng, (size // 16, 8), "float32")
        self.built: Adam | None = None

    def adam(self, params: list[Array] | None = None, **options: Any) -> Adam:
        """An optimizer in the middle of training whose state has numbers of all kinds."""
        adam = Adam(**({"epsilon": 0.0, "flush_denormals": False} | options))
        adam.build(self.params if params is None else params)
        for i, weight in enumerate(adam.weights[1:]):
            weight[...] = telling(np.random.default_rng(i), weight.shape, str(weight.dtype))
        adam.set_weights([3, *adam.get_weights()[1:]])
        self.built = adam
        return adam

    def arrays(self) -> list[Array]:
        """Everything that a call may have changed."""
        kept = [] if self.built is None else [*self.built.weights, *self.built.ema]
        return [
            *self.params,
            *self.grads,
            *self.finite,
            *self.moments[0],
            *self.moments[1],
            self.table,
            *kept,
        ]


def pairs(scene: Scene, grads: list[Array]) -> list[tuple[Array, Array]]:
    return list(zip(grads, scene.params, strict=True))


def applied(grads: str = "grads", *, calls: int = 2, **options: Any) -> Callable[[Scene], Any]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        adam, given = scene.adam(**options), pairs(scene, getattr(scene, grads))

        def call() -> None:
            for _ in range(calls):
                adam.apply_gradients(given)

        return call

    return prepare


def sparse(*, lazy: bool, **options: Any) -> Callable[[Scene], Any]:
    def prepare(scene: Scene) -> Callable[[], Any]:
        adam = scene.adam([scene.table], **options)
        return lambda: adam.apply_sparse(scene.rows, scene.row_grads, scene.table, lazy=lazy)

    return prepare


def stateless(scene: Scene, **options: Any) -> Callable[[], Any]:
    return lambda: adam_step(scene.params, scene.grads, *scene.moments, step=3, **options)


# Calls that compute. They must neither use nor change the environment.
COMPUTING: dict[str, Callable[[Scene], Callable[[], Any]]] = {
    "adam_step": lambda s: stateless(s, epsilon=0.0, flush_denormals=False),
    "adam_step with clips": lambda s: stateless(s, clipnorm=0.3, clipvalue=0.01, decay=0.7),
    "first step": lambda s: lambda: Adam(decay=0.1).apply_gradients(pairs(s, s.finite)),
    "apply_gradients": applied(),
    "apply_gradients, flushed": applied(flush_denormals=True),
    "apply_gradients, everything": applied("finite", **EVERYTHING),
    "apply_gradients, per tensor": applied("finite", clipnorm_per_tensor=0.1),
    "apply_gradients, skipped": applied(skip_nonfinite=True),
    "apply_gradients, dynamic": applied("finite", loss_scale="dynamic"),
    "apply_gradients, accumulated": applied(calls=6, gradient_accumulation_steps=3),
    "apply_sparse": sparse(lazy=True),
    "apply_sparse, dense": sparse(lazy=False, clipnorm=0.5),
    "get_gradients": lambda s: (
        lambda: Adam(clipnorm=0.3, loss_scale=3.0).get_gradients(s.finite, s.params)
    ),
    "get_updates": lambda s: bound(s.adam(decay=0.3).get_updates, s.grads, s.params),
    "global_norm": lambda s: lambda: global_norm(s.finite),
}
# Calls that only move numbers.
MOVING: dict[str, Callable[[Scene], Callable[[], Any]]] = {
    "build": lambda s: bound(s.adam(use_ema=True).build, s.params),
    "get_weights": lambda s: s.adam(amsgrad=True).get_weights,
    "set_weights": lambda s: bound(s.adam().set_weights, s.adam().get_weights()),
    "swap_ema": lambda s: s.adam(use_ema=True).swap_ema,
    "deepcopy": lambda s: bound(copy.deepcopy, s.adam()),
    "pickle": lambda s: bound(lambda a: pickle.loads(pickle.dumps(a)), s.adam()),
    "exclude_from_weight_decay": lambda s: bound(s.adam().exclude_from_weight_decay, s.params[:1]),
    "set_num_threads": lambda _: bound(fusedadam.set_num_threads, THREADS),
    "set_isa": lambda _: bound(fusedadam.set_isa, fusedadam.active_isa()),
    "save and load": lambda s: saved_and_loaded(s),
}


def bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    return lambda: function(*arguments)


def saved_and_loaded(scene: Scene) -> Callable[[], Any]:
    # lr, betas and epsilon are read and written exactly in any rounding mode.
    adam = scene.adam(lr=0.5, beta_1=0.5, beta_2=0.75, epsilon=0.0)

    def call() -> Adam:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "adam.safetensors"
            adam.save(path)
            return Adam.load(path, scene.params)

    return call


def flat(result: Any) -> list[Array]:
    """The arrays and numbers in the result of a call."""
    if isinstance(result, Adam):
        return flat(result.weights)
    if isinstance(result, (list, tuple)):
        return [array for item in result for array in flat(item)]
    return [np.asarray(result)] if isinstance(result, (int, float, np.ndarray)) else []


def outcome(name: str, size: int, around: Callable[[Callable[[], Any]], Any]) -> list[Array]:
    """Everything that a call changes and returns, when called by `around`."""
    scene = Scene(size)
    call = (COMPUTING | MOVING)[name](scene)
    result = around(call)
    return [array.copy() for array in (*scene.arrays(), *flat(result))]


def called(call: Callable[[], Any]) -> Any:
    return call()


def watched(
    processor: Processor,
    *modes: str,
    raised: bool = False,
    traps: bool = False,
    ignored: AbstractSet[str] = frozenset(),
) -> Callable[[Callable[[], Any]], Any]:
    """Return a function that calls in this environment and checks that the call preserves it."""

    def around(call: Callable[[], Any]) -> Any:
        processor.set(*modes, raised=raised, traps=traps)
        before = processor.state()
        result = call()
        after = processor.state()
        processor.restore()
        after = after._replace(**{field: getattr(before, field) for field in ignored})
        assert after == before, f"{modes}, flags {'raised' if raised else 'clear'}"
        return result

    return around


@pytest.fixture
def processor() -> Iterator[Processor]:
    with processor_restored() as processor:
        yield processor


def environments() -> Iterator[tuple[tuple[str, ...], bool]]:
    return itertools.product(((), *MODES), (False, True))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", COMPUTING)
def test_computing_call_in_every_environment(name: str, size: int, processor: Processor) -> None:
    with running(threads=THREADS):
        expected = outcome(name, size, called)
        for modes, raised in environments():
            actual = outcome(name, size, watched(processor, *modes, raised=raised))
            assert_all_same_bits(actual, expected, f"{name}, {modes}")


@pytest.mark.parametrize("name", MOVING)
def test_moving_call_in_every_environment(name: str, processor: Processor) -> None:
    # Python uses arithmetic to read and write decimal fractions, which raises flags.
    ignored = {"flags"} if name == "save and load" else set()
    with running():
        expected = outcome(name, SIZES[0], called)
        for modes, raised in environments():
            around = watched(processor, *modes, raised=raised, ignored=ignored)
            assert_all_same_bits(outcome(name, SIZES[0], around), expected, f"{name}, {modes}")


def test_caller_is_called_back_in_its_own_environment(processor: Processor) -> None:
    seen = []

    def schedule(_: int) -> float:
        seen.append(processor.state())
        return 0.001

    def loss(params: list[Any]) -> Any:
        seen.append(processor.state())
        return (params[0] * params[0]).sum()

    adam, p = Adam(lr=schedule), np.ones(3)
    adam.get_updates(loss, [p])  # imports autograd
    seen.clear()
    processor.set("downward")
    state = processor.state()
    adam.get_updates(loss, [p])
    processor.restore()
    # The loss may have raised the inexact flag by then.
    assert [s._replace(flags=state.flags) for s in seen] == [state] * len(seen)
    assert len(seen) >= 2


def test_python_threads_with_environments_of_their_own() -> None:
    size = SIZES[-1]
    expected = outcome("apply_gradients, everything", size, called)

    def work(modes: tuple[str, ...]) -> list[Array]:
        with processor_restored() as processor:
            around = watched(processor, *modes, raised=True)
            return outcome("apply_gradients, everything", size, around)

    with concurrent.futures.ThreadPoolExecutor(len(MODES)) as pool:
        for actual in pool.map(work, MODES):
            assert_all_same_bits(actual, expected)


def test_first_step_of_a_process_raises_no_flag() -> None:
    code = """
        import numpy as np
        import fusedadam
        from processor_state import Processor
        p, g, m, v = np.ones((4, 10))
        processor = Processor()
        processor.set()
        before = processor.state()
        fusedadam.adam_step(p, g, m, v, step=1)
        after = processor.state()
        processor.restore()
        print(after == before)
    """
    assert output_of(code) == "True"


@pytest.mark.parametrize("modes", MODES, ids="+".join)
def test_files_hold_the_same_numbers_in_every_environment(
    processor: Processor, modes: tuple[str, ...], tmp_path: Path
) -> None:
    # Python reads "0.9" with a division, which uses the caller's rounding mode.
    rng = np.random.default_rng(5)
    p, path = np.ones(3), tmp_path / "adam.safetensors"
    for drawn in rng.uniform(0, 1, (5, 3)):
        lr, beta_1, beta_2 = (float(x) for x in (np.round(drawn, 3) + 0.0001) * 0.99)
        adam = Adam(lr=lr, beta_1=beta_1, beta_2=beta_2, epsilon=1e-8, decay=1e300)
        processor.set(*modes)
        adam.save(path)
        loaded = Adam.load(path, [p])
        processor.restore()
        assert loaded.get_config() == adam.get_config()


# For a caller who traps NaNs to find their origin. In a separate process, because SIGFPE ends it.
TRAPS = """
    import sys
    from test_float_environment_calls import *

    with processor_restored() as processor, running(threads=THREADS):
        for name in COMPUTING:
            for size in SIZES:
                expected = outcome(name, size, called)
                for modes in ((), *MODES):
                    print(name, size, modes, flush=True)
                    actual = outcome(name, size, watched(processor, *modes, traps=True))
                    assert_all_same_bits(actual, expected, name)
    print("done")
"""


def test_no_step_springs_a_trap_of_the_caller() -> None:
    assert output_of(TRAPS).splitlines()[-1] == "done"


def test_a_trap_that_is_set_is_sprung() -> None:
    # Verifies that the trap works, or the test above would prove nothing.
    done = run_python(
        """
        import numpy as np
        from processor_state import Processor
        zero = np.zeros(4)
        with np.errstate(all="ignore"):
            Processor().set(traps=True)
            zero / zero
        """
    )
    traps = platform.machine() == "x86_64"
    assert done.returncode == (-signal.SIGFPE if traps else 0)
