# SPDX-License-Identifier: MIT
"""Turn the results of `run.py` into the tables and plots of the documentation.

    python bench/report.py [RESULTS.json] [--docs docs/benchmarks.md] [--plots docs/benchmarks]
                           [--readme README.md] [--no-readme] [--check]

In a page, it replaces only the text between `<!-- begin NAME -->` and `<!-- end NAME -->`. With
`--check` it writes nothing, and exits with 1 if it would change a page or if a plot is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from cost_model import FITTED_SECTIONS, Fit, fit, samples_of
from cost_page import cost_model_part
from plots import COST_MODEL_ALT, PLOTS, cost_model_plot, save
from storage_page import storage_memory_part, storage_part
from tables import (
    FLOAT_SECTIONS,
    HEADLINES,
    figures_part,
    machine_part,
    one_line,
    targets_part,
)
from targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1
BEGIN = re.compile(r"^<!-- begin (\S+) -->$", re.MULTILINE)
SECTIONS = {
    **FLOAT_SECTIONS,
    "storage": storage_part,
    "storage_memory": storage_memory_part,
}
# Parts that are made from several sections. A part is renewed only by results with all of them.
DERIVED = {
    "targets": tuple(dict.fromkeys(target.section for target in TARGETS)),
    "cost_model": FITTED_SECTIONS,
    "figures": tuple(dict.fromkeys(section for _, section, *_ in HEADLINES)),
}


class ReportError(Exception):
    """Invalid results, or a page that does not fit them."""


class Drawing(NamedTuple):
    """A plot to draw: its file, and the function that saves it there."""

    path: Path
    save: Callable[[Path], None]


class Report(NamedTuple):
    """Pages with their new text, plots to draw, and notes for the user."""

    pages: dict[Path, str]
    drawings: list[Drawing]
    notes: list[str]


# ---- pages -------------------------------------------------------------------------------------


def markers(text: str) -> list[str]:
    """Return the names of the parts of a page, in order. Raise if markers are not paired."""
    names = BEGIN.findall(text)
    for name in names:
        if names.count(name) > 1:
            raise ReportError(
                f"<!-- begin {name} --> must be on a page once. Received: {names.count(name)}"
            )
        body = text[text.index(f"<!-- begin {name} -->") :]
        end = re.search(rf"^<!-- end {re.escape(name)} -->$", body, re.MULTILINE)
        following = BEGIN.search(body, 1)
        if end is None or (following is not None and following.start() < end.start()):
            raise ReportError(f"<!-- begin {name} --> must be followed by <!-- end {name} -->")
    return names


def with_part(text: str, name: str, part: str) -> str:
    """Replace the content of one part of a page."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    # Without the blank lines, Markdown would not recognize a table after a comment.
    return f"{before}{begin}\n{part}\n\n{end}{after}"


def image(alt: str, plot: Path, page: Path) -> str:
    """Return the Markdown that shows a plot on a page."""
    return f"![{alt}]({Path(os.path.relpath(plot, page.parent)).as_posix()})"


# ---- the report --------------------------------------------------------------------------------


def read_results(path: Path) -> dict[str, Any]:
    """Read a file that `run.py` wrote."""
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ReportError(
            f"results must be a file that bench/run.py wrote. Received: {path}"
        ) from error
    if document.get("format") != FORMAT:
        raise ReportError(
            f"results must have format {FORMAT}. Received: {document.get('format')!r} in {path}"
        )
    return document


