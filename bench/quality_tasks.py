# SPDX-License-Identifier: MIT
"""The formats and tasks of bench/quality.py.

A task has the same data for every seed, which chooses initial weights, batches and the stochastic
rounding. Models compute in float32, so that formats differ only in what the optimizer stores.
"""

from __future__ import annotations

import copy
import functools
import math
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import fusedadam.torch
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

# Numbers by name. None: not finite.
Result: TypeAlias = dict[str, float | None]


class Format(NamedTuple):
    """How weights and moments are stored."""

    weights: Literal["float32", "bfloat16", "float64"]
    moments: Literal["auto", "float32", "bfloat16", "packed"]
    low_bits: Literal["int8", "int16"] | None = None
    rounding: Literal["stochastic", "nearest"] = "stochastic"

    @property
    def bytes(self) -> int:
        """Bytes a parameter: weight with low bits, moments, and a gradient of the weight's dtype."""
        weight = 2 if self.weights == "bfloat16" else 4
        low_bits = {None: 0, "int8": 1, "int16": 2}[self.low_bits]
        return 2 * weight + low_bits + {"float32": 8, "bfloat16": 4, "packed": 2}[self.moments]

    @property
    def digits(self) -> int:
        """Significant bits of a weight."""
        coarse = 8 if self.weights == "bfloat16" else 24
        return {None: coarse, "int8": 16, "int16": 24}[self.low_bits]


REFERENCE = "float32"
FORMATS = {
    REFERENCE: Format("float32", "float32"),
    "moments-bf16": Format("float32", "bfloat16"),
    "moments-bf16-nearest": Format("float32", "bfloat16", rounding="nearest"),
    "moments-packed": Format("float32", "packed"),
    "weights-bf16": Format("bfloat16", "float32"),
    "weights-bf16-nearest": Format("bfloat16", "float32", rounding="nearest"),
    "10-bytes": Format("bfloat16", "bfloat16", "int16"),
    "9-bytes": Format("bfloat16", "bfloat16", "int8"),
    "8-bytes": Format("bfloat16", "bfloat16"),
    "8-bytes-nearest": Format("bfloat16", "bfloat16", rounding="nearest"),
    "7-bytes": Format("bfloat16", "packed", "int8"),
    "6-bytes": Format("bfloat16", "packed"),
}
EXACT = Format("float64", "auto")
LARGE = (REFERENCE, "9-bytes", "7-bytes")


class Training:
    """A float32 model, and an optimizer that stores its weights in a format.

    `largest` is the largest change of a weight so far, less the distance to the next weight that
    the format has (rounding may account for so much), divided by the learning rate.
    """

    def __init__(self, model: nn.Module, form: Format, seed: int, decay: float = 0.0) -> None:
        self._computed = list(model.parameters())
        stored = copy.deepcopy(model)
        if form.low_bits is None:
            stored.to(getattr(torch, form.weights))
        self._stored = list(stored.parameters())
        stored_as = {"moments": form.moments, "low_bits": form.low_bits, "rounding": form.rounding}
        settings: dict[str, Any] = {"weight_decay": decay, "seed": seed, **stored_as}
        self._optimizer = fusedadam.torch.AdamW(self._stored, **settings)
        if form.low_bits is not None:
            fusedadam.torch.split_(stored, self._optimizer)
        self._digits = form.digits
        self.largest = 0.0
        self.weights = self._read()

    def minimize(self, loss: Tensor, lr: float, factor: float = 1.0) -> None:
        """Step along the gradients of a loss, times a factor."""
        self.step([factor * g for g in torch.autograd.grad(loss, self._computed)], lr)

    def step(self, gradients: Iterable[Tensor], lr: float) -> None:
        """Step with gradients, rounded to the dtype of their weights."""
        for stored, gradient in zip(self._stored, gradients, strict=True):
            stored.grad = gradient.to(stored.dtype)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        before, self.weights = self.weights, self._read()
        for old, new in zip(before, self.weights, strict=True):
            exponents = torch.frexp(torch.maximum(old.abs(), new.abs())).exponent
            distances = torch.ldexp(torch.ones_like(new), exponents - self._digits)
            change = float(((new - old).abs() - distances).max()) / lr
            if not change <= self.largest:  # also if it is NaN
                self.largest = change

    def _read(self) -> list[Tensor]:
        # Copies the weights to the model, and returns them with their low bits.
        with torch.no_grad():
            for computed, stored in zip(self._computed, self._stored, strict=True):
                computed.copy_(stored)
            return [
                p.detach().clone() if p.dtype.itemsize > 2 else self._optimizer.master_weights(p)
                for p in self._stored
            ]


class Built(NamedTuple):
    """A model, its loss on a random batch, and its validation loss."""

    model: nn.Module
    loss: Callable[[], Tensor]
    validate: Callable[[], Tensor]


