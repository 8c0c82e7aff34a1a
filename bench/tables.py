# SPDX-License-Identifier: MIT
"""The Markdown tables of a run. One function per section."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from figures import NotMeasuredError, Sections, Target, beyond_expected
from rows import (
    OURS,
    PEERS,
    STEP_BYTES,
    TAIL_BYTES,
    TWIN,
    Row,
    all_elements,
    as_bytes,
    as_count,
    as_ratio,
    as_time,
    contenders_of,
    digits,
    find,
    growth,
    median,
    ratio,
    round_by_round,
    spread,
    table,
    time_with_quartiles,
    with_quartiles,
)
from targets import TARGETS

Results: TypeAlias = Mapping[str, Any]

DASH = "—"


# ---- timed rows --------------------------------------------------------------------------------


def timed_part(
    rows: Sequence[Row],
    bytes_of: Mapping[str, int] = STEP_BYTES,
    more: Mapping[str, Callable[[Row], str]] | None = None,
    ours: str = OURS,
) -> str:
    """Return a table of timed rows: times of fusedadam, and ratios of the others to it.

    Below the table are the reasons why contenders were not run.
    """
    extra = more or {}
    peers = peers_of(rows, ours)
    header = ["case", *extra, ours, "GB/s"]
    # The twin has a column only if it was run.
    twin = any(TWIN in row["seconds"] for row in rows)
    header += [*(["of the twin"] if twin else []), *(f"{peer} / {ours}" for peer in peers)]
    cells = []
    for row in rows:
        line = [row["case"], *(cell(row) for cell in extra.values())]
        line += our_cells(row, bytes_of, ours)
        line += [ratio_cell(row, TWIN, ours)] if twin else []
        line += [ratio_cell(row, peer, ours) for peer in peers]
        cells.append(line)
    return "\n\n".join([table(header, cells), *reasons(rows, [ours, *peers])])


def our_cells(row: Row, bytes_of: Mapping[str, int], ours: str) -> list[str]:
    """Return fusedadam's median time and the resulting memory traffic in GB/s."""
    if ours not in row["seconds"]:
        return [DASH, DASH]
    seconds = median(row["seconds"][ours])
    traffic = bytes_of[row["dtype"]] * all_elements(row) / seconds
    return [as_time(seconds), digits(traffic / 1e9)]


def ratio_cell(row: Row, contender: str, ours: str) -> str:
    """Format contender / fusedadam with quartiles, or return a dash."""
    figure = ratio(row, contender, ours)
    return DASH if figure is None else with_quartiles(figure)


def peers_of(rows: Sequence[Row], ours: str) -> list[str]:
    """Return the contenders that have a column: those that were timed or have a reason why not."""
    named = {name for row in rows for name in (*row["seconds"], *row.get("not_run", {}))}
    known = [peer for peer in PEERS if peer in named]
    return known + sorted(named - {ours, TWIN, *known})


def reasons(rows: Sequence[Row], peers: Sequence[str]) -> list[str]:
    """Return a Markdown list of why contenders were not run, or [] if all were."""
    # (peer, reason) -> cases; then (cases, reason) -> peers.
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for peer in peers:
            if peer not in row["seconds"]:
                reason = row.get("not_run", {}).get(peer, "not among the contenders there")
                cases.setdefault((peer, one_line(reason)), []).append(row["case"])
    groups: dict[tuple[str, str], list[str]] = {}
    for (peer, reason), where in cases.items():
        everywhere = len(where) == len(rows)
        words = "" if everywhere else f" on {'; '.join(dict.fromkeys(where))}"
        groups.setdefault((words, reason), []).append(peer)
    lines = [
        f"- not run{words}: {', '.join(group)} ({reason})"
        for (words, reason), group in groups.items()
    ]
    return ["\n".join(lines)] if lines else []


def one_line(text: str) -> str:
    """Return a message on one line and without a final full stop."""
    return " ".join(text.split()).rstrip(".")


# ---- sections ----------------------------------------------------------------------------------


def steps_part(results: Results) -> str:
    """Return the table of sizes, float64 or the like."""
    return timed_part(results["rows"])


def many_tensors_part(results: Results) -> str:
    """Return the table of many tensors, with the time per tensor."""
    more = {"per tensor": time_of_a_tensor}
    return timed_part(results["rows"], more=more)


def time_of_a_tensor(row: Row) -> str:
    """Return the time of a step per tensor."""
    seconds = row["seconds"].get(OURS)
    return DASH if seconds is None else as_time(median(seconds) / row["tensors"])


