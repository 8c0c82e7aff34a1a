# SPDX-License-Identifier: MIT
"""The plots of a run, as PNG files 1,200 pixels wide. One function per plot."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import matplotlib as mpl
from cost_model import Fit
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from PIL import Image
from plot_looks import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    SHADE,
    SKY,
    STYLE,
    VERMILION,
    WIDTH,
    LineEnd,
    Part,
    bold_ours,
    label_ends,
    look,
    name,
    only_horizontal_grid,
    plain_log,
    short_count,
    short_time,
    stacked,
    unit_of,
)
from rows import (
    OURS,
    STEP_BYTES,
    TWIN,
    Row,
    all_elements,
    as_count,
    as_time,
    contenders_of,
    digits,
    median,
    ratio,
    spread,
)
from storage_plot import storage_plot
from tables import optimizer_shares

Results: TypeAlias = Mapping[str, Any]

DPI = 120

# ---- lines -------------------------------------------------------------------------------------


def sizes_plot(results: Results) -> Figure:
    """Plot elements per second over the size of one tensor. Shade what exceeds the traffic twin."""
    rows = sorted((row for row in results["rows"] if row.get("tensors", 1) == 1), key=all_elements)
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    axes = figure.subplots()
    plain_log(axes.xaxis, short_count)
    plain_log(axes.yaxis, short_count)

    def throughput(contender: str) -> tuple[list[float], list[float]]:
        chosen = [row for row in rows if contender in row["seconds"]]
        x = [float(all_elements(row)) for row in chosen]
        return x, [n / median(row["seconds"][contender]) for n, row in zip(x, chosen, strict=True)]

    ends = draw_lines(axes, contenders_of(rows), throughput)
    x, roof = throughput(TWIN)
    bottom, top = axes.get_ylim()
    if x:
        top = max(top, 3.0 * max(roof))
        axes.fill_between(x, roof, top, color=SHADE, lw=0, zorder=0)
        axes.text(x[0] * 1.15, top / 1.15, "beyond memory traffic alone", va="top", color=GREY)
    axes.set_ylim(bottom, top)
    axes.set_xlim(rows[0]["elements"] * 0.8, all_elements(rows[-1]) * 1.12)
    axes.set(
        title="Elements stepped per second, over the size of one tensor",
        xlabel=f"elements of the tensor (float32, {threads_words(rows)})",
        ylabel="elements a second",
    )
    label_ends(axes, ends)
    return figure


def draw_lines(
    axes: Axes,
    contenders: Iterable[str],
    points: Callable[[str], tuple[list[float], list[float]]],
) -> list[LineEnd]:
    """Draw a line for each contender and return the line ends for `label_ends`."""
    ends = []
    for contender in contenders:
        x, y = points(contender)
        if not x:
            continue
        drawn, ours = look(contender), contender == OURS
        axes.plot(
            x,
            y,
            color=drawn.colour,
            linestyle=drawn.style,
            marker=drawn.marker,
            lw=3.0 if ours else 1.5,
            markersize=6.5 if ours else 4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            zorder=5 if ours else 3,
        )
        ends.append(LineEnd(x[-1], y[-1], name(contender), drawn.colour, ours))
    return ends


def threads_words(rows: Sequence[Row]) -> str:
    """Return the numbers of threads as text, such as "2 threads"."""
    counts = sorted({row["threads"] for row in rows})
    return " or ".join(map(str, counts)) + (" thread" if counts == [1] else " threads")


def many_tensors_plot(results: Results) -> Figure:
    """Plot the time per tensor over the number of tensors, for the most common size of tensor."""
    lengths = [row["elements"] for row in results["rows"]]
    common = max(lengths, key=lengths.count)
    rows = sorted(
        (row for row in results["rows"] if row["elements"] == common),
        key=lambda row: int(row["tensors"]),
    )
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    axes = figure.subplots()
    plain_log(axes.xaxis, short_count)
    plain_log(axes.yaxis, short_time)

    def time_of_each(contender: str) -> tuple[list[float], list[float]]:
        chosen = [row for row in rows if contender in row["seconds"]]
        return (
            [float(row["tensors"]) for row in chosen],
            [median(row["seconds"][contender]) / row["tensors"] for row in chosen],
        )

    ends = draw_lines(axes, contenders_of(rows), time_of_each)
    axes.set_xlim(rows[0]["tensors"] * 0.8, rows[-1]["tensors"] * 1.12)
    axes.set(
        title=f"Time per tensor, over the number of tensors of {common:,} elements",
        xlabel=f"tensors stepped together (float32, {threads_words(rows)})",
        ylabel="time of a step / tensors",
    )
    label_ends(axes, ends)
    return figure


# ---- bars and dots -----------------------------------------------------------------------------


def threads_plot(results: Results) -> Figure:
    """Plot the speedup over one thread: a panel per case and a bar per number of threads."""
    rows = results["rows"]
    cases: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["tensors"], row["elements"]), []).append(row)
    names = [contender for contender in contenders_of(rows) if contender != TWIN]
    counts = sorted({row["threads"] for row in rows} - {1})
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    height = 0.9 + (0.14 + 0.22 * max(1, len(counts))) * len(names)
    figure = Figure(figsize=(WIDTH, lines * height + 0.4), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False)
    for panel in panels.flat[len(cases) :]:
        panel.set_visible(False)
    for panel, ((tensors, elements), of_case) in zip(panels.flat, cases.items(), strict=False):
        thread_bars(panel, of_case, names, counts)
        size = as_count(elements) if elements >= 1 << 20 else f"{elements:,}"
        panel.set_title(f"{tensors:,} x {size}", fontweight="normal", pad=6)
        if panel not in panels[:, 0]:
            panel.tick_params(labelleft=False)
    over_panels(figure, f"Speed of {' and '.join(map(str, counts))} threads over that of one")
    return figure


def thread_bars(
    axes: Axes, rows: Sequence[Row], names: Sequence[str], counts: Sequence[int]
) -> None:
    """Draw the panel of one case."""
    width = 0.72 / max(1, len(counts))
    longest = float(max(counts, default=1))
    for position, contender in enumerate(names):
        times = {
            row["threads"]: median(row["seconds"][contender])
            for row in rows
            if contender in row["seconds"]
        }
        for i, count in enumerate(counts):
            if count not in times or 1 not in times:
                continue
            gain = times[1] / times[count]
            longest = max(longest, gain)
            y = position + (i - (len(counts) - 1) / 2) * width
            axes.barh(y, gain, height=0.92 * width, color=look(contender).colour)
            words = f"{gain:.2f}  ({as_time(times[count])})"
            # The white background keeps the line at 1 from crossing the text.
            ground = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
            axes.text(gain + 0.02 * longest, y, words, va="center", fontsize=9, bbox=ground)
    axes.axvline(1, color=GREY, lw=1, zorder=0.9)
    axes.set_yticks(range(len(names)), [name(contender) for contender in names])
    bold_ours(axes, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 1.5 * longest)
    only_horizontal_grid(axes)


def over_panels(figure: Figure, title: str) -> None:
    """Set the title above all panels."""
    figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=12.5)


def tail_plot(results: Results) -> Figure:
    """Plot the times of training tails: a panel per case, with whiskers at the quartiles."""
    rows = results["rows"]
    figure = Figure(figsize=(WIDTH, 0.9 + 1.9 * -(-len(rows) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(rows) // 2), min(2, len(rows)), squeeze=False)
    for panel in panels.flat[len(rows) :]:
        panel.set_visible(False)
    for panel, row in zip(panels.flat, rows, strict=False):
        names = contenders_of([row])
        times = [spread(row["seconds"][contender]) for contender in names]
        unit, size = unit_of(max(time.high for time in times))
        bars = [time.middle / size for time in times]
        panel.barh(
            range(len(names)),
            bars,
            color=[look(contender).colour for contender in names],
            xerr=[
                [(time.middle - time.low) / size for time in times],
                [(time.high - time.middle) / size for time in times],
            ],
            error_kw={"ecolor": BLACK, "elinewidth": 1.2, "capsize": 3.5},
            height=0.62,
        )
        furthest = max(time.high for time in times) / size
        for position, (contender, time) in enumerate(zip(names, times, strict=True)):
            words = f"{digits(time.middle / size)} {unit}"
            times_ours = ratio(row, contender)
            if contender != OURS and times_ours is not None:
                words += f"  ({times_ours.middle:.2f} x)"
            panel.text(
                time.high / size + 0.025 * furthest, position, words, va="center", fontsize=10
            )
        panel.set_yticks(range(len(names)), [name(contender) for contender in names])
        bold_ours(panel, names)
        panel.invert_yaxis()
        only_horizontal_grid(panel)
        panel.set_xlim(0, 1.6 * furthest)
        panel.set_xlabel(f"{unit} a step")
        panel.set_title(row["case"], fontweight="normal", pad=6)
    over_panels(figure, "Training tail: clip by norm, AdamW, average, zero the gradients")
    return figure


def first_step_plot(results: Results) -> Figure:
    """Plot build and first step in one bar, and a later step in the next."""
    rows = results["rows"]
    unit, size = unit_of(max(median(row["first"]) + median(row["build"]) for row in rows))
    labels, build, first, later, ends, y = [], [], [], [], [], []
    for i, row in enumerate(rows):
        times = [median(row[part]) / size for part in ("build", "first", "later")]
        labels += [f"{name(row['contender'])}, {row['memory']} memory", "a later step"]
        build += [times[0], 0.0]
        first += [times[1], 0.0]
        later += [0.0, times[2]]
        ends += [
            f"{digits(times[0] + times[1])} {unit}  ({(times[0] + times[1]) / times[2]:.1f} x)",
            f"{digits(times[2])} {unit}",
        ]
        y += [2.5 * i, 2.5 * i + 0.8]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.78 * len(rows)), layout="constrained")
    axes = figure.subplots()
    parts = [
        Part("build", BLUE, build),
        Part("first step", SKY, first),
        Part("a later step", PALE, later),
    ]
    stacked(axes, labels, parts, ends, y)
    axes.set(xlabel=unit, title=f"First step, {rows[0]['case']}")
    bold_ours(axes, labels)
    return figure


def memory_plot(results: Results) -> Figure:
    """Plot the peak memory by what it holds."""
    rows = results["rows"]
    elements = max(row["elements"] for row in rows)
    rows = [row for row in rows if row["elements"] == elements]
    rest = [row["peak_bytes"] - row["baseline_bytes"] - row["expected_bytes"] for row in rows]
    unit, size = ("GB", 1e9) if rows[0]["expected_bytes"] > 1e9 else ("MB", 1e6)
    # Float32: 4 bytes each for the parameter and its gradient, 8 for the moments.
    parts = [
        Part("parameters", BLUE, [4 * row["elements"] / size for row in rows]),
        Part("gradients", SKY, [4 * row["elements"] / size for row in rows]),
        Part("moments", GREEN, [8 * row["elements"] / size for row in rows]),
        Part("beyond these", VERMILION, [max(0, extra) / size for extra in rest]),
    ]
    ends = [f"{extra / 1e6:+,.0f} MB" for extra in rest]
    figure = Figure(figsize=(WIDTH, 1.2 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    names = [row["contender"] for row in rows]
    stacked(axes, [name(contender) for contender in names], parts, ends, list(range(len(rows))))
    bold_ours(axes, names)
    axes.set(xlabel=unit, title=f"Memory at peak, {as_count(elements)} parameters")
    return figure


def calls_plot(results: Results) -> Figure:
    """Plot the profile of a small call, and the time of a call over the number of tensors."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    profile = results.get("profile", [])
    if profile:
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        names = [part["part"] for part in profile]
        times = [part["microseconds"] for part in profile]
        left.barh(range(len(names)), times, color=BLUE, height=0.62)
        for position, time in enumerate(times):
            left.text(time + 0.015 * max(times), position, f"{time:.2f} us", va="center")
        left.set_yticks(range(len(names)), names)
        left.invert_yaxis()
        left.set_xlim(0, 1.25 * max(times))
        only_horizontal_grid(left)
        left.set(xlabel="us", title=f"Where {sum(times):.1f} us of a call go")
    else:
        right = figure.subplots()
    plain_log(right.xaxis, short_count)
    plain_log(right.yaxis, short_time)
    sizes = sorted({row["elements"] for row in results["rows"]}, reverse=True)
    for elements, colour, marker in zip(sizes, (BLUE, SKY, ORANGE, GREEN), "osD^", strict=False):
        rows = sorted(
            (row for row in results["rows"] if row["elements"] == elements),
            key=lambda row: int(row["tensors"]),
        )
        right.plot(
            [row["tensors"] for row in rows],
            [median(row["seconds"][OURS]) for row in rows],
            color=colour,
            marker=marker,
            lw=2,
            markersize=6,
            markeredgecolor="white",
            label=f"of {elements:,} elements" if elements > 1 else "of 1 element",
        )
    right.legend(loc="upper left")
    right.set(xlabel="tensors", ylabel="time of a call", title="Cost of apply_gradients")
    return figure


