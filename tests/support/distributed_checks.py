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

SAVED = 6  # steps before a checkpoint

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


# ---- DDP and ZeRO --------------------------------------------------------------------------------


def zero_equals_one_process(rank: int, *, views: bool) -> None:
    one = one_process()
    one.run(STEPS, [0, 1], 2, CLIP)
    sharded = zero(views=views)
    sharded.run(STEPS, [rank], 2, CLIP)
    compare_all(same_bits, sharded, one)

    shares = gathered(list(sharded.state()))
    assert sorted(itertools.chain(*shares)) == sorted(one.names().values())
    held = sum(s["exp_avg"].numel() for s in sharded.state().values())
    total = sum(p.numel() for p in one.names())
    # Half of the state, up to the granularity of whole parameters.
    assert abs(2 * held - total) <= 0.05 * total, f"{held} of {total} elements"


@on_ranks(2)
def zero_by_parameter(rank: int, _: Path) -> None:
    zero_equals_one_process(rank, views=False)


@on_ranks(2)
def zero_with_parameters_in_buckets(rank: int, _: Path) -> None:
    zero_equals_one_process(rank, views=True)


@on_ranks(2)
def zero_is_close_to_the_whole_batch(rank: int, _: Path) -> None:
    one = one_process(torch.float64)
    one.run(STEPS, [0], 1, CLIP)
    sharded = zero(torch.float64)
    sharded.run(STEPS, [rank], 2, CLIP)
    compare_all(close, sharded, one)


@on_ranks(2)
def zero_steps_rows(rank: int, _: Path) -> None:
    # Close but not equal: each rank first sums repeated gradients of a row, then the ranks' sums
    # are added. No clipping: torch does not clip sparse gradients.
    one = one_process(torch.float64, sparse=True)
    one.run(STEPS, [0, 1], 2)
    sharded = zero(torch.float64, sparse=True)
    sharded.run(STEPS, [rank], 2)
    compare_all(close, sharded, one)


def load_into(training: Training, saved: dict[str, Any]) -> Training:
    saved = copy.deepcopy(saved)  # ZeRO drops other ranks' entries from it
    model = training.model
    (model.module if isinstance(model, DistributedDataParallel) else model).load_state_dict(
        saved["model"]
    )
    training.optimizer.load_state_dict(saved["optimizer"])
    training.schedule.load_state_dict(saved["schedule"])
    training.steps = saved["steps"]
    return training


