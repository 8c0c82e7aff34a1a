# SPDX-License-Identifier: MIT
"""Print the only command in a Markdown file's fenced code blocks that starts with the given words.

    python3 .ci/readme_command.py README.md "pip install '.[test]'"

A command is a line, with backslash continuations joined, without a leading `$ ` prompt. No match or
several matches are an error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

FENCED_BLOCK = re.compile(r"^(```+|~~~+)[^\n]*\n(.*?)^\1\s*$", re.MULTILINE | re.DOTALL)

if __name__ == "__main__":
    file, begins = sys.argv[1:]
    blocks = (code for _, code in FENCED_BLOCK.findall(Path(file).read_text(encoding="utf-8")))
    lines = (line for code in blocks for line in re.sub(r"\\\n\s*", "", code).splitlines())
    commands = [line.strip().removeprefix("$ ") for line in lines]
    found = [command for command in commands if command.startswith(begins)]
    if len(found) != 1:
        sys.exit(f"{file} must have one command that begins with {begins!r}. Received: {found}")
    sys.stdout.write(found[0] + "\n")
