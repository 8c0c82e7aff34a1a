# SPDX-License-Identifier: MIT
"""Time fusedadam against all other installed implementations of Adam for CPUs; write a JSON file.

    python bench/run.py                    everything; docs/benchmarks.md says how long it takes
    python bench/run.py --quick            a smoke test; its figures mean nothing
    python bench/run.py --only sizes tail  these sections; keeps the other sections of the file
    python bench/run.py --only sizes --peers "torch fused" numba

`pip install '.[peers]'` installs the other implementations. Those that are not installed are
reported as absent. The machine should be otherwise idle. bench/report.py turns the file into tables
and plots.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import rounds
import sections
from peers import ADAPTERS, PEERS, STORING_PEERS, TAIL_PEERS, twin
from processes import probe
from settings import Settings
from tqdm import tqdm

OUTPUT = Path(__file__).parent / "results" / "latest.json"
FORMAT = 1
QUICK_ROUNDS = 2


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=15, help="at most (15)")
    parser.add_argument("--threads", type=positive, default=machine.usable_cpus())
    parser.add_argument("--only", nargs="+", choices=sections.NAMES, metavar="SECTION")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=tuple(PEERS | TAIL_PEERS | STORING_PEERS),
        metavar="NAME",
        help="beside fusedadam, only these",
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"small sizes and {QUICK_ROUNDS} rounds"
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


def positive(text: str) -> int:
    """Parse an integer >= 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1. Received: {text}")
    return number


def kept_sections(path: Path, only: list[str] | None) -> dict[str, Any]:
    """Return the sections of an earlier file if only some are measured again."""
    if not only or not path.exists():
        return {}
    document = json.loads(path.read_text())
    return {name: {"date": document["date"], **kept} for name, kept in document["sections"].items()}


def run_sections(names: list[str], settings: Settings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run sections back-to-back under one progress bar, and yield the results of each.

    If a section fails, its results hold the error, and the next sections run.
    """
    loaded = {name: sections.load(name) for name in names}
    total = sum(section.ticks(settings) for section in loaded.values())
    with tqdm(total=total, unit="case", smoothing=0) as bar:
        for name, section in loaded.items():

            def tick(words: str, name: str = name) -> None:
                bar.set_postfix_str(f"{name}: {words}", refresh=False)
                bar.update()

            try:
                yield name, section.run(settings, tick)
            except Exception as error:  # noqa: BLE001 - shown, and the run ends with status 1
                traceback.print_exc()
                yield name, {"rows": [], "error": f"{type(error).__name__}: {error}"}


def summary(name: str, results: dict[str, Any]) -> str:
    """Return a summary: medians of timed rows, and median ratios to fusedadam."""
    lines = [f"\n{sections.load(name).TITLE}"]
    if "error" in results:
        lines.append(f"  failed: {results['error']}")
    for row in results.get("rows", []):
        seconds = row.get("seconds")
        if not isinstance(seconds, dict):
            lines.append("  " + ", ".join(f"{key} {shown(value)}" for key, value in row.items()))
            continue
        # Either fusedadam or one of its adapters takes part in a case.
        us = next((n for n in (row.get("ours"), "fusedadam", *ADAPTERS) if n in seconds), "")
        ours = seconds.get(us)
        cells = []
        for contender, times in seconds.items():
            cell = f"{contender} {microseconds(statistics.median(times))}"
            if ours and contender != us:
                ratios = [theirs / our for theirs, our in zip(times, ours, strict=True)]
                cell += f" ({statistics.median(ratios):.2f}x)"
            cells.append(cell)
        threads = f", {row['threads']} threads" if "threads" in row else ""
        case = row.get("case") or f"{row.get('elements', 0):,}"
        lines.append(f"  {case}{threads}: " + ", ".join(cells))
        lines += [f"    not run: {peer}: {why}" for peer, why in row.get("not_run", {}).items()]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """Format a value of a row; a list of times as its median."""
    if isinstance(value, list) and value and all(isinstance(x, float) for x in value):
        return microseconds(statistics.median(value))
    return f"{value:,}" if isinstance(value, int) else str(value)


def microseconds(seconds: float) -> str:
    """Format a time in ms or us."""
    return f"{seconds * 1e3:.1f} ms" if seconds >= 0.01 else f"{seconds * 1e6:.1f} us"


def main() -> int:
    """Run the sections, write the file after each, and print a summary."""
    args = arguments()
    most = min(args.rounds, QUICK_ROUNDS) if args.quick else args.rounds
    settings = Settings(threads=args.threads, rounds=most, quick=args.quick)
    names = [name for name in sections.NAMES if not args.only or name in args.only]
    rounds.choose(args.peers)
    begin = time.monotonic()
    if not twin.library_path():
        print("The traffic twin could not be built: see above.", file=sys.stderr)
    versions, absent = probe(rounds.chosen(PEERS | ADAPTERS | STORING_PEERS), settings.threads)
    for name, why in absent.items():
        print(f"absent: {name}: {why}", file=sys.stderr)
    document: dict[str, Any] = {
        "format": FORMAT,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "quick": settings.quick,
        "machine": machine.describe_machine(),
        "software": machine.describe_software(versions),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "seconds": 0.0,
        "absent": absent,
        "sections": kept_sections(args.output, args.only),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name, results in run_sections(names, settings):
        document["sections"][name] = {"date": document["date"], **results}
        document["seconds"] = round(time.monotonic() - begin, 1)
        args.output.write_text(json.dumps(document, indent=1) + "\n")
    measured = {name: document["sections"][name] for name in names}
    for name, results in measured.items():
        print(summary(name, results))
    print(f"\n{args.output}: {document['seconds']:.0f} s")
    return 1 if any("error" in results for results in measured.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
