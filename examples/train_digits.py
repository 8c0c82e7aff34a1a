# SPDX-License-Identifier: MIT
"""Train a two-layer network on handwritten digits with a fused Adam.

The 1,797 images of 8 x 8 pixels come with scikit-learn, so nothing is downloaded. The loss is plain
NumPy code, differentiated by autograd. The optimizer updates the NumPy arrays in place.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import autograd.numpy as anp
import numpy as np
from autograd.scipy.special import logsumexp
from fusedadam import Adam
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from threadpoolctl import threadpool_limits
from tqdm import tqdm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

HIDDEN_UNITS = 256
CLASSES = 10


class Samples(NamedTuple):
    """Images, one per row with pixels in [0, 1], and their labels."""

    images: NDArray[np.float32]
    digits: NDArray[np.int64]


class Epoch(NamedTuple):
    """Losses and accuracy after one pass over the training images."""

    train_loss: float
    test_loss: float
    test_accuracy: float


@dataclass
class Seconds:
    """Time spent in the training steps."""

    gradients: float = 0.0
    optimizer: float = 0.0


def load_splits(seed: int) -> tuple[Samples, Samples]:
    """Return the training and test split: 80 % and 20 % of the images of each digit."""
    images, digits = load_digits(return_X_y=True)
    images = (images / images.max()).astype(np.float32)
    train_images, test_images, train_digits, test_digits = train_test_split(
        images, digits, test_size=0.2, stratify=digits, random_state=seed
    )
    return Samples(train_images, train_digits), Samples(test_images, test_digits)


def init_params(inputs: int, rng: np.random.Generator) -> list[NDArray[np.float32]]:
    """Return weights and biases of both layers, with He initialization (arXiv:1502.01852)."""
    params: list[NDArray[np.float32]] = []
    for fan_in, fan_out in ((inputs, HIDDEN_UNITS), (HIDDEN_UNITS, CLASSES)):
        spread = np.float32(np.sqrt(2 / fan_in))
        params.append(spread * rng.standard_normal((fan_in, fan_out), dtype=np.float32))
        params.append(np.zeros(fan_out, dtype=np.float32))
    return params


def predict(
    params: Sequence[NDArray[np.float32]], images: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the log-probability of each digit, one row per image."""
    w1, b1, w2, b2 = params
    hidden = anp.maximum(images @ w1 + b1, 0)
    scores = hidden @ w2 + b2
    log_probabilities: NDArray[np.float32] = scores - logsumexp(scores, axis=1, keepdims=True)
    return log_probabilities


def cross_entropy(params: Sequence[NDArray[np.float32]], batch: Samples) -> np.float32:
    """Return the mean cross-entropy of a batch."""
    log_probabilities = predict(params, batch.images)
    rows = np.arange(len(batch.digits))
    loss: np.float32 = -anp.mean(log_probabilities[rows, batch.digits])
    return loss


def accuracy(params: Sequence[NDArray[np.float32]], samples: Samples) -> float:
    """Return the fraction of images classified correctly."""
    return float(np.mean(predict(params, samples.images).argmax(axis=1) == samples.digits))


def train_epoch(
    optimizer: Adam,
    params: Sequence[NDArray[np.float32]],
    train: Samples,
    order: NDArray[np.int64],
    batch_size: int,
    seconds: Seconds,
) -> None:
    """Take one step per batch, in the given order, and add up the time."""
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        loss = partial(cross_entropy, batch=Samples(train.images[rows], train.digits[rows]))

        # `optimizer.get_updates(loss, params)` would do both at once. Separate calls can be timed.
        begin = time.perf_counter()
        gradients = optimizer.get_gradients(loss, params)
        middle = time.perf_counter()
        optimizer.get_updates(gradients, params)
        end = time.perf_counter()

        seconds.gradients += middle - begin
        seconds.optimizer += end - middle


def plot(history: Sequence[Epoch], output: Path) -> None:
    """Plot loss and accuracy per epoch."""
    epochs = range(1, len(history) + 1)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss_axes, accuracy_axes = figure.subplots(1, 2)

    loss_axes.plot(epochs, [epoch.train_loss for epoch in history], label="training")
    loss_axes.plot(epochs, [epoch.test_loss for epoch in history], label="test")
    loss_axes.set(title="Loss", xlabel="epoch", ylabel="cross-entropy [nats]", yscale="log")
    loss_axes.legend()

    accuracy_axes.plot(epochs, [100 * epoch.test_accuracy for epoch in history], color="C1")
    accuracy_axes.set(title="Test accuracy", xlabel="epoch", ylabel="accuracy [%]")

    for axes in (loss_axes, accuracy_axes):
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=120)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; exit with a message if it is invalid."""
    parser = argparse.ArgumentParser(
        description="Train a small network on handwritten digits with fusedadam.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=int, default=40, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, default=32, help="images per step")
    parser.add_argument("--seed", type=int, default=0, help="seed of split, weights and order")
    parser.add_argument(
        "--output", type=Path, default=Path("train_digits.png"), help="the plot, a PNG file"
    )
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(
                f"--{name.replace('_', '-')} must be at least 1. Received: {getattr(args, name)}"
            )
    if args.seed < 0:
        parser.error(f"--seed must be at least 0. Received: {args.seed}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Train, plot and report; return the exit code."""
    args = parse_arguments(argv)
    rng = np.random.default_rng(args.seed)
    train, test = load_splits(args.seed)
    params = init_params(train.images.shape[1], rng)
    optimizer = Adam(lr=0.001)

    history: list[Epoch] = []
    seconds = Seconds()
    # For matrices this small, BLAS threads only add overhead. With one thread, the result also does
    # not depend on the number of cores.
    with (
        threadpool_limits(limits=1, user_api="blas"),
        tqdm(range(args.epochs), desc="Training", unit="epoch") as progress,
    ):
        for _ in progress:
            order = rng.permutation(len(train.digits))
            train_epoch(optimizer, params, train, order, args.batch_size, seconds)
            epoch = Epoch(
                train_loss=float(cross_entropy(params, train)),
                test_loss=float(cross_entropy(params, test)),
                test_accuracy=accuracy(params, test),
            )
            history.append(epoch)
            progress.set_postfix(
                loss=f"{epoch.train_loss:.4f}", accuracy=f"{epoch.test_accuracy:.1%}"
            )

    plot(history, args.output)
    total = seconds.gradients + seconds.optimizer
    print(f"Test accuracy: {history[-1].test_accuracy:.2%} of {len(test.digits)} digits")
    print(f"Plot: {args.output}")
    print(
        f"Optimizer: {seconds.optimizer / total:.1%} of the time of the training steps"
        f" ({seconds.optimizer:.3f} s of {total:.3f} s; the rest is gradients)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
