# SPDX-License-Identifier: MIT
"""Public calls in every floating-point environment: same bits, and the environment stays unchanged.

A caller may have set a rounding mode, FTZ and DAZ, the x87 precision, exception flags to be read
later, and traps. A trap ends the process with SIGFPE if a step raises the exception.
"""

from __future__ import annotations

import concurrent.futures
import copy
import functools
import pickle
import platform
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import fusedadam
import numpy as np
import pytest
from fresh_python import output_of, run_python
from fusedadam import Adam, adam_step, global_norm
from helpers import Array, assert_all_same_bits, running, values
from processor_state import MODES, Processor, needs_fenv, processor_restored

pytestmark = needs_fenv

# Steps on one thread and on several.
SMALL, LARGE = 1_000, 33_000
THREADS = 3
ENVIRONMENTS = [*((modes, False) for modes in ((), *MODES)), ((), True), (MODES[-1], True)]

EVERYTHING: dict[str, Any] = (
    {"lr": 0.7, "decay": 0.3, "bias_corrected_epsilon": True, "amsgrad": True, "weight_decay": 0.1}
    | {"l2": 0.01, "clipnorm": 0.9, "clipvalue": 0.1, "use_ema": True, "ema_overwrite_frequency": 4}
    | {"loss_scale": 3.0, "maximize": True, "zero_grad": True, "flush_denormals": False}
)


@functools.cache
def drawn(seed: int, shape: int | tuple[int, ...], dtype: str, *, telling: bool = True) -> Array:
    """Numbers that reveal every rounding mode, FTZ and DAZ, and that raise each exception.

    If not `telling`, they are finite and normal.
    """
    x = values(np.random.default_rng(seed), shape, dtype)
    if telling:
        info, flat = np.finfo(x.dtype), x.reshape(-1)
        flat[::3] *= info.smallest_normal
        flat[1:2], flat[4:5], flat[7:8] = np.inf, np.nan, info.max
    return x


