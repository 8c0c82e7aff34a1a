# SPDX-License-Identifier: MIT
"""Checks of the torch adapter in several processes. Each rank runs these functions."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
import torch.distributed.checkpoint
from distributed_training import (
    CLIP,
    FORMATS,
    STEPS,
    Training,
    close,
    compare_all,
    compare_models,
    compare_states,
    ddp,
    fsdp,
    groups_of,
    new_model,
    one_process,
    same_bits,
    whole,
    zero,
)
from fusedadam.torch import Adam, AdamW, attach, split_
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

# Not all of these modules export their names in a way that type checkers accept.
dist: Any = torch.distributed
dcp: Any = torch.distributed.checkpoint

SAVED = 3  # steps before a checkpoint

Run: TypeAlias = Callable[[int, Path], None]


class Check(NamedTuple):
    """A check for a given number of ranks. It raises if something is wrong."""

    ranks: int
    run: Run


CHECKS: dict[str, Check] = {}


def on_ranks(ranks: int) -> Callable[[Run], Run]:
    """Register a function of the rank and a shared directory as a check."""

    def add(run: Run) -> Run:
        CHECKS[run.__name__] = Check(ranks, run)
        return run

    return add


def gathered(value: Any) -> list[Any]:
    """The value of each rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def alone(steps: int = STEPS, clip: float | None = None, **settings: Any) -> Training:
    """A training in one process, with the sum of the gradients of two ranks."""
    one = one_process(**settings)
    one.run(steps, [0, 1], 2, clip)
    return one


def same_as_alone(
    rank: int, sharded: Training, clip: float | None = None, **settings: Any
) -> Training:
    """Train on two ranks, compare with one process, and return that training."""
    one = alone(STEPS, clip, **settings)
    sharded.run(STEPS, [rank], 2, clip)
    compare_all(same_bits, sharded, one)
    return one


# ---- DDP and ZeRO --------------------------------------------------------------------------------


@on_ranks(2)
def zero_equals_one_process(rank: int, _: Path) -> None:
    for views in (False, True):  # parameters on their own or in buckets
        sharded = zero(views=views)
        one = same_as_alone(rank, sharded, CLIP)
        shares = gathered(list(sharded.state()))
        assert sorted(itertools.chain(*shares)) == sorted(one.names().values())
        held = sum(s["exp_avg"].numel() for s in sharded.state().values())
        total = sum(p.numel() for p in one.names())
        # Half of the state, up to the granularity of whole parameters.
        assert abs(2 * held - total) <= 0.05 * total, f"{held} of {total} elements"


@on_ranks(2)
def sharded_trainings_are_close_to_the_whole_batch(rank: int, _: Path) -> None:
    one = one_process(torch.float64)
    one.run(STEPS, [0], 1, CLIP)
    for new in (zero, fsdp):
        sharded = new(torch.float64)
        sharded.run(STEPS, [rank], 2, CLIP)
        compare_all(close, sharded, one)
    # Rows: close but not equal, since each rank first sums repeated gradients of a row. No
    # clipping: torch does not clip sparse gradients.
    sharded = zero(torch.float64, sparse=True)
    sharded.run(STEPS, [rank], 2)
    compare_all(close, sharded, alone(dtype=torch.float64, sparse=True))


def load_into(training: Training, saved: dict[str, Any]) -> Training:
    saved = copy.deepcopy(saved)  # ZeRO drops other ranks' entries from it
    model = training.model
    model = model.module if isinstance(model, DistributedDataParallel) else model
    model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(saved["optimizer"])
    training.schedule.load_state_dict(saved["schedule"])
    training.steps = saved["steps"]
    return training


def consolidated(rank: int, sharded: Training, one: Training, path: Path) -> Any:
    """Save a training under ZeRO, whose state must be that of one process; return what is saved."""
    sharded.optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        state, expected = sharded.optimizer.state_dict(), one.optimizer.state_dict()
        for group, own in zip(state["param_groups"], expected["param_groups"], strict=True):
            if "seed" in own:
                group.setdefault("seed", 0)  # ZeRO writes the groups itself
        assert state["param_groups"] == expected["param_groups"]
        assert list(state["state"]) == list(expected["state"])
        for index, tensors in expected["state"].items():
            assert list(state["state"][index]) == list(tensors)
            for key, tensor in tensors.items():
                same_bits(state["state"][index][key], tensor, f"{key} of parameter {index}")
        saved = {"model": sharded.model.module.state_dict(), "optimizer": state}
        torch.save(saved | {"schedule": sharded.schedule.state_dict(), "steps": SAVED}, path)
    dist.barrier()
    return torch.load(path)