def training_plot(results: Results) -> Figure:
    """Plot the time of each training, divided into gradients and optimizer."""
    rows = results["rows"]
    gradients = [median(row["gradient_seconds"]) for row in rows]
    steps = [median(row["optimizer_seconds"]) for row in rows]
    unit, size = unit_of(max(g + s for g, s in zip(gradients, steps, strict=True)))
    labels = [f"{name(row['framework'])}, {row['optimizer']}" for row in rows]
    ends = [f"optimizer {100 * median(optimizer_shares(row)):.0f} %" for row in rows]
    y, frameworks = [], dict.fromkeys(row["framework"] for row in rows)
    for i, row in enumerate(rows):
        y.append(i + 0.5 * list(frameworks).index(row["framework"]))
    figure = Figure(figsize=(WIDTH, 1.3 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    parts = [
        Part("gradients", PALE, [g / size for g in gradients]),
        Part("optimizer", BLUE, [s / size for s in steps]),
    ]
    stacked(axes, labels, parts, ends, y)
    for row, label in zip(rows, axes.get_yticklabels(), strict=True):
        if row["optimizer"] == OURS:
            label.set_fontweight("bold")
    axes.set(xlabel=unit, title="Training a small network")
    return figure


def cost_model_plot(fit: Fit) -> Figure:
    """Plot the fitted formula with the measurements of one tensor, and the error of each sample."""
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    of_one = [s for s in fit.samples if s.section == "sizes" and s.tensors == 1]
    plain_log(left.xaxis, short_count)
    plain_log(left.yaxis, short_time)
    smallest, largest = of_one[0].elements, max(s.elements for s in of_one)
    threads = of_one[0].threads
    count = 200
    x = [smallest * (largest / smallest) ** (i / (count - 1)) for i in range(count)]
    sizes = [round(n) for n in x]
    model = fit.model
    memory = STEP_BYTES["float32"] / model.memory_bandwidth
    left.plot(
        x,
        [model.fixed(n, threads) + model.bookkeeping(n, 1) for n in sizes],
        color=ORANGE,
        ls="--",
        label="call, threads and one tensor",
    )
    left.plot(
        x,
        [n / (model.threads_of(n, threads) * model.rate) for n in sizes],
        color=GREEN,
        ls="-.",
        label="computing",
    )
    left.plot(x, [n * memory for n in sizes], color=GREY, ls=":", lw=2, label="memory traffic")
    left.plot(
        x,
        [model.seconds(n, threads=threads) for n in sizes],
        color=BLUE,
        lw=2.5,
        label="the formula",
    )
    left.plot(
        [s.elements for s in of_one],
        [s.seconds for s in of_one],
        "o",
        color=BLACK,
        markersize=6,
        markerfacecolor="white",
        markeredgewidth=1.5,
        zorder=6,
        label="measured",
    )
    times = [s.seconds for s in of_one]
    left.set_ylim(min(times) / 8, max(times) * 2)
    left.set(title="Time of a step", xlabel="elements of one tensor (float32)")
    left.legend(loc="upper left", fontsize=9.5)
    residuals = fit.residuals()
    for section, colour, marker in (
        ("sizes", BLUE, "o"),
        ("many_tensors", VERMILION, "s"),
        ("threads", GREEN, "D"),
    ):
        points = [
            (s.seconds, 100 * residual)
            for s, residual in zip(fit.samples, residuals, strict=True)
            if s.section == section
        ]
        right.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            marker,
            color=colour,
            markersize=6,
            alpha=0.85,
            label=section.replace("_", " "),
        )
    plain_log(right.xaxis, short_time)
    reach = max(20.0, *(120 * abs(residual) for residual in residuals))
    right.axhline(0, color=GREY, lw=1)
    right.axhspan(-10, 10, color=SHADE, zorder=0)
    right.set_ylim(-reach, reach)
    right.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:+.0f} %" if value else "0 %")
    )
    right.set(title="Predicted against measured", xlabel="measured time of a step")
    right.legend(loc="lower right", ncols=3, fontsize=9, columnspacing=0.8, handletextpad=0.1)
    return figure


