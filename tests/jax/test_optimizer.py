# SPDX-License-Identifier: MIT
"""`fusedadam.jax` as an optimizer of optax, in the libraries that take one, and what it refuses."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
optax = pytest.importorskip("optax")

import fusedadam.jax as fused
import jax.numpy as jnp
from fusedadam._core import AdamOptions

rng = np.random.default_rng(0)
X = jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)
PARAMS = {
    "w": jnp.asarray(rng.standard_normal((8, 4)), jnp.float32),
    "b": jnp.zeros(4),
    "out": {"w": jnp.asarray(rng.standard_normal((4, 1)), jnp.float32)},
}


def loss(params: Any) -> Any:
    return jnp.mean((jnp.tanh(X @ params["w"] + params["b"]) @ params["out"]["w"] - 1) ** 2)


def trained(optimizer: Any, *, by_step: bool = False, steps: int = 5) -> tuple[Any, Any]:
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(loss)(params)
        if by_step:
            return optimizer.step(grads, state, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    result: tuple[Any, Any] = PARAMS, optimizer.init(PARAMS)
    for _ in range(steps):
        result = jax.jit(step)(*result)
    return result


def assert_close(actual: Any, expected: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected
    )


SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 2, 5)


def matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


# The arguments of `adam` beside the learning rate that are numbers.
STATIC = ("b1", "b2", "eps", "max_grad_norm", "skip_nonfinite", "seed", "keep_gradients")

Make = Callable[[Any, Any], Any]
WITH_AN_OPTIMIZER: dict[str, Make] = {
    "adam": lambda adam, _: adam(0.1, b1=0.8, b2=0.9, eps=1e-3),
    "adamw": lambda _, adamw: adamw(0.1, weight_decay=0.1),
    "a schedule": lambda _, adamw: adamw(SCHEDULE, weight_decay=0.1),
    "an array as rate": lambda adam, _: adam(jnp.float32(0.1)),
    "an array of 16 bits as rate": lambda adam, _: adam(jnp.bfloat16(0.125)),
    "a mask": lambda _, adamw: adamw(0.1, weight_decay=0.5, mask=matrices),
    "chain, before": lambda adam, _: optax.chain(optax.clip_by_global_norm(0.1), adam(0.1)),
    "chain, after": lambda _, adamw: optax.chain(adamw(0.1), optax.add_decayed_weights(0.1)),
    "masked": lambda adam, _: optax.masked(adam(0.1), matrices),
    "multi_transform": lambda adam, _: optax.multi_transform(
        {"fused": adam(0.1), "sgd": optax.sgd(0.1)}, {"w": "fused", "b": "sgd", "out": "fused"}
    ),
    "MultiSteps": lambda adam, _: optax.MultiSteps(adam(0.1), 2),
    "apply_if_finite": lambda adam, _: optax.apply_if_finite(adam(0.1), 2),
    "inject_hyperparams": lambda adam, _: optax.inject_hyperparams(
        adam, static_args=STATIC if adam is fused.adam else ()
    )(learning_rate=SCHEDULE),
}


@pytest.mark.parametrize("name", WITH_AN_OPTIMIZER)
def test_updates_are_those_of_optax(name: str) -> None:
    make = WITH_AN_OPTIMIZER[name]
    ours = trained(make(fused.adam, fused.adamw))[0]
    assert_close(ours, trained(make(optax.adam, optax.adamw))[0])


@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1, "mask": matrices}], ids=["", "mask"]
)
def test_steps_are_those_of_optax(settings: dict[str, Any]) -> None:
    clipped = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(SCHEDULE, **settings))
    ours = fused.adamw(SCHEDULE, max_grad_norm=0.1, **settings)
    expected = trained(clipped)[0]
    assert_close(trained(ours, by_step=True)[0], expected)
    assert_close(trained(ours)[0], expected)


def test_a_skipped_step_has_no_update() -> None:
    optimizer = fused.adamw(0.1, skip_nonfinite=True)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.inf), PARAMS)
    updates, state = jax.jit(optimizer.update)(grads, optimizer.init(PARAMS), PARAMS)
    assert not any(jnp.any(update) for update in jax.tree.leaves(updates))
    assert state.count == 0


def test_updates_have_the_dtypes_of_the_parameters() -> None:
    optimizer = fused.adam(0.1)
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    updates, _ = optimizer.update(grads, optimizer.init(PARAMS), PARAMS)
    assert {update.dtype for update in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_defaults_are_those_of_optax_or_of_the_core(name: str) -> None:
    def defaults(function: Callable[..., Any]) -> dict[str, Any]:
        return {n: p.default for n, p in inspect.signature(function).parameters.items()}

    own = {"moments": "auto", "max_grad_norm": None, "keep_gradients": True}
    expected = AdamOptions().as_dict() | defaults(getattr(optax, name)) | own
    ours = defaults(getattr(fused, name))
    assert ours == {argument: expected[argument] for argument in ours}


def test_state_goes_to_optax_and_back() -> None:
    ours, theirs = fused.adam(0.1), optax.adam(0.1)
    params, state = trained(ours, by_step=True)
    grads = jax.grad(loss)(params)
    updates, after = theirs.update(grads, (fused.to_optax(state), optax.EmptyState()))
    stepped, new_state = ours.step(grads, fused.from_optax(after, params), params)
    twice = ours.step(grads, *reversed(ours.step(grads, state, params)))
    assert_close(new_state.nu, twice[1].nu)
    assert new_state.count == twice[1].count
    assert_close(optax.apply_updates(params, updates), ours.step(grads, state, params)[0])
    del stepped


@pytest.mark.parametrize("shape", [(), (1,), (3,)])
def test_arrays_of_numpy_are_stepped_alike(shape: tuple[int, ...]) -> None:
    optimizer, ones = fused.adam(0.1), jnp.ones(shape)
    arguments = ones, optimizer.init(ones), ones
    expected = optimizer.step(*arguments)
    found = optimizer.step(*jax.tree.map(np.asarray, arguments))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_many_tensors_compile_faster_than_with_optax() -> None:
    """XLA's time grows faster than the number of buffers of a call; see `xla.TENSORS_IN_A_CALL`."""
    params = [jnp.ones(i % 7 + 1) for i in range(200)]
    seconds = []
    for adam in (fused.adam, optax.adam):
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam(0.1))
        begin = time.process_time()
        jax.jit(optimizer.update).lower(params, optimizer.init(params)).compile()
        seconds.append(time.process_time() - begin)
    assert seconds[0] < seconds[1]