@on_ranks(2)
def zero_consolidates_and_loads(rank: int, directory: Path) -> None:
    dtypes = torch.float64, torch.bfloat16, torch.bfloat16
    for number, (dtype, formats) in enumerate(zip(dtypes, [({}, {}), *FORMATS], strict=True)):
        one = alone(SAVED, dtype=dtype, formats=formats)
        sharded = zero(dtype, formats=formats)
        sharded.run(SAVED, [rank], 2)
        saved = consolidated(rank, sharded, one, directory / f"zero-{number}.pt")
        one.run(STEPS, [0, 1], 2)
        views = dtype == torch.float64
        resumed = load_into(zero(dtype, views=views, formats=formats), saved)
        resumed.run(STEPS, [rank], 2)
        compare_all(same_bits, resumed, one)
        unsharded = load_into(one_process(dtype, formats=formats), saved)
        unsharded.run(STEPS, [0, 1], 2)
        compare_all(same_bits, unsharded, one)
        if dtype == torch.float64:
            model = new_model(dtype)
            torchs = load_into(Training(model, torch.optim.AdamW(groups_of(model))), saved)
            torchs.run(STEPS, [0, 1], 2)
            compare_models(close, torchs, one)


@on_ranks(3)
def zero_goes_on_with_three_ranks(rank: int, directory: Path) -> None:
    saved = torch.load(directory / "zero-0.pt")
    one = load_into(one_process(torch.float64), saved)
    resumed = load_into(zero(torch.float64), saved)
    one.run(STEPS, [0], 1)
    resumed.run(STEPS, [rank], 3)
    compare_all(close, resumed, one)


@on_ranks(2)
def max_grad_norm_bounds_what_a_process_holds(rank: int, _: Path) -> None:
    # Under DDP alone, the norm covers all gradients.
    same_as_alone(rank, ddp(max_grad_norm=CLIP), max_grad_norm=CLIP)

    # Under ZeRO, the norm covers the rank's share only, as if the share were a model of its own.
    sharded = zero(max_grad_norm=CLIP)
    sharded.run(1, [rank], 2)
    share = one_process(max_grad_norm=CLIP)
    for group in share.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if share.names()[p] in sharded.state()]
    share.run(1, [0, 1], 2)
    compare_states(same_bits, sharded, share)
    one = alone(1, max_grad_norm=CLIP)
    for name, state in sharded.state().items():
        assert state["exp_avg"].abs().max() > one.state()[name]["exp_avg"].abs().max()


@on_ranks(2)
def zero_passes_the_extras_on(rank: int, _: Path) -> None:
    extras: dict[str, Any] = {"ema_decay": 0.9, "zero_grad_in_step": True}
    sharded = zero(**extras)
    one = same_as_alone(rank, sharded, **extras)
    for p, name in sharded.names().items():
        assert p.grad is not None
        assert "ema" in one.state()[name]
        # A rank's optimizer zeroes only the gradients of its share. zero_grad() zeroes the others.
        assert bool((p.grad == 0).all()) is (name in sharded.state())


# ---- FSDP2 ---------------------------------------------------------------------------------------


@on_ranks(2)
def fsdp_equals_one_process(rank: int, _: Path) -> None:
    sharded = fsdp(ema_decay=0.9)
    one = same_as_alone(rank, sharded, ema_decay=0.9)
    for p, name in sharded.names().items():
        assert isinstance(p, DTensor)
        for key, moment in sharded.state()[name].items():
            if key != "step":
                assert isinstance(moment, DTensor), f"{key} of {name}"
                assert (moment.placements, moment.device_mesh) == (p.placements, p.device_mesh)
                assert moment.to_local().shape == p.to_local().shape
    # At least one shard is empty.
    assert 0 in itertools.chain(*gathered([p.to_local().numel() for p in sharded.names()]))
    one.optimizer.swap_ema()
    sharded.optimizer.swap_ema()
    compare_all(same_bits, sharded, one)


@on_ranks(2)
def fsdp_refuses_max_grad_norm(rank: int, _: Path) -> None:
    sharded = fsdp(max_grad_norm=CLIP)
    before = [whole(p).clone() for p in sharded.names()]
    with pytest.raises(ValueError, match=r"max_grad_norm must be None .*clip_grad_norm_.*=0\.5$"):
        sharded.run(1, [rank], 2)
    for p, old in zip(sharded.names(), before, strict=True):
        same_bits(p, old, sharded.names()[p])
    sharded = fsdp(formats=({"low_bits": "int8"}, {}))
    with pytest.raises(TypeError, match=r"^model must be split before.*Received: a DTensor"):
        split_(sharded.model, sharded.optimizer)
    assert {p.dtype for p in sharded.names()} == {torch.float32}
    assert not sharded.optimizer.state


