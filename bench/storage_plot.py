# SPDX-License-Identifier: MIT
"""The plot of the formats' cost model: speed relative to float32 over the bandwidth of a core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from formats import FLOAT32, PACKED, contender
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from plot_looks import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    WIDTH,
    plain_log,
)
from rows import Row
from storage_model import Cost, core_bandwidth, costs_of, measured_speed, timed_in_memory

COLOURS = {
    PACKED: BLUE,
    "packed": SKY,
    "bf16": GREEN,
    "bf16 + int8": ORANGE,
    "bf16 + int16": VERMILION,
    "float32 + bf16 copy": PURPLE,
}
# GB/s of a core: from a server with slow memory and all cores busy to a desktop with one.
LOWEST, HIGHEST = 3.0, 60.0
TICKS = (3, 5, 10, 20, 30, 50)
POINTS = 300


def storage_plot(results: Mapping[str, Any]) -> Figure:
    """Plot each format's speed by instruction set, with the measured points of this machine."""
    costs = costs_of(results)
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    if not costs:
        figure.text(0.5, 0.5, "not measured", ha="center")
        return figure
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    rows = timed_in_memory(results)
    for axes, (isa, of_isa) in zip(panels, costs.items(), strict=True):
        draw_lines(axes, of_isa)
        if rows:
            draw_points(axes, rows[0], isa, of_isa)
        axes.set(xlabel="bandwidth of a core (GB/s)", title=isa)
    panels[0].set(ylabel="speed (float32 = 1)", ylim=(0, None))
    # Outside, since the lines fill the axes.
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def draw_lines(axes: Axes, costs: Mapping[str, Cost]) -> None:
    """Draw the cost model."""
    base = costs[FLOAT32]
    plain_log(axes.xaxis, lambda value: f"{value:g}")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    x = [LOWEST * (HIGHEST / LOWEST) ** (i / (POINTS - 1)) for i in range(POINTS)]
    for name, colour in COLOURS.items():
        if name in costs:
            speeds = [costs[name].speed(base, 1e9 * bandwidth) for bandwidth in x]
            width = 2.6 if name == PACKED else 1.8
            axes.plot(x, speeds, color=colour, lw=width, label=name)
    axes.axhline(1, color=GREY, lw=1.2, ls="--", label=FLOAT32)


def draw_points(axes: Axes, row: Row, isa: str, costs: Mapping[str, Cost]) -> None:
    """Draw the measured speeds at the bandwidth that float32 reached."""
    bandwidth = core_bandwidth(row, isa)
    if bandwidth is None:
        return
    axes.axvline(bandwidth / 1e9, color=BLACK, lw=0.8, ls=":")
    for name, colour in COLOURS.items():
        figure = measured_speed(row, contender(name, isa), isa)
        if name in costs and figure is not None:
            axes.plot(
                [bandwidth / 1e9],
                [figure.middle],
                "o",
                color=colour,
                markersize=7,
                markeredgecolor="white",
                zorder=6,
            )
    axes.plot([], [], "o", color=GREY, markersize=7, label="measured here")