class Plot(NamedTuple):
    """The plot of a section, and its alternative text."""

    draw: Callable[[Results], Figure]
    alt: str


PLOTS = {
    "sizes": Plot(sizes_plot, "Elements stepped per second over the size of one tensor"),
    "many_tensors": Plot(many_tensors_plot, "Time per tensor over the number of tensors"),
    "threads": Plot(threads_plot, "Time of a step by number of threads"),
    "tail": Plot(tail_plot, "Time of a training tail"),
    "first_step": Plot(first_step_plot, "Build and first step against a later step"),
    "memory": Plot(memory_plot, "Peak memory by use"),
    "calls": Plot(calls_plot, "Where the time of a call goes, and its cost by number of tensors"),
    "training": Plot(training_plot, "Share of the optimizer in the time of a training"),
    "storage": Plot(storage_plot, "Speed of each format over the bandwidth of a core"),
}
COST_MODEL_ALT = "The cost model through the measurements, and its errors"


def save(draw: Callable[[], Figure], path: Path) -> None:
    """Draw a plot and write it atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    drawn = io.BytesIO()
    with mpl.rc_context(STYLE):
        draw().savefig(drawn, format="png", dpi=DPI)
    # A palette reduces the file to a third of its size. Saving through Pillow drops the metadata
    # with matplotlib's version, so that a file changes only if its picture does.
    picture = Image.open(drawn).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    picture.save(temporary, format="PNG", optimize=True)
    temporary.replace(path)
