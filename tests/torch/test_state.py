# SPDX-License-Identifier: MIT
"""State of `fusedadam.torch`: its formats, and how it moves to torch and back, to files and copies."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from helpers import FLOATS, assert_same_bits

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import (
    KINDS,
    NAMES,
    SHAPES,
    Training,
    array,
    assert_everything_same_bits,
    everything,
    leaves,
    params_of,
    train,
)

EXTRAS: dict[str, Any] = {"max_grad_norm": 0.5, "ema_decay": 0.9, "zero_grad_in_step": True}
DECAY: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "seed": 7}

# -- formats ----------------------------------------------------------------------------------

MOMENTS = ("auto", "float32", "bfloat16", "packed")
LOW_BITS = (None, "int8", "int16")
# Every combination of formats that is not refused, with the dtypes that may have it.
FORMATS = [
    pytest.param(
        "bfloat16"
        if low_bits
        else "bfloat16 float16 float32"
        if moments in ("bfloat16", "packed")
        else "bfloat16 float16 float32 float64",
        {"moments": moments, "low_bits": low_bits, "rounding": rounding},
        id=f"{moments}-{low_bits}-{rounding}",
    )
    for moments, low_bits, rounding in itertools.product(
        MOMENTS, LOW_BITS, ("stochastic", "nearest")
    )
    if not (rounding == "nearest" and (moments == "packed" or low_bits == "int8"))
]
# One element, partial groups of 64, several vectors; matrices are transposed in memory.
MANY = [(), (37,), (9, 17), (3, 5, 7), (1300,)]
FEW = [(9, 17), (70,)]


def transposed(t: Any) -> Any:
    return t.t().contiguous().t() if t.dim() == 2 else t.clone()


@pytest.mark.parametrize(("dtypes", "formats"), FORMATS)
def test_steps_equal_those_of_the_oracle(dtypes: str, formats: dict[str, Any]) -> None:
    has_maxima = formats["moments"] != "packed"
    options = DECAY | {"amsgrad": has_maxima}
    training = Training(AdamW, MANY, dtypes, lay_out=transposed, **options, **formats)
    training.run(2)
    training.optimizer.param_groups[0]["ema_decay"] = 0.9  # averages begin later
    training.run(2)
    training.swap_ema()
    training.run(2)


def test_groups_of_different_formats_with_missing_gradients() -> None:
    groups: list[dict[str, Any]] = [
        {"moments": "packed", "low_bits": "int8", "seed": 2**63 - 1},
        {"moments": "packed", "low_bits": "int16"},
        {"low_bits": "int8", "amsgrad": True, "ema_decay": 0.9},
        {"low_bits": "int16", "rounding": "nearest"},
        {},
    ]
    training = Training(AdamW, FEW, "bfloat16 float32", groups=groups, moments="bfloat16")
    training.run(4, missing=0.3)


MIXES = [
    (dtype, {"moments": moments, "low_bits": low_bits})
    for dtype, moments, low_bits in itertools.product(("bfloat16", "float32"), MOMENTS, LOW_BITS)
    if dtype == "bfloat16" or not low_bits
]


@pytest.mark.parametrize("at", ["step", "state_dict"])
@pytest.mark.parametrize(("dtype", "before"), MIXES, ids=str)
def test_formats_change_between_steps(dtype: str, before: dict[str, Any], at: str) -> None:
    training = Training(AdamW, FEW, dtype, **before)
    training.step()
    for formats in itertools.chain(*((of, before) for other, of in MIXES if other == dtype)):
        training.optimizer.param_groups[0].update(formats)
        if at == "state_dict":
            training.optimizer.state_dict()
            training.convert_all()
            training.check(str(formats))
        training.step()


def test_maxima_and_averages_are_converted() -> None:
    training = Training(AdamW, FEW, "bfloat16 float32", amsgrad=True, ema_decay=0.9)
    for moments in ("float32", "bfloat16", "auto"):
        training.optimizer.param_groups[0]["moments"] = moments
        training.step()
    for state in training.state:
        state["ema"] = state["ema"].bfloat16()
    training.adopt()
    training.step()


# -- copies and files -------------------------------------------------------------------------


def through_a_file(saved: Any, *, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


def loaded(state_dict: Any, optimizer: Any, kind: Any = None, **settings: Any) -> Any:
    """Load into a new optimizer of copies of the parameters, with other settings."""
    groups = [
        {"params": [p.detach().clone().requires_grad_() for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    new = (kind or type(optimizer))(groups, lr=0.5, **settings)
    new.load_state_dict(state_dict)
    return new


def in_c_order(state_dict: Any) -> Any:
    """As of formats that store no strides."""
    for state in state_dict["state"].values():
        c_order = torch.contiguous_format
        state.update({name: t.clone(memory_format=c_order) for name, t in state.items()})
    return state_dict


WAYS: dict[str, Callable[[Any], Any]] = {
    "state_dict": lambda o: loaded(copy.deepcopy(o.state_dict()), o, seed=3),
    "file": lambda o: loaded(through_a_file(o.state_dict()), o, seed=3),
    "file without strides": lambda o: loaded(in_c_order(through_a_file(o.state_dict())), o, seed=3),
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
    "torch.save": lambda o: through_a_file(o, weights_only=False),
}
COPIED: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("float32 float64", {}),
    "extras": ("float32 float64", EXTRAS | {"amsgrad": True, "lr": torch.tensor(0.02)}),
    "default of 16 bits": ("bfloat16 float16", {}),
    "bfloat16 + int16": ("bfloat16", {"moments": "bfloat16", "low_bits": "int16"}),
    "packed": ("bfloat16 float16 float32", {"moments": "packed"}),
    "packed + int8": ("bfloat16", {"moments": "packed", "low_bits": "int8"}),
}


@pytest.mark.parametrize(("dtypes", "options"), COPIED.values(), ids=COPIED)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_copies_go_on_with_the_same_bits(
    way: Callable[[Any], Any], dtypes: str, options: dict[str, Any]
) -> None:
    training = Training(AdamW, FEW, dtypes, lay_out=transposed, groups=[options, {}], ema_decay=0.9)
    for steps in (0, 2):
        training.run(steps)
        before = everything(training.optimizer)
        training.optimizer, old = way(training.optimizer), training.optimizer
        training.check("copied")
        assert type(training.optimizer) is AdamW
        if "16" in dtypes:  # the bits depend on the seed, also if it is the default
            assert [g.get("seed", 0) for g in training.optimizer.param_groups] == [0, 0]
        training.run(2)
        assert_everything_same_bits(everything(old), before, "the original")
    training.optimizer.add_param_group({"params": leaves([(2,)])})
    training.adopt()
    training.step()


# -- exchange with torch ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True, "weight_decay": 0.1}, {"lr": torch.tensor(0.01), "maximize": True}],
    ids=["plain", "amsgrad", "lr as a tensor"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_in_the_other(kind: Any, options: dict[str, Any]) -> None:
    training = Training(kind, SHAPES, "float64", beside_torch=True, **options)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "lr" in options else {}  # torch's are in float32
    for _ in range(2):
        training.run(3)
        ours, theirs = training.optimizer.state_dict(), training.stock.state_dict()
        assert list(ours) == list(theirs)
        assert [list(s) for s in ours["state"].values()] == [
            list(s) for s in theirs["state"].values()
        ]
        # Options that are off leave no entries.
        ours["param_groups"][0]["foreach"] = False  # as the other is told to
        assert ours["param_groups"] == theirs["param_groups"]
        ours, theirs = through_a_file(ours), through_a_file(theirs)
        training.stock = loaded(ours, training.stock)
        training.optimizer = loaded(theirs, training.optimizer)
        training.adopt()
    training.run(2)
    training.check_torch(**tolerance)


@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_state_of_torch_is_converted(dtype: str, moments: Any) -> None:
    training = Training(AdamW, FEW, dtype, lay_out=transposed, moments=moments)
    stock = torch.optim.AdamW([p.detach().clone().requires_grad_() for p in training.params])
    train(stock, 3)
    training.optimizer.load_state_dict(through_a_file(stock.state_dict()))
    for i, (p, state) in enumerate(stock.state.items()):
        training.params[i].data.copy_(p)
        training.stored[i] = {"params": array(p)}
        training.stored[i] |= {NAMES[n]: array(t) for n, t in state.items() if n != "step"}
        training.steps[i] = 3
    training.convert_all()
    training.check()
    training.run(2)
    # To torch it goes as decoded.
    training.optimizer.param_groups[0]["moments"] = "float32"
    saved = through_a_file(training.optimizer.state_dict())
    training.convert_all()
    training.check()
    stock = loaded(saved, stock, torch.optim.AdamW)
    assert {tuple(state) for state in stock.state.values()} == {("step", "exp_avg", "exp_avg_sq")}
    train(stock, 1)


def test_averages_and_extras_with_checkpoints_of_torch() -> None:
    groups: list[dict[str, Any]] = [{}, {"max_grad_norm": 7.0}]
    training = Training(Adam, groups=groups, beside_torch=True, **EXTRAS)
    training.run(2)
    averages = [stored["ema"] for stored in training.stored]
    training.stock = loaded(through_a_file(training.optimizer.state_dict()), training.stock)
    train(training.stock, 1)
    # And back, with the averages of before, and the extras that are not in the checkpoint.
    saved = copy.deepcopy(training.stock.state_dict())
    for group in saved["param_groups"]:
        for name in EXTRAS:
            group.pop(name, None)
    saved["param_groups"][0]["lr"] = 0.25
    training.optimizer.load_state_dict(saved)
    training.adopt()
    assert training.steps == [3] * len(training.params)
    for stored, average in zip(training.stored, averages, strict=True):
        assert_same_bits(stored["ema"], average)
    first, second = training.optimizer.param_groups
    assert first | EXTRAS | {"lr": 0.25} == first
    assert second["max_grad_norm"] == 7.0
    training.run(2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_checkpoint_of_the_other_dtype(dtype: str) -> None:
    (other,) = set(FLOATS) - {dtype}
    saved = torch.optim.Adam(leaves(SHAPES, other), amsgrad=True)
    train(saved, 3)
    ours, theirs = (k(leaves(SHAPES, dtype), amsgrad=True) for k in (Adam, torch.optim.Adam))
    for optimizer in (ours, theirs):
        optimizer.load_state_dict(saved.state_dict())
    assert_everything_same_bits(everything(ours), everything(theirs))
    train(ours, 1)


def with_count(change: Callable[[Any], Any]) -> Callable[[Any], None]:
    def edit(saved: Any) -> None:
        for state in saved["state"].values():
            state["step"] = change(state["step"])

    return edit


def of_an_older_torch(saved: Any) -> None:
    known = {"params", "lr", "betas", "eps", "weight_decay"}
    for name in saved["param_groups"][0].keys() - known:
        del saved["param_groups"][0][name]


def one_count_for_all(saved: Any) -> None:
    """As other programs' formats store it."""
    with_count(lambda _: saved["state"][0]["step"])(saved)


