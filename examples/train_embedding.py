# SPDX-License-Identifier: MIT
"""Factorize a table of ratings: each batch has gradients for a few rows of a large table.

    python examples/train_embedding.py

The ratings are drawn from hidden vectors of users and items. Each batch names a thousand ratings.
`apply_sparse` steps the rows that they name; with `lazy=False` it steps the whole table, as a dense
gradient would.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from fusedadam import Adam
from matplotlib.figure import Figure
from numpy.typing import NDArray
from tqdm import tqdm

USERS, ITEMS, WIDTH = 100_000, 1_000, 16
BATCH, BATCHES_BETWEEN_TESTS = 1_000, 25

Ratings = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]
Tables = tuple[NDArray[np.float32], NDArray[np.float32]]


def new_tables(rng: np.random.Generator, scale: float) -> Tables:
    """Return random vectors of all users and of all items."""
    users, items = (
        (scale * rng.standard_normal((rows, WIDTH))).astype(np.float32) for rows in (USERS, ITEMS)
    )
    return users, items


def draw(rng: np.random.Generator, hidden: Tables, count: int) -> Ratings:
    """Return users, items and their ratings. Few users and items have most of the ratings."""
    users = (USERS * rng.random(count) ** 8).astype(np.int64)
    items = (ITEMS * rng.random(count) ** 2).astype(np.int64)
    return users, items, np.sum(hidden[0][users] * hidden[1][items], axis=1)


def train(lazy: bool, batches: int, seed: int) -> tuple[list[float], list[float]]:
    """Return the seconds and the error on held-out ratings after every few batches."""
    rng = np.random.default_rng(seed)
    hidden = new_tables(rng, WIDTH**-0.25)  # ratings of variance 1
    held_out = draw(rng, hidden, 10_000)
    users, items = new_tables(rng, 0.3)
    # An optimizer has one table.
    user_adam, item_adam = Adam(lr=0.05), Adam(lr=0.01)
    seconds, errors, spent = [], [], 0.0
    for batch in tqdm(range(batches), desc="rows" if lazy else "table", unit="batch"):
        u, i, ratings = draw(rng, hidden, BATCH)
        begin = time.perf_counter()
        rows_of_users, rows_of_items = users[u], items[i]
        error = np.sum(rows_of_users * rows_of_items, axis=1) - ratings
        user_adam.apply_sparse(u, error[:, None] * rows_of_items, users, lazy=lazy)
        item_adam.apply_sparse(i, error[:, None] * rows_of_users, items, lazy=lazy)
        spent += time.perf_counter() - begin
        if (batch + 1) % BATCHES_BETWEEN_TESTS == 0:
            u, i, ratings = held_out
            predicted = np.sum(users[u] * items[i], axis=1)
            seconds.append(spent)
            errors.append(float(np.sqrt(np.mean((predicted - ratings) ** 2))))
    return seconds, errors


def main() -> None:
    """Train both ways, plot and report."""
    parser = argparse.ArgumentParser(
        description="Factorize a table of ratings with sparse steps.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--batches", type=int, default=1000, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of ratings and first vectors")
    parser.add_argument(
        "--output", type=Path, default=Path("train_embedding.png"), help="the plot, a PNG file"
    )
    args = parser.parse_args()
    if args.batches < BATCHES_BETWEEN_TESTS:
        parser.error(
            f"--batches must be at least {BATCHES_BETWEEN_TESTS}. Received: {args.batches}"
        )

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for lazy, name in ((True, "rows named"), (False, "whole table")):
        seconds, errors = train(lazy, args.batches, args.seed)
        axes.plot(seconds, errors, label=name)
        print(
            f"{name + ':':13}{1e3 * seconds[-1] / args.batches:6.2f} ms a batch, "
            f"held-out error {errors[-1]:.3f}"
        )
    title = f"A table of {USERS:,} users"
    axes.set(title=title, xlabel="time of the steps [s]", ylabel="error of held-out ratings")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.output, dpi=120)
    print(f"Plot: {args.output}")


if __name__ == "__main__":
    main()
