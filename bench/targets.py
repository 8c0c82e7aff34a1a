# SPDX-License-Identifier: MIT
"""The project's performance targets as data: work, bounds, and how to compute the figure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rows import OURS, TWIN, Spread, as_count, find, growth, ratio, round_by_round, spread

Sections: TypeAlias = Mapping[str, Any]

K = 1_000
M = 1 << 20
# 1B is 10**9. A parameter with its gradient and moments takes 16 bytes: 16 GB in total.
B = 1_000_000_000


class NotMeasuredError(Exception):
    """The results lack a figure. The message says why."""


Figure: TypeAlias = Callable[[Sections], Spread]


@dataclass(frozen=True)
class Target:
    """A figure and its bounds in the figure's unit. None means no bound."""

    work: str
    rule: str
    section: str
    figure: Figure
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    def met(self, value: float) -> bool:
        """Return whether an unrounded figure is within the bounds."""
        return (self.at_least is None or value >= self.at_least) and (
            self.at_most is None or value <= self.at_most
        )


# ---- figures -----------------------------------------------------------------------------------


def rows_of(sections: Sections, section: str) -> list[Any]:
    """Return the rows of a section. Raise if it was not run."""
    if section not in sections:
        raise NotMeasuredError(f"no section {section} in this run")
    return list(sections[section]["rows"])


def row_of(sections: Sections, section: str, tensors: int, elements: int) -> Any:
    """Return the row of a case. Raise if it was not run."""
    row = find(rows_of(sections, section), tensors=tensors, elements=elements)
    if row is None:
        raise NotMeasuredError(
            f"no case {tensors:,} x {as_count(elements)} in {section} of this run"
        )
    return row


def times(peer: str, section: str, tensors: int, elements: int) -> Figure:
    """Figure: peer / fusedadam, round by round."""

    def figure(sections: Sections) -> Spread:
        row = row_of(sections, section, tensors, elements)
        result = ratio(row, peer)
        if result is None:
            raise NotMeasuredError(row.get("not_run", {}).get(peer, f"{peer} was not run"))
        return result

    return figure


def microseconds(section: str, tensors: int, elements: int) -> Figure:
    """Figure: microseconds per step."""

    def figure(sections: Sections) -> Spread:
        row = row_of(sections, section, tensors, elements)
        return spread([1e6 * seconds for seconds in row["seconds"][OURS]])

    return figure


def first_over_later(memory: str, *, with_build: bool) -> Figure:
    """Figure: first step / later step, with or without `build` in the first step."""

    def figure(sections: Sections) -> Spread:
        for row in rows_of(sections, "first_step"):
            if row["contender"] == OURS and row["memory"] == memory:
                build = row["build"] if with_build else [0.0] * len(row["first"])
                first = [b + f for b, f in zip(build, row["first"], strict=True)]
                return round_by_round(first, row["later"])
        raise NotMeasuredError(f"no first step on {memory} memory in this run")

    return figure


def megabytes_beyond(elements: int) -> Figure:
    """Figure: peak memory in MB beyond parameters, gradients and moments."""

    def figure(sections: Sections) -> Spread:
        for row in rows_of(sections, "memory"):
            if row["contender"] == OURS and find([row], elements=elements):
                return spread([beyond_expected(row) / 1e6])
        raise NotMeasuredError(f"no peak at {as_count(elements)} in this run")

    return figure


def beyond_expected(row: Any) -> int:
    """Return the bytes at peak beyond the process baseline and the arrays that a step needs."""
    return int(row["peak_bytes"] - row["baseline_bytes"] - row["expected_bytes"])


def growth_of(elements: int) -> Figure:
    """Figure: time per element at this size / that of the first 64M, round by round."""

    def figure(sections: Sections) -> Spread:
        row = find(rows_of(sections, "large"), elements=elements)
        if row is None:
            raise NotMeasuredError(f"no step of {as_count(elements)} in this run")
        return growth(row)

    return figure


def adapter_times(peer: str, adapter: str, tensors: int, elements: int) -> Figure:
    """Figure: peer / adapter, round by round."""

    def figure(sections: Sections) -> Spread:
        rows = [row for row in rows_of(sections, "adapters") if row.get("adapter") == adapter]
        row = find(rows, tensors=tensors, elements=elements)
        if row is None:
            raise NotMeasuredError(
                f"no case {tensors:,} x {as_count(elements)} of {adapter} in this run"
            )
        result = ratio(row, peer, adapter)
        if result is None:
            not_run = row.get("not_run", {})
            reasons = [not_run[name] for name in (adapter, peer) if name in not_run]
            raise NotMeasuredError(reasons[0] if reasons else f"{peer} was not run")
        return result

    return figure


def gradients_saved(elements: int) -> Figure:
    """Figure: reduction of the peak by `attach`, as a fraction of the size of all gradients."""

    def figure(sections: Sections) -> Spread:
        peaks = {
            row["attached"]: beyond_expected(row) / (4 * row["elements"])
            for row in rows_of(sections, "adapters")
            if "attached" in row and find([row], elements=elements)
        }
        if peaks.keys() != {False, True}:
            raise NotMeasuredError(f"no two peaks at {as_count(elements)} in this run")
        return spread([peaks[False] - peaks[True]])

    return figure


def import_milliseconds(sections: Sections) -> Spread:
    """Figure: milliseconds of `import fusedadam` beyond `import numpy`."""
    for row in rows_of(sections, "imports"):
        if row["package"] == OURS:
            return spread([1e3 * seconds for seconds in row["seconds"]])
    raise NotMeasuredError("no import of fusedadam in this run")


