# SPDX-License-Identifier: MIT
"""Train a transformer with 7 bytes of memory a parameter instead of 16.

    python examples/train_small_memory.py
    python examples/train_small_memory.py --memory 4GB --largest

The text is the standard library of the running Python, so nothing is downloaded. The first command
trains one model twice, on the same batches: with float32 parameters, gradients and moments, and
with bfloat16 parameters and gradients, 8 more bits of each parameter and both moments in one 16-bit
word. The model is the largest whose float32 training fits in the memory. The second command trains
only the second way, and the largest model that fits then.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import multiprocessing
import re
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import fusedadam.torch
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Sequence

BYTES = 256
HEAD_WIDTH = 64


class Transformer(nn.Module):
    """Predicts each byte of a text from those before it."""

    def __init__(self, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(context, width)
        block = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // HEAD_WIDTH, 4 * width, **block)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.scores = nn.Linear(width, BYTES)
        for table in (self.bytes, self.positions):
            nn.init.normal_(table.weight, std=0.1)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, in bits per byte, of all bytes of the rows but the first."""
        x = self.bytes(rows[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        scores = self.scores(self.norm(x)).float()  # the loss is in float32 in any case
        nats = nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        return nats / math.log(2)


def largest(small: bool, args: argparse.Namespace) -> tuple[int, int]:
    """Return the width and layers of the largest model whose training fits in the memory."""

    def parameters(width: int, layers: int) -> int:
        return layers * (12 * width + 13) * width + (2 * BYTES + args.context + 2) * width + BYTES

    def needed(width: int, layers: int) -> int:
        of_each, gradient = (5, 2) if small else (12, 4)
        # A rough count of what the forward pass keeps for the backward pass.
        numbers = args.batch * args.context * (20 * width * layers + 4 * BYTES)
        training = of_each + (0 if args.attach else gradient)
        splitting = 9 if small else 0  # for a moment, split_ has the weights in both formats
        n = parameters(width, layers)
        return max(n * training + numbers * (2 if small else 4), n * splitting)

    sizes = [(w, w // 128 + more) for w in range(64, 8192, 64) for more in (1, 2)]
    fitting = [size for size in sizes if needed(*size) <= args.memory]
    if not fitting:
        sys.exit(f"--memory must be at least {min(needed(*size) for size in sizes) / 1e6:.0f}MB")
    return max(fitting, key=lambda size: parameters(*size))


def build(small: bool, size: tuple[int, int], args: argparse.Namespace) -> tuple[Transformer, Any]:
    """Return a new model and its optimizer."""
    torch.manual_seed(args.seed)
    model = Transformer(args.context, *size)
    settings: dict[str, Any] = {"lr": 0.5 / size[0], "betas": (0.9, 0.99)}
    optimizer: Any
    if small:
        # These two lines are all it takes:
        optimizer = fusedadam.torch.AdamW(
            model.parameters(), **settings, moments="packed", low_bits="int8"
        )
        fusedadam.torch.split_(model, optimizer)
    else:
        optimizer = fusedadam.torch.AdamW(model.parameters(), **settings)
    if args.attach:  # each parameter is stepped during the backward pass, which frees its gradient
        fusedadam.torch.attach(model, optimizer)
    return model, optimizer


@dataclass
class Result:
    """What a training reports; memory in bytes."""

    parameters: int = 0
    losses: list[float] = field(default_factory=list)  # bits per byte, of each step
    gradients: list[float] = field(default_factory=list)  # seconds of each step
    optimizer: list[float] = field(default_factory=list)
    tensors: int = 0
    resident: float = math.nan
    peak: float = math.nan


def memory(of: str) -> float:
    """Return "VmRSS", the resident memory of this process, or "VmHWM", its maximum; Linux only."""
    if sys.platform != "linux":
        return math.nan
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)  # otherwise freed activations would count
    found = re.search(rf"{of}:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    return int(found[1]) * 1024 if found else math.nan


def take_step(model: Transformer, optimizer: Any, rows: torch.Tensor, result: Result) -> None:
    """Take one step, and note loss and times."""
    optimizer.zero_grad()
    begin = time.perf_counter()
    loss: Any = model(rows)
    loss.backward()
    middle = time.perf_counter()
    optimizer.step()  # does nothing with --attach
    result.optimizer.append(time.perf_counter() - middle)
    result.gradients.append(middle - begin)
    result.losses.append(loss.item())


def train(name: str, small: bool, size: tuple[int, int], args: argparse.Namespace) -> Result:
    """Train a model in this process, which should be a new one."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)
    # A step of a tiny model loads all code and starts all threads: not memory of the training.
    rows = text[None, : args.context + 1].long()
    take_step(*build(small, (HEAD_WIDTH, 1), args), rows, Result())
    before = memory("VmRSS")

    model, optimizer = build(small, size, args)
    schedule = OneCycleLR(
        optimizer,
        max_lr=optimizer.defaults["lr"],
        total_steps=args.steps + 1,
        pct_start=0.1,
        cycle_momentum=False,
    )
    result = Result(parameters=sum(p.numel() for p in model.parameters()))
    generator = torch.Generator().manual_seed(args.seed)
    with tqdm(range(args.steps), desc=name, unit="step") as progress:
        for _ in progress:
            starts = torch.randint(len(text) - args.context, (args.batch,), generator=generator)
            rows = text[starts[:, None] + torch.arange(args.context + 1)].long()
            take_step(model, optimizer, rows, result)
            schedule.step()
            progress.set_postfix(bits=f"{result.losses[-1]:.2f}")

    result.resident, result.peak = memory("VmRSS") - before, memory("VmHWM") - before
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    result.tensors = sum(t.nbytes for t in (*model.parameters(), *gradients, *states))
    return result


def report(results: dict[str, Result], args: argparse.Namespace) -> None:
    """Plot the losses; print losses, memory and times."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for (name, result), style in zip(results.items(), ("-", "--"), strict=False):
        axes.plot(result.losses, style, label=f"{name}, {result.tensors / result.parameters:.0f}")
    axes.set(title="Python source code", xlabel="step", ylabel="cross-entropy [bits per byte]")
    axes.grid(alpha=0.3)
    axes.legend(title="bytes a parameter")
    figure.savefig(args.plot, dpi=120)

    print(f"{'':34}" + "".join(f"{name:>12}" for name in results))
    # No text is read twice in a few hundred steps, so this loss is that of new text.
    late = -max(1, args.steps // 10)
    rows = {
        "million parameters": lambda r: r.parameters / 1e6,
        "bytes a parameter, of all tensors": lambda r: r.tensors / r.parameters,
        "bytes a parameter, measured": lambda r: r.resident / r.parameters,
        "peak with activations, MB": lambda r: r.peak / 1e6,
        "loss in the end, bits a byte": lambda r: fmean(r.losses[late:]),
        "forward and backward, ms a step": lambda r: 1e3 * median(r.gradients),
        "optimizer, ms a step": lambda r: 1e3 * median(r.optimizer),
    }
    for what, value in rows.items():
        print(f"{what:34}" + "".join(f"{value(result):12.3f}" for result in results.values()))
    print(f"Plot: {args.plot}")


def bytes_of(text: str) -> float:
    """Return the bytes in a size such as 4GB."""
    found = re.fullmatch(r"([0-9.]+)\s*([kMG])B", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"must be like 300MB or 4GB. Received: {text}")
    return float(found[1]) * {"k": 1e3, "M": 1e6, "G": 1e9}[found[2]]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with a message if it is invalid."""
    parser = argparse.ArgumentParser(
        description="Train a transformer on Python source code, with float32 and with 7 bytes of "
        "memory a parameter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--memory", type=bytes_of, default="250MB", help="beyond that of Python and torch"
    )
    parser.add_argument("--largest", action="store_true", help="the largest model, without float32")
    parser.add_argument("--attach", action="store_true", help="step while backward runs")
    parser.add_argument("--steps", type=int, default=200, help="steps of each training")
    parser.add_argument("--batch", type=int, default=16, help="windows per step")
    parser.add_argument("--context", type=int, default=64, help="bytes per window")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    parser.add_argument(
        "--plot", type=Path, default=Path("train_small_memory.png"), help="the losses, a PNG file"
    )
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "context"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1. Received: {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train in one new process after the other, plot and report; return the exit code."""
    args = parse_arguments(argv)
    ways = {"7 bytes": True} if args.largest else {"float32": False, "7 bytes": True}
    size = largest(args.largest, args)
    results = {}
    for name, small in ways.items():
        # A new process for each: memory that is freed may stay with its process.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            results[name] = process.submit(train, name, small, size, args).result()
    report(results, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