def assert_same_state_dict(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["param_groups"] == expected["param_groups"]
    assert list(actual["state"]) == list(expected["state"])
    for index, state in expected["state"].items():
        assert list(actual["state"][index]) == list(state)
        for key, tensor in state.items():
            same_bits(actual["state"][index][key], tensor, f"{key} of parameter {index}")


@on_ranks(2)
def zero_consolidates_and_loads(rank: int, directory: Path) -> None:
    one = one_process(torch.float64)
    one.run(SAVED, [0, 1], 2)
    sharded = zero(torch.float64)
    sharded.run(SAVED, [rank], 2)
    sharded.optimizer.consolidate_state_dict(to=0)
    if rank == 0:
        assert_same_state_dict(sharded.optimizer.state_dict(), one.optimizer.state_dict())
        saved = {
            "model": sharded.model.module.state_dict(),
            "optimizer": sharded.optimizer.state_dict(),
            "schedule": sharded.schedule.state_dict(),
            "steps": SAVED,
        }
        torch.save(saved, directory / "zero.pt")
    dist.barrier()
    saved = torch.load(directory / "zero.pt")

    one.run(STEPS, [0, 1], 2)
    resumed = load_into(zero(torch.float64, views=True), saved)
    resumed.run(STEPS, [rank], 2)
    compare_all(same_bits, resumed, one)
    unsharded = load_into(one_process(torch.float64), saved)
    unsharded.run(STEPS, [0, 1], 2)
    compare_all(same_bits, unsharded, one)
    model = new_model(torch.float64)
    torchs = load_into(Training(model, torch.optim.AdamW(groups_of(model))), saved)
    torchs.run(STEPS, [0, 1], 2)
    compare_models(close, torchs, one)


@on_ranks(3)
def zero_goes_on_with_three_ranks(rank: int, directory: Path) -> None:
    saved = torch.load(directory / "zero.pt")
    one = load_into(one_process(torch.float64), saved)
    resumed = load_into(zero(torch.float64), saved)
    one.run(STEPS, [0], 1)
    resumed.run(STEPS, [rank], 3)
    compare_all(close, resumed, one)


@on_ranks(2)
def max_grad_norm_bounds_what_a_process_holds(rank: int, _: Path) -> None:
    one = one_process(max_grad_norm=CLIP)
    one.run(STEPS, [0, 1], 2)

    # Under DDP alone, the norm covers all gradients.
    replica = ddp(max_grad_norm=CLIP)
    replica.run(STEPS, [rank], 2)
    compare_all(same_bits, replica, one)

    # Under ZeRO, the norm covers the rank's share only, as if the share were a model of its own.
    sharded = zero(max_grad_norm=CLIP)
    sharded.run(1, [rank], 2)
    alone = one_process(max_grad_norm=CLIP)
    for group in alone.optimizer.param_groups:
        group["params"] = [p for p in group["params"] if alone.names()[p] in sharded.state()]
    alone.run(1, [0, 1], 2)
    compare_states(same_bits, sharded, alone)
    one = one_process(max_grad_norm=CLIP)
    one.run(1, [0, 1], 2)
    for name, state in sharded.state().items():
        assert state["exp_avg"].abs().max() > one.state()[name]["exp_avg"].abs().max()


@on_ranks(2)
def zero_passes_the_extras_on(rank: int, _: Path) -> None:
    extras: dict[str, Any] = {"ema_decay": 0.9, "zero_grad_in_step": True}
    one = one_process(**extras)
    one.run(STEPS, [0, 1], 2)
    sharded = zero(**extras)
    sharded.run(STEPS, [rank], 2)
    compare_all(same_bits, sharded, one)
    for p, name in sharded.names().items():
        assert p.grad is not None
        assert ("ema" in one.state()[name]) is True
        # A rank's optimizer zeroes only the gradients of its share. zero_grad() zeroes the others.
        assert bool((p.grad == 0).all()) is (name in sharded.state())


# ---- FSDP2 ---------------------------------------------------------------------------------------


@on_ranks(2)
def fsdp_equals_one_process(rank: int, _: Path) -> None:
    one = one_process()
    one.run(STEPS, [0, 1], 2)
    sharded = fsdp()
    sharded.run(STEPS, [rank], 2)
    compare_all(same_bits, sharded, one)

    for p, name in sharded.names().items():
        assert isinstance(p, DTensor)
        moments = {k: t for k, t in sharded.state()[name].items() if k != "step"}
        for key, moment in moments.items():
            assert isinstance(moment, DTensor), f"{key} of {name}"
            assert (moment.placements, moment.device_mesh) == (p.placements, p.device_mesh)
            assert moment.to_local().shape == p.to_local().shape
    # At least one shard is empty.
    assert 0 in itertools.chain(*gathered([p.to_local().numel() for p in sharded.names()]))


@on_ranks(2)
def fsdp_is_close_to_the_whole_batch_with_clipping(rank: int, _: Path) -> None:
    one = one_process(torch.float64)
    one.run(STEPS, [0], 1, CLIP)
    sharded = fsdp(torch.float64)
    sharded.run(STEPS, [rank], 2, CLIP)
    compare_all(close, sharded, one)


@on_ranks(2)
def fsdp_refuses_max_grad_norm(rank: int, _: Path) -> None:
    sharded = fsdp(max_grad_norm=CLIP)
    before = [whole(p).clone() for p in sharded.names()]
    try:
        sharded.run(1, [rank], 2)
    except ValueError as error:
        message = str(error)
    else:
        raise AssertionError("no ValueError")
    assert "max_grad_norm" in message
    assert "clip_grad_norm_" in message
    for p, old in zip(sharded.names(), before, strict=True):
        same_bits(p, old, sharded.names()[p])


@on_ranks(2)
def fsdp_keeps_averages_of_the_parameters(rank: int, _: Path) -> None:
    one = one_process(ema_decay=0.9)
    one.run(STEPS, [0, 1], 2)
    sharded = fsdp(ema_decay=0.9)
    sharded.run(STEPS, [rank], 2)
    compare_all(same_bits, sharded, one)
    one.optimizer.swap_ema()
    sharded.optimizer.swap_ema()
    compare_all(same_bits, sharded, one)


@on_ranks(2)
def fsdp_steps_in_the_backward_pass(rank: int, _: Path) -> None:
    one = one_process()
    one.run(STEPS, [0, 1], 2)
    sharded = fsdp()
    assert isinstance(sharded.optimizer, AdamW)
    with attach(sharded.model, sharded.optimizer):
        sharded.run(STEPS, [rank], 2)
    compare_all(same_bits, sharded, one)
    assert all(p.grad is None for p in sharded.names())


@on_ranks(2)
def attach_refuses_ddp(rank: int, _: Path) -> None:
    training = ddp()
    assert isinstance(training.optimizer, AdamW)
    for model in (training.model, torch.nn.Sequential(torch.nn.ReLU(), training.model)):
        with pytest.raises(TypeError, match=r"^model .*DistributedDataParallel.*Received: .+"):
            attach(model, training.optimizer)
    assert not training.optimizer.state
    # No hooks remain: training continues with the gradients of all ranks.
    one = one_process()
    one.run(STEPS, [0, 1], 2)
    training.run(STEPS, [rank], 2)
    compare_all(same_bits, training, one)


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

        other = {name: p for p, name in one.names().items()}
        for p, name in sharded.names().items():
            actual = sharded.optimizer.master_weights(p)
            same_bits(actual, one.optimizer.master_weights(other[name]), f"master of {name}")
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
def bfloat16_steps_in_the_backward_pass(rank: int, _: Path) -> None:
    for formats in FORMATS:
        one = one_process(torch.bfloat16, formats=formats)
        one.run(STEPS, [0, 1], 2)
        sharded = fsdp(torch.bfloat16, columns=True, formats=formats)
        with attach(sharded.model, sharded.optimizer):
            sharded.run(STEPS, [rank], 2)
        compare_all(same_bits, sharded, one)


@on_ranks(2)
def bfloat16_under_zero_consolidates_and_loads(rank: int, directory: Path) -> None:
    for number, formats in enumerate(FORMATS):
        one = one_process(torch.bfloat16, formats=formats)
        one.run(SAVED, [0, 1], 2)
        sharded = zero(torch.bfloat16, formats=formats)
        sharded.run(SAVED, [rank], 2)
        compare_all(same_bits, sharded, one)
        sharded.optimizer.consolidate_state_dict(to=0)
        path = directory / f"zero-{number}.pt"
        if rank == 0:
            consolidated = sharded.optimizer.state_dict()
            for group in consolidated["param_groups"]:
                group.setdefault("seed", 0)  # ZeRO writes the groups itself
            assert_same_state_dict(consolidated, one.optimizer.state_dict())
            torch.save(
                {
                    "model": sharded.model.module.state_dict(),
                    "optimizer": sharded.optimizer.state_dict(),
                    "schedule": sharded.schedule.state_dict(),
                    "steps": SAVED,
                },
                path,
            )
        dist.barrier()
        one.run(STEPS, [0, 1], 2)
        for new, shares in ((zero, [rank]), (one_process, [0, 1])):
            resumed = load_into(new(torch.bfloat16, formats=formats), torch.load(path))
            resumed.run(STEPS, shares, 2)
            compare_all(same_bits, resumed, one)


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
            training.run(2 * count, shares, 2)
            table = training.state()["0.weight"].keys()
            assert ("packed_moments" in table, "low_bits" in table) == (bool(formats[0]),) * 2
        for sharded in trainings[1:]:
            compare_all(same_bits, sharded, trainings[0])


@on_ranks(2)
def split_refuses_shards(_rank: int, _: Path) -> None:
    sharded = fsdp(formats=({"low_bits": "int8"}, {}))
    with pytest.raises(TypeError, match=r"^model must be split before.*Received: a DTensor"):
        split_(sharded.model, sharded.optimizer)
    assert {p.dtype for p in sharded.names()} == {torch.float32}
    assert not sharded.optimizer.state


# ---- torch.distributed.checkpoint ----------------------------------------------------------------


def checkpoint_of(training: Training) -> dict[str, Any]:
    model, optimizer = get_state_dict(training.model, training.optimizer)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": training.schedule.state_dict(),
        "steps": training.steps,
    }


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