def make_report(
    document: Mapping[str, Any], docs: Path, plots: Path, readme: Path | None
) -> Report:
    """Make the new pages and the list of plots. Writes nothing."""
    sections = document["sections"]
    text = docs.read_text(encoding="utf-8")
    names = markers(text)
    check_sections(sections, names, docs)
    notes = [
        f"{name}: kept as it was, since these results do not have it"
        for name in names
        if name in SECTIONS and name not in sections
    ]
    parts: dict[str, str] = {}
    drawings: list[Drawing] = []
    for name, results in sections.items():
        part = SECTIONS[name](results)
        if name in PLOTS:
            plot = PLOTS[name]
            path = plots / f"{name}.png"
            drawings.append(Drawing(path, partial(save, partial(plot.draw, results))))
            part = f"{image(plot.alt, path, docs)}\n\n{part}"
        parts[name] = part

    for name in names:
        if name in DERIVED and complete(name, sections, notes):
            if name == "targets":
                parts[name] = targets_part(sections)
            elif name == "cost_model":
                fitted = fitted_model(document, notes)
                if fitted is not None:
                    path = plots / "cost_model.png"
                    drawings.append(Drawing(path, partial(save, partial(cost_model_plot, fitted))))
                    part = cost_model_part(fitted, document["threads"], sections.get("large"))
                    parts[name] = f"{image(COST_MODEL_ALT, path, docs)}\n\n{part}"
        elif name not in SECTIONS and name not in DERIVED and name != "machine":
            notes.append(f"{name}: kept as it was, since it is nothing that this program makes")
    # The machine is described as of these results, so parts from earlier results must be named.
    kept = [name for name in names if name not in parts and (name in SECTIONS or name in DERIVED)]
    if "machine" in names:
        parts["machine"] = machine_part(document, kept)

    for name in names:
        if name in parts:
            text = with_part(text, name, parts[name])
    pages = {docs: text}
    if readme is not None:
        pages[readme] = readme_text(document, readme, plots, notes)
    return Report(pages, drawings, notes)


def check_sections(sections: Mapping[str, Any], names: Sequence[str], docs: Path) -> None:
    """Raise if the page has no place for a section of the results."""
    for name in sections:
        if name not in SECTIONS:
            raise ReportError(f"sections must be among {', '.join(SECTIONS)}. Received: {name}")
        if name not in names:
            raise ReportError(
                f"{docs} must have a line <!-- begin {name} -->, since the results have a section "
                f"{name}. Received: {', '.join(names) or 'no such lines'}"
            )


def complete(name: str, sections: Mapping[str, Any], notes: list[str]) -> bool:
    """Return whether the results have all sections of a part. Note what is missing."""
    missing = [section for section in DERIVED[name] if section not in sections]
    if missing:
        notes.append(f"{name}: kept as it was, since these results lack {', '.join(missing)}")
    return not missing


def fitted_model(document: Mapping[str, Any], notes: list[str]) -> Fit | None:
    """Fit the cost model. Note if there are too few measurements, as in a quick run."""
    try:
        return fit(samples_of(document["sections"]), document["machine"]["cores"])
    except ValueError as error:
        notes.append(f"cost_model: kept as it was: {one_line(str(error))}")
        return None


def readme_text(document: Mapping[str, Any], readme: Path, plots: Path, notes: list[str]) -> str:
    """Return the README with new figures, if it has a place for them."""
    text = readme.read_text(encoding="utf-8")
    if "figures" in markers(text) and complete("figures", document["sections"], notes):
        picture = image(PLOTS["sizes"].alt, plots / "sizes.png", readme)
        text = with_part(text, "figures", f"{figures_part(document)}\n\n{picture}")
    return text


def write(path: Path, text: str) -> None:
    """Write a file atomically."""
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# ---- the command -------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Write or check the pages and plots, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "bench/results/latest.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/benchmarks.md")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--no-readme", action="store_const", const=None, dest="readme")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 on a change")
    args = parser.parse_args(argv)
    try:
        report = make_report(read_results(args.results), args.docs, args.plots, args.readme)
    except ReportError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    for note in report.notes:
        print(f"note: {note}")
    if args.check:
        return check(report)
    for drawing in report.drawings:
        drawing.save(drawing.path)
        print(f"drew {drawing.path}")
    for page, text in report.pages.items():
        if text != page.read_text(encoding="utf-8"):
            write(page, text)
            print(f"wrote {page}")
    return 0


def check(report: Report) -> int:
    """Print pages that would change and missing plots. Return 1 if there are any."""
    changed = [
        page for page, text in report.pages.items() if text != page.read_text(encoding="utf-8")
    ]
    missing = [drawing.path for drawing in report.drawings if not drawing.path.exists()]
    for page in changed:
        print(f"would change {page}")
    for path in missing:
        print(f"missing: {path}")
    return 1 if changed or missing else 0


if __name__ == "__main__":
    sys.exit(main())
