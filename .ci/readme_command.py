# SPDX-License-Identifier: MIT
"""Print the only command in a Markdown file's fenced code blocks that starts with the given words.

A command is a line, with backslash continuations joined, without a leading `$ ` prompt. No match or
several matches are an error.
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
    """Return all lines of all fenced blocks, with continued lines joined."""
    lines: list[str] = []
    for block in FENCED_BLOCK.finditer(markdown):
        code = re.sub(r"\\\n\s*", "", block["code"])
        lines += [line.strip().removeprefix("$ ") for line in code.splitlines()]
    return lines


def main() -> int:
    """Print the command; return 1 if there is not exactly one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("begins", help="start of the command, such as \"pip install '.[test]'\"")
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
