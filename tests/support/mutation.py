# SPDX-License-Identifier: MIT
"""Mutants: small faults planted in one line of the source, to see whether a test notices.

A mutant names its line by the text, so that it survives edits elsewhere. Faults are found by regular
expressions on lines without comments, strings and annotations, and rely on the formatters' spaces
around binary operators. `mutants.py` is the command.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

# Parts of the source, and how many mutants each gets. The first prefix of a path counts.
AREAS: Final = {
    "src/cpp/kernels/": 5,
    "src/cpp/step/": 5,
    "src/cpp/memory/": 2,
    "src/cpp/parallel/": 3,
    "src/cpp/cpu/": 1,
    "src/cpp/api/": 2,
    "src/cpp/include/": 1,
    "src/cpp/bindings/": 7,
    "src/python/fusedadam/torch/": 5,
    "src/python/fusedadam/keras": 2,
    "src/python/fusedadam/": 8,
}

# Neither compiled nor run where the tests run.
_NOT_HERE: Final = {"TYPE_CHECKING", "sys.platform == 'win32'"}


@dataclass(frozen=True)
class Mutant:
    """A line of a file and what replaces it, both without the spaces around them."""

    path: str
    old: str
    nth: int  # of the lines with this text
    new: str
    rule: str
    found_by: str = ""  # a test, or SURVIVED; "" if it was not tested

    @property
    def key(self) -> str:
        return f"{self.path}#{self.nth}: {self.old} -> {self.new}"

    @property
    def area(self) -> str:
        return next(area for area in AREAS if self.path.startswith(area))

    def line(self, source: str) -> int | None:
        """The index of the line, or None if it is gone."""
        places = (i for i, line in enumerate(source.splitlines()) if line.strip() == self.old)
        return next(itertools.islice(places, self.nth, None), None)

    def planted(self, source: str) -> str | None:
        """The source with the fault, or None if the line is gone."""
        index = self.line(source)
        if index is None:
            return None
        lines = source.splitlines(keepends=True)
        lines[index] = lines[index].replace(self.old, self.new)
        return "".join(lines)


SURVIVED: Final = "survived"


def statement_lines(source: str, index: int) -> set[int]:
    """The numbers of a line of Python, and of the line where its statement begins."""
    statements = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt))
    begins = [s.lineno for s in statements if s.lineno <= index + 1 <= (s.end_lineno or 0)]
    return {index + 1, max(begins, default=0)}


# ---- code without what is no code ------------------------------------------------------------------

_CPP_OTHER: Final = re.compile(
    r"""//[^\n]* | /\*.*?\*/ | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'
    | ^[ ]*\#if\ defined\(__AVX512F__\)\n.*?(?=^[ ]*\#)  # few machines can run it
    | ^[ ]*\#(?:\\\n|[^\n])* | \bstatic_assert\(.*?\);""",
    re.VERBOSE | re.MULTILINE | re.DOTALL,
)


def _spaces(text: str) -> str:
    return re.sub(r"[^\n]", " ", text)


def _cpp_code(source: str) -> str:
    return _CPP_OTHER.sub(lambda match: _spaces(match[0]), source)