class Task(NamedTuple):
    """A training."""

    build: Callable[[Generator], Built]
    steps: int
    lr: float
    decay: float = 0.0
    spike: bool = False

    @property
    def words(self) -> str:
        """A description."""
        spike = " The gradients of one step are multiplied by 1e4." if self.spike else ""
        return f"{self.build.__doc__} {self.steps:,} steps.{spike}"

    def __call__(self, form: Format, seed: int, scale: float) -> Result:
        """Train, and return the validation loss and the largest update."""
        model, loss, validate = self.build(seeded(seed))
        training = Training(model, form, seed, self.decay)
        steps = scaled(self.steps, scale)
        for step in range(steps):
            factor = 1e4 if self.spike and step == steps // 3 else 1.0
            training.minimize(loss(), self.lr * share_of_lr(step / steps), factor)
        model.eval()
        with torch.no_grad():
            return {"loss": finite(float(validate())), "update": finite(training.largest)}


def seeded(seed: int) -> Generator:
    """Seed initial weights, and return a generator for batches."""
    torch.manual_seed(seed)
    return Generator().manual_seed(1_000 + seed)


def share_of_lr(progress: float) -> float:
    """Return the schedule: it rises during a tenth of the steps, then falls to a tenth."""
    return min(1.0, 10 * progress + 0.01) * (0.55 + 0.45 * math.cos(math.pi * progress))


def scaled(steps: int, scale: float) -> int:
    """Return a shortened number of steps."""
    return max(10, round(scale * steps))


def finite(value: float) -> float | None:
    """Return None for what JSON cannot write."""
    return value if math.isfinite(value) else None


# ---- language models ----------------------------------------------------------------------------


class LanguageModel(nn.Module):
    """A causal transformer over bytes."""

    def __init__(self, width: int, blocks: int, heads: int, context: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, width), nn.Embedding(context, width)
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.02)
        block = functools.partial(nn.TransformerEncoderLayer, dropout=0.0, activation="gelu")
        self.blocks = nn.ModuleList(
            block(width, heads, 4 * width, batch_first=True, norm_first=True) for _ in range(blocks)
        )
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256, bias=False))
        self.mask = nn.Transformer.generate_square_subsequent_mask(context)

    def forward(self, texts: Tensor) -> Tensor:
        """Return the mean loss of predicting each byte of texts but the first."""
        x = self.tokens(texts[:, :-1]) + self.places.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        return cross_entropy(self.head(x).flatten(0, 1), texts[:, 1:].flatten())


@functools.cache
def sources(length: int) -> tuple[Tensor, Tensor]:
    """Return all texts of this length in the standard library's modules: to learn, and to keep."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, paths))), dtype=torch.uint8)
    cut = len(text) * 95 // 100
    return text[:cut].unfold(0, length, 1), text[cut:].unfold(0, length, 1)


def drawn(rows: Tensor, count: int, generator: Generator) -> Tensor:
    """Return random texts."""
    return rows[torch.randint(len(rows), (count,), generator=generator)].long()


def language_model(batches: Generator) -> Built:
    """A transformer of 0.4M parameters on the sources of Python's standard library."""
    learnt, kept = sources(65)
    fixed = drawn(kept, 384, Generator().manual_seed(0))
    model = LanguageModel(width=96, blocks=3, heads=4, context=64)
    return Built(model, lambda: model(drawn(learnt, 8, batches)), lambda: model(fixed))


def large(minutes: float, width: int = 320) -> dict[str, Any]:
    """Train a language model in three formats for so long, step by step in turn.

    All see the same batches, from the same initial weights. The learning rate follows the time.
    """
    batches, (learnt, kept) = seeded(0), sources(129)
    fixed = drawn(kept, 32, Generator().manual_seed(0))
    first = LanguageModel(width, blocks=8, heads=8, context=128)
    models = {name: copy.deepcopy(first) for name in LARGE}
    trainings = {name: Training(model, FORMATS[name], 0, 0.1) for name, model in models.items()}
    curve: list[dict[str, Any]] = []
    steps, progress = 0, 0.0
    begin = time.monotonic()
    while True:
        # The first point is before training, the last after it.
        if progress >= len(curve) / 40:
            with torch.no_grad():
                losses = {name: finite(float(model(fixed))) for name, model in models.items()}
            curve.append({"step": steps, **losses})
        if progress == 1.0:
            break
        batch = drawn(learnt, 8, batches)
        for name, model in models.items():
            trainings[name].minimize(model(batch), 1e-3 * share_of_lr(progress))
        steps += 1
        progress = min(1.0, (time.monotonic() - begin) / (60 * minutes))
    updates = {name: finite(training.largest) for name, training in trainings.items()}
    parameters = sum(p.numel() for p in first.parameters())
    return {"parameters": parameters, "minutes": minutes, "curve": curve, "update": updates}


# ---- other trainings ----------------------------------------------------------------------------

# Makes this many inputs and targets.
Sample: TypeAlias = Callable[[Generator, int], tuple[Tensor, Tensor]]


def fresh(
    model: nn.Module, sample: Sample, compare: Callable[..., Tensor], batches: Generator
) -> Built:
    """Learn from new data in every step, which no model can overfit."""
    x, y = sample(Generator().manual_seed(0), 4_096)

    def loss() -> Tensor:
        inputs, targets = sample(batches, 64)
        return compare(model(inputs), targets)

    return Built(model, loss, lambda: compare(model(x), y))