# Forms of checkpoints that all mean the same.
FORMS: dict[str, Callable[[Any], None]] = {
    "count as int": with_count(lambda step: int(step.item())),
    "count as float64": with_count(lambda step: step.double()),
    "count as int64": with_count(lambda step: step.long()),
    "count of one element": with_count(lambda step: step.reshape(1)),
    "one count for all": one_count_for_all,
    "of an older torch": of_an_older_torch,
    "with what is no parameter": lambda saved: saved["state"].update(
        note={"step": 1, "exp_avg": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("edit", FORMS.values(), ids=FORMS)
def test_forms_of_a_checkpoint(edit: Callable[[Any], None]) -> None:
    training = Training(AdamW, weight_decay=0.3)
    training.run(2)
    saved = copy.deepcopy(training.optimizer.state_dict())
    edit(saved)
    theirs = torch.optim.AdamW(leaves())
    theirs.load_state_dict(copy.deepcopy(saved))
    training.optimizer.load_state_dict(saved)
    for name, value in theirs.param_groups[0].items():
        assert name == "params" or training.optimizer.param_groups[0][name] == value, name
    for state, other in zip(training.state, theirs.state.values(), strict=False):
        assert isinstance(state["step"], torch.Tensor)
        assert state["step"].is_floating_point()
        is_floating = other["step"].is_floating_point()
        assert not is_floating or state["step"].dtype == other["step"].dtype
        state["step"] = state["step"].reshape(())
    training.check()
    training.run(2)
    assert ("note" in saved["state"]) == ("note" in training.optimizer.state_dict()["state"])


# -- state edited by others -------------------------------------------------------------------


def replace(name: str, make: Callable[[Any], Any]) -> Callable[[Any], None]:
    def edit(optimizer: Any) -> None:
        for state in optimizer.state.values():
            state[name] = make(state[name])

    return edit


def first_state(change: Callable[[Any, Any], Any]) -> Callable[[Any], None]:
    return lambda optimizer: change(optimizer.state, params_of(optimizer)[0])


def with_gaps(t: Any) -> Any:
    return torch.stack([t, t], dim=-1)[..., 0]


def transpose_parameters(optimizer: Any) -> None:
    for p in params_of(optimizer):
        p.data = transposed(p.data)


def other_parameter(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    optimizer.state.pop(params[0], None)
    params[0] = params[0].detach().clone().requires_grad_()


def load_an_empty_state(optimizer: Any) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0] = {}
    optimizer.load_state_dict(saved)


EDITS: dict[str, Callable[[Any], Any]] = {
    "a moment replaced by a transposed one": replace("exp_avg", transposed),
    "a moment replaced by one with gaps": replace("exp_avg_sq", with_gaps),
    "a count replaced": replace("step", lambda _: torch.tensor(40.0)),
    "all state cleared": lambda optimizer: optimizer.state.clear(),
    "the state of one parameter deleted": first_state(lambda state, p: state.pop(p)),
    "the state of one parameter emptied": first_state(lambda state, p: state[p].clear()),
    "the state of one parameter replaced": first_state(
        lambda state, p: state.update({p: {k: t * 2 for k, t in state[p].items()}})
    ),
    "parameters in another layout": transpose_parameters,
    "another first parameter": other_parameter,
    "a parameter less, the first": lambda o: o.param_groups[0]["params"].pop(0),
    "a parameter less, the last": lambda o: o.param_groups[0]["params"].pop(),
    "an empty state of one parameter loaded": load_an_empty_state,
    "averages off": lambda o: o.param_groups[0].update(ema_decay=None),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_edited_state_is_what_the_next_step_uses(change: Callable[[Any], Any]) -> None:
    training = Training(Adam, amsgrad=True, ema_decay=0.9)
    training.run(2)
    change(training.optimizer)
    training.adopt()
    training.run(2)
