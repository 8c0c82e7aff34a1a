# SPDX-License-Identifier: MIT
"""Train small models in every format of weights and moments, and compare their losses.

    python bench/quality.py                 everything but --large: 40 minutes on two cores
    python bench/quality.py --large 60      a larger language model, for 60 minutes
    python bench/quality.py --keep          only what the file of results lacks
    python bench/quality.py --tasks mlp zipf --formats 7-bytes --seeds 5

Needs torch and matplotlib. Writes a JSON file after each training, then docs/quality.md and its
plots. Results of earlier runs stay in the file until they are measured again.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import fusedadam
import machine
import numpy as np
import plots
import torch
from matplotlib.figure import Figure
from plot_looks import BLACK, BLUE, GREEN, ORANGE, SHADE, SKY, VERMILION, WIDTH
from quality_tasks import FORMATS, LARGE, REFERENCE, TASKS, TINY_RATES, TRAININGS, large
from report import write
from rows import as_count, digits, table

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "bench/results/quality.json"
PAGE = ROOT / "docs/quality.md"
EDGE = 100.0  # standard deviations; the plot draws at its edge what is beyond

PAGE_TEXT = """\
# What storing less costs

`python bench/quality.py --seeds {seeds}` trained small models in every format and wrote this page.
({date}, {minutes:.0f} minutes of one core, {software}.){warning}

## Formats

{formats}

Bytes are those of a parameter with its gradient and moments. Weights in bf16 with low bits are
split float32 weights ([`split_`](storage.md)). "Nearest" is how `torch.optim` rounds.

All models compute in float32. Before each forward pass they get the stored weights, widened and
without low bits; gradients are rounded to the dtype of their weights. So formats differ only in
what is stored. All have beta_2 = 0.999, the same initial weights, batches and schedule.

## Validation losses

The first row has float32's mean loss and the standard deviation of its seeds. The others have the
difference of their mean loss from float32's, in these standard deviations: below zero is better.
Differences beyond {noise:.1f} are bold; with {seeds} seeds, chance alone makes up to one in ten of
them. "Largest update" is the largest change of a weight in a step, divided by the learning rate.
(The distance to the next weight that the format has is subtracted, since rounding may account for
so much.)

{losses}