def of_flax(optimizer: Any) -> Any:
    train_state = pytest.importorskip("flax.training.train_state")
    state = train_state.TrainState.create(apply_fn=loss, params=PARAMS, tx=optimizer)
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(loss)(state.params)))
    return step(step(state)).params


def of_nnx(optimizer: Any) -> Any:
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(8, 1, rngs=nnx.Rngs(0))
    state = nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    def step(model: Any, state: Any) -> None:
        grads = nnx.grad(lambda model: jnp.mean(model(X) ** 2))(model)
        # flax 0.10 takes the gradients alone.
        takes_model = "model" in inspect.signature(state.update).parameters
        state.update(*([model] if takes_model else []), grads)

    for _ in range(2):
        nnx.jit(step)(model, state)
    return nnx.state(model).kernel


def of_equinox(optimizer: Any) -> Any:
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(8, 1, 4, 1, key=jax.random.key(0))
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    def step(model: Any, state: Any) -> Any:
        grads = eqx.filter_grad(lambda model: jnp.mean(jax.vmap(model)(X) ** 2))(model)
        updates, state = optimizer.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    for _ in range(2):
        model, state = eqx.filter_jit(step, donate="all")(model, state)
    return eqx.filter(model, eqx.is_inexact_array)


@pytest.mark.parametrize("training", [of_flax, of_nnx, of_equinox])
def test_libraries_take_it_as_it_is(training: Callable[[Any], Any]) -> None:
    assert_close(training(fused.adamw(0.1)), training(optax.adamw(0.1)))


# -- refusals ---------------------------------------------------------------------------------

ADAM = fused.adam(0.1)
STATE = ADAM.init(PARAMS)
GRADS = jax.tree.map(jnp.ones_like, PARAMS)


def lost(grads: Any = GRADS, state: Any = STATE, params: Any = PARAMS, how: Any = ADAM) -> Any:
    return jax.block_until_ready(jax.jit(how.step)(grads, state, params))


def used_after_donation() -> Any:
    params = jax.tree.map(jnp.copy, PARAMS)
    jax.jit(ADAM.step, donate_argnums=2)(GRADS, STATE, params)
    return params["w"] + 1


