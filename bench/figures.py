# SPDX-License-Identifier: MIT
"""What a performance target is, and how its figure is computed from the results of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rows import OURS, Spread, as_count, find, growth, ratio, round_by_round, spread

Sections: TypeAlias = Mapping[str, Any]


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


def peak_of(sections: Sections, section: str, contender: str, elements: int) -> Any:
    """Return the row with the peak of a contender. Raise if it was not run."""
    for row in rows_of(sections, section):
        if row.get("contender") == contender and find([row], elements=elements):
            return row
    not_run = sections[section].get("not_run", {})
    reasons = not_run if isinstance(not_run, Mapping) else {}
    why = f"no peak of {contender} at {as_count(elements)} in this run"
    raise NotMeasuredError(reasons.get(contender, why))


def megabytes_beyond(elements: int, section: str = "memory", contender: str = OURS) -> Figure:
    """Figure: peak memory in MB beyond parameters, gradients and moments."""

    def figure(sections: Sections) -> Spread:
        return spread([beyond_expected(peak_of(sections, section, contender, elements)) / 1e6])

    return figure


def bytes_per_element(section: str, contender: str, elements: int) -> Figure:
    """Figure: bytes of an element that the contender holds after a step."""

    def figure(sections: Sections) -> Spread:
        row = peak_of(sections, section, contender, elements)
        return spread([row["held_bytes"] / row["elements"]])

    return figure


def gibibytes_at_peak(section: str, case: str) -> Figure:
    """Figure: peak memory of the whole process in GiB."""

    def figure(sections: Sections) -> Spread:
        for row in rows_of(sections, section):
            if row.get("case") == case:
                return spread([row["peak_bytes"] / 2**30])
        why = sections[section].get("not_run", {}).get(case, f"no {case} in this run")
        raise NotMeasuredError(why)

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


def format_times(other: str, ours: str, elements: int) -> Figure:
    """Figure: a contender of `storage` / a format on an instruction set, round by round."""

    def figure(sections: Sections) -> Spread:
        rows = [row for row in rows_of(sections, "storage") if find([row], elements=elements)]
        reasons: dict[str, str] = {}
        for row in rows:
            result = ratio(row, other, ours)
            if result is not None:
                return result
            reasons |= row["not_run"]
        why = next((reasons[name] for name in (ours, other) if name in reasons), "not in this run")
        raise NotMeasuredError(f"{other} or {ours} at {as_count(elements)}: {why}")

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