![Difference of validation losses from float32's](benchmarks/quality.png)

{tasks}

## Single effects

*Movement*: how far weights near 0.05 move in 1,000 steps at a tiny learning rate, as a share of how
far they move in float64. *After a pause*: the largest update, divided by the learning rate, after
2,000 gradients of zero; gradients have sizes from 1e-6 to 1e2.

{effects}
{large}
## Not covered

These models have at most some million parameters and run for some thousand steps on a CPU. Nothing
here shows what happens with billions of parameters, in weeks of training or in fine-tuning of large
models. Other betas, epsilons and optimizers were not tried, nor gradients that are computed in
16 bits, which have errors of their own. The losses of several seeds detect large effects only.
"""

LARGE_TEXT = """
## A larger language model

{parameters} parameters, {steps:,} steps in {minutes:g} minutes (`--large {minutes:g}`). The formats took their steps in
turn, with the same batches of the standard library's sources. One seed: small differences mean
nothing.

{rows}

![Validation losses of a larger language model](benchmarks/quality_large.png)
"""


class Trial(NamedTuple):
    """One training."""

    task: str
    form: str
    seed: int


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, metavar="TASK")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, metavar="FORMAT", default=FORMATS)
    parser.add_argument("--seeds", type=int, default=8, help="per task and format (8)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the numbers of steps (1)")
    parser.add_argument("--workers", type=int, default=machine.usable_cpus(), help="of one thread")
    parser.add_argument("--large", type=float, metavar="MINUTES", help="without --tasks, only this")
    parser.add_argument("--keep", action="store_true", help="do not repeat what the file has")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    if args.scale != 1.0 and (args.output == OUTPUT or args.page == PAGE):
        parser.error("--scale makes figures that mean nothing: name another --output and --page")
    if args.tasks is None:
        args.tasks = [] if args.large else list(TASKS)
    return args


def run_trial(trial: Trial, scale: float) -> dict[str, Any]:
    """Run a trial on one thread; its `seconds` are those of the CPU."""
    torch.set_num_threads(1)
    fusedadam.set_num_threads(1)
    begin = time.process_time()
    result = TASKS[trial.task](FORMATS[trial.form], trial.seed, scale)
    return {**trial._asdict(), **result, "seconds": round(time.process_time() - begin, 2)}


def run_trials(trials: Sequence[Trial], scale: float, workers: int) -> Iterator[dict[str, Any]]:
    """Yield the results of trials as they come."""
    # Not forked: a child of a process with threads may hang.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    try:
        for done in as_completed([pool.submit(run_trial, trial, scale) for trial in trials]):
            yield done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is asked for; write the file, the page and the plots."""
    args = arguments(argv)
    document: dict[str, Any] = {"scale": args.scale, "trials": []}
    if args.output.exists():
        document = json.loads(args.output.read_text())
        if document["scale"] != args.scale:
            print(f"{args.output} has the scale {document['scale']:g}", file=sys.stderr)
            return 2
    results = {Trial(row["task"], row["form"], row["seed"]): row for row in document["trials"]}
    trials = [
        Trial(task, form, seed)
        for seed in range(args.seeds)
        for task in args.tasks
        for form in dict.fromkeys([REFERENCE, *args.formats])
    ]
    trials = [trial for trial in trials if not (args.keep and trial in results)]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    document |= {
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "cpu": machine.cpu_name(),
        "software": machine.describe_software({"torch": torch.__version__}),
    }
    for count, row in enumerate(run_trials(trials, args.scale, args.workers), 1):
        trial = Trial(row["task"], row["form"], row["seed"])
        print(f"{count}/{len(trials)} {' '.join(map(str, trial))}: {row['seconds']} s", flush=True)
        results[trial] = row
        document["trials"] = [results[known] for known in sorted(results)]
        write(args.output, json.dumps(document, indent=1) + "\n")
    if args.large:
        document["large"] = large(args.large)
        write(args.output, json.dumps(document, indent=1) + "\n")
    args.page.parent.mkdir(parents=True, exist_ok=True)
    write(args.page, page_of(document))
    folder = args.page.parent / "benchmarks"
    plots.save(lambda: losses_plot(document["trials"]), folder / "quality.png")
    if "large" in document:
        plots.save(lambda: large_plot(document["large"]), folder / "quality_large.png")
    print(f"wrote {args.page}")
    return 0


# ---- the page -----------------------------------------------------------------------------------


def values(trials: Sequence[dict[str, Any]], task: str, form: str, name: str) -> list[float]:
    """Return a value of all seeds; NaN where it was not finite."""
    found = [row[name] for row in trials if (row["task"], row["form"]) == (task, form)]
    return [math.nan if value is None else value for value in found]


def difference(trials: Sequence[dict[str, Any]], task: str, form: str) -> float | None:
    """Return the mean loss less float32's, in standard deviations of float32's seeds.

    NaN if a training diverged, None if it was not run or if float32 has one seed.
    """
    reference, losses = (values(trials, task, name, "loss") for name in (REFERENCE, form))
    if len(reference) < 2 or not losses:
        return None
    return float((np.mean(losses) - np.mean(reference)) / np.std(reference, ddof=1))


def seeds_of(trials: Sequence[dict[str, Any]]) -> int:
    """Return the smallest number of seeds that a training of a format has."""
    counts = [len(values(trials, task, form, "loss")) for task in TRAININGS for form in FORMATS]
    return min(filter(None, counts), default=0)


def noise_of(trials: Sequence[dict[str, Any]]) -> float:
    """Return two standard deviations of a difference by chance, in those of one seed."""
    return 2 * math.sqrt(2 / max(1, seeds_of(trials)))


def page_of(document: dict[str, Any]) -> str:
    """Return the page."""
    trials, software = document["trials"], document["software"]
    return PAGE_TEXT.format(
        seeds=seeds_of(trials),
        noise=noise_of(trials),
        minutes=sum(row["seconds"] for row in trials) / 60,
        date=document["date"],
        software=f"torch {software['torch']}, Python {software['python']}, {document['cpu']}",
        warning=""
        if document["scale"] == 1
        else " **Trainings were shortened: the figures mean nothing.**",
        formats=formats_table(),
        losses=losses_table(trials),
        tasks="\n".join(f"- {name}: {task.words}" for name, task in TRAININGS.items()),
        effects=effects_table(trials),
        large=large_part(document["large"]) if "large" in document else "",
    )


def formats_table() -> str:
    """Return the table of formats."""
    rows = [
        [name, str(form.bytes), form.weights, form.low_bits or "", form.moments, form.rounding]
        for name, form in FORMATS.items()
    ]
    rows[0][-1] = ""  # float32 is not rounded
    return table(["format", "bytes", "weights", "low bits", "moments", "rounding"], rows)


def losses_table(trials: Sequence[dict[str, Any]]) -> str:
    """Return the table of differences, and of the largest updates in all trainings."""
    rows = []
    for form in FORMATS:
        cells = [loss_cell(trials, task, form) for task in TRAININGS]
        updates = [u for task in TRAININGS for u in values(trials, task, form, "update")]
        rows.append([form, *cells, largest(updates)])
    return table(["format", *TRAININGS, "largest update"], rows)


def loss_cell(trials: Sequence[dict[str, Any]], task: str, form: str) -> str:
    """Return float32's losses, or the difference from them."""
    found = values(trials, task, form, "loss")
    diverged = int(np.isnan(found).sum())
    if diverged:
        return f"**{diverged} diverged**"
    if form == REFERENCE and len(found) > 1:
        return f"{digits(float(np.mean(found)), 4)} ± {digits(float(np.std(found, ddof=1)), 2)}"
    apart = difference(trials, task, form)
    if apart is None:
        return ""
    return f"**{apart:+.1f}**" if abs(apart) > noise_of(trials) else f"{apart:+.1f}"


def effects_table(trials: Sequence[dict[str, Any]]) -> str:
    """Return the table of single effects."""
    header = ["format", *(f"movement, lr {lr:g}" for lr in TINY_RATES), "after a pause"]
    rows = []
    for form in FORMATS:
        shares = [values(trials, "tiny-rates", form, f"{lr:g}") for lr in TINY_RATES]
        cells = [f"{np.mean(found):.3f}" if found else "" for found in shares]
        rows.append([form, *cells, largest(values(trials, "pause", form, "update"))])
    return table(header, rows)


def largest(updates: Sequence[float]) -> str:
    """Return the largest of some updates, which may be NaN or absent."""
    if any(map(math.isnan, updates)):
        return "**not finite**"
    return digits(max(updates)) if updates else ""


def large_part(results: dict[str, Any]) -> str:
    """Return the section about the larger model."""
    last = results["curve"][-1]
    rows = [
        [name, "diverged" if last[name] is None else f"{last[name]:.4f}", f"{update:.2f}"]
        for name, update in results["update"].items()
    ]
    return LARGE_TEXT.format(
        parameters=as_count(results["parameters"]),
        steps=last["step"],
        minutes=results["minutes"],
        rows=table(["format", "validation loss", "largest update"], rows),
    )


# ---- plots --------------------------------------------------------------------------------------

COLOURS = (BLUE, VERMILION, GREEN, ORANGE, SKY, BLACK)


def losses_plot(trials: Sequence[dict[str, Any]]) -> Figure:
    """Draw the differences from float32: a row for each format, a mark for each training."""
    figure = Figure(figsize=(WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    forms = [form for form in FORMATS if form != REFERENCE]
    axes.axvspan(-noise_of(trials), noise_of(trials), color=SHADE, zorder=0, label="chance")
    for task, colour, marker in zip(TRAININGS, COLOURS, "osD^vP", strict=True):
        found = [(difference(trials, task, form), row) for row, form in enumerate(forms)]
        known = [(EDGE if math.isnan(x) else x, row) for x, row in found if x is not None]
        axes.plot(
            [min(max(x, -EDGE), EDGE) for x, _ in known],
            [row + 0.08 * (list(TRAININGS).index(task) - 2.5) for _, row in known],
            marker,
            color=colour,
            label=task,
        )
    axes.set_xscale("symlog", linthresh=3)
    axes.set_xlim(-12, 1.2 * EDGE)
    axes.set_xticks([-10, -3, -1, 0, 1, 3, 10, 30, EDGE])
    axes.set_xticklabels(["-10", "-3", "-1", "0", "1", "3", "10", "30", f"{EDGE:g} or more"])
    axes.set_yticks(range(len(forms)), forms)
    axes.invert_yaxis()
    axes.set(
        title="Validation loss compared with float32's",
        xlabel="standard deviations of float32's seeds; to the right is worse",
    )
    figure.legend(loc="outside lower center", ncols=7, fontsize=9)
    return figure


def large_plot(results: dict[str, Any]) -> Figure:
    """Draw the validation losses of the larger model."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = figure.subplots()
    steps = [point["step"] for point in results["curve"]]
    for name, colour, style in zip(LARGE, COLOURS, ("-", "--", ":"), strict=False):
        losses = [math.nan if point[name] is None else point[name] for point in results["curve"]]
        axes.plot(steps, losses, style, color=colour, label=name, lw=2)
    axes.set(title=f"{as_count(results['parameters'])} parameters", xlabel="step")
    axes.set_ylabel("validation loss")
    axes.legend()
    return figure


if __name__ == "__main__":
    sys.exit(main())
