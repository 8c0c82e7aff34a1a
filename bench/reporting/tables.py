# SPDX-License-Identifier: MIT
"""The parts of the page, each made from one or more sections."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from peers import STEPS
from peers.formats import FLOAT32, contender, parts_of
from runner import Row
from sections import SECTIONS

from reporting import costs, data, targets
from reporting.data import DASH, OURS, TWIN, Sections

# A cell of a row; a dash if it raises NotMeasuredError.
Cell: TypeAlias = Callable[[Row], str]
Part: TypeAlias = Callable[[Sections], str]


def table(rows: Sequence[Row], cells: Mapping[str, Cell]) -> str:
    """Return a table of cases, and below it why contenders were not run."""

    def shown(cell: Cell, row: Row) -> str:
        try:
            return cell(row)
        except data.NotMeasuredError:
            return DASH

    records = [
        {"case": row["case"], **{name: shown(cell, row) for name, cell in cells.items()}}
        for row in rows
    ]
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name, why in row["not_run"].items():
            cases.setdefault((name, data.one_line(why)), []).append(row["case"])
    groups: dict[tuple[str, str], list[str]] = {}
    for (name, why), where in cases.items():
        words = "" if len(where) == len(rows) else f" on {'; '.join(where)}"
        groups.setdefault((words, why), []).append(name)
    reasons = [f"- not run{w}: {', '.join(n)} ({why})" for (w, why), n in groups.items()]
    return "\n\n".join([data.markdown(records), *(["\n".join(reasons)] if reasons else [])])


def time_of(name: str) -> Cell:
    """Return a cell with the median time of a contender."""
    return lambda row: data.as_time(data.times(row, name)[name].median())


def ratio_to(name: str, ours: str) -> Cell:
    """Return a cell with a contender's time over ours."""
    return lambda row: data.quartiles(data.ratio(row, name, ours))


def times_table(rows: Sequence[Row]) -> str:
    """Return a table of the times of all contenders of some rows."""

    def cell(name: str) -> Cell:
        return lambda row: data.quartiles(data.times(row, name)[name], data.as_time)

    return table(rows, {name: cell(name) for row in rows for name in row["seconds"]})


def steps_table(
    rows: Sequence[Row],
    ours: str = OURS,
    more: Mapping[str, Cell] | None = None,
    of_element: int = data.STEP_BYTES,
) -> str:
    """Return a table of our time, its traffic, and the times of others over ours."""
    named = {name for row in rows for name in (*row["seconds"], *row["not_run"])}
    peers = [name for name in STEPS if name in named - {ours, OURS, TWIN}]
    peers += sorted(named - {ours, TWIN, *peers})

    def traffic(row: Row) -> str:
        moved = of_element * (2 if row["dtype"] == "float64" else 1)
        moved *= row["tensors"] * row["elements"]
        return data.digits(moved / data.times(row, ours)[ours].median() / 1e9)

    cells = {**(more or {}), ours: time_of(ours), "GB/s": traffic}
    if TWIN in named:
        cells["of the twin"] = ratio_to(TWIN, ours)
    return table(rows, cells | {peer: ratio_to(peer, ours) for peer in peers})


def rows_of(sections: Sections, name: str) -> list[Row]:
    """Return the rows of a section."""
    return list(sections[name]["rows"])


def together(*parts: str) -> str:
    """Return tables below one another."""
    return "\n\n".join(parts)


# ---- the parts ---------------------------------------------------------------------------------


def one_tensor(sections: Sections) -> str:
    """Steps of one tensor, by size and dtype."""
    wide = [{**row, "case": f"{row['case']}, float64"} for row in rows_of(sections, "float64")]
    return steps_table([*rows_of(sections, "sizes"), *wide])


def many_tensors(sections: Sections) -> str:
    """Steps of many tensors."""

    def of_each(row: Row) -> str:
        return data.as_time(data.times(row, OURS)[OURS].median() / row["tensors"])

    return steps_table(rows_of(sections, "many_tensors"), more={"per tensor": of_each})


def tail(sections: Sections) -> str:
    """Training tails."""
    return steps_table(rows_of(sections, "tail"), of_element=data.TAIL_BYTES)


def bytes_of(of: Callable[[Row], float], write: Callable[[float], str] = data.as_bytes) -> Cell:
    """Return a cell with an amount of memory."""
    return lambda row: write(of(row)) if "peak_bytes" in row else DASH


# Trainings with ours and with the stock optimizer. The ratio of CPU times fails if neither was run.
TRAINING: dict[str, Cell] = {
    "CPU time, stock over ours": lambda row: data.quartiles(data.cpu_ratio(row)),
    "speed": lambda row: data.quartiles(data.ratio(row, *reversed([*row["seconds"]]))),
    "ours": lambda row: time_of(next(iter(row["seconds"])))(row),
    "page faults of ours, stock": lambda row: ", ".join(
        f"{statistics.median(each):,.0f}" for each in row["faults"].values()
    ),
}
PEAK: dict[str, Cell] = {
    "has to exist": bytes_of(lambda row: row["expected_bytes"]),
    "at peak": bytes_of(lambda row: row["peak_bytes"] - row["baseline_bytes"]),
    "beyond": bytes_of(data.beyond),
}


