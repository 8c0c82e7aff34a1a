# SPDX-License-Identifier: MIT
"""Train a transformer on Python source code, byte by byte, in several processes.

    torchrun --nproc-per-node 2 examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py --sharding fsdp
    python examples/train_distributed.py

The text is the standard library of the Python that runs this, so nothing is downloaded. Each rank
(process) computes the gradients of its share of a batch, and torch.distributed averages them. What
is divided is the optimizer: with ZeRO each rank has the state of some parameters, steps these, and
sends them to the others; with FSDP2 each rank has a part of every parameter, gradient and state.
Batches are functions of seed and step, so neither the number of ranks nor an interruption changes
what is learnt.
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
    # torch deprecates what comes along with it from torch itself.
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Not all of their names are exported as type checkers want it.
dist: Any = torch.distributed
dcp: Any = torch.distributed.checkpoint

BYTES = 256
HEAD_WIDTH = 32
VALIDATION_BATCHES = 8


# ---- text ----------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """Text to train on and text held out, as bytes."""

    train: torch.Tensor
    validation: torch.Tensor


def load_corpus() -> Corpus:
    """Read the modules of the standard library; every tenth is held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = [file.read_bytes() for file in files]
    held_out = b"".join(texts[9::10])
    rest = b"".join(text for i, text in enumerate(texts) if i % 10 != 9)
    return Corpus(*(torch.frombuffer(bytearray(t), dtype=torch.uint8) for t in (rest, held_out)))


def windows(text: torch.Tensor, starts: torch.Tensor, length: int) -> torch.Tensor:
    """Return a row of so many bytes from each start."""
    rows: torch.Tensor = text[starts[:, None] + torch.arange(length)]
    return rows.long()


def share(rows: torch.Tensor) -> torch.Tensor:
    """Return this rank's rows; all ranks have equally many."""
    mine: torch.Tensor = rows.chunk(dist.get_world_size())[dist.get_rank()]
    return mine