@on_ranks(2)
def checkpoint_is_loaded_by_two_ranks(rank: int, directory: Path) -> None:
    one = one_process(torch.float64)
    one.run(SAVED, [0, 1], 2)
    sharded = fsdp(torch.float64)
    sharded.run(SAVED, [rank], 2)
    dcp.save(checkpoint_of(sharded), checkpoint_id=directory / "fsdp")
    one.run(STEPS, [0, 1], 2)
    for new in (fsdp, ddp):
        resumed = resume(new(torch.float64), directory / "fsdp")
        resumed.run(STEPS, [rank], 2)
        compare_all(same_bits, resumed, one)


@on_ranks(1)
def checkpoint_is_loaded_by_one_rank(_: int, directory: Path) -> None:
    expected = one_process(torch.float64)
    expected.run(STEPS, [0, 1], 2)
    for new in (one_process, fsdp):
        resumed = resume(new(torch.float64), directory / "fsdp")
        resumed.run(STEPS, [0, 1], 2)
        compare_all(same_bits, resumed, expected)


@on_ranks(3)
def checkpoint_is_loaded_by_three_ranks(rank: int, directory: Path) -> None:
    saved = one_process(torch.float64)
    saved.run(SAVED, [0, 1], 2)
    resumed = resume(fsdp(torch.float64), directory / "fsdp")
    compare_all(same_bits, resumed, saved)
    saved.run(STEPS, [0], 1)
    resumed.run(STEPS, [rank], 3)
    compare_all(close, resumed, saved)


