# SPDX-License-Identifier: MIT
"""Train a byte-level transformer on Python source code, in several processes.

    torchrun --nproc-per-node 2 examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py --sharding fsdp
    python examples/train_distributed.py

The text is the standard library of the running Python, so nothing is downloaded. Each rank (process)
computes the gradients of its share of a batch, and torch.distributed averages them. The optimizer
state is sharded. With ZeRO, each rank holds the state of some parameters, steps these and broadcasts
them. With FSDP2, each rank holds a shard of every parameter, gradient and state tensor. Batches
depend on seed and step only, so neither the number of ranks nor an interruption changes the training.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import sysconfig
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed
import torch.distributed.checkpoint
from fusedadam.torch import AdamW
from matplotlib.figure import Figure
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

with warnings.catch_warnings():
    # The import uses parts of torch that torch itself deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Any: type checkers do not see all of their names.
dist: Any = torch.distributed
dcp: Any = torch.distributed.checkpoint

BYTES = 256
HEAD_WIDTH = 32
VALIDATION_BATCHES = 8


# ---- text ----------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Training and validation text, as bytes."""

    train: torch.Tensor
    validation: torch.Tensor


def load_corpus() -> Corpus:
    """Read the modules of the standard library; every tenth is for validation."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_bytes() for file in files]
    held_out = b"".join(texts[9::10])
    rest = b"".join(text for i, text in enumerate(texts) if i % 10 != 9)
    return Corpus(*(torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in (rest, held_out)))


def windows(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Return one row of `length` bytes for each start."""
    rows: torch.Tensor = text[starts[:, None] + torch.arange(length)]
    return rows.long()


def share(rows: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows; all ranks have the same number."""
    mine: torch.Tensor = rows.chunk(dist.get_world_size())[dist.get_rank()]
    return mine


def training_rows(corpus: Corpus, step: int, args: argparse.Namespace) -> torch.Tensor:
    """Return this rank's share of a step's batch: random windows, the same in each run."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    last = len(corpus.train) - args.context - 1
    starts = torch.randint(last, (args.batch_size,), generator=generator)
    return windows(corpus.train, share(starts), args.context + 1)


def unigram_bits(corpus: Corpus) -> float:
    """Return the bits per byte of a model that knows byte frequencies but no context."""
    counts = torch.bincount(corpus.train.int(), minlength=BYTES) + 1.0  # add-one smoothing
    bits = -torch.log2(counts / counts.sum())
    return float(bits[corpus.validation.int()].mean())


# ---- model ---------------------------------------------------------------------------------------


class Transformer(nn.Module):
    """Predicts each byte of a text from those before it."""

    def __init__(self, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                nhead=width // HEAD_WIDTH,
                dim_feedforward=4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, BYTES)
        for table in (self.bytes, self.positions):
            # torch's default of 1 would drown the outputs of the blocks.
            nn.init.normal_(table.weight, std=0.1)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, in bits per byte, of all bytes of the rows but the first."""
        x = self.bytes(rows[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        scores = self.scores(self.norm(x))
        nats = nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        return nats / math.log(2)


def groups_of(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameter groups: weight decay for matrices, none for biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


# ---- sharding ------------------------------------------------------------------------------------


def shard(model: Transformer, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the distributed model and the sharded optimizer."""
    settings: dict[str, Any] = {"lr": args.lr, "betas": (0.9, 0.99)}
    if args.sharding == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, AdamW(groups_of(model, args.weight_decay), **settings)
    # Bucket views avoid a copy of all gradients and let parameters be broadcast in buckets.
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = ZeroRedundancyOptimizer(
        groups_of(replica, args.weight_decay),
        optimizer_class=AdamW,
        parameters_as_bucket_view=True,
        **settings,
    )
    return replica, optimizer


def local_optimizer(optimizer: Any) -> Any:
    """Return the fused optimizer that holds the state of this rank."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def bytes_here(tensors: Iterable[Any]) -> int:
    """Return the bytes that the tensors take in this process."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def memory(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Return the bytes of this rank's parameters and optimizer state."""
    states = local_optimizer(optimizer).state.values()
    return {
        "Parameters": bytes_here(model.parameters()),
        "State of the optimizer": bytes_here(t for state in states for t in state.values()),
    }


# ---- checkpoints ---------------------------------------------------------------------------------


@dataclass
class Training:
    """Everything that changes from step to step."""

    model: nn.Module
    optimizer: Any
    schedule: OneCycleLR
    step: int = 0

    def checkpoint(self) -> dict[str, Any]:
        """Return the contents of a checkpoint; its tensors are the live ones.

        Entries are keyed by parameter name, and each rank contributes its shards. A checkpoint can
        therefore be loaded with any number of ranks and either sharding.
        """
        local = local_optimizer(self.optimizer)
        return {
            "model": get_model_state_dict(self.model),
            "state": get_optimizer_state_dict(self.model, local)["state"],
            "schedule": self.schedule.state_dict(),
            "step": self.step,
        }


def save(training: Training, directory: Path) -> None:
    """Write a checkpoint for this step."""
    dcp.save(training.checkpoint(), checkpoint_id=directory / f"step-{training.step:06}")


def resume(training: Training, path: Path) -> None:
    """Restore a checkpoint."""
    saved = training.checkpoint()
    total = saved["schedule"]["total_steps"]
    dcp.load(saved, checkpoint_id=path)  # in place
    if saved["schedule"]["total_steps"] != total:
        sys.exit(
            "--steps must be that of the checkpoint, since it determines the learning rates: "
            f"{saved['schedule']['total_steps'] - 1}. Received: {total - 1}"
        )
    training.step = saved["step"]
    training.schedule.load_state_dict(saved["schedule"])
    for group, lr in zip(
        training.optimizer.param_groups, training.schedule.get_last_lr(), strict=True
    ):
        group["lr"] = lr


# ---- training ------------------------------------------------------------------------------------


@dataclass
class Seconds:
    """Time spent in the training steps."""

    gradients: float = 0.0
    optimizer: float = 0.0
    exchange: float = 0.0  # ZeRO's broadcast of parameters after the step


@dataclass
class History:
    """Losses in bits per byte, each with the number of steps taken."""

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


def mean_over_ranks(value: torch.Tensor) -> float:
    """Return the mean over all ranks, which must all call this."""
    total = value.detach().clone()
    dist.all_reduce(total)
    ranks: int = dist.get_world_size()
    return float(total) / ranks


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus, args: argparse.Namespace) -> float:
    """Return the bits per byte on the validation text, in evenly spaced windows."""
    last = len(corpus.validation) - args.context - 1
    starts = torch.linspace(0, last, VALIDATION_BATCHES * args.batch_size).long()
    losses = [
        model(windows(corpus.validation, share(batch), args.context + 1))
        for batch in starts.chunk(VALIDATION_BATCHES)
    ]
    return mean_over_ranks(torch.stack(losses).mean())