def training_rows(corpus: Corpus, step: int, args: argparse.Namespace) -> torch.Tensor:
    """Return this rank's share of a step's batch: windows at random, the same in each run."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
    last = len(corpus.train) - args.context - 1
    starts = torch.randint(last, (args.batch_size,), generator=generator)
    return windows(corpus.train, share(starts), args.context + 1)


def unigram_bits(corpus: Corpus) -> float:
    """Return the bits a byte that knowing how frequent each byte is takes, without any context."""
    counts = torch.bincount(corpus.train.int(), minlength=BYTES) + 1.0  # no byte is impossible
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
            # At torch's spread of 1 they would drown what the blocks have to say.
            nn.init.normal_(table.weight, std=0.1)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, in bits a byte, of all bytes of the rows but the first."""
        x = self.bytes(rows[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        scores = self.scores(self.norm(x))
        nats = nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        return nats / math.log(2)


def groups_of(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the parameters as groups: matrices decay, biases and norms do not."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


# ---- sharding ------------------------------------------------------------------------------------


def shard(model: Transformer, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the model for many ranks, and the optimizer of which each has its share."""
    settings: dict[str, Any] = {"lr": args.lr, "betas": (0.9, 0.99)}
    if args.sharding == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, AdamW(groups_of(model, args.weight_decay), **settings)
    # The views spare a copy of all gradients, and let parameters travel together.
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
    """Return the memory that tensors take in this process."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local)


def memory(model: nn.Module, optimizer: Any) -> dict[str, int]:
    """Return the bytes that this rank keeps from step to step."""
    states = local_optimizer(optimizer).state.values()
    return {
        "Parameters": bytes_here(model.parameters()),
        "State of the optimizer": bytes_here(t for state in states for t in state.values()),
    }


# ---- checkpoints ---------------------------------------------------------------------------------


@dataclass
class Training:
    """All that changes from step to step."""

    model: nn.Module
    optimizer: Any
    schedule: OneCycleLR
    step: int = 0

    def checkpoint(self) -> dict[str, Any]:
        """Return what a checkpoint holds; its tensors are those in use.

        By names of parameters, each rank with what it has: so a checkpoint can be loaded by any
        number of ranks, with either sharding.
        """
        local = local_optimizer(self.optimizer)
        return {
            "model": get_model_state_dict(self.model),
            "state": get_optimizer_state_dict(self.model, local)["state"],
            "schedule": self.schedule.state_dict(),
            "step": self.step,
        }


def save(training: Training, directory: Path) -> None:
    """Write a checkpoint of its own for this step."""
    dcp.save(training.checkpoint(), checkpoint_id=directory / f"step-{training.step:06}")


def resume(training: Training, path: Path) -> None:
    """Go back to where a checkpoint was made."""
    saved = training.checkpoint()
    total = saved["schedule"]["total_steps"]
    dcp.load(saved, checkpoint_id=path)  # into the tensors in use
    if saved["schedule"]["total_steps"] != total:
        sys.exit(
            "--steps must be that of the checkpoint, whose learning rates were scheduled by it, "
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
    """Where the time of the training steps went."""

    gradients: float = 0.0
    optimizer: float = 0.0
    exchange: float = 0.0  # of parameters after the step, which ZeRO needs


@dataclass
class History:
    """Bits a byte, each with the number of steps taken."""

    train: list[tuple[int, float]] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)


def mean_over_ranks(value: torch.Tensor) -> float:
    """Return the mean of what each rank has; all ranks must ask for it."""
    total = value.detach().clone()
    dist.all_reduce(total)
    ranks: int = dist.get_world_size()
    return float(total) / ranks


@torch.no_grad()
def validate(model: nn.Module, corpus: Corpus, args: argparse.Namespace) -> float:
    """Return the bits a byte on the held-out text, in windows evenly spaced."""
    last = len(corpus.validation) - args.context - 1
    starts = torch.linspace(0, last, VALIDATION_BATCHES * args.batch_size).long()
    losses = [
        model(windows(corpus.validation, share(batch), args.context + 1))
        for batch in starts.chunk(VALIDATION_BATCHES)
    ]
    return mean_over_ranks(torch.stack(losses).mean())


class Stopwatch:
    """Adds up the time inside of an optimizer's step."""

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
    """Take one step, and return the loss before it on this rank's rows, a tensor."""
    begin = time.perf_counter()
    loss: Any = training.model(rows)
    loss.backward()
    # Of all gradients: here they are whole (ZeRO), or know of their other parts (FSDP2). An
    # optimizer with a share of them cannot do it, so its own max_grad_norm would be wrong here.
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
    """Step until the end, evaluating and saving on the way."""
    until = min(args.stop_at or args.steps, args.steps)
    if training.step >= until:
        sys.exit(f"--resume must be of before step {until}. Received: {args.resume}")
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


# ---- what it says at the end ---------------------------------------------------------------------


def plot(history: History, baseline: float, output: Path) -> None:
    """Draw the losses over the steps."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*history.train, strict=True), linewidth=1, label="training, a batch each")
    axes.plot(*zip(*history.validation, strict=True), marker="o", label="held out")
    axes.axhline(baseline, color="gray", linestyle="--", label="frequencies of bytes alone")
    axes.set(title="Python source code", xlabel="step", ylabel="cross-entropy [bits a byte]")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(output, dpi=120)


def report(
    history: History, baseline: float, memories: list[dict[str, int]], seconds: Seconds
) -> None:
    """Print what was learnt, and what it took in memory and time."""
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


# ---- start and end -------------------------------------------------------------------------------


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong one ends the program with a message."""
    parser = argparse.ArgumentParser(
        description="Train a transformer on Python source code, in one process or by torchrun in "
        "many, with fusedadam.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--sharding",
        choices=("zero", "fsdp"),
        default="zero",
        help="zero: the optimizer's state is divided; fsdp: parameters and gradients too",
    )
    parser.add_argument("--steps", type=int, default=800, help="of the whole training")
    parser.add_argument("--batch-size", type=int, default=16, help="windows a step, of all ranks")
    parser.add_argument("--context", type=int, default=64, help="bytes a window")
    parser.add_argument("--width", type=int, default=128, help=f"a multiple of {HEAD_WIDTH}")
    parser.add_argument("--layers", type=int, default=4, help="of the transformer")
    parser.add_argument("--lr", type=float, default=4e-3, help="the highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of the matrices")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="bound of the gradients")
    parser.add_argument("--evaluate-every", type=int, default=50, help="steps")
    parser.add_argument("--save-every", type=int, default=200, help="steps")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path("train_distributed"),
        help="directory that gets a directory step-NNNNNN for each checkpoint",
    )
    parser.add_argument(
        "--stop-at", type=int, help="end after this step, with a checkpoint, as if interrupted"
    )
    parser.add_argument("--resume", type=Path, help="go on from this checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
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
    torch.manual_seed(args.seed)  # all ranks begin with the same parameters
    corpus = load_corpus()
    model, optimizer = shard(Transformer(args.context, args.width, args.layers), args)
    # One more than are taken: the schedule has already the rate of the first step.
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
    """Join the other ranks, or be the only one; return the exit code."""
    args = parse_arguments(argv)
    if "RANK" in os.environ:  # by torchrun
        dist.init_process_group("gloo")
    else:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        run(args)
        # The ranks end together: a thread of torch that is still at work would abort one that ends.
        dist.barrier()
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
