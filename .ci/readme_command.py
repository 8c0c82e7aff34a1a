# SPDX-License-Identifier: MIT
"""Print the one command of a Markdown file's code blocks that begins with the given words.

A command is a line of a fenced block, with the lines that it continues on by a backslash and without
a leading `$ ` prompt. None, or more than one, is an error: then the README has drifted.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

FENCED_BLOCK = re.compile(
    r"^(?P<fence>```+|~~~+)[^\n]*\n(?P<code>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL
)


def commands(markdown: str) -> list[str]:
    """Return every line of every fenced block, continued lines joined."""
    lines: list[str] = []
    for block in FENCED_BLOCK.finditer(markdown):
        code = re.sub(r"\\\n\s*", "", block["code"])
        lines += [line.strip().removeprefix("$ ") for line in code.splitlines()]
    return lines


def main() -> int:
    """Print the command; return 1 if there is not exactly one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("begins", help="how the command begins, such as \"pip install '.[test]'\"")
    args = parser.parse_args()

    found = [
        c for c in commands(args.file.read_text(encoding="utf-8")) if c.startswith(args.begins)
    ]
    if len(found) != 1:
        print(
            f"{args.file} must hold one command that begins with {args.begins!r} in a fenced block."
            f" Received: {found}",
            file=sys.stderr,
        )
        return 1
    print(found[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