@on_ranks(2)
def bfloat16_is_loaded_by_two_ranks(rank: int, directory: Path) -> None:
    for number, formats in enumerate(FORMATS):
        one = one_process(torch.bfloat16, formats=formats)
        one.run(STEPS, [0, 1], 2)
        sharded = fsdp(torch.bfloat16, columns=True, formats=formats)
        sharded.run(SAVED, [rank], 2)
        dcp.save(checkpoint_of(sharded), checkpoint_id=directory / f"bfloat16-{number}")
        resumed = resume(fsdp(torch.bfloat16, formats=formats), directory / f"bfloat16-{number}")
        resumed.run(STEPS, [rank], 2)
        compare_all(same_bits, resumed, one)


@on_ranks(1)
def bfloat16_is_loaded_by_one_rank(_: int, directory: Path) -> None:
    for number, formats in enumerate(FORMATS):
        expected = one_process(torch.bfloat16, formats=formats)
        expected.run(STEPS, [0, 1], 2)
        for new in (one_process, fsdp):
            path = directory / f"bfloat16-{number}"
            resumed = resume(new(torch.bfloat16, formats=formats), path)
            resumed.run(STEPS, [0, 1], 2)
            compare_all(same_bits, resumed, expected)


@on_ranks(2)
def checkpoint_of_torch_is_loaded(rank: int, directory: Path) -> None:
    before = fsdp(torch.float64, torch.optim.AdamW)
    before.run(SAVED, [rank], 2)
    dcp.save(checkpoint_of(before), checkpoint_id=directory / "by-torch")
    after = resume(fsdp(torch.float64), directory / "by-torch")
    go_on_alike(rank, before, after)


@on_ranks(2)
def checkpoint_is_loaded_by_torch(rank: int, directory: Path) -> None:
    before = fsdp(torch.float64)
    before.run(SAVED, [rank], 2)
    dcp.save(checkpoint_of(before), checkpoint_id=directory / "for-torch")
    after = resume(fsdp(torch.float64, torch.optim.AdamW), directory / "for-torch")
    go_on_alike(rank, after, before)