def threads_part(results: Results) -> str:
    """Return the table of threads, with the speedup over one thread."""
    rows = results["rows"]

    def gain(row: Row) -> str:
        one = find(rows, tensors=row["tensors"], elements=row["elements"], threads=1)
        if one is None or OURS not in row["seconds"]:
            return DASH
        # The two rows have different rounds, so there is no ratio round by round.
        return as_ratio(median(one["seconds"][OURS]) / median(row["seconds"][OURS]))

    more = {"threads": lambda row: f"{row['threads']}", "over 1 thread": gain}
    return timed_part(rows, more=more)


def tail_part(results: Results) -> str:
    """Return the table of training tails."""
    return timed_part(results["rows"], TAIL_BYTES)


def first_step_part(results: Results) -> str:
    """Return the table of first steps."""
    rows = []
    for row in results["rows"]:
        both = [b + f for b, f in zip(row["build"], row["first"], strict=True)]
        rows.append(
            [
                row["case"],
                row["memory"],
                row["contender"],
                as_time(median(row["build"])),
                as_time(median(row["first"])),
                as_time(median(row["later"])),
                with_quartiles(round_by_round(both, row["later"])),
                with_quartiles(round_by_round(row["first"], row["later"])),
            ]
        )
    header = ["case", "memory", "optimizer", "build", "first step", "later step"]
    header += ["build and first / later", "first / later"]
    return with_reasons(table(header, rows), results)


def memory_part(results: Results) -> str:
    """Return the table of peak memory."""
    rows = [
        [
            row["contender"],
            as_count(row["elements"]),
            as_bytes(row["expected_bytes"]),
            as_bytes(row["peak_bytes"] - row["baseline_bytes"]),
            f"{beyond_expected(row) / 1e6:,.1f} MB",
            as_bytes(row["baseline_bytes"]),
        ]
        for row in results["rows"]
    ]
    header = ["optimizer", "parameters", "parameters, gradients and moments", "at peak"]
    header += ["beyond", "process baseline"]
    return with_reasons(table(header, rows), results)


def large_part(results: Results) -> str:
    """Return the table of large steps."""
    cells = []
    for row in results["rows"]:
        count = all_elements(row)
        seconds = median(row["seconds"][OURS])
        cells.append(
            [
                as_count(count),
                as_bytes(16 * count),
                as_time(seconds),
                digits(STEP_BYTES["float32"] * count / seconds / 1e9),
                with_quartiles(growth(row)),
            ]
        )
    header = ["parameters", "memory with gradients", OURS, "GB/s"]
    header.append("time per element, relative to the first 64M in the same round")
    return with_reasons(table(header, cells), results)


def calls_part(results: Results) -> str:
    """Return the table of call times by number of tensors, and the profile of a small call."""
    names = contenders_of(results["rows"])
    rows = []
    for row in results["rows"]:
        times = [row["seconds"].get(contender) for contender in names]
        rows.append(
            [
                row["case"],
                time_of_a_tensor(row),
                *(DASH if seconds is None else as_time(median(seconds)) for seconds in times),
            ]
        )
    parts = [table(["case", "per tensor", *names], rows)]
    if "profile" in results:
        parts.append(profile_table("part of a call", results["profile"]))
    if "profile_within" in results:
        parts.append(profile_table("by itself", results["profile_within"], shares=False))
    return "\n\n".join(parts)


def profile_table(header: str, profile: Sequence[Row], *, shares: bool = True) -> str:
    """Return a table of parts with their times and, if the parts make a whole, their shares."""
    whole = sum(part["microseconds"] for part in profile)
    rows = []
    for part in profile:
        line = [part["part"], f"{part['microseconds']:.2f} us"]
        line += [f"{100 * part['microseconds'] / whole:.0f} %"] if shares else []
        rows.append(line)
    if shares:
        rows.append(["total", f"{whole:.2f} us", ""])
    return table([header, "time", *(["share"] if shares else [])], rows)


def training_part(results: Results) -> str:
    """Return the table of trainings, with the optimizer's share of the time."""
    rows = []
    for row in results["rows"]:
        shares = spread(optimizer_shares(row))
        rows.append(
            [
                row["framework"],
                row["optimizer"],
                as_time(median(row["gradient_seconds"])),
                as_time(median(row["optimizer_seconds"])),
                f"{100 * shares.middle:.1f} % ({100 * shares.low:.1f} to {100 * shares.high:.1f})",
                f"{100 * row['accuracy']:.1f} %",
            ]
        )
    header = ["gradients from", "optimizer", "gradients", "steps", "share of the optimizer"]
    return with_reasons(table([*header, "accuracy"], rows), results)


def optimizer_shares(row: Row) -> list[float]:
    """Return the optimizer's share of the time in each round."""
    pairs = zip(row["gradient_seconds"], row["optimizer_seconds"], strict=True)
    return [optimizer / (gradients + optimizer) for gradients, optimizer in pairs]