def worst_at_once(sections: Sections) -> Spread:
    """Figure: concurrent steps / back-to-back steps, in the worst case."""
    rows = rows_of(sections, "at_once")
    return largest(
        round_by_round(row["seconds"]["at once"], row["seconds"]["one after the other"])
        for row in rows
    )


def slowdown_beside_runtimes(elements: int) -> Figure:
    """Figure: step beside another OpenMP runtime / step alone, for the worst kind of process."""

    def figure(sections: Sections) -> Spread:
        rows = [row for row in rows_of(sections, "runtimes") if row["when"] == "later"]
        row = find(rows, elements=elements)
        if row is None:
            raise NotMeasuredError(f"no step of {as_count(elements)} in runtimes of this run")
        seconds = dict(row["seconds"])
        alone = seconds.pop("alone")
        if not seconds:
            raise NotMeasuredError("no other runtime in this run")
        return largest(round_by_round(beside, alone) for beside in seconds.values())

    return figure


def largest(figures: Iterable[Spread]) -> Spread:
    """Return the figure with the largest median."""
    return max(figures, key=lambda figure: figure.middle)


# ---- the targets -------------------------------------------------------------------------------


def against(
    peer: str, bound: float, work: str, section: str, tensors: int, elements: int
) -> Target:
    """Return a target for the speed relative to a peer, or for the fraction of the twin's speed."""
    rule = f"at least {bound:g} of the twin" if peer == TWIN else f"at least {bound:g} x {peer}"
    return Target(work, rule, section, times(peer, section, tensors, elements), at_least=bound)


def adapter_against(
    peer: str, bound: float, work: str, adapter: str, tensors: int, elements: int
) -> Target:
    """Return a target for an adapter's speed relative to the framework's own optimizer."""
    figure = adapter_times(peer, adapter, tensors, elements)
    rule = f"at least {bound:g} x {peer}"
    return Target(f"`{adapter}`, {work}", rule, "adapters", figure, at_least=bound)


TARGETS = (
    *(
        against(peer, bound, f"one tensor, {name}", "sizes", 1, elements)
        for name, elements in (("64M", 64 * M), ("256M", 256 * M))
        for peer, bound in ((TWIN, 0.97), ("torch fused", 1.0), ("deepspeed", 1.0))
    ),
    against("torch fused", 2.0, "one tensor, 1M (in cache)", "sizes", 1, M),
    against("deepspeed", 1.2, "one tensor, 1M (in cache)", "sizes", 1, M),
    against("numba", 0.9, "one tensor, 1M (in cache)", "sizes", 1, M),
    against("torch fused", 10.0, "one tensor, 10k", "sizes", 1, 10 * K),
    Target(
        "one tensor, 1k, from Python",
        "at most 2.5 us a call",
        "sizes",
        microseconds("sizes", 1, K),
        at_most=2.5,
        unit="us",
    ),
    against("torch fused", 20.0, "1,000 tensors x 1,000", "many_tensors", 1_000, K),
    against("deepspeed", 20.0, "1,000 tensors x 1,000", "many_tensors", 1_000, K),
    against("torch fused", 20.0, "100,000 tensors x 100", "many_tensors", 100_000, 100),
    against(TWIN, 0.97, "float64, 32M", "float64", 1, 32 * M),
    against("torch", 1.6, "training tail, 64M", "tail", 1, 64 * M),
    *(
        target
        for memory in ("fresh", "recycled")
        for target in (
            Target(
                f"first step, 64M, {memory} memory",
                "`build` and first step together at most 3 x a later one",
                "first_step",
                first_over_later(memory, with_build=True),
                at_most=3.0,
            ),
            Target(
                f"first step, 64M, {memory} memory",
                "first step after `build` at most 1.2 x a later one",
                "first_step",
                first_over_later(memory, with_build=False),
                at_most=1.2,
            ),
        )
    ),
    Target(
        "peak memory, 256M",
        "parameters + gradients + moments + at most 64 MB",
        "memory",
        megabytes_beyond(256 * M),
        at_most=64.0,
        unit="MB",
    ),
    Target(
        "1B parameters",
        "time grows linearly from 64M within 10 %",
        "large",
        growth_of(B),
        at_least=0.9,
        at_most=1.1,
    ),
    Target(
        "`import fusedadam`",
        "at most 60 ms beyond `import numpy`",
        "imports",
        import_milliseconds,
        at_most=60.0,
        unit="ms",
    ),
    adapter_against("torch fused", 8.0, "1,000 tensors x 1,000", "fusedadam.torch", 1_000, K),
    adapter_against("torch fused", 1.0, "one tensor, 64M", "fusedadam.torch", 1, 64 * M),
    # 250k is the mean size of the model's 40 variables.
    adapter_against("keras torch", 5.0, "a model of 10M", "fusedadam.keras", 40, 250 * K),
    # Not 1.0: the gradients of a few of the 24 layers exist at a time, and the C library may keep
    # freed ones.
    Target(
        "`fusedadam.torch.attach`, 100M",
        "peak memory lower by at least 0.8 of the gradients",
        "adapters",
        gradients_saved(100_000_000),
        at_least=0.8,
    ),
    # No slower, within the difference between two processes.
    Target(
        "optimizers stepped at once, one thread each (worst case)",
        "at most 1.05 x one after the other",
        "at_once",
        worst_at_once,
        at_most=1.05,
    ),
    *(
        Target(
            f"{as_count(elements)}, next to torch or scikit-learn (worst case)",
            "at most 1.1 x alone",
            "runtimes",
            slowdown_beside_runtimes(elements),
            at_most=1.1,
        )
        for elements in (32 << 10, M, 16 * M)
    ),
)