def zipf(batches: Generator) -> Built:
    """Embeddings of 2,000 tokens as frequent as Zipf's law says: most of a gradient is zero."""
    truth = Generator().manual_seed(1)
    affinity = torch.randn(2_000, 8, generator=truth) @ torch.randn(8, 50, generator=truth)
    labels = affinity.argmax(1)
    frequency = (torch.arange(2_000) + 1.0) ** -1.1

    def sample(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        tokens = torch.multinomial(frequency, count, replacement=True, generator=generator)
        return tokens, labels[tokens]

    vectors = nn.Embedding(2_000, 16)
    nn.init.normal_(vectors.weight, std=0.1)
    return fresh(nn.Sequential(vectors, nn.Linear(16, 50)), sample, cross_entropy, batches)


def ill_conditioned(batches: Generator) -> Built:
    """Least squares in 256 coordinates with curvatures over 6 decades."""
    # A curvature is the square of a scale.
    scales = torch.logspace(-1.5, 1.5, 256)
    truth = 0.1 * torch.randn(256, generator=Generator().manual_seed(1)) / scales

    def sample(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
        x = scales * torch.randn(count, 256, generator=generator)
        return x, (x @ truth + 0.1 * torch.randn(count, generator=generator)).unsqueeze(1)

    return fresh(nn.Linear(256, 1, bias=False), sample, mse_loss, batches)


# Pictures of 5 rows and 3 columns; an octal digit is a row.
DIGITS = (0o75557, 0o26227, 0o71747, 0o71717, 0o55711, 0o74717, 0o74757, 0o71111, 0o75757, 0o75717)


@functools.cache
def glyphs() -> Tensor:
    """Return the digits at 24 places of 8 x 8 pixels."""
    bits = [[digit >> bit & 1 for bit in range(14, -1, -1)] for digit in DIGITS]
    corner = nn.functional.pad(torch.tensor(bits).view(10, 5, 3), (0, 5, 0, 3))
    return torch.stack([corner.roll((i, j), (1, 2)) for i in range(4) for j in range(6)])


def pictures(generator: Generator, count: int) -> tuple[Tensor, Tensor]:
    """Return noisy pictures of digits, and the digits."""
    places, digits = (torch.randint(n, (count,), generator=generator) for n in (24, 10))
    noise = 0.5 * torch.randn(count, 8, 8, generator=generator)
    return glyphs()[places, digits] + noise, digits


def mlp(batches: Generator) -> Built:
    """A perceptron with two hidden layers on noisy digits."""
    layers = (nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    return fresh(nn.Sequential(nn.Flatten(), *layers), pictures, cross_entropy, batches)


def convolutions(batches: Generator) -> Built:
    """Two convolutions with batch normalization on noisy digits."""
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8)),
        *(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 24, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(24 * 16, 10)),
    )
    return fresh(model, pictures, cross_entropy, batches)


# ---- single effects -----------------------------------------------------------------------------

TINY_RATES = (1e-5, 1e-6, 1e-7)


def tiny_rates(form: Format, seed: int, scale: float) -> Result:
    """The movement of weights near 0.05 in 1,000 steps, as a share of the true one."""
    steps = scaled(1_000, scale)

    def movement(stored: Format, lr: float) -> float:
        data = seeded(seed)
        start = nn.Parameter(0.04 + 0.02 * torch.rand(16_384, generator=data))
        training = Training(nn.ParameterList([start]), stored, seed)
        before = training.weights[0]
        for _ in range(steps):
            training.step([1 + 0.1 * torch.randn(16_384, generator=data)], lr)
        return float((training.weights[0] - before).mean())

    return {f"{lr:g}": movement(form, lr) / movement(EXACT, lr) for lr in TINY_RATES}


def pause(form: Format, seed: int, scale: float) -> Result:
    """The largest update after 2,000 gradients of zero.

    Gradients have sizes from 1e-6 to 1e2; half of them are zero also before.
    """
    data = seeded(seed)
    sizes = 10 ** (8 * torch.rand(4_096, generator=data) - 6)
    training = Training(nn.ParameterList([nn.Parameter(torch.zeros(4_096))]), form, seed)
    half = sizes * (torch.arange(4_096) % 2)
    for steps, size in ((200, half), (2_000, 0 * sizes), (100, sizes)):
        training.largest = 0.0
        for _ in range(scaled(steps, scale)):
            training.step([size * torch.randn(4_096, generator=data)], 1e-3)
    return {"update": finite(training.largest)}


TRAININGS = {
    "language-model": Task(language_model, 1_500, 2e-3, 0.1),
    "zipf": Task(zipf, 2_000, 5e-3),
    "ill-conditioned": Task(ill_conditioned, 4_000, 1e-2),
    "mlp": Task(mlp, 3_000, 2e-3, 0.01),
    "mlp-spike": Task(mlp, 3_000, 2e-3, 0.01, spike=True),
    "convolutions": Task(convolutions, 2_000, 2e-3, 0.01),
}
# Each takes a format, a seed and a scale, and returns a Result.
TASKS: dict[str, Any] = {**TRAININGS, "tiny-rates": tiny_rates, "pause": pause}
