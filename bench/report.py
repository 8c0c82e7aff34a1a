# SPDX-License-Identifier: MIT
"""Turn the results of `run.py` into the tables and plots of the documentation.

    python bench/report.py [RESULTS.json] [--docs docs/benchmarks.md] [--plots docs/benchmarks]
                           [--readme README.md] [--no-readme]

In a page, it replaces only the text between `<!-- begin PART -->` and `<!-- end PART -->`. A part
is renewed if the results have all of its sections.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reporting.data import NotMeasuredError
from reporting.plots import draw_all
from reporting.tables import PARTS, figures_part, machine_part
from run import FORMAT

ROOT = Path(__file__).resolve().parent.parent


def replaced(text: str, parts: Mapping[str, str]) -> str:
    """Return a page with these parts. Each must be on it once."""
    for name, part in parts.items():
        body = f"<!-- begin {name} -->\n{part}\n<!-- end {name} -->"
        pattern = rf"^<!-- begin {name} -->$.*?^<!-- end {name} -->$"
        text, count = re.subn(pattern, lambda _: body, text, flags=re.MULTILINE | re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"a page must have <!-- begin {name} --> once. Received: {count}")
    return text


def image(alt: str, plot: Path, page: Path) -> str:
    """Return the Markdown that shows a plot on a page."""
    return f"![{alt}]({Path(os.path.relpath(plot, page.parent)).as_posix()})"


def make_parts(document: Mapping[str, Any], docs: Path, plots: Path) -> dict[str, str]:
    """Draw the plots, and return the parts of the page."""
    sections = document["sections"]
    drawn = draw_all(sections, plots)
    parts = {}
    for name, (needed, make) in PARTS.items():
        missing = [section for section in needed if section not in sections]
        try:
            if missing:
                raise NotMeasuredError(f"these results lack {', '.join(missing)}")
            text = make(sections)
        except NotMeasuredError as error:
            print(f"note: {name} is kept as it was: {error}")
        else:
            picture = [image(*drawn[name], docs)] if name in drawn else []
            parts[name] = "\n\n".join([*picture, text])
    kept = [name for name in PARTS if name not in parts]
    return {"machine": machine_part(document, kept), **parts}


def main(argv: list[str] | None = None) -> int:
    """Write the pages and plots, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="?", type=Path, default=ROOT / "bench/results/latest.json")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/benchmarks.md")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs/benchmarks")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--no-readme", action="store_const", const=None, dest="readme")
    args = parser.parse_args(argv)
    document = json.loads(args.results.read_text(encoding="utf-8"))
    if document.get("format") != FORMAT:
        print(f"{args.results} must have format {FORMAT}: run bench/run.py", file=sys.stderr)
        return 2
    pages = {args.docs: make_parts(document, args.docs, args.plots)}
    if args.readme is not None:
        try:
            picture = image(
                "Elements stepped per second over the size of one tensor",
                args.plots / "sizes.png",
                args.readme,
            )
            pages[args.readme] = {"figures": f"{figures_part(document)}\n\n{picture}"}
        except (NotMeasuredError, KeyError) as error:
            print(f"note: {args.readme} is kept as it was: {error}")
    for page, parts in pages.items():
        page.write_text(replaced(page.read_text(encoding="utf-8"), parts), encoding="utf-8")
        print(f"wrote {page}: {', '.join(parts)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