def sparse_rows_part(results: Results) -> str:
    """Return the comparison of lazy steps of some rows with the dense step."""
    rows = []
    for row in results["rows"]:
        lazy, dense = row["seconds"]["lazy"], row["seconds"]["dense"]
        rows.append(
            [
                f"{row['table_rows']:,} x {row['width']}",
                f"{row['rows']:,}",
                as_time(median(lazy)),
                as_time(median(dense)),
                with_quartiles(round_by_round(dense, lazy)),
            ]
        )
    return table(["table", "rows named", "lazy", "dense step", "dense / lazy"], rows)


def imports_part(results: Results) -> str:
    """Return the tables of import times."""
    rows = []
    for row in results["rows"]:
        times = spread([1e3 * seconds for seconds in row["seconds"]])
        name = f"`import {row['package']}`"
        beyond = f"{name}, beyond `import numpy`" if row["package"] == OURS else name
        rows.append(
            [beyond, f"{digits(times.middle)} ms ({digits(times.low)} to {digits(times.high)})"]
        )
    text = table(["import", "time (quartiles)"], rows)
    modules = [
        [f"`{part['module']}`", as_time(part["own_seconds"]), as_time(part["seconds_with_imports"])]
        for part in results.get("parts", [])
    ]
    if modules:
        text += "\n\n" + table(["module", "by itself", "with what it imports"], modules)
    return text


