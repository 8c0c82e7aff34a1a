# SPDX-License-Identifier: MIT
"""The plots of a run, as PNG files 1,200 pixels wide."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator
from PIL import Image
from runner import Row

from reporting.data import OURS, TWIN, Sections, as_ratio, as_time, times

DPI, WIDTH = 120, 10.0
# Okabe and Ito, "Color Universal Design" (2008): distinguishable with every kind of colour vision.
# Each family of contenders has a colour, and each member a line style.
BLUE, SKY, GREEN, VERMILION = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
ORANGE, PURPLE, BLACK, GREY = "#E69F00", "#CC79A7", "#000000", "#5f6368"
LOOKS = {
    OURS: (BLUE, "o-"),
    TWIN: (GREY, "--"),
    "torch": (VERMILION, "s-"),
    "torch fused": (VERMILION, "s-"),
    "torch foreach": (VERMILION, "^--"),
    "torch default": (VERMILION, "v:"),
    "deepspeed": (GREEN, "D-"),
    "numba": (SKY, "P-"),
    "tensorflow ResourceApplyAdam": (ORANGE, "X-"),
    "keras tensorflow": (ORANGE, "<--"),
    "keras torch": (PURPLE, ">--"),
    "optax": (PURPLE, "h-"),
    "numpy": (BLACK, "d:"),
}
STYLE: dict[Any, Any] = {
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False,
    "axes.titlelocation": "left", "axes.titleweight": "bold", "grid.alpha": 0.4,
    "legend.frameon": False,
}  # fmt: skip


class Plot(NamedTuple):
    """A plot, its alternative text, and the section that it shows."""

    section: str
    alt: str
    draw: Callable[..., None]  # (figure, rows)


def lines(
    axes: Axes, rows: list[Row], x: Callable[[Row], float], y: Callable[[Row, float], float]
) -> None:
    """Draw a line for each contender, and name it at its right end or in the legend."""
    for name, (colour, style) in LOOKS.items():
        points = [
            (x(row), y(row, times(row)[name].median())) for row in rows if name in row["seconds"]
        ]
        if points:
            label = "memory traffic alone" if name == TWIN else name
            wide = 3.0 if name == OURS else 1.5
            axes.plot(*zip(*points, strict=True), style, color=colour, label=label, lw=wide, ms=5)
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def sizes(figure: Figure, rows: list[Row]) -> None:
    """Elements per second over the size of one tensor."""
    axes = figure.subplots()
    lines(axes, rows, lambda row: row["elements"], lambda row, seconds: row["elements"] / seconds)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set(title="Elements stepped per second, over the size of one tensor (float32)")
    axes.set(xlabel="elements of the tensor", ylabel="elements a second")


def many_tensors(figure: Figure, rows: list[Row]) -> None:
    """Time per tensor over the number of tensors."""
    axes = figure.subplots()
    lengths = [row["elements"] for row in rows]
    common = max(lengths, key=lengths.count)
    rows = [row for row in rows if row["elements"] == common]
    lines(axes, rows, lambda row: row["tensors"], lambda row, seconds: seconds / row["tensors"])
    axes.yaxis.set_major_formatter(EngFormatter("s"))
    axes.set(title=f"Time per tensor, over the number of tensors of {common:,} elements")
    axes.set(xlabel="tensors stepped together (float32)", ylabel="time of a step / tensors")


def tail(figure: Figure, rows: list[Row]) -> None:
    """Times of training tails: a panel per case, with whiskers at the quartiles."""
    figure.suptitle(
        "Training tail: clip by norm, AdamW, average, zero the gradients", weight="bold"
    )
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        frame = times(row)
        low, middle, high = (frame.quantile(q) for q in (0.25, 0.5, 0.75))
        bars = axes.barh(
            frame.columns, middle, xerr=[middle - low, high - middle], capsize=3,
            color=[LOOKS[name][0] for name in frame.columns],
        )  # fmt: skip
        words = [f"{as_time(t)} ({as_ratio(t / middle[OURS])} x)" for t in middle]
        axes.bar_label(bars, words, padding=12)
        axes.invert_yaxis()
        axes.set(title=row["case"], xlim=(0, 1.7 * high.max()))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter("s"))


PLOTS = {
    "one_tensor": Plot("sizes", "Elements stepped per second over the size of one tensor", sizes),
    "many_tensors": Plot(
        "many_tensors", "Time per tensor over the number of tensors", many_tensors
    ),
    "tail": Plot("tail", "Time of a training tail", tail),
}


def save(draw: Callable[[Figure], object], path: Path, height: float = 5.0) -> None:
    """Draw a plot into a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        # Without matplotlib's version, a file changes only if its picture does.
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    # A third of the bytes, which the repository keeps for each published run.
    Image.open(path).convert("RGB").quantize().save(path, optimize=True)


def draw_all(sections: Sections, folder: Path) -> Mapping[str, tuple[str, Path]]:
    """Draw the plots of all sections that were run. Returns part -> alternative text and file."""
    drawn = {}
    for part, plot in PLOTS.items():
        if plot.section in sections:
            path = folder / f"{plot.section}.png"
            rows = sections[plot.section]["rows"]
            save(functools.partial(plot.draw, rows=rows), path, 3.0 if part == "tail" else 5.0)
            drawn[part] = (plot.alt, path)
    return drawn
