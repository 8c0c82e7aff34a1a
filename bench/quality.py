# SPDX-License-Identifier: MIT
"""Train small models in every format of weights and moments, and compare their losses.

    python bench/quality.py                 everything but --large: 40 minutes on two cores
    python bench/quality.py --large 60      a larger language model, for 60 minutes
    python bench/quality.py --keep          only what the file of results lacks
    python bench/quality.py --tasks mlp zipf --formats 7-bytes --seeds 5

Needs torch and matplotlib. Writes a JSON file after each training, then the parts of
docs/quality.md and its plots. Results of earlier runs stay in the file until they are measured again.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import fusedadam
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from quality_tasks import FORMATS, LARGE, REFERENCE, TASKS, TINY_RATES, TRAININGS, large
from report import replaced
from reporting.data import digits, markdown
from reporting.plots import BLACK, BLUE, GREEN, ORANGE, SKY, VERMILION, save
from runner.machine import cpu_name, describe_software, usable_cpus

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "bench/results/quality.json"
PAGE = ROOT / "docs/quality.md"
EDGE = 100.0  # standard deviations; the plot draws at its edge what is beyond
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, SKY, BLACK)


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
    option = parser.add_argument
    option("--tasks", nargs="+", choices=TASKS, metavar="TASK")
    option("--formats", nargs="+", choices=FORMATS, metavar="FORMAT", default=FORMATS)
    option("--seeds", type=int, default=8, help="per task and format (8)")
    option("--scale", type=float, default=1.0, help="of the numbers of steps (1)")
    option("--workers", type=int, default=usable_cpus(), help="of one thread")
    option("--large", type=float, metavar="MINUTES", help="without --tasks, only this")
    option("--keep", action="store_true", help="do not repeat what the file has")
    option("--output", type=Path, default=OUTPUT)
    option("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    if args.scale != 1.0 and (args.output == OUTPUT or args.page == PAGE):
        parser.error("--scale makes figures that mean nothing: name another --output and --page")
    args.tasks = args.tasks or ([] if args.large else list(TASKS))
    return args


def run_trial(trial: Trial, scale: float) -> dict[str, Any]:
    """Run a trial on one thread; its `seconds` are those of the CPU."""
    torch.set_num_threads(1)
    fusedadam.set_num_threads(1)
    begin = time.process_time()
    result = TASKS[trial.task](FORMATS[trial.form], trial.seed, scale)
    return {**trial._asdict(), **result, "seconds": round(time.process_time() - begin, 2)}


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
        "date": f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}",
        "cpu": cpu_name(),
        "software": describe_software(["torch"]),
    }
    # Not forked: a child of a process with threads may hang.
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(run_trial, trial, args.scale) for trial in trials]):
            row = done.result()
            print(row["task"], row["form"], row["seed"], f"{row['seconds']} s", flush=True)
            results[Trial(row["task"], row["form"], row["seed"])] = row
            document["trials"] = [results[known] for known in sorted(results)]
            args.output.write_text(json.dumps(document, indent=1) + "\n")
    if args.large:
        document["large"] = large(args.large)
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    args.page.write_text(replaced(args.page.read_text(), parts_of(document)))
    folder = args.page.parent / "benchmarks"
    trained = pd.DataFrame(document["trials"])
    save(lambda figure: losses_plot(figure, trained), folder / "quality.png")
    if "large" in document:
        save(lambda figure: large_plot(figure, document["large"]), folder / "quality_large.png", 4)
    print(f"wrote {args.page}")
    return 0


# ---- the page -----------------------------------------------------------------------------------


def seeds_of(trials: pd.DataFrame) -> int:
    """Return the smallest number of seeds that a training of a format has."""
    trained = trials[trials["task"].isin(TRAININGS)]
    return int(trained.groupby(["task", "form"])["seed"].count().min()) if len(trained) else 0


def noise_of(trials: pd.DataFrame) -> float:
    """Return two standard deviations of a difference by chance, in those of one seed."""
    return 2 * math.sqrt(2 / max(1, seeds_of(trials)))


def losses_of(trials: pd.DataFrame, task: str, form: str) -> pd.Series:
    """Return the losses of all seeds; NaN where a training diverged."""
    chosen = trials[(trials["task"] == task) & (trials["form"] == form)]
    return chosen["loss"].astype(float) if len(chosen) else pd.Series(dtype=float)


def difference(trials: pd.DataFrame, task: str, form: str) -> float | None:
    """Return the mean loss less float32's, in standard deviations of float32's seeds.

    NaN if a training diverged, None if it was not run or if float32 has one seed.
    """
    reference, losses = (losses_of(trials, task, name) for name in (REFERENCE, form))
    if len(reference) < 2 or losses.empty:
        return None
    return float((losses.mean(skipna=False) - reference.mean()) / reference.std())


def parts_of(document: dict[str, Any]) -> dict[str, str]:
    """Return the parts of the page."""
    trials, software = pd.DataFrame(document["trials"]), document["software"]
    seeds, minutes = seeds_of(trials), trials["seconds"].sum() / 60
    shortened = "" if document["scale"] == 1 else " **Shortened: the figures mean nothing.**"
    noise = f"Differences beyond {noise_of(trials):.1f} are bold; with {seeds} seeds, chance alone"
    records = []
    for name, form in FORMATS.items():
        how = {"rounding": form.rounding if name != REFERENCE else ""}
        stored = {"weights": form.weights, "low bits": form.low_bits or "", "moments": form.moments}
        records.append({"format": name, "bytes": form.bytes, **stored, **how})
    parts = {
        "run": f"`python bench/quality.py --seeds {seeds}` trained small models in every format and"
        f" wrote the tables.\n({document['date']}, {minutes:.0f} minutes of one core, torch"
        f" {software['torch']}, Python {software['Python']}, {document['cpu']}.){shortened}",
        "formats": markdown(records),
        "losses": f"{noise} makes up to one in ten.\n\n{losses_table(trials)}",
        "tasks": "\n".join(f"- {name}: {task.words}" for name, task in TRAININGS.items()),
        "effects": effects_table(trials),
    }
    return {**parts, **({"large": large_part(document["large"])} if "large" in document else {})}


def losses_table(trials: pd.DataFrame) -> str:
    """Return the table of differences, and of the largest updates in all trainings."""
    return markdown(
        {
            "format": form,
            **{task: loss_cell(trials, task, form) for task in TRAININGS},
            "largest update": largest(trials, form, [*TRAININGS]),
        }
        for form in FORMATS
    )


def loss_cell(trials: pd.DataFrame, task: str, form: str) -> str:
    """Return float32's losses, or the difference from them."""
    losses = losses_of(trials, task, form)
    if losses.isna().any():
        return f"**{losses.isna().sum()} diverged**"
    if form == REFERENCE and len(losses) > 1:
        return f"{losses.mean():#.4g} ± {losses.std():#.2g}"
    apart = difference(trials, task, form)
    if apart is None:
        return ""
    return f"**{apart:+.1f}**" if abs(apart) > noise_of(trials) else f"{apart:+.1f}"


