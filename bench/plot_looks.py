# SPDX-License-Identifier: MIT
"""The appearance of plots: colours and names of contenders, axes, line labels and stacked bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from rows import OURS, TWIN, as_count

WIDTH = 10.0  # inches: 1,200 pixels

GREY = "#5f6368"
PALE = "#c9cdd2"
SHADE = "#f0f1f3"

# Okabe and Ito, "Color Universal Design" (2008): distinguishable with every kind of colour vision.
# Each family of contenders has a colour, and each member a line style, so that no two contenders
# of one plot share both.
BLUE, SKY, GREEN, VERMILION = "#0072B2", "#56B4E9", "#009E73", "#D55E00"
ORANGE, PURPLE, BLACK = "#E69F00", "#CC79A7", "#000000"


class Look(NamedTuple):
    """How a contender is drawn in every plot."""

    colour: str
    style: Any = "-"
    marker: str = "o"
    name: str | None = None


LOOKS = {
    OURS: Look(BLUE, "-", "o"),
    TWIN: Look(GREY, (0, (4, 2)), "", "memory traffic alone"),
    "torch": Look(VERMILION, "-", "s"),
    "torch fused": Look(VERMILION, "-", "s"),
    "torch foreach": Look(VERMILION, "--", "^"),
    "torch default": Look(VERMILION, ":", "v"),
    "deepspeed": Look(GREEN, "-", "D", "DeepSpeed"),
    "numba": Look(SKY, "-", "P", "numba, fastmath"),
    "tensorflow ResourceApplyAdam": Look(ORANGE, "-", "X", "TensorFlow"),
    "keras tensorflow": Look(ORANGE, "--", "<", "Keras on TensorFlow"),
    "keras torch": Look(PURPLE, "--", ">", "Keras on torch"),
    "optax": Look(PURPLE, "-", "h"),
    "numpy": Look(BLACK, ":", "d", "NumPy"),
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e6e9",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": BLACK,
    "ytick.labelcolor": BLACK,
    "legend.frameon": False,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.6,
}


def look(contender: str) -> Look:
    """Return the look of a contender, with a default for unknown ones."""
    return LOOKS.get(contender, Look(GREY, "-.", "*"))


def name(contender: str) -> str:
    """Return the name of a contender in plots."""
    return look(contender).name or contender


# ---- axes --------------------------------------------------------------------------------------


def plain_log(axis: Any, text: Callable[[float], str]) -> None:
    """Make an axis logarithmic with readable labels such as 1k, 1M or 10 us."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(base=10, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    axis.set_minor_locator(NullLocator())


def short_count(value: float) -> str:
    """Format a count: 1k for 1,000."""
    return as_count(round(value)).replace("B", "G") if value >= 1 else ""


def short_time(seconds: float) -> str:
    """Format a time: 10 us for 1e-5."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size * (1 - 1e-9):
            return f"{seconds / size:g} {unit}"
    return f"{seconds / 1e-9:g} ns"


def only_horizontal_grid(axes: Axes) -> None:
    """Hide the grid lines of the category axis."""
    axes.grid(visible=False, axis="y")


class LineEnd(NamedTuple):
    """The right end of a line, and its label."""

    x: float
    y: float
    words: str
    colour: str
    bold: bool


def label_ends(axes: Axes, ends: Sequence[LineEnd]) -> None:
    """Label lines to the right of the axes, and move labels apart that would overlap."""
    figure = axes.get_figure()
    assert figure is not None
    # Drawing computes the layout, which the transformations below depend on.
    figure.canvas.draw()
    ordered = sorted(ends, key=lambda end: end.y)
    wanted = [float(axes.transData.transform((end.x, end.y))[1]) for end in ordered]
    places = moved_apart(wanted, 0.15 * figure.dpi)
    for end, place in zip(ordered, places, strict=True):
        axes.annotate(
            end.words,
            xy=(end.x, end.y),
            xytext=(1.035, axes.transAxes.inverted().transform((0, place))[1]),
            textcoords="axes fraction",
            va="center",
            color=end.colour,
            fontweight="bold" if end.bold else "normal",
            fontsize=10,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "lw": 0.7,
                "alpha": 0.6,
                "shrinkA": 0,
                "shrinkB": 3,
                "relpos": (0, 0.5),
            },
        )


def moved_apart(places: Sequence[float], height: float) -> list[float]:
    """Move ascending positions at least `height` apart, in blocks near the original positions."""
    # Blocks of touching labels: (sum over its labels of the first label's wanted position, number).
    blocks: list[tuple[float, int]] = []
    for place in places:
        total, count = place, 1
        while blocks:
            before_total, before = blocks[-1]
            if before_total / before + before * height <= total / count:
                break
            blocks.pop()
            total, count = before_total + total - count * before * height, before + count
        blocks.append((total, count))
    return [total / count + i * height for total, count in blocks for i in range(count)]


# ---- bars ---------------------------------------------------------------------------------------


def bold_ours(axes: Axes, names: Sequence[str]) -> None:
    """Set the labels of fusedadam in bold."""
    for contender, label in zip(names, axes.get_yticklabels(), strict=True):
        if contender.startswith(OURS):
            label.set_fontweight("bold")


def unit_of(seconds: float) -> tuple[str, float]:
    """Return a suitable unit for a time, and its length in seconds."""
    if seconds >= 1:
        return "s", 1.0
    return ("ms", 1e-3) if seconds >= 1e-3 else ("us", 1e-6)


class Part(NamedTuple):
    """A component of stacked bars: its name, its colour, and its length in each bar."""

    name: str
    colour: str
    lengths: list[float]


def stacked(
    axes: Axes,
    labels: Sequence[str],
    parts: Sequence[Part],
    ends: Sequence[str],
    y: Sequence[float],
) -> None:
    """Draw stacked horizontal bars with text at their ends and a legend above."""
    left = [0.0] * len(labels)
    for part in parts:
        axes.barh(
            y,
            part.lengths,
            left=left,
            color=part.colour,
            edgecolor="white",
            linewidth=0.8,
            height=0.66,
            label=part.name,
        )
        left = [begin + length for begin, length in zip(left, part.lengths, strict=True)]
    longest = max(left)
    for position, end, words in zip(y, left, ends, strict=True):
        axes.text(end + 0.01 * longest, position, words, va="center", fontsize=10)
    axes.set_yticks(y, labels)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * longest)
    only_horizontal_grid(axes)
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.0),
        ncols=len(parts),
        columnspacing=1.4,
        handlelength=1.1,
        handleheight=1.0,
        borderaxespad=0.2,
    )