class Stopwatch:
    """Adds up the time inside an optimizer's step."""

    def __init__(self, optimizer: Any) -> None:
        self.seconds = 0.0
        self._begin = 0.0
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._begin = time.perf_counter()

    def _stop(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._begin


def train_step(
    training: Training, rows: torch.Tensor, max_grad_norm: float, seconds: Seconds
) -> Any:
    """Take one step and return the loss on this rank's rows before it, as a tensor."""
    begin = time.perf_counter()
    loss: Any = training.model(rows)
    loss.backward()
    # Clips by the norm of all gradients, which are complete here (ZeRO) or DTensors (FSDP2). The
    # sharded optimizer's own max_grad_norm would see only its share.
    clip_grad_norm_(training.model.parameters(), max_grad_norm)
    middle = time.perf_counter()
    training.optimizer.step()
    end = time.perf_counter()
    training.optimizer.zero_grad()
    training.schedule.step()
    training.step += 1
    seconds.gradients += middle - begin
    seconds.optimizer += end - middle
    return loss


def train(
    training: Training, corpus: Corpus, args: argparse.Namespace, seconds: Seconds
) -> History:
    """Train to the end, with validation and checkpoints at intervals."""
    until = min(args.stop_at or args.steps, args.steps)
    if training.step >= until:
        sys.exit(f"--resume must be a checkpoint from before step {until}. Received: {args.resume}")
    history = History()
    stopwatch = Stopwatch(local_optimizer(training.optimizer))
    steps = range(training.step, until)
    with tqdm(steps, desc="Training", unit="step", disable=dist.get_rank() != 0) as progress:
        for step in progress:
            rows = training_rows(corpus, step, args)
            loss = mean_over_ranks(train_step(training, rows, args.max_grad_norm, seconds))
            history.train.append((step, loss))
            done = training.step
            if done % args.evaluate_every == 0 or done == until:
                history.validation.append((done, validate(training.model, corpus, args)))
                progress.set_postfix(
                    bits=f"{loss:.2f}", held_out=f"{history.validation[-1][1]:.2f}"
                )
            if done % args.save_every == 0 or done == until:
                save(training, args.checkpoints)
    seconds.exchange = seconds.optimizer - stopwatch.seconds
    seconds.optimizer = stopwatch.seconds
    return history


# ---- report --------------------------------------------------------------------------------------


def plot(history: History, baseline: float, output: Path) -> None:
    """Plot the losses over the steps."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*history.train, strict=True), linewidth=1, label="training, per batch")
    axes.plot(*zip(*history.validation, strict=True), marker="o", label="held out")
    axes.axhline(baseline, color="gray", linestyle="--", label="frequencies of bytes alone")
    axes.set(title="Python source code", xlabel="step", ylabel="cross-entropy [bits per byte]")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)


def report(
    history: History, baseline: float, memories: list[dict[str, int]], seconds: Seconds
) -> None:
    """Print loss, memory and time."""
    total = seconds.gradients + seconds.optimizer + seconds.exchange
    step, loss = history.validation[-1]
    print(f"Held-out loss after step {step}: {loss:.3f} bits a byte")
    print(f"Frequencies of bytes alone: {baseline:.3f} bits a byte")
    for what in memories[0]:
        sizes = [f"rank {rank} has {m[what] / 1e6:.2f} MB" for rank, m in enumerate(memories)]
        print(f"{what}: {', '.join(sizes)}")
    print(
        f"Optimizer: {seconds.optimizer / total:.1%} of the time of the training steps on rank 0 "
        f"({seconds.optimizer:.3f} s of {total:.3f} s), its exchange of parameters "
        f"{seconds.exchange / total:.1%}; the rest is gradients"
    )


# ---- command line --------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with a message if it is invalid."""
    parser = argparse.ArgumentParser(
        description="Train a transformer on Python source code with fusedadam, in one process or, "
        "with torchrun, in several.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--sharding",
        choices=("zero", "fsdp"),
        default="zero",
        help="zero: shard the optimizer state; fsdp: parameters and gradients too",
    )
    parser.add_argument("--steps", type=int, default=800, help="steps of the whole training")
    parser.add_argument("--batch-size", type=int, default=16, help="windows per step, all ranks")
    parser.add_argument("--context", type=int, default=64, help="bytes per window")
    parser.add_argument("--width", type=int, default=128, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--layers", type=int, default=4, help="transformer layers")
    parser.add_argument("--lr", type=float, default=4e-3, help="the highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="for the matrices")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="gradient clipping")
    parser.add_argument("--evaluate-every", type=int, default=50, help="steps")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("train_distributed"),
        help="directory for the checkpoints, step-NNNNNN",
    )
    parser.add_argument("--stop-at", type=int, help="save a checkpoint and end after this step")
    parser.add_argument("--resume", type=Path, help="continue from this checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument(
        "--output", type=Path, default=Path("train_distributed.png"), help="the plot, a PNG file"
    )
    args = parser.parse_args(argv)
    for name in ("steps", "batch_size", "context", "layers", "evaluate_every", "save_every"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1. Received: {getattr(args, name)}"
            )
    if args.width < 1 or args.width % HEAD_WIDTH:
        parser.error(f"--width must be a multiple of {HEAD_WIDTH}. Received: {args.width}")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if args.batch_size % ranks:
        parser.error(
            f"--batch-size must be a multiple of the {ranks} ranks. Received: {args.batch_size}"
        )
    return args


def run(args: argparse.Namespace) -> None:
    """Train and report, as one of the ranks."""
    torch.manual_seed(args.seed)  # the same initial parameters on all ranks
    corpus = load_corpus()
    model, optimizer = shard(Transformer(args.context, args.width, args.layers), args)
    # One more than the steps taken: a new schedule already has the rate of the first step.
    schedule = OneCycleLR(
        optimizer, args.lr, total_steps=args.steps + 1, pct_start=0.1, cycle_momentum=False
    )
    training = Training(model, optimizer, schedule)
    if args.resume is not None:
        resume(training, args.resume)
    seconds = Seconds()
    history = train(training, corpus, args, seconds)
    memories: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(memories, memory(model, optimizer))
    if dist.get_rank() == 0:
        baseline = unigram_bits(corpus)
        plot(history, baseline, args.output)
        report(history, baseline, memories, seconds)
        print(f"Plot: {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run as one of torchrun's ranks or as a single process; return the exit code."""
    args = parse_arguments(argv)
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run(args)
        # End together: torch's background threads abort a process that exits while they are busy.
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
