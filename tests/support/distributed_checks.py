# SPDX-License-Identifier: MIT
"""Checks of the torch adapter in several processes. Each rank runs these functions."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

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
    one_process,
    same_bits,
    whole,
    zero,
)
from fusedadam.torch import Adam, AdamW, attach, split_
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

# Not all of these modules export their names in a way that type checkers accept.
dist: Any = torch.distributed
dcp: Any = torch.distributed.checkpoint

SAVED = 3  # steps before a checkpoint

Check: TypeAlias = Callable[[int, Path], None]
# Functions of the rank and of a shared directory, which raise if something is wrong.
CHECKS: dict[str, Check] = {}


def check(run: Check) -> Check:
    CHECKS[run.__name__] = run
    return run


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


@check
def zero_equals_one_process(rank: int, _: Path) -> None:
    for views in (False, True):  # parameters on their own or in buckets
        sharded = zero(views=views, ema_decay=0.9)
        same_as_alone(rank, sharded, CLIP, ema_decay=0.9)


def load_into(training: Training, saved: dict[str, Any]) -> Training:
    saved = copy.deepcopy(saved)  # ZeRO drops other ranks' entries from it
    model = training.model
    model = model.module if isinstance(model, DistributedDataParallel) else model
    model.load_state_dict(saved["model"])
    training.optimizer.load_state_dict(saved["optimizer"])
    training.schedule.load_state_dict(saved["schedule"])
    training.steps = saved["steps"]
    return training


@check
def zero_consolidates_and_loads(rank: int, directory: Path) -> None:
    dtypes = torch.float64, torch.bfloat16, torch.bfloat16
    for number, (dtype, formats) in enumerate(zip(dtypes, [({}, {}), *FORMATS], strict=True)):
        one = alone(dtype=dtype, formats=formats)
        sharded = zero(dtype, formats=formats)
        sharded.run(SAVED, [rank], 2)
        sharded.optimizer.consolidate_state_dict(to=0)
        path = directory / f"zero-{number}.pt"
        if rank == 0:
            saved = {"model": sharded.model.module.state_dict(), "steps": SAVED}
            saved |= {
                name: getattr(sharded, name).state_dict() for name in ("optimizer", "schedule")
            }
            torch.save(saved, path)
        dist.barrier()
        saved = torch.load(path)
        resumed = load_into(zero(dtype, views=dtype == torch.float64, formats=formats), saved)
        resumed.run(STEPS, [rank], 2)
        compare_all(same_bits, resumed, one)
        unsharded = load_into(one_process(dtype, formats=formats), saved)
        unsharded.run(STEPS, [0, 1], 2)
        compare_all(same_bits, unsharded, one)


# ---- FSDP2 ---------------------------------------------------------------------------------------


@check
def fsdp_equals_one_process(rank: int, _: Path) -> None:
    of_16_bits = itertools.product([torch.bfloat16], FORMATS, (False, True))
    for dtype, formats, columns in [(torch.float32, ({}, {}), False), *of_16_bits]:
        settings: dict[str, Any] = {"formats": formats, "ema_decay": 0.9}
        sharded = fsdp(dtype, columns=columns, **settings)
        one = same_as_alone(rank, sharded, dtype=dtype, **settings)
        dims = {p.placements[0].dim for p in sharded.names()}
        assert dims == ({0, 1} if columns else {0})
        others = {name: p for p, name in one.names().items()}
        for p, name in sharded.names().items():
            master = sharded.optimizer.master_weights(p)
            same_bits(master, one.optimizer.master_weights(others[name]), f"master of {name}")
        before = {name: whole(p).clone() for p, name in sharded.names().items()}
        for _swap in range(2):
            one.optimizer.swap_ema()
            sharded.optimizer.swap_ema()
            compare_all(same_bits, sharded, one)
        for p, name in sharded.names().items():
            same_bits(whole(p), before[name], name)


@check
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


@check
def fsdp_steps_in_the_backward_pass(rank: int, _: Path) -> None:
    dtypes = torch.float32, torch.bfloat16, torch.bfloat16
    for dtype, formats in zip(dtypes, [({}, {}), *FORMATS], strict=True):
        sharded = fsdp(dtype, columns=dtype == torch.bfloat16, formats=formats)
        with attach(sharded.model, sharded.optimizer):
            same_as_alone(rank, sharded, dtype=dtype, formats=formats)
        assert all(p.grad is None for p in sharded.names())


@check
def attach_refuses_ddp(rank: int, _: Path) -> None:
    training = ddp()
    for model in (training.model, torch.nn.Sequential(torch.nn.ReLU(), training.model)):
        with pytest.raises(TypeError, match=r"^model .*DistributedDataParallel.*Received: .+"):
            attach(model, training.optimizer)
    assert not training.optimizer.state
    # No hooks remain: training continues with the gradients of all ranks.
    same_as_alone(rank, training)


@check
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


# What is saved and loaded: the dtype and the formats.
SAVED_AND_LOADED: dict[str, tuple[Any, Any]] = {
    "float64": (torch.float64, ({}, {})),
    "bfloat16": (torch.bfloat16, FORMATS[0]),
    "bfloat16-integers": (torch.bfloat16, FORMATS[1]),
}


@check
def checkpoint_is_loaded_into_shards_and_into_the_whole(rank: int, directory: Path) -> None:
    for name, (dtype, formats) in SAVED_AND_LOADED.items():
        sharded = fsdp(dtype, columns=dtype == torch.bfloat16, formats=formats)
        sharded.run(SAVED, [rank], 2)
        dcp.save(checkpoint_of(sharded), checkpoint_id=directory / name)
        one = alone(dtype=dtype, formats=formats)
        for new in (fsdp, ddp):
            resumed = resume(new(dtype, formats=formats), directory / name)
            resumed.run(STEPS, [rank], 2)
            compare_all(same_bits, resumed, one)


@check
def state_dicts_go_to_torch_and_back(rank: int, _: Path) -> None:
    # torch cannot load a state dict that is both full and flat into its own optimizers either.
    of: list[Any] = [{}, {"full_state_dict": True}, {"flatten_optimizer_state_dict": True}]
    pairs = [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)]
    for options, pair in itertools.product((StateDictOptions(**each) for each in of), pairs):
        before, after = (fsdp(torch.float64, kind) for kind in pair)
        before.run(SAVED, [rank], 2)
        after.run(1, [rank], 2)
        model, state = copy.deepcopy(
            get_state_dict(before.model, before.optimizer, options=options)
        )
        set_state_dict(
            after.model,
            after.optimizer,
            model_state_dict=model,
            optim_state_dict=state,
            options=options,
        )
        after.schedule.load_state_dict(before.schedule.state_dict())
        after.steps = before.steps
        compare_models(same_bits, after, before)
        compare_states(same_bits, after, before)
        for training in (before, after):
            training.run(STEPS, [rank], 2)
        compare_models(close, after, before)


@check
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