@on_ranks(2)
def fsdp_steps_in_the_backward_pass(rank: int, _: Path) -> None:
    dtypes = torch.float32, torch.bfloat16, torch.bfloat16
    for dtype, formats in zip(dtypes, [({}, {}), *FORMATS], strict=True):
        sharded = fsdp(dtype, columns=dtype == torch.bfloat16, formats=formats)
        with attach(sharded.model, sharded.optimizer):
            same_as_alone(rank, sharded, dtype=dtype, formats=formats)
        assert all(p.grad is None for p in sharded.names())


@on_ranks(2)
def attach_refuses_ddp(rank: int, _: Path) -> None:
    training = ddp()
    for model in (training.model, torch.nn.Sequential(torch.nn.ReLU(), training.model)):
        with pytest.raises(TypeError, match=r"^model .*DistributedDataParallel.*Received: .+"):
            attach(model, training.optimizer)
    assert not training.optimizer.state
    # No hooks remain: training continues with the gradients of all ranks.
    same_as_alone(rank, training)


# ---- 16-bit models -------------------------------------------------------------------------------


def bits_do_not_depend_on_the_ranks(rank: int) -> None:
    ranks = dist.get_world_size()
    for formats, columns in itertools.product(FORMATS, (False, True)):
        settings: dict[str, Any] = {"formats": formats, "ema_decay": 0.9}
        one = one_process(torch.bfloat16, **settings)
        one.run(STEPS, range(ranks), ranks)
        sharded = fsdp(torch.bfloat16, columns=columns, **settings)
        sharded.run(STEPS, [rank], ranks)
        compare_all(same_bits, sharded, one)
        dims = {p.placements[0].dim for p in sharded.names()}
        assert dims == ({0, 1} if columns else {0})
        others = {name: p for p, name in one.names().items()}
        for p, name in sharded.names().items():
            master = sharded.optimizer.master_weights(p)
            same_bits(master, one.optimizer.master_weights(others[name]), f"master of {name}")
        before = {name: whole(p).clone() for p, name in sharded.names().items()}
        for _ in range(2):
            one.optimizer.swap_ema()
            sharded.optimizer.swap_ema()
            compare_all(same_bits, sharded, one)
        for p, name in sharded.names().items():
            same_bits(whole(p), before[name], name)


@on_ranks(1)
def bfloat16_in_one_shard_equals_one_process(rank: int, _: Path) -> None:
    bits_do_not_depend_on_the_ranks(rank)


@on_ranks(2)
def bfloat16_in_two_shards_equals_one_process(rank: int, _: Path) -> None:
    bits_do_not_depend_on_the_ranks(rank)


@on_ranks(2)
def formats_of_shards_change(rank: int, _: Path) -> None:
    trainings = [
        one_process(torch.bfloat16),
        fsdp(torch.bfloat16),
        fsdp(torch.bfloat16, columns=True),
    ]
    for count, formats in enumerate([*FORMATS, *FORMATS], 1):
        for training, shares in zip(trainings, ([0, 1], [rank], [rank]), strict=True):
            for group, own in zip(training.optimizer.param_groups, formats, strict=True):
                for name, off in (("moments", "auto"), ("low_bits", None), ("seed", 0)):
                    group[name] = own.get(name, off)
            training.run(count, shares, 2)
            table = training.state()["0.weight"].keys()
            assert ("packed_moments" in table, "low_bits" in table) == (bool(formats[0]),) * 2
        for sharded in trainings[1:]:
            compare_all(same_bits, sharded, trainings[0])


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


def checkpoint_of(training: Training) -> dict[str, Any]:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    own = {"schedule": training.schedule.state_dict(), "steps": training.steps}
    return {"model": model, "optimizer": optimizer, **own}


def resume(training: Training, path: Path) -> Training:
    saved = checkpoint_of(training)
    dcp.load(saved, checkpoint_id=path)
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=saved["model"],
        optim_state_dict=saved["optimizer"],
    )
    training.schedule.load_state_dict(saved["schedule"])
    training.steps = saved["steps"]
    return training


# What is saved by two ranks, and loaded by other numbers of ranks: the dtype and the formats.
SAVED_BY_TWO: dict[str, tuple[Any, Any]] = {
    "float64": (torch.float64, ({}, {})),
    "bfloat16": (torch.bfloat16, FORMATS[0]),
    "bfloat16-integers": (torch.bfloat16, FORMATS[1]),
}


@on_ranks(2)
def checkpoint_is_loaded_by_two_ranks(rank: int, directory: Path) -> None:
    for name, (dtype, formats) in SAVED_BY_TWO.items():
        is_double = dtype == torch.float64
        sharded = fsdp(dtype, columns=not is_double, formats=formats)
        sharded.run(SAVED, [rank], 2)
        dcp.save(checkpoint_of(sharded), checkpoint_id=directory / name)
        one = alone(dtype=dtype, formats=formats)
        for new in (fsdp, ddp) if is_double else (fsdp,):
            resumed = resume(new(dtype, formats=formats), directory / name)
            resumed.run(STEPS, [rank], 2)
            compare_all(same_bits, resumed, one)


