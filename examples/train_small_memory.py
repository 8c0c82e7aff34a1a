# SPDX-License-Identifier: MIT
"""Train a transformer with 7 bytes of memory a parameter instead of 16.

    python examples/train_small_memory.py
    python examples/train_small_memory.py --memory 4GB --largest

The text is the standard library of the running Python, so nothing is downloaded. The first command
trains one model twice, on the same batches: with parameters, gradients and moments in float32, and
with parameters and gradients in bfloat16, 8 more bits of each parameter, and both moments in one
16-bit word. The model is the largest that fits in the memory with float32. The second command
trains only the second way, and the largest model that fits then.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import sys
import sysconfig
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from fusedadam.torch import AdamW, attach, split_
from matplotlib.figure import Figure
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

BYTES, HEAD_WIDTH = 256, 64
NAMES = ("float32", "small memory")


class Transformer(nn.Module):
    """Predicts each byte of a text from those before it."""

    def __init__(self, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.bytes = nn.Embedding(BYTES, width)
        self.positions = nn.Embedding(context, width)
        for table in (self.bytes, self.positions):
            nn.init.normal_(table.weight, std=0.1)
        layer = nn.TransformerEncoderLayer(
            width, width // HEAD_WIDTH, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), False)
        self.scores = nn.Linear(width, BYTES)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, in bits per byte, of all bytes of the rows but the first."""
        x = self.bytes(rows[:, :-1]) + self.positions.weight
        scores = self.scores(self.layers(x, self.mask, is_causal=True)).float()
        nats = nn.functional.cross_entropy(scores.flatten(0, 1), rows[:, 1:].flatten())
        return nats / math.log(2)  # in float32 in any case


def build(small: bool, size: tuple[int, int], args: argparse.Namespace) -> tuple[Transformer, Any]:
    """Return a new model and its optimizer."""
    torch.manual_seed(args.seed)
    model, lr = Transformer(args.context, *size), 0.5 / size[0]
    if small:
        # These two lines are all it takes: the model becomes bfloat16, in place.
        optimizer = AdamW(model.parameters(), lr=lr, moments="packed", low_bits="int8")
        split_(model, optimizer)
    else:
        optimizer = AdamW(model.parameters(), lr=lr)
    if args.attach:  # the backward pass steps each parameter and frees its gradient
        attach(model, optimizer)
    return model, optimizer