def times_part(results: Results) -> str:
    """Return tables of times with quartiles. Rows with the same contenders share a table."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in results["rows"]:
        groups.setdefault(tuple(contenders_of([row])), []).append(row)
    tables = []
    for names, rows in groups.items():
        cells = [
            [row["case"], *(time_with_quartiles(row["seconds"][name]) for name in names)]
            for row in rows
        ]
        tables.append(table(["case", *names], cells))
    return with_reasons("\n\n".join(tables), results)


def adapters_part(results: Results) -> str:
    """Return a table of steps for each adapter, and one of peak memory."""
    adapters = dict.fromkeys(row["adapter"] for row in timed_rows(results))
    parts = [
        timed_part([row for row in timed_rows(results) if row["adapter"] == adapter], ours=adapter)
        for adapter in adapters
    ]
    peaks = [
        [
            row["contender"],
            as_count(row["elements"]),
            as_bytes(row["expected_bytes"]),
            as_bytes(row["peak_bytes"] - row["baseline_bytes"]),
            as_bytes(beyond_expected(row)),
        ]
        for row in results["rows"]
        if "attached" in row
    ]
    if peaks:
        header = ["training", "parameters", "parameters and moments", "at peak", "beyond"]
        parts.append(table(header, peaks))
    # The reasons of timed rows are already below their tables.
    return with_reasons("\n\n".join(parts), {**results, "rows": []})


def timed_rows(results: Results) -> list[Row]:
    """Return the rows with times."""
    return [row for row in results["rows"] if "seconds" in row]


def with_reasons(text: str, results: Results) -> str:
    """Append the reasons why parts of a section were not run, if there are any."""
    not_run = results.get("not_run", {})
    # A list if a contender may run at one size and not at another.
    reasons = (
        [(name, reason) for name, reason in not_run.items()]
        if isinstance(not_run, Mapping)
        else [
            (f"{entry['contender']}, {as_count(entry['elements'])}", entry["reason"])
            for entry in not_run
        ]
    )
    for row in results["rows"]:
        reasons += row.get("not_run", {}).items()
    lines = dict.fromkeys(f"- not run: {name} ({one_line(why)})" for name, why in reasons)
    return "\n\n".join([text, *(["\n".join(lines)] if lines else [])])


# ---- what is not a section of its own ----------------------------------------------------------


def targets_part(sections: Sections, targets: Sequence[Target] = TARGETS) -> str:
    """Return the table of targets, with each measured figure and verdict."""
    rows, verdicts = [], []
    for target in targets:
        try:
            figure = target.figure(sections)
        except NotMeasuredError as error:
            measured, verdict = DASH, f"not measured: {one_line(str(error))}"
            verdicts.append("not measured")
        else:
            unit = f" {target.unit}" if target.unit else ""
            measured = with_quartiles(figure)
            if figure.low == figure.high:
                measured = as_ratio(figure.middle)
            measured += unit
            verdict = "met" if target.met(figure.middle) else "**MISSED**"
            verdicts.append(verdict)
        rows.append([target.work, target.rule, measured, verdict])
    counted = [verdicts.count("met"), verdicts.count("**MISSED**"), verdicts.count("not measured")]
    summary = f"{counted[0]} met, {counted[1]} missed" + (
        f", {counted[2]} not measured" if counted[2] else ""
    )
    return table(["work", "target", "measured", ""], rows) + f"\n\n{summary}."


def machine_part(document: Mapping[str, Any], kept: Sequence[str] = ()) -> str:
    """Return the description of a run: date, machine, software and settings.

    `kept` names the parts of the page that are from an earlier run.
    """
    rows = [["date", dates(document)]]
    rows += [[words(key), plain(value)] for key, value in document["machine"].items()]
    rows.append(["software", plain(document["software"])])
    rows.append(["threads", str(document["threads"])])
    rows.append(["rounds", str(document["rounds"])])
    rows.append(["duration of this run", f"{document['seconds'] / 60:.1f} minutes"])
    rows += [[f"absent: {name}", one_line(why)] for name, why in document["absent"].items()]
    parts = [table(["", ""], rows)]
    if document["quick"]:
        parts.insert(
            0, "**A quick run, which shows that everything works: no figure here means anything.**"
        )
    if kept:
        parts.append(f"Not in this run, and shown as an earlier one had it: {', '.join(kept)}.")
    return "\n\n".join(parts)


def dates(document: Mapping[str, Any]) -> str:
    """Return the date of the run, and the sections with other dates."""
    days: dict[str, list[str]] = {}
    for name in document["sections"]:
        days.setdefault(date_of(document, name), []).append(name)
    days.pop(document["date"], None)
    earlier = [f"{', '.join(names)}: {day}" for day, names in sorted(days.items())]
    return "; ".join([document["date"], *earlier])


def date_of(document: Mapping[str, Any], section: str) -> str:
    """Return the date of a section, which may be kept from an earlier run."""
    day: str = document["sections"][section].get("date", document["date"])
    return day


def words(key: str) -> str:
    """Return the displayed name of an entry."""
    return {
        "cpu": "CPU",
        "os": "OS",
        "l1d": "L1d",
        "l2": "L2",
        "l3": "L3",
        "memory_gib": "memory (GiB)",
    }.get(key, key.replace("_", " "))


def plain(value: Any) -> str:
    """Format a value of an entry."""
    if value is None or isinstance(value, bool):
        return {None: "unknown", True: "yes", False: "no"}[value]
    if isinstance(value, Mapping):
        # A nested mapping is in brackets.
        return ", ".join(
            f"{words(key)} ({plain(inner)})"
            if isinstance(inner, Mapping)
            else f"{words(key)} {plain(inner)}"
            for key, inner in value.items()
        )
    if isinstance(value, list | tuple):
        return ", ".join(plain(inner) for inner in value)
    return one_line(str(value)).replace("|", "/")


# The README's figures: few, from both large and small work.
HEADLINES = (
    ("one tensor of 64M", "sizes", 1, 1 << 26, "torch fused"),
    ("one tensor of 1M, in cache", "sizes", 1, 1 << 20, "torch fused"),
    ("one tensor of 10,000", "sizes", 1, 10_000, "torch fused"),
    ("1,000 tensors of 1,000", "many_tensors", 1_000, 1_000, "torch fused"),
    ("a training tail, 64M", "tail", 1, 1 << 26, "torch"),
)


def figures_part(document: Mapping[str, Any]) -> str:
    """Return the README's table of figures."""
    sections = document["sections"]
    rows = []
    for name, section, tensors, elements, torch in HEADLINES:
        row = find(sections[section]["rows"], tensors=tensors, elements=elements)
        if row is None:
            rows.append([name, DASH, DASH, DASH, DASH])
            continue
        rows.append(
            [
                name,
                as_time(median(row["seconds"][OURS])),
                *(short_ratio(row, contender) for contender in (TWIN, torch, "deepspeed")),
            ]
        )
    machine = document["machine"]
    header = ["float32", OURS, "of the traffic twin"]
    header += [f"speedup over {peer}" for peer in ("torch fused", "DeepSpeed")]
    days = sorted({date_of(document, section) for _, section, *_ in HEADLINES})
    where = f"{', '.join(days)}, {plain(machine['cpu'])}, {document['threads']} threads."
    return "\n\n".join([table(header, rows), where])


def short_ratio(row: Row, contender: str) -> str:
    """Format contender / fusedadam without quartiles, or return a dash."""
    figure = ratio(row, contender)
    return DASH if figure is None else as_ratio(figure.middle)


FLOAT_SECTIONS: dict[str, Callable[[Results], str]] = {
    "sizes": steps_part,
    "float64": steps_part,
    "many_tensors": many_tensors_part,
    "threads": threads_part,
    "tail": tail_part,
    "first_step": first_step_part,
    "memory": memory_part,
    "large": large_part,
    "calls": calls_part,
    "training": training_part,
    "sparse_rows": sparse_rows_part,
    "imports": imports_part,
    "neighbours": times_part,
    "adapters": adapters_part,
    "callbacks": times_part,
    "ranks": times_part,
    "at_once": times_part,
    "runtimes": times_part,
}