@on_ranks(2)
def state_dicts_go_both_ways_with_every_option(rank: int, _: Path) -> None:
    for options in STATE_DICT_OPTIONS:
        for saving, loading in ((AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)):
            before, after = fsdp(torch.float64, saving), fsdp(torch.float64, loading)
            before.run(SAVED, [rank], 2)
            after.run(1, [rank], 2)
            move_state(before, after, options)
            torchs, ours = (after, before) if saving is AdamW else (before, after)
            go_on_alike(rank, torchs, ours)


# The options of torch.distributed.checkpoint.state_dict and their combinations. torch cannot load a
# state dict that is both full and flat into its own optimizers either.
STATE_DICT_OPTIONS = [
    StateDictOptions(full_state_dict=True),
    StateDictOptions(flatten_optimizer_state_dict=True),
    StateDictOptions(cpu_offload=True),
    StateDictOptions(ignore_frozen_params=True),
    StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True),
    StateDictOptions(flatten_optimizer_state_dict=True, cpu_offload=True),
    StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
]


def move_state(before: Training, after: Training, options: StateDictOptions) -> None:
    """Load the whole state of one training into another, by name."""
    model, state = get_state_dict(before.model, before.optimizer, options=options)
    # Only the first rank gets the full state.
    set_state_dict(
        after.model,
        after.optimizer,
        model_state_dict=copy.deepcopy(whole_on_all_ranks(model)),
        optim_state_dict=copy.deepcopy(whole_on_all_ranks(state)),
        options=options,
    )
    after.schedule.load_state_dict(before.schedule.state_dict())
    after.steps = before.steps


def whole_on_all_ranks(state: dict[str, Any]) -> dict[str, Any]:
    """Broadcast a full state, which cpu_offload leaves on the first rank only, to all ranks."""
    if all(gathered(bool(state))):
        return state
    whole_state: dict[str, Any] = gathered(state)[0]
    return whole_state


def go_on_alike(rank: int, torchs: Training, ours: Training) -> None:
    compare_models(same_bits, torchs, ours)
    compare_states(same_bits, torchs, ours)
    torchs.run(STEPS, [rank], 2)
    ours.run(STEPS, [rank], 2)
    compare_models(close, torchs, ours)


def tensors_of(training: Training) -> dict[str, Any]:
    """The tensors of model and optimizer by name, so that each rank saves and loads its share."""
    return {
        "model": get_model_state_dict(training.model),
        "state": get_optimizer_state_dict(training.model, training.local_optimizer())["state"],
    }


@on_ranks(2)
def zero_and_fsdp_load_the_same_checkpoint(rank: int, directory: Path) -> None:
    one = one_process()
    one.run(SAVED, [0, 1], 2)
    for name, saving, loading in (("by-zero", zero, fsdp), ("for-zero", fsdp, zero)):
        before = saving()
        before.run(SAVED, [rank], 2)
        dcp.save(tensors_of(before), checkpoint_id=directory / name)
        after = loading()
        dcp.load(tensors_of(after), checkpoint_id=directory / name)
        after.steps = SAVED
        compare_models(same_bits, after, one)
        compare_states(same_bits, after, one)


@on_ranks(3)
def zero_loads_shares_onto_three_ranks(_: int, directory: Path) -> None:
    one = one_process()
    one.run(SAVED, [0, 1], 2)
    resumed = zero()
    dcp.load(tensors_of(resumed), checkpoint_id=directory / "by-zero")
    resumed.steps = SAVED
    compare_models(same_bits, resumed, one)
    compare_states(same_bits, resumed, one)


@on_ranks(2)
def gradients_of_other_placements_are_redistributed(rank: int, _: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole, gradient = torch.arange(1.0, 9.0), torch.linspace(-1, 1, 8)
    param: Any = torch.nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    expected = torch.nn.Parameter(whole.clone())
    optimizer, reference = Adam([param], lr=0.1), Adam([expected], lr=0.1)
    for _step in range(2):
        param.grad = distribute_tensor(gradient, mesh, [Replicate()])
        expected.grad = gradient.clone()
        optimizer.step()
        reference.step()
    same_bits(param.to_local().detach(), expected.detach().chunk(2)[rank], "the shard")