@on_ranks(1)
def checkpoint_is_loaded_by_one_rank(_: int, directory: Path) -> None:
    for name, (dtype, formats) in SAVED_BY_TWO.items():
        expected = alone(dtype=dtype, formats=formats)
        for new in (one_process, fsdp):
            resumed = resume(new(dtype, formats=formats), directory / name)
            resumed.run(STEPS, [0, 1], 2)
            compare_all(same_bits, resumed, expected)


@on_ranks(3)
def checkpoint_is_loaded_by_three_ranks(rank: int, directory: Path) -> None:
    saved = alone(SAVED, dtype=torch.float64)
    resumed = resume(fsdp(torch.float64), directory / "float64")
    compare_all(same_bits, resumed, saved)
    saved.run(STEPS, [0], 1)
    resumed.run(STEPS, [rank], 3)
    compare_all(close, resumed, saved)


# The options of torch.distributed.checkpoint.state_dict and their combinations. torch cannot load a
# state dict that is both full and flat into its own optimizers either.
STATE_DICT_OPTIONS = [
    StateDictOptions(),
    StateDictOptions(full_state_dict=True),
    StateDictOptions(flatten_optimizer_state_dict=True),
    StateDictOptions(ignore_frozen_params=True),
    StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True),
    StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True),
    StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
]


def whole_on_all_ranks(state: dict[str, Any]) -> dict[str, Any]:
    """Broadcast a full state, which cpu_offload leaves on the first rank only, to all ranks."""
    whole_state: dict[str, Any] = state if all(gathered(bool(state))) else gathered(state)[0]
    return copy.deepcopy(whole_state)


@on_ranks(2)
def state_dicts_go_to_torch_and_back(rank: int, directory: Path) -> None:
    pairs = [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)]
    for number, (options, pair) in enumerate(itertools.product([None, *STATE_DICT_OPTIONS], pairs)):
        before, after = (fsdp(torch.float64, kind) for kind in pair)
        before.run(SAVED, [rank], 2)
        if options is None:  # by a checkpoint
            dcp.save(checkpoint_of(before), checkpoint_id=directory / f"of-{number}")
            resume(after, directory / f"of-{number}")
        else:
            after.run(1, [rank], 2)
            model, state = get_state_dict(before.model, before.optimizer, options=options)
            set_state_dict(
                after.model,
                after.optimizer,
                model_state_dict=whole_on_all_ranks(model),
                optim_state_dict=whole_on_all_ranks(state),
                options=options,
            )
            after.schedule.load_state_dict(before.schedule.state_dict())
            after.steps = before.steps
        compare_models(same_bits, after, before)
        compare_states(same_bits, after, before)
        for training in (before, after):
            training.run(STEPS, [rank], 2)
        compare_models(close, after, before)


def tensors_of(training: Training) -> dict[str, Any]:
    """The tensors of model and optimizer by name, so that each rank saves and loads its share."""
    state = get_optimizer_state_dict(training.model, training.local_optimizer())["state"]
    return {"model": get_model_state_dict(training.model), "state": state}


def loads_shares(training: Training, path: Path) -> None:
    dcp.load(tensors_of(training), checkpoint_id=path)
    training.steps = SAVED
    one = alone(SAVED)
    compare_models(same_bits, training, one)
    compare_states(same_bits, training, one)


@on_ranks(2)
def zero_and_fsdp_load_the_same_checkpoint(rank: int, directory: Path) -> None:
    for name, saving, loading in (("by-zero", zero, fsdp), ("for-zero", fsdp, zero)):
        before = saving()
        before.run(SAVED, [rank], 2)
        dcp.save(tensors_of(before), checkpoint_id=directory / name)
        loads_shares(loading(), directory / name)


@on_ranks(3)
def zero_loads_shares_onto_three_ranks(_: int, directory: Path) -> None:
    loads_shares(zero(), directory / "by-zero")


@on_ranks(2)
def gradients_of_other_placements_are_redistributed(rank: int, _: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    values, gradient = torch.arange(1.0, 9.0), torch.linspace(-1, 1, 8)
    param: Any = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    expected = torch.nn.Parameter(values.clone())
    optimizer, reference = Adam([param], lr=0.1), Adam([expected], lr=0.1)
    for _step in range(2):
        param.grad = distribute_tensor(gradient, mesh, [Replicate()])
        expected.grad = gradient.clone()
        optimizer.step()
        reference.step()
    same_bits(param.to_local().detach(), expected.detach().chunk(2)[rank], "the shard")