def _python_code(source: str) -> str:
    others: list[ast.AST] = []
    for node in ast.walk(ast.parse(source)):
        text = isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes))
        if text or isinstance(node, ast.JoinedStr):
            others.append(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in _NOT_HERE:
            others += [node.test, *node.body]
        annotations = (getattr(node, field, None) for field in ("annotation", "returns"))
        others += (annotation for annotation in annotations if isinstance(annotation, ast.AST))
    begins = [0, *itertools.accumulate(map(len, source.splitlines(keepends=True)))]
    for node in others:
        if isinstance(node, (ast.expr, ast.stmt)) and node.end_lineno and node.end_col_offset:
            begin = begins[node.lineno - 1] + node.col_offset
            end = begins[node.end_lineno - 1] + node.end_col_offset
            source = source[:begin] + _spaces(source[begin:end]) + source[end:]
    return re.sub(r"#.*", lambda match: _spaces(match[0]), source)


# ---- rules -----------------------------------------------------------------------------------------

# A pattern whose group `it` is replaced by each of the texts.
Rule: TypeAlias = tuple[str, "re.Pattern[str]", Callable[["re.Match[str]"], Iterable[str]]]


def _rule(name: str, pattern: str, *texts: str) -> Rule:
    return name, re.compile(pattern, re.MULTILINE), lambda _: texts


def _swap(name: str, pairs: str) -> Rule:
    """Operators, each with the one that replaces it."""
    swaps = dict(pair.split("~") for pair in pairs.split(", "))
    either = "|".join(re.escape(operator) for operator in sorted(swaps, key=len, reverse=True))
    pattern = re.compile(rf"(?<= )(?P<it>{either})(?=\s)", re.MULTILINE)
    return name, pattern, lambda match: [swaps[match["it"]]]


_PARENS: Final = r"\((?:[^()\n]|\((?:[^()\n]|\((?:[^()\n]|\([^()\n]*\))*\))*\))*\)"
_COMPARISONS: Final = "<~<=, <=~<, >~>=, >=~>, ==~!=, !=~=="
_ARITHMETIC: Final = "+~-, -~+, *~+, /~*, %~/, <<~>>, >>~<<, &~|, |~&, +=~-=, -=~+=, *=~+=, |=~&="
_NUMBERS: Final[list[Rule]] = [
    (
        "integer",
        re.compile(r"(?<![\w.'])(?<!\de-)(?P<it>\d+)(?=(?:[uU][lL]*)?(?![\w.']))"),
        lambda match: [str(int(match["it"]) + 1)],
    ),
    _rule("negation", r"(?<![\w)\]-])(?<![\w)\]] )(?P<it>-)(?=[\w(])", ""),
    (
        "arguments",
        re.compile(
            r"^(?! *(?:async )?def )(?:.*?\w)??(?<!isinstance)\("
            r"(?P<it>(?P<a>[^\s(){},=]+), (?P<b>[^\s(){},=]+))(?=[,)])",
            re.MULTILINE,
        ),
        lambda match: [f"{match['b']}, {match['a']}"],
    ),
]
_CPP: Final[list[Rule]] = [
    *_NUMBERS,
    _swap("comparison", f"{_COMPARISONS}, &&~||, ||~&&"),
    _swap("arithmetic", _ARITHMETIC),
    _rule("boolean", r"\b(?P<it>true)\b", "false"),
    _rule("boolean", r"\b(?P<it>false)\b", "true"),
    _rule("negation", r"(?P<it>!)(?=[\w(])", ""),
    _rule("condition", rf"\bif (?P<it>{_PARENS})", "(true)", "(false)"),
    _rule(
        "guard",
        r"^ *(?P<it>(?:const )?[\w:]*(?:Environment|Gil|_guard|_lock)(?:<.*>)? \w+(?:\(.*\))?;)$",
        ";",
    ),
    _rule("statement", rf"(?<=[;{{}}):]\n) *(?P<it>(?:[\w:.\[\]]|->)+{_PARENS};)$", ";"),
    _rule(
        "statement",
        r"(?<=[;{}):]\n) *(?P<it>(?:\*|\w+(?:\.|->|\[)|\w+_ )[^\n;]* ?[-+*/|&]?= [^\n;]+;)$",
        ";",
    ),
]
_PYTHON: Final[list[Rule]] = [
    *_NUMBERS,
    _swap(
        "comparison", f"{_COMPARISONS}, and~or, or~and, is~is not, is not~is, in~not in, not in~in"
    ),
    _swap("arithmetic", f"{_ARITHMETIC}, //~*, **~*"),
    _rule("boolean", r"(?<!strict=)\b(?P<it>True)\b", "False"),
    _rule("boolean", r"(?<!strict=)\b(?P<it>False)\b", "True"),
    _rule("negation", r"(?<!is )(?P<it>\bnot )(?!in\b)", ""),
    _rule("condition", r"^ *(?:el)?if (?P<it>\S.*):\s*$", "True", "False"),
    _rule("guard", r"^ *(?P<it>with (?!.* as ).+):\s*$", "if True"),
    _rule("statement", rf"^ *(?P<it>(?:[\w.\[\]]+{_PARENS})+) *$", "pass"),
    _rule("statement", r"^ *(?P<it>[\w.]+(?:\.\w+|\[[^\n=]*\]) [-+*|&/]?= [^\n]+)$", "pass"),
]


# ---- drawing ---------------------------------------------------------------------------------------

# Rules that are not taken at each turn: most swaps of arguments do not compile or do nothing, and
# without most guards only the time differs.
_TURNS: Final = {"arguments": 4, "guard": 2}


def candidates(path: str, source: str) -> Iterator[Mutant]:
    """Every mutant of a file, also such as cannot be compiled."""
    python = path.endswith(".py")
    code = _python_code(source) if python else _cpp_code(source)
    for rule, pattern, texts in _PYTHON if python else _CPP:
        for match in pattern.finditer(code):
            begin, end = match.span("it")
            first = source.rfind("\n", 0, begin) + 1
            last = source.find("\n", end)
            old = source[first:last].strip()
            before = source[:first].splitlines()
            nth = sum(line.strip() == old for line in before)
            for text in texts(match):
                new = (source[first:begin] + text + source[end:last]).strip()
                # Texts can only be added.
                adds_text = rule == "arithmetic" and re.search(r"[\"']|string\(", old)
                if new != old and not adds_text:
                    yield Mutant(path, old, nth, new, rule)


def _compiles(mutant: Mutant, source: str) -> bool:
    """Whether Python can compile the mutant, to something else than before. True for C++."""
    if not mutant.path.endswith(".py"):
        return True
    try:
        changed = ast.parse(mutant.planted(source) or "")
    except SyntaxError:
        return False
    return ast.dump(changed) != ast.dump(ast.parse(source))


def drawn(root: Path, count: int, seed: int, parts: Iterable[str]) -> list[Mutant]:
    """About `count` mutants of different lines: by area, and rules in turn.

    Files are those whose path has one of these parts.
    """
    rng = random.Random(seed)
    sources = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((root / "src").rglob("*.*"))
        if path.suffix in (".cpp", ".hpp", ".py") and any(part in str(path) for part in parts)
    }
    rules: dict[str, dict[str, list[Mutant]]] = {area: defaultdict(list) for area in AREAS}
    for path, source in sources.items():
        for mutant in candidates(path, source):
            rules[mutant.area][mutant.rule].append(mutant)
    taken: dict[tuple[str, str, int], Mutant] = {}
    shares = {area: share for area, share in AREAS.items() if rules[area]}
    for area, share in shares.items():
        left = rules[area]
        for mutants in left.values():
            rng.shuffle(mutants)
        wanted = len(taken) + round(count * share / sum(shares.values()))
        for turn, rule in ((turn, rule) for turn in itertools.count(1) for rule in sorted(left)):
            if len(taken) >= wanted or not any(left.values()):
                break
            while left[rule] and turn % _TURNS.get(rule, 1) == 0:
                mutant = left[rule].pop()
                place = (mutant.path, mutant.old, mutant.nth)
                if place not in taken and _compiles(mutant, sources[mutant.path]):
                    taken[place] = mutant
                    break
    return sorted(taken.values(), key=lambda mutant: mutant.key)
