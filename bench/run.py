# SPDX-License-Identifier: MIT
"""Time fusedadam against all other installed implementations of Adam for CPUs; write a JSON file.

    python bench/run.py                    everything; docs/benchmarks.md says how long it takes
    python bench/run.py --quick            a smoke test; its figures mean nothing
    python bench/run.py --only sizes tail  these sections; keeps the other sections of the file
    python bench/run.py --only sizes --peers "torch fused" numba

`pip install '.[peers]'` installs the other implementations. Those that are not installed are
reported as absent. The machine should be otherwise idle. bench/report.py turns the file into tables
and plots. Exits with 1 if a result is wrong or a section fails, with --strict also if a peer is
absent.
"""

from __future__ import annotations

# Every process of the benchmark imports this file too, so it imports libraries only in functions.
import argparse
import datetime as dt
import json
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parent / "results" / "latest.json"
FORMAT = 2
QUICK_ROUNDS = 2
# A contender that reports that it does not support a task has not failed.
FAILURES = ("Error", "wrong result")


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    from peers import PEERS
    from runner.machine import usable_cpus
    from sections import SECTIONS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="at most (15)")
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS], metavar="NAME")
    parser.add_argument(
        "--peers", nargs="+", choices=PEERS, metavar="NAME", help="beside fusedadam, only these"
    )
    parser.add_argument("--quick", action="store_true", help=f"small, {QUICK_ROUNDS} rounds")
    parser.add_argument("--strict", action="store_true", help="no peer may be absent")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    return parser.parse_args()


def measured(bench: Any, names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the results of sections. If one fails, they hold the error, and the next ones run."""
    from sections import CONTESTS, load

    for name in names:
        if name not in CONTESTS and not bench.quick:
            bench.contest.close()  # what follows needs the memory
        begin = time.monotonic()
        results: dict[str, Any] = {"date": f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}"}
        try:
            results["rows"] = load(name)(bench)
        except Exception as error:  # noqa: BLE001 - shown, and the run ends with status 1
            traceback.print_exc()
            results |= {"rows": [], "error": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        yield name, results


def failures(sections: dict[str, Any]) -> Iterator[str]:
    """Yield what went wrong in a run."""
    for name, section in sections.items():
        if "error" in section:
            yield f"{name}: {section['error']}"
        elif not section["rows"]:
            yield f"{name}: no rows"
        for row in section["rows"]:
            for who, why in row["not_run"].items():
                if any(word in why for word in FAILURES):
                    yield f"{name}: {row['case']}: {who}: {why}"


def main() -> int:
    """Run the sections, write the file after each, and return the exit status."""
    from peers import FORK, PEERS, fusedadam_adam
    from runner import Bench
    from runner.contest import Contest
    from runner.machine import describe_machine, describe_software
    from sections import CONTESTS, SECTIONS

    args = arguments()
    begin = time.monotonic()
    fusedadam_adam.build_twin()
    absent = {name: peer.absent() for name, peer in PEERS.items() if peer.absent()}
    packages = {
        p: None for name, peer in PEERS.items() if name not in absent for p in peer.packages
    }
    rounds = min(args.rounds, QUICK_ROUNDS) if args.quick else args.rounds
    chosen = frozenset(args.peers or PEERS).difference(absent)
    bench = Bench(
        Contest(),
        args.threads,
        rounds,
        args.quick,
        chosen,
        lambda case: print(f"  {case}", flush=True),
    )
    document: dict[str, Any] = {
        "format": FORMAT,
        "date": f"{dt.datetime.now(dt.timezone.utc):%Y-%m-%d}",
        "quick": args.quick,
        "machine": describe_machine(),
        "software": describe_software(packages)
        | {found.name: found.version for found in metadata.distributions(path=[str(FORK)])},
        "threads": args.threads,
        "rounds": rounds,
        "absent": absent,
        "sections": {},
    }
    if args.only != [*SECTIONS] and args.output.exists():
        kept = json.loads(args.output.read_text())
        document["sections"] = kept["sections"] if kept["format"] == FORMAT else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def run(names: list[str]) -> None:
        for name, results in measured(bench, names):
            document["sections"][name] = results
            document["seconds"] = round(time.monotonic() - begin, 1)
            args.output.write_text(json.dumps(document, indent=1) + "\n")

    names = [name for name in SECTIONS if name in args.only]
    groups = [[n for n in names if n in CONTESTS], [n for n in names if n not in CONTESTS]]
    if args.quick:  # figures mean nothing, so sections may disturb one another
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, groups))
    else:
        run(names)
    bench.contest.close()
    for name, why in absent.items():
        print(f"absent: {name}: {why}", file=sys.stderr)
    failed = [*failures({name: document["sections"][name] for name in names})]
    print(*failed, sep="\n", file=sys.stderr)
    print(f"{args.output}: {document['seconds']:.0f} s")
    return int(bool(failed) or (args.strict and bool(absent)))


if __name__ == "__main__":
    sys.exit(main())
