# SPDX-License-Identifier: MIT
"""The project's performance targets as data: work, bounds, and how to compute the figure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import pandas as pd
from peers.formats import PACKED, contender
from runner import Row

from reporting import data
from reporting.data import OURS, TWIN, NotMeasuredError, Sections, ratio, row_of, times

# The values of all rounds, of which the median counts.
Figure: TypeAlias = Callable[[Sections], pd.Series]
Where: TypeAlias = tuple[str, str]  # a section, and a case of it

M = 1 << 20


class Target(NamedTuple):
    """A figure and its bounds in the figure's unit. None means no bound."""

    work: str
    rule: str
    figure: Figure
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    def met(self, value: float) -> bool:
        """Return whether an unrounded figure is within the bounds."""
        low, high = self.at_least, self.at_most
        return (low is None or value >= low) and (high is None or value <= high)


# ---- figures -----------------------------------------------------------------------------------


def of_row(where: Where, figure: Callable[[Row], object]) -> Figure:
    """Return the figure of the row of a case: a value, or one for each round."""
    return lambda sections: pd.Series(figure(row_of(sections, *where)))


def first_step(row: Row, with_build: bool) -> pd.Series:
    """Return the first step, with or without `build`, over a later step."""
    seconds = times(row, "build", "first", "later")
    return (seconds["first"] + with_build * seconds["build"]) / seconds["later"]


def growth(row: Row) -> pd.Series:
    """Return the time per element relative to that of the part that was stepped in between."""
    return row["part"] / row["elements"] / ratio(row, "part")


def bytes_held(row: Row) -> float:
    """Return the bytes of an element after a step."""
    return float(row["held_bytes"] / row["elements"])


def megabytes_beyond(row: Row) -> float:
    """Return the peak in MB beyond the process and what a step needs."""
    return data.beyond(row) / 1e6


def gradients_saved(sections: Sections) -> pd.Series:
    """Return by how much `attach` reduces the peak, as a fraction of the size of all gradients."""
    whole, attached = (
        row_of(sections, "peaks", case) for case in ("backward, then step", "attach")
    )
    return pd.Series((data.beyond(whole) - data.beyond(attached)) / (4 * whole["elements"]))


def largest(ratios: list[pd.Series]) -> pd.Series:
    """Return the ratios with the largest median."""
    if not ratios:
        raise NotMeasuredError("nothing to compare in this run")
    return max(ratios, key=lambda values: float(values.median()))


def worst_at_once(sections: Sections) -> pd.Series:
    """Return concurrent steps over steps in turn, in the worst case."""
    rows = sections.get("at_once", {"rows": []})["rows"]
    return largest([ratio(row, "at once", "one after the other") for row in rows])


# ---- targets -----------------------------------------------------------------------------------


def against(
    other: str, bound: float, work: str, where: Where, ours: str = OURS, name: str = ""
) -> Target:
    """Return a target for the speed relative to a peer, or for the fraction of the twin's speed."""
    rule = f"at least {bound:g} " + ("of the twin" if other == TWIN else f"x {name or other}")
    return Target(work, rule, of_row(where, lambda row: ratio(row, other, ours)), bound)


def at_most(
    bound: float, unit: str, work: str, rule: str, where: Where, of: Callable[[Row], object]
) -> Target:
    """Return a target with an upper bound."""
    return Target(work, rule, of_row(where, of), None, bound, unit)


def of_format(
    other: str, bound: float, work: str, form: str, elements: int = 64 * M, isa: str = "avx512"
) -> Target:
    """Return a target for the speed of a format relative to float32, or to a peer."""
    work = f"{work}, {data.as_count(elements)}, {'AVX-512' if isa == 'avx512' else 'AVX2'}"
    base = contender(other, isa) if other == "float32" else other
    where = ("storage", f"1 x {elements:,}")
    return against(base, bound, work, where, contender(form, isa), other)


def beside_runtimes(elements: int) -> Target:
    """Return a target for a step next to another OpenMP runtime, relative to one alone."""

    def worst(sections: Sections) -> pd.Series:
        row = row_of(sections, "runtimes", f"{elements:,}")
        return largest([ratio(row, name, "alone") for name in row["seconds"] if name != "alone"])

    work = f"{data.as_count(elements)}, next to torch or scikit-learn (worst case)"
    return Target(work, "at most 1.1 x alone", worst, None, 1.1)


