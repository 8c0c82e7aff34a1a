# SPDX-License-Identifier: MIT
"""The site, built from the Markdown files where they are; CONTRIBUTING.md has the command."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

os.environ.setdefault("KERAS_BACKEND", "torch")
import fusedadam

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build/docs"

project = "fusedadam"
copyright = "fusedadam contributors"
version = release = fusedadam.__version__
extensions = ["breathe", "myst_parser", "numpydoc", "sphinx.ext.autodoc"]

# The root of the repository is the source directory, so that links between its files hold.
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "examples/README.md", "src/cpp/kernels/README.md"]
exclude_patterns = [".git", ".venv*", "build"]
myst_heading_anchors = 4  # as on code hosts

default_role = "py:obj"
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
numpydoc_show_class_members = False
breathe_projects = {"fusedadam": str(BUILD / "xml")}
breathe_default_project = "fusedadam"
breathe_domain_by_extension = {"h": "c"}
breathe_default_members = ("members", "undoc-members")
# Names of others. Their documentation would be read from the network.
nitpick_ignore_regex = [
    ("py:.*", r"(?!fusedadam\b).*"),
    ("cpp:.*", r"std\b.*"),
    ("c:.*", r"u?int\d+_t|size_t"),
]
# breathe names pages of headers, which there are not, and a struct of C beside its typedef.
suppress_warnings = ["ref.ref", "duplicate_declaration.c"]
nitpick_ignore = [("py:class", "fusedadam.torch.fused_step.FusedStep")]  # the base of both classes

html_theme = "furo"
html_title = f"fusedadam {version}"
html_math_renderer = "mathml"
html_extra_path = ["root"]
html_favicon = "static/icon.svg"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False

DOXYGEN = """
INPUT = src/cpp/include
RECURSIVE = YES
STRIP_FROM_INC_PATH = src/cpp/include
EXTRACT_ALL = YES
GENERATE_HTML = NO
GENERATE_LATEX = NO
GENERATE_XML = YES
MACRO_EXPANSION = YES
PREDEFINED = FUSEDADAM_EXPORT=
OUTPUT_DIRECTORY = build/docs
QUIET = YES
MAX_INITIALIZER_LINES = 1
WARN_AS_ERROR = YES
WARN_IF_INCOMPLETE_DOC = NO
"""

# The examples of the gallery, with the name of the option for the picture.
EXAMPLES = {
    "train_digits": ["--output"],
    "train_embedding": ["--output"],
    "train_small_memory": ["--steps=40", "--memory=60MB", "--plot"],
}


def make_sources(_app: Any) -> None:
    """Read the C++ headers, and run the examples that have changed."""
    BUILD.mkdir(parents=True, exist_ok=True)
    subprocess.run(["doxygen", "-"], cwd=ROOT, input=DOXYGEN, text=True, check=True)
    for name, arguments in EXAMPLES.items():
        script, text = ROOT / f"examples/{name}.py", BUILD / f"{name}.txt"
        if text.exists() and text.stat().st_mtime > script.stat().st_mtime:
            continue
        command = [sys.executable, script, *arguments, text.with_suffix(".png").relative_to(ROOT)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        printed = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
        text.write_text(printed, "utf-8")


def visit_math(writer: Any, node: nodes.Element) -> None:
    """Write a formula as MathML, which browsers show by themselves."""
    block = not isinstance(node, nodes.math)
    formula = tex2mathml(node.astext(), as_block=block)
    writer.body.append(f'<div class="math">{formula}</div>' if block else formula)
    raise nodes.SkipNode


def number_citations(_app: Any, page: nodes.document) -> None:
    """Write [1] for the label that numpydoc has made of it, which in Markdown files stays."""
    for text in list(page.findall(nodes.Text)):
        if label := re.fullmatch(r"\[R[0-9a-f]+-(\d+)\]", text):
            text.parent.replace(text, nodes.Text(f"[{label[1]}]"))


def setup(app: Any) -> None:
    """Register the above."""
    app.connect("doctree-read", number_citations)
    app.connect("builder-inited", make_sources)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
