# SPDX-License-Identifier: MIT
"""A small training in one process or in several, and comparisons of two such trainings.

Two ranks with half a batch each are compared with one process that sums the gradients of the two
halves. Their gradients agree to the last bit, because (a / 2) + (b / 2) is rounded once, in either
order. (A gradient of the whole batch would be rounded differently.) So everything must be bitwise
equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.distributed
from fusedadam.torch import AdamW
from helpers import assert_same_bits
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR

BATCH = 24
STEPS = 6
CLIP = 0.5  # clips most steps, but not all

# Tolerance between float64 trainings with different roundings. Measured: at most 1e-15, for values
# up to 10. A wrong mean, a missed step or a lost moment changes the leading digits.
RELATIVE, ABSOLUTE = 1e-12, 1e-13

Compare: TypeAlias = Callable[[torch.Tensor, torch.Tensor, str], None]
Formats: TypeAlias = tuple[dict[str, Any], dict[str, Any]]


def new_model(dtype: torch.dtype) -> nn.Sequential:
    """The same model in every process. Two ranks cannot shard one row, so one rank gets none."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3))
    return nn.Sequential(nn.Embedding(11, 6), body, nn.Linear(3, 1)).to(dtype)


def batch_of(step: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randint(11, (BATCH,), generator=generator)
    return inputs, torch.randn(BATCH, 1, generator=generator, dtype=torch.float64).to(dtype)


# Formats of the two groups: the default, and those with integers in the state.
FORMATS: list[Formats] = [
    ({}, {}),
    (
        {"moments": "packed", "low_bits": "int8", "seed": 5},
        {"moments": "bfloat16", "low_bits": "int16"},
    ),
]


def groups_of(model: nn.Module, formats: Formats = ({}, {})) -> list[dict[str, Any]]:
    """Matrices and vectors in separate groups with their own settings, as is usual."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    settings = {"weight_decay": 0.0, "betas": (0.8, 0.99), "amsgrad": True}
    return [
        {"params": matrices, "weight_decay": 0.1, **formats[0]},
        {"params": vectors, **settings, **formats[1]},
    ]


class Training:
    """A model in training, with its optimizer and schedule."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model = model
        self.optimizer = optimizer
        self.schedule = OneCycleLR(optimizer, max_lr=[0.05, 0.02], total_steps=STEPS + 1)
        self.dtype = next(model.parameters()).dtype
        self.steps = 0

    def run(self, until: int, shares: Sequence[int], of: int, clip: float | None = None) -> None:
        """Train up to step `until` on these of the `of` shares of a batch: one per rank, or all."""
        for step in range(self.steps, until):
            self.optimizer.zero_grad()
            inputs, targets = (x.chunk(of) for x in batch_of(step, self.dtype))
            for share in shares:
                loss = ((self.model(inputs[share]) - targets[share]) ** 2).mean()
                (loss / len(shares)).backward()
            if clip is not None:
                clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.schedule.step()
        self.steps = until

    def names(self) -> dict[Any, str]:
        return {p: name.removeprefix("module.") for name, p in self.model.named_parameters()}

    def local_optimizer(self) -> Any:
        """The optimizer that holds the state of this rank."""
        optimizer = self.optimizer
        return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer

    def state(self) -> dict[str, dict[str, Any]]:
        """The part of the optimizer's state that this rank holds, by parameter name."""
        names = self.names()
        return {names[p]: state for p, state in self.local_optimizer().state.items()}


def one_process(
    dtype: torch.dtype = torch.float32, *, formats: Formats = ({}, {}), **settings: Any
) -> Training:
    model = new_model(dtype)
    return Training(model, AdamW(groups_of(model, formats), **settings))


def ddp(dtype: torch.dtype = torch.float32, *, formats: Formats = ({}, {})) -> Training:
    model = DistributedDataParallel(new_model(dtype))
    return Training(model, AdamW(groups_of(model, formats)))


def zero(
    dtype: torch.dtype = torch.float32,
    *,
    views: bool = False,
    formats: Formats = ({}, {}),
    **settings: Any,
) -> Training:
    model = DistributedDataParallel(new_model(dtype))
    optimizer = ZeroRedundancyOptimizer(
        groups_of(model, formats),
        optimizer_class=AdamW,
        parameters_as_bucket_view=views,
        # OneCycleLR looks for betas in the defaults. ZeRO's defaults hold only the arguments given.
        betas=(0.9, 0.999),
        **settings,
    )
    return Training(model, optimizer)


def fsdp(
    dtype: torch.dtype = torch.float32,
    optimizer_class: Any = AdamW,
    *,
    columns: bool = False,
    formats: Formats = ({}, {}),
    **settings: Any,
) -> Training:
    """Shard by rows, or by `columns` where torch can: only into equal shards."""
    ranks = torch.distributed.get_world_size()

    def placement(param: nn.Parameter) -> Shard | None:
        can = columns and param.dim() > 1 and param.shape[1] % ranks == 0
        return Shard(1) if can else None

    mesh = init_device_mesh("cpu", (ranks,))
    model = new_model(dtype)
    fully_shard(model[1], mesh=mesh, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, shard_placement_fn=placement)
    return Training(model, optimizer_class(groups_of(model, formats), **settings))


# ---- comparisons ---------------------------------------------------------------------------------


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, which may be sharded. Every rank must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def same_bits(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.dtype == expected.dtype, what
    # NumPy has no bfloat16, and gloo gathers no int16. Both are exact in float32.
    a, b = (t.float() if t.dtype.itemsize < 4 else t for t in (actual, expected))
    assert_same_bits(whole(a).numpy(), whole(b).numpy(), what)


def close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    torch.testing.assert_close(
        whole(actual),
        whole(expected),
        rtol=RELATIVE,
        atol=ABSOLUTE,
        msg=lambda text: f"{what}: {text}",
    )


def compare_models(compare: Compare, actual: Training, expected: Training) -> None:
    other = {name: p for p, name in expected.names().items()}
    assert actual.steps == expected.steps
    assert list(actual.names().values()) == list(other)
    for p, name in actual.names().items():
        compare(p, other[name], name)


def compare_states(compare: Compare, actual: Training, expected: Training) -> None:
    """Compare the state that `actual` holds, which may be a share of the whole."""
    others = expected.state()
    assert actual.state()
    for name, state in actual.state().items():
        assert list(state) == list(others[name])
        for key, tensor in state.items():
            compare(tensor, others[name][key], f"{key} of {name}")


def compare_all(compare: Compare, actual: Training, expected: Training) -> None:
    """Compare models, states and the settings that a schedule left."""
    compare_models(compare, actual, expected)
    compare_states(compare, actual, expected)
    for group, other in zip(
        actual.optimizer.param_groups, expected.optimizer.param_groups, strict=True
    ):
        differ = [key for key in other if key != "params" and group[key] != other[key]]
        assert differ == [], f"settings that differ: {differ}"