IN_CACHE, LARGE, MANY = ("sizes", f"1 x {M:,}"), f"1 x {64 * M:,}", "1,000 x 1,000"
TARGETS = (
    *(
        against(peer, bound, f"one tensor, {n}M", ("sizes", f"1 x {n * M:,}"))
        for n in (64, 256)
        for peer, bound in ((TWIN, 0.97), ("torch fused", 1.0), ("deepspeed", 1.0))
    ),
    against("torch fused", 2.0, "one tensor, 1M (in cache)", IN_CACHE),
    against("deepspeed", 1.2, "one tensor, 1M (in cache)", IN_CACHE),
    against("numba", 0.9, "one tensor, 1M (in cache)", IN_CACHE),
    against("torch fused", 10.0, "one tensor, 10k", ("sizes", "1 x 10,000")),
    at_most(2.5, "us", "one tensor, 1k, from Python", "at most 2.5 us a call",
            ("sizes", "1 x 1,000"), lambda row: 1e6 * times(row, OURS)[OURS]),
    against("torch fused", 20.0, "1,000 tensors x 1,000", ("many_tensors", MANY)),
    against("deepspeed", 20.0, "1,000 tensors x 1,000", ("many_tensors", MANY)),
    against("torch fused", 20.0, "100,000 tensors x 100", ("many_tensors", "100,000 x 100")),
    against(TWIN, 0.97, "float64, 32M", ("float64", f"1 x {32 * M:,}")),
    against("torch", 1.6, "training tail, 64M", ("tail", LARGE)),
    *(
        at_most(bound, "", f"first step, 64M, {name} memory", rule,
                ("first_step", f"{OURS}, {name} memory"),
                functools.partial(first_step, with_build=build))
        for name in ("fresh", "recycled")
        for bound, build, rule in (
            (3.0, True, "`build` and first step together at most 3 x a later one"),
            (1.2, False, "first step after `build` at most 1.2 x a later one"),
        )
    ),
    at_most(64.0, "MB", "peak memory, 256M", "parameters + gradients + moments + at most 64 MB",
            ("memory", OURS), megabytes_beyond),
    Target("1B parameters", "time grows linearly from 64M within 10 %",
           of_row(("large", "1 x 1,000,000,000"), growth), 0.9, 1.1),
    at_most(60.0, "ms", "`import fusedadam`", "at most 60 ms beyond `import numpy`",
            ("imports", "imports"), lambda row: 1e3 * times(row)["import fusedadam"]),
    against("torch fused", 8.0, "`fusedadam.torch`, 1,000 tensors x 1,000", ("adapters", MANY),
            "fusedadam.torch"),
    against("torch fused", 1.0, "`fusedadam.torch`, one tensor, 64M", ("adapters", LARGE),
            "fusedadam.torch"),
    against("keras torch", 5.0, "`fusedadam.keras`, a model of 10M",
            ("adapters", "a model of 9,971,176"), "fusedadam.keras"),
    *(
        against("optax", 1.5, f"`fusedadam.jax`, {case}", ("adapters", f"JAX, {case}"),
                "fusedadam.jax")
        for case in (LARGE, f"10 x {M:,}")
    ),
    *(
        Target(f"a training step, {case}", f"at least {bound:g} x the CPU time of stock",
               of_row(("trainings", case), data.cpu_ratio), bound)
        for case, bound in (("flax, 1M", 1.0), ("flax, 10M", 1.1), ("flax, 10M, 20 layers", 1.1),
                            ("flax, 67M", 1.4), ("Keras on JAX, 10M", 1.15),
                            ("Keras on JAX, 10M, 20 layers", 1.15))
    ),
    # Not 1.0: the gradients of a few of the 24 layers exist at a time, and the C library may keep
    # freed ones.
    Target("`fusedadam.torch.attach`, 100M", "peak memory lower by at least 0.8 of the gradients",
           gradients_saved, 0.8),
    # No slower, within the difference between two processes.
    Target("optimizers stepped at once, one thread each (worst case)",
           "at most 1.05 x one after the other", worst_at_once, None, 1.05),
    *(beside_runtimes(elements) for elements in (32 << 10, M, 16 * M)),
    *(
        of_format("float32", bound, work, form, isa=isa)
        for work, form, bounds in (
            ("all bf16", "bf16", (1.7, 1.25)),
            ("bf16 + int8 weights, bf16 moments", "bf16 + int8", (1.5, 1.05)),
            ("packed, 7 bytes", PACKED, (0.85, 0.58)),
        )
        for isa, bound in zip(("avx512", "avx2"), bounds, strict=True)
    ),
    # No slower, within the noise of a round.
    of_format("float32", 0.97, "float32 state, bf16 gradients and copy", "float32 + bf16 copy"),
    of_format("torch fused bf16", 1.8, "all bf16", "bf16"),
    of_format("bitsandbytes-cpu-fork 8 bit", 5.0, "packed, 7 bytes", PACKED, 16 * M),
    of_format("torchao 8 bit", 20.0, "packed, 7 bytes", PACKED, 16 * M),
    *(
        at_most(bound, unit, f"packed, 256M, {name}", rule, ("storage_memory", f"packed, {name}"), of)
        for name, held in (("backward, then step", 7.05), ("attach", 5.05))
        for rule, of, bound, unit in (
            (f"at most {held} bytes a parameter", bytes_held, held, "bytes"),
            ("peak memory at most 64 MB beyond that", megabytes_beyond, 64.0, "MB"),
        )
    ),
    at_most(24.0, "GiB", "packed, 2.5B parameters", "a step in at most 24 GiB",
            ("storage_memory", "packed, a step of 2,500,000,000"),
            lambda row: row["peak_bytes"] / 2**30),
)  # fmt: skip


def targets_part(sections: Sections, targets: tuple[Target, ...] = TARGETS) -> str:
    """Return the table of targets, with each measured figure and verdict."""
    records = []
    for target in targets:
        try:
            values = target.figure(sections)
        except NotMeasuredError as error:
            measured, verdict = "", f"not measured: {data.one_line(str(error))}"
        else:
            measured = f"{data.quartiles(values)} {target.unit}".strip()
            verdict = "met" if target.met(float(values.median())) else "**MISSED**"
        records.append(
            {"work": target.work, "target": target.rule, "measured": measured, "": verdict}
        )
    verdicts = [record[""].partition(":")[0] for record in records]
    met, missed, not_measured = map(verdicts.count, ("met", "**MISSED**", "not measured"))
    words = f", {not_measured} not measured" if not_measured else ""
    return f"{data.markdown(records)}\n\n{met} met, {missed} missed{words}."