def frameworks(sections: Sections) -> str:
    """PyTorch, JAX and Keras: steps, training steps and peaks."""
    rows = rows_of(sections, "adapters")
    return together(
        *(
            steps_table([row for row in rows if ours in {*row["seconds"], *row["not_run"]}], ours)
            for ours in ("fusedadam.torch", "fusedadam.keras", "fusedadam.jax")
        ),
        table(rows_of(sections, "trainings"), TRAINING),
        table(rows_of(sections, "peaks"), PEAK),
    )


def neighbours(sections: Sections) -> str:
    """Steps beside other work."""
    return together(*(times_table(rows_of(sections, name)) for name in ("runtimes", "ranks")))


def storage(sections: Sections) -> str:
    """Formats and optimizers that store less, and the memory of packed state."""
    large, of_all = rows_of(sections, "storage")
    best = next((parts_of(name)[1] for name in of_all["seconds"]), "")
    records = []
    for name in of_all["seconds"]:
        form, isa = parts_of(name)
        if isa not in ("", best):  # only in the targets
            continue
        record: dict[str, Any] = {"stored": form, "instructions": isa or DASH}
        record["bytes a parameter"] = f"{of_all['held_bytes'][name] / of_all['elements']:.2f}"
        for row in (large, of_all):
            base, size = contender(FLOAT32, isa or best), data.as_count(row["elements"])
            timed = name in row["seconds"] and base in row["seconds"]
            record[f"step, {size}"] = time_of(name)(row) if timed else DASH
            record[f"speed, {size}"] = ratio_to(base, name)(row) if timed else DASH
        records.append(record)
    held = {**PEAK, "bytes a parameter": bytes_of(targets.bytes_held, lambda x: f"{x:.2f}")}
    held["step"] = lambda r: data.as_time(r["step_seconds"]) if "step_seconds" in r else DASH
    reasons = {n: data.one_line(w) for row in (large, of_all) for n, w in row["not_run"].items()}
    return together(
        data.markdown(records),
        *("\n".join(f"- not run: {n} ({w})" for n, w in reasons.items()),) * bool(reasons),
        table(rows_of(sections, "storage_memory"), held),
    )


# Part -> the sections that it is made from, and what makes it.
PARTS: dict[str, tuple[Sequence[str], Part]] = {
    "targets": ([*SECTIONS], targets.targets_part),
    "one_tensor": (["sizes", "float64"], one_tensor),
    "many_tensors": (["many_tensors"], many_tensors),
    "tail": (["tail"], tail),
    "frameworks": (["adapters", "trainings", "peaks"], frameworks),
    "neighbours": (["runtimes", "ranks"], neighbours),
    "storage": (["storage", "storage_memory"], storage),
    "cost_model": (costs.FITTED, costs.cost_model_part),
}


# ---- what is about the run ---------------------------------------------------------------------


def machine_part(document: Mapping[str, Any], kept: Sequence[str] = ()) -> str:
    """Return the description of a run. `kept` names the parts that are from an earlier run."""
    days: dict[str, list[str]] = {}
    for name, section in document["sections"].items():
        days.setdefault(section["date"], []).append(name)
    days.pop(document["date"], None)
    date = "; ".join([document["date"], *(f"{', '.join(n)}: {day}" for day, n in days.items())])
    machine, software = (
        ", ".join(f"{name} {value}" for name, value in document[key].items())
        for key in ("machine", "software")
    )
    quick = "**A quick run: no figure here means anything.**\n\n" if document["quick"] else ""
    rounds = f"{document['threads']} threads, at most {document['rounds']} rounds"
    lines = {
        "Run": f"{date}, {document['seconds'] / 60:.0f} minutes, {rounds}",
        "Machine": machine,
        "Software": software,
        **{f"Absent: {name}": data.one_line(why) for name, why in document["absent"].items()},
        **({"Parts of an earlier run": ", ".join(kept)} if kept else {}),
    }
    return quick + "\n".join(f"- **{name}:** {line}" for name, line in lines.items())


# The README's figures: few, from both large and small work.
HEADLINES = (
    ("one tensor of 64M", "sizes", "1 x 67,108,864", "torch fused"),
    ("one tensor of 1M, in cache", "sizes", "1 x 1,048,576", "torch fused"),
    ("one tensor of 10,000", "sizes", "1 x 10,000", "torch fused"),
    ("1,000 tensors of 1,000", "many_tensors", "1,000 x 1,000", "torch fused"),
    ("a training tail, 64M", "tail", "1 x 67,108,864", "torch"),
)


def figures_part(document: Mapping[str, Any]) -> str:
    """Return the README's table of figures."""
    records = []
    for name, section, case, torch in HEADLINES:
        row = data.row_of(document["sections"], section, case)
        others = {"of the traffic twin": TWIN, "speedup over torch fused": torch}
        others["speedup over DeepSpeed"] = "deepspeed"
        speedups = {
            word: data.as_ratio(data.ratio(row, other).median())
            for word, other in others.items()
            if other in row["seconds"]
        }
        records.append({"float32": name, OURS: time_of(OURS)(row), **speedups})
    days = sorted({document["sections"][section]["date"] for _, section, *_ in HEADLINES})
    where = f"{', '.join(days)}, {document['machine'].get('CPU')}, {document['threads']} threads."
    return f"{data.markdown(records)}\n\n{where}"