class Scene:
    """The objects used by the calls below, the same each time."""

    def __init__(self, size: int) -> None:
        kinds = [(size, "float32"), (size // 8, "float64")]
        self.params, self.m, self.v = ([drawn(i, *of).copy() for of in kinds] for i in (1, 2, 3))
        self.finite = [drawn(5, *of, telling=False).copy() for of in kinds]
        self.grads = [drawn(4, *kinds[0]).copy(), self.finite[1].copy()]
        self.table = drawn(6, (size // 8, 8), "float32").copy()
        self.rows = np.random.default_rng(7).integers(0, size // 8, size // 16)
        self.row_grads = drawn(8, (size // 16, 8), "float32")
        self.built: Adam | None = None

    def adam(self, params: list[Array] | None = None, **options: Any) -> Adam:
        """An optimizer in the middle of training whose state has numbers of all kinds."""
        adam = Adam(**({"epsilon": 0.0, "flush_denormals": False} | options))
        adam.build(self.params if params is None else params)
        for i, weight in enumerate(adam.weights[1:]):
            weight[...] = drawn(i, weight.shape, str(weight.dtype))
        adam.set_weights([3, *adam.get_weights()[1:]])
        self.built = adam
        return adam

    def arrays(self) -> list[Array]:
        """Everything that a call may have changed."""
        kept = [] if self.built is None else [*self.built.weights, *self.built.ema]
        lists = (self.params, self.grads, self.finite, self.m, self.v, [self.table], kept)
        return [array for each in lists for array in each]


# Take a scene, and return a call without arguments.
Prepare: TypeAlias = Callable[[Scene], Callable[[], Any]]


def applied(grads: str = "grads", *, calls: int = 2, **options: Any) -> Prepare:
    def prepare(scene: Scene) -> Callable[[], Any]:
        adam = scene.adam(**options)
        pairs = list(zip(getattr(scene, grads), scene.params, strict=True))
        return lambda: [adam.apply_gradients(pairs) for _ in range(calls)]

    return prepare


def sparse(*, lazy: bool, **options: Any) -> Prepare:
    def prepare(s: Scene) -> Callable[[], Any]:
        adam = s.adam([s.table], **options)
        return functools.partial(adam.apply_sparse, s.rows, s.row_grads, s.table, lazy=lazy)

    return prepare


def stateless(**options: Any) -> Prepare:
    return lambda s: functools.partial(
        adam_step, s.params, s.grads, s.m, s.v, step=3, epsilon=0.0, **options
    )


def saved_and_loaded(scene: Scene) -> Callable[[], Any]:
    # lr, betas and epsilon are read and written exactly in any rounding mode.
    adam = scene.adam(lr=0.5, beta_1=0.5, beta_2=0.75)

    def call() -> Adam:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "adam.safetensors"
            adam.save(path)
            return Adam.load(path, scene.params)

    return call


# Calls that compute. They must neither use nor change the environment.
COMPUTING: dict[str, Prepare] = {
    "adam_step": stateless(flush_denormals=False),
    "adam_step with clips": stateless(clipnorm=0.3, clipvalue=0.01, decay=0.7),
    "first step": lambda s: lambda: Adam(decay=0.1).step(s.params, s.finite),
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
    "get_updates": lambda s: functools.partial(s.adam(decay=0.3).get_updates, s.grads, s.params),
    "global_norm": lambda s: lambda: global_norm(s.finite),
}
# Calls that only move numbers.
MOVING: dict[str, Prepare] = {
    "build": lambda s: functools.partial(s.adam(use_ema=True).build, s.params),
    "get_weights": lambda s: s.adam(amsgrad=True).get_weights,
    "set_weights": lambda s: functools.partial(s.adam().set_weights, s.adam().get_weights()),
    "swap_ema": lambda s: s.adam(use_ema=True).swap_ema,
    "deepcopy": lambda s: functools.partial(copy.deepcopy, s.adam()),
    "pickle": lambda s: functools.partial(lambda a: pickle.loads(pickle.dumps(a)), s.adam()),
    "exclude": lambda s: functools.partial(s.adam().exclude_from_weight_decay, s.params[:1]),
    "set_num_threads": lambda _: functools.partial(fusedadam.set_num_threads, THREADS),
    "set_isa": lambda _: functools.partial(fusedadam.set_isa, fusedadam.active_isa()),
    "save and load": saved_and_loaded,
}


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
    processor: Processor, *modes: str, raised: bool = False, traps: bool = False, flags: bool = True
) -> Callable[[Callable[[], Any]], Any]:
    """Return a function that calls in this environment and checks that the call preserves it."""

    def around(call: Callable[[], Any]) -> Any:
        processor.set(*modes, raised=raised, traps=traps)
        before = processor.state()
        result = call()
        after = processor.state()
        processor.restore()
        after = after if flags else after._replace(flags=before.flags)
        assert after == before, f"{modes}, flags {'raised' if raised else 'clear'}"
        return result

    return around


@pytest.fixture
def processor() -> Iterator[Processor]:
    with processor_restored() as processor:
        yield processor


@pytest.mark.parametrize(
    ("name", "size"),
    [(name, size) for name in COMPUTING for size in (SMALL, LARGE)] + [(n, SMALL) for n in MOVING],
)
def test_call_in_every_environment(name: str, size: int, processor: Processor) -> None:
    # Python uses arithmetic to read and write decimal fractions, which raises flags.
    flags = name != "save and load"
    with running(threads=THREADS):
        expected = outcome(name, size, called)
        for modes, raised in ENVIRONMENTS:
            actual = outcome(name, size, watched(processor, *modes, raised=raised, flags=flags))
            assert_all_same_bits(actual, expected, f"{name}, {modes}")


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
    name = "apply_gradients, everything"
    expected = outcome(name, LARGE, called)

    def work(modes: tuple[str, ...]) -> list[Array]:
        with processor_restored() as processor:
            return outcome(name, LARGE, watched(processor, *modes, raised=True))

    with concurrent.futures.ThreadPoolExecutor(len(MODES)) as pool:
        for actual in pool.map(work, MODES):
            assert_all_same_bits(actual, expected)


@pytest.mark.parametrize("modes", MODES, ids="+".join)
def test_files_hold_the_same_numbers_in_every_environment(
    processor: Processor, modes: tuple[str, ...], path: Path
) -> None:
    # Python reads "0.9" with a division, which uses the caller's rounding mode.
    for drawn in np.random.default_rng(5).uniform(0, 1, (5, 3)):
        lr, beta_1, beta_2 = (float(x) for x in (np.round(drawn, 3) + 0.0001) * 0.99)
        adam = Adam(lr=lr, beta_1=beta_1, beta_2=beta_2, epsilon=1e-8, decay=1e300)
        processor.set(*modes)
        adam.save(path)
        loaded = Adam.load(path, [np.ones(3)])
        processor.restore()
        assert loaded.get_config() == adam.get_config()


def test_in_a_new_process() -> None:
    # In a separate process, because only the first step starts threads, and SIGFPE ends it.
    code = f"""
        import sys
        import numpy as np
        from processor_state import MODES, Processor
        thread = Processor()
        thread.set()
        before = thread.state()
        import fusedadam
        # A library linked with -ffast-math sets FTZ and DAZ for the process that loads it.
        after = thread.state()._replace(flags=before.flags, x87_flags=before.x87_flags)
        assert after == before, "import"
        tiny = np.array([5e-324]), np.array([1e-45], "float32")
        assert 5e-324 * 1.0 > 0 and all((t * 1)[0] > 0 for t in tiny)

        p, g, m, v = np.ones((4, 10))
        thread.set()
        before = thread.state()
        fusedadam.adam_step(p, g, m, v, step=1)
        assert thread.state() == before, "the first step"

        sys.path.append({str(Path(__file__).parent)!r})
        from test_float_environment import *
        # A new thread inherits the environment of its creator, and OpenMP threads persist.
        fusedadam.set_num_threads(THREADS)
        outcome("adam_step", LARGE, watched(thread, *MODES[-1]))  # starts the threads
        actual = outcome("adam_step", LARGE, called)
        fusedadam.set_num_threads(1)
        assert_all_same_bits(actual, outcome("adam_step", LARGE, called), "threads")

        # For a caller who traps NaNs to find their origin.
        fusedadam.set_num_threads(THREADS)
        for name in COMPUTING:
            for size in (SMALL, LARGE):
                expected = outcome(name, size, called)
                for modes in ((), MODES[-1]):
                    print(name, size, modes, flush=True)
                    actual = outcome(name, size, watched(thread, *modes, traps=True))
                    assert_all_same_bits(actual, expected, name)
        print("done")
    """
    assert output_of(code).splitlines()[-1] == "done"


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