def effects_table(trials: pd.DataFrame) -> str:
    """Return the table of single effects."""
    records = []
    for form in FORMATS:
        records.append({"format": form})
        chosen = trials[(trials["task"] == "tiny-rates") & (trials["form"] == form)]
        for lr in TINY_RATES:
            share = f"{chosen[f'{lr:g}'].mean():.3f}" if len(chosen) else ""
            records[-1][f"movement, lr {lr:g}"] = share
        records[-1]["after a pause"] = largest(trials, form, ["pause"])
    return markdown(records)


def largest(trials: pd.DataFrame, form: str, tasks: list[str]) -> str:
    """Return the largest update in some tasks."""
    chosen = trials[trials["task"].isin(tasks) & (trials["form"] == form)]
    if chosen.empty:
        return ""
    update = chosen["update"].astype(float).max(skipna=False)
    return "**not finite**" if math.isnan(update) else digits(update)


def large_part(results: dict[str, Any]) -> str:
    """Return the figures of the larger model."""
    last, millions, minutes = results["curve"][-1], results["parameters"] / 1e6, results["minutes"]
    rows = (
        {
            "format": name,
            "validation loss": "diverged" if last[name] is None else f"{last[name]:.4f}",
            "largest update": f"{update:.2f}",
        }
        for name, update in results["update"].items()
    )
    size = f"{millions:.4g}M parameters, {last['step']:,} steps in {minutes:g} minutes"
    return f"{size} (`--large {minutes:g}`).\n\n{markdown(rows)}"


def losses_plot(figure: Figure, trials: pd.DataFrame) -> None:
    """Draw the differences from float32: a row for each format, a mark for each training."""
    axes = figure.subplots()
    forms = [form for form in FORMATS if form != REFERENCE]
    axes.axvspan(-noise_of(trials), noise_of(trials), alpha=0.1, label="chance")
    for task, colour, marker in zip(TRAININGS, COLOURS, "osD^vP", strict=True):
        found = pd.Series([difference(trials, task, form) for form in forms], dtype=float)
        ran = [not losses_of(trials, task, form).empty for form in forms]
        shown = found.where(found.notna() | ~np.array(ran), EDGE).clip(-EDGE, EDGE)
        axes.plot(shown, shown.index, marker, color=colour, label=task)
    axes.set_xscale("symlog", linthresh=3)
    axes.set_xticks(
        [-10, -3, 0, 3, 10, 30, EDGE], ["-10", "-3", "0", "3", "10", "30", "100 or more"]
    )
    axes.set_yticks(range(len(forms)), forms)
    axes.invert_yaxis()
    axes.set(title="Validation loss compared with float32's")
    axes.set_xlabel("standard deviations of float32's seeds; to the right is worse")
    figure.legend(loc="outside lower center", ncols=7, fontsize=9)


def large_plot(figure: Figure, results: dict[str, Any]) -> None:
    """Draw the validation losses of the larger model."""
    axes = figure.subplots()
    curve = pd.DataFrame(results["curve"]).set_index("step").astype(float)
    for name, colour, style in zip(LARGE, COLOURS, ("-", "--", ":"), strict=False):
        axes.plot(curve.index, curve[name], style, color=colour, label=name, lw=2)
    axes.set(title=f"{results['parameters'] / 1e6:.4g}M parameters", xlabel="step")
    axes.set_ylabel("validation loss")
    axes.legend()


if __name__ == "__main__":
    sys.exit(main())