def largest(small: bool, args: argparse.Namespace) -> tuple[int, int]:
    """Return the width and layers of the largest model whose training fits in the memory."""
    kept, gradient, building, itemsize = (5, 2, 7, 2) if small else (12, 4, 5, 4)
    fitting: dict[int, tuple[int, int]] = {}
    for width in range(HEAD_WIDTH, 8192, HEAD_WIDTH):
        for layers in (width // 128 + 1, width // 128 + 2):
            n = layers * (12 * width + 13) * width + (2 * BYTES + args.context + 2) * width + BYTES
            # An estimate of what the forward pass keeps. It is freed while gradients arrive.
            numbers = args.batch * args.context * (28 * width * layers + 4 * BYTES)
            most = max(itemsize * numbers, (not args.attach) * gradient * n)
            if max(kept * n + most, building * n) + 5e6 <= args.memory:
                fitting[n] = width, layers
    return fitting[max(fitting)] if fitting else sys.exit("--memory is too little for one layer")


def resident(what: str = "VmRSS") -> float:
    """Return the resident memory of this process, or its peak ("VmHWM"). Known on Linux only."""
    if sys.platform != "linux":
        return math.nan
    gc.collect()
    getattr(ctypes.CDLL(None), "malloc_trim", id)(0)  # return what has been freed
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return float(dict(line.split(":") for line in lines)[what].removesuffix("kB")) * 1024


def take_step(model: Transformer, optimizer: Any, rows: torch.Tensor) -> tuple[float, float, float]:
    """Return the loss, and the seconds of forward and backward, and of the optimizer."""
    optimizer.zero_grad()
    begin = time.perf_counter()
    loss: Any = model(rows)
    loss.backward()
    middle = time.perf_counter()
    optimizer.step()  # with --attach, there is nothing left to step
    return loss.item(), middle - begin, time.perf_counter() - middle


def train(small: bool, size: tuple[int, int], args: argparse.Namespace) -> tuple[Any, Any]:
    """Train a model in a process of its own; return the losses, and figures by name."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)
    window = torch.arange(args.context + 1)
    # Before memory is measured, a step of one layer loads all code and starts all threads.
    take_step(*build(small, (size[0], 1), args), text[window.repeat(args.batch, 1)].long())
    before = resident()

    model, optimizer = build(small, size, args)
    lr = optimizer.defaults["lr"]
    schedule = OneCycleLR(optimizer, lr, args.steps + 1, pct_start=0.1, cycle_momentum=False)
    generator = torch.Generator().manual_seed(args.seed)
    history = []
    with tqdm(range(args.steps), desc=NAMES[small], unit="step") as progress:
        for _ in progress:
            starts = torch.randint(len(text) - args.context, (args.batch, 1), generator=generator)
            history.append(take_step(model, optimizer, text[starts + window].long()))
            schedule.step()
            progress.set_postfix(bits=f"{history[-1][0]:.2f}")

    used, peak = resident() - before, resident("VmHWM") - before
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    tensors += [t for p in model.parameters() for t in (p, p.grad) if t is not None]
    n = sum(p.numel() for p in model.parameters())
    losses, gradient_seconds, optimizer_seconds = map(list, zip(*history, strict=True))
    return losses, {
        "Million parameters": n / 1e6,
        "Bytes a parameter, all tensors": sum(t.nbytes for t in tensors) / n,
        "Bytes a parameter, measured": used / n,
        "Peak with activations, MB": peak / 1e6,
        # Hardly any text is read twice in a few hundred steps: this is the loss on new text.
        "Loss of the last steps, bits": fmean(losses[-(args.steps // 10 or 1) :]),
        "Forward and backward, ms": 1e3 * median(gradient_seconds),
        "Optimizer, ms": 1e3 * median(optimizer_seconds),
    }


def bytes_in(text: str) -> float:
    """Return the bytes in a size such as 4GB."""
    return float(text[:-2] + {"MB": "e6", "GB": "e9"}.get(text[-2:], "?"))


def main() -> int:
    """Train in new processes, plot and report; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Train a transformer with float32 and with 7 bytes of memory a parameter.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--memory", type=bytes_in, default="300MB", help="MB or GB, besides Python and torch")
    add("--largest", action="store_true", help="train the largest model, without float32")
    add("--attach", action="store_true", help="step while backward runs: 5 bytes, or 12")
    add("--steps", type=int, default=200, help="steps of each training")
    add("--batch", type=int, default=16, help="windows per step")
    add("--context", type=int, default=64, help="bytes per window")
    add("--seed", type=int, default=0, help="seed of weights and batches")
    add("--plot", type=Path, default=Path("train_small_memory.png"), help="a PNG file")
    args = parser.parse_args()
    if min(args.steps, args.batch, args.context) < 1:
        parser.error("--steps, --batch and --context must be at least 1")

    size = largest(args.largest, args)
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    table = []
    for small in (True,) if args.largest else (False, True):
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            losses, figures = process.submit(train, small, size, args).result()
        axes.plot(losses, "--" if small else "-", label=NAMES[small])
        table.append({"": f"{NAMES[small]:>14}"} | {k: f"{v:14.2f}" for k, v in figures.items()})
    axes.set(title="Python source code", xlabel="step", ylabel="cross-entropy [bits per byte]")
    axes.legend()
    figure.savefig(args.plot, dpi=120)

    for what in table[0]:
        print(f"{what:32}", *(column[what] for column in table))
    print(f"Plot: {args.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