ANYTHING: Any = "x"
REFUSALS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "b1": (lambda: fused.adam(0.1, b1=1.0), ValueError, "b1 must be >= 0 and < 1. Received: b1=1"),
    "b2": (lambda: fused.adam(0.1, b2=ANYTHING), TypeError, "b2 must be .* Received: b2='x'"),
    "eps": (lambda: fused.adam(0.1, eps=-1.0), ValueError, "eps must be .* Received: eps=-1.0"),
    "weight_decay": (lambda: fused.adamw(0.1, weight_decay=-1.0), ValueError, "weight_decay must"),
    "max_grad_norm": (
        lambda: fused.adam(0.1, max_grad_norm=-1.0),
        ValueError,
        "max_grad_norm >= 0, received: -1.0",
    ),
    "a traced beta": (
        lambda: jax.jit(lambda b1: fused.adam(0.1, b1=b1).init(PARAMS))(0.9),
        TypeError,
        r"b1 must be known when the program is traced; .*static_args=\('b1',\)",
    ),
    "all hyperparameters traced": (
        lambda: jax.jit(optax.inject_hyperparams(fused.adam)(0.1).init)(PARAMS),
        TypeError,
        r"b1, b2, eps, .*static_args=\('b1', 'b2', 'eps', .*\). Received: .*Trace",
    ),
    "a rate that is not finite": (
        lambda: lost(how=fused.adam(lambda _: jnp.float32(jnp.nan))),
        Exception,
        "INVALID_ARGUMENT: .*lr must be finite. Received: lr=nan",
    ),
    "rates": (
        lambda: lost(how=fused.adam(jnp.ones(2))),
        ValueError,
        r"learning_rate must have shape \(\). Received: shape=\(2,\)",
    ),
    "a count of another dtype": (
        lambda: lost(state=STATE._replace(count=jnp.float32(1))),
        ValueError,
        r"state.count must be int32 of shape \(\), .* Received: float32 of shape \(\)",
    ),
    "a negative count": (
        lambda: lost(state=STATE._replace(count=jnp.int32(-1))),
        Exception,
        "count must be >= 0. Received: -1",
    ),
    "integers": (
        lambda: ADAM.init({"a": jnp.arange(3)}),
        TypeError,
        r"params\['a'\] must be float32, .* Received: dtype=int32",
    ),
    "complex numbers": (
        lambda: ADAM.init({"a": jnp.ones(3, jnp.complex64)}),
        TypeError,
        r"params\['a'\] .* step the real and the imaginary part. Received: dtype=complex64",
    ),
    "low bits of float16": (
        lambda: fused.adam(0.1, low_bits="int8").init([jnp.ones(3, jnp.float16)]),
        ValueError,
        r"params\[0\] must be bfloat16 to have low bits",
    ),
    "gradients of another structure": (
        lambda: lost(grads={"w": GRADS["w"]}),
        ValueError,
        "grads must have the structure of the parameters, .* Received: PyTreeDef",
    ),
    "a gradient of another shape": (
        lambda: lost(grads=GRADS | {"b": jnp.ones(3)}),
        ValueError,
        r"grads\['b'\] must have the shape of its parameter, \(4,\). Received: shape=\(3,\)",
    ),
    "a gradient of integers": (
        lambda: lost(grads=GRADS | {"b": jnp.arange(4)}),
        TypeError,
        r"grads\['b'\] must be an array of floating-point numbers. Received: dtype=int32",
    ),
    "no gradient": (
        lambda: lost(grads=GRADS | {"b": None}),
        TypeError,
        r"grads\['b'\] must be an array of floating-point numbers. Received: None",
    ),
    "state of other settings": (
        lambda: lost(how=fused.adam(0.1, moments="packed")),
        ValueError,
        r"state.packed must have the structure",
    ),
    "state of another dtype": (
        lambda: lost(
            state=STATE._replace(mu=jax.tree.map(lambda m: m.astype("bfloat16"), STATE.mu))
        ),
        ValueError,
        r"state.mu\['b'\] must be float32, as init\(params\) makes it.* Received: bfloat16",
    ),
    "update without params": (
        lambda: fused.adamw(0.1).update(GRADS, STATE),
        ValueError,
        "needs params for weight decay. Received: params=None",
    ),
    "update with low bits": (
        lambda: fused.adam(0.1, low_bits="int8").update(GRADS, STATE, PARAMS),
        ValueError,
        r"call step\(...\), or leave low_bits=None. Received: low_bits='int8'",
    ),
    "a derivative": (
        lambda: jax.grad(lambda params: jnp.sum(ADAM.step(GRADS, STATE, params)[0]["b"]))(PARAMS),
        TypeError,
        "cannot be differentiated: apply jax.lax.stop_gradient",
    ),
    "a donated parameter": (used_after_donation, Exception, "deleted or donated|has been deleted"),
    "packed moments for optax": (
        lambda: fused.to_optax(fused.adam(0.1, moments="packed").init(PARAMS)),
        ValueError,
        "Received: a state with moments='packed'",
    ),
    "low bits for optax": (
        lambda: fused.to_optax(
            fused.adam(0.1, low_bits="int8").init(jnp.ones(3, jnp.bfloat16)),
        ),
        ValueError,
        "state must have no low bits.* Received: a state with low_bits",
    ),
    "state without Adam": (
        lambda: fused.from_optax(optax.sgd(0.1).init(PARAMS), PARAMS),
        ValueError,
        "must contain one optax.ScaleByAdamState. Received: 0 in a tuple",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str) -> None:
    call, error, message = REFUSALS[name]
    with pytest.raises(error) as refusal:
        call()
    assert re.search(message, str(refusal.value), re.DOTALL), str(refusal.value)
