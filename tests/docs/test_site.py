# SPDX-License-Identifier: MIT
"""The site builds without a warning, has every public name, and works in a browser."""

from __future__ import annotations

import ast
import functools
import html
import http.server
import importlib.util
import inspect
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fusedadam
import pytest

NEEDS = ("breathe", "furo", "jax", "keras", "matplotlib", "myst_parser", "numpydoc", "sklearn")
for needed in (*NEEDS, "sphinx", "torch", "tqdm"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"needs {needed}", allow_module_level=True)
if shutil.which("doxygen") is None:
    pytest.skip("needs doxygen", allow_module_level=True)

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SCREENSHOTS = ROOT / "build/screenshots"


@pytest.fixture(scope="module")
def site() -> Path:
    """Build with the command of CONTRIBUTING.md and return the directory."""
    (command,) = re.findall(
        r"`sphinx-build (-W .*?)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.DOTALL
    )
    arguments = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return ROOT / arguments[-1]


# -- every public name ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def entries(site: Path) -> set[str]:
    """The names of Python, C++ and C on the site, of which Sphinx writes an inventory."""
    compressed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(compressed).decode().splitlines()
    return {line.split(" ")[0] for line in lines if re.search(r" (py|cpp|c):", line)}


@pytest.mark.parametrize("package", ["", "torch", "jax", "keras"])
def test_every_public_name_of_python_has_an_entry(package: str, entries: set[str]) -> None:
    # Read, since a process has one backend of Keras.
    source = (Path(fusedadam.__file__).parent / package / "__init__.py").read_text("utf-8")
    (listed,) = re.findall(r"^__all__ = (\[.*?\])", source, re.MULTILINE | re.DOTALL)
    names = [".".join(filter(None, ("fusedadam", package, n))) for n in ast.literal_eval(listed)]
    assert names
    assert [name for name in names if name not in entries] == []


def test_every_member_of_adam_has_an_entry(entries: set[str]) -> None:
    members = [name for name, _ in inspect.getmembers(fusedadam.Adam) if not name.startswith("_")]
    assert [name for name in members if f"fusedadam.Adam.{name}" not in entries] == []


def test_every_declaration_of_c_has_an_entry(entries: set[str]) -> None:
    header = (ROOT / "src/cpp/include/fusedadam/fusedadam.h").read_text("utf-8")
    names = re.findall(r"^FUSEDADAM_EXPORT [^(]*\b(\w+)\(|^\} (\w+);", header, re.MULTILINE)
    assert len(names) > 30
    assert [name for function, struct in names if (name := function or struct) not in entries] == []


def test_every_declaration_of_cpp_has_an_entry_and_every_header_is_named(entries: set[str]) -> None:
    headers = sorted((ROOT / "src/cpp/include/fusedadam").glob("*.h*"))
    declaration = re.compile(
        r"^(?:(?:struct|class|enum class)(?: FUSEDADAM_EXPORT)?|using"
        r"|(?:inline constexpr|FUSEDADAM_EXPORT) .*?) ?\b(\w+)(?= [{:=]|\()",
        re.MULTILINE,
    )
    of_cpp = [file.read_text("utf-8") for file in headers if file.suffix == ".hpp"]
    names = [name for text in of_cpp for name in declaration.findall(text)]
    assert len(names) > 35
    assert [name for name in names if f"fusedadam::{name}" not in entries] == []
    page = (ROOT / "docs/cpp.md").read_text("utf-8")
    assert [file.name for file in headers if f"| `{file.name}` |" not in page] == []


# -- in a browser ---------------------------------------------------------------------------------

# Shows a page as a visitor sees it, and writes what a test asks of it.
PROBE = """<!doctype html><link rel="icon" href="data:,"><style>* {{ margin: 0; border: 0 }}</style>
<iframe src="/{page}" width="1280" height="900"></iframe><pre></pre><script>
setTimeout(() => {{
  const page = document.querySelector("iframe").contentDocument;
  const formula = page.querySelector("math[display=block]");
  if (formula) formula.scrollIntoView({{behavior: "instant", block: "center"}});
  document.querySelector("pre").textContent = JSON.stringify({{
    text: page.querySelector("article").innerText,
    background: getComputedStyle(page.body).backgroundColor,
    formula: formula && formula.getBoundingClientRect(),
  }});
}}, 3000);
</script>"""


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the site, the probes, and remembers what is missing."""

    missing: list[str]

    def do_GET(self) -> None:
        prefix, found, page = self.path.partition("/probe/")
        if prefix or not found:
            super().do_GET()
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(PROBE.format(page=html.escape(page)).encode())

    def log_request(self, code: int | str = "-", *_: object) -> None:
        if int(code) >= 400:
            self.missing.append(self.path)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server(site: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the site; return its address and the list of what has been asked for in vain."""
    Handler.missing = []
    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as http_server:
        threading.Thread(target=http_server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http_server.server_port}", Handler.missing
        http_server.shutdown()


def look(server: tuple[str, list[str]], page: str, name: str, *flags: str) -> dict[str, Any]:
    """Open a page, keep a screenshot, and return what the probe has seen."""
    address, missing = server
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    command = [
        *(str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--window-size=1280,900", "--virtual-time-budget=10000", "--enable-logging=stderr"),
        *("--dump-dom", f"--screenshot={SCREENSHOTS / name}.png", *flags),
    ]
    done = subprocess.run(
        [*command, f"{address}/probe/{page}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert re.findall(r".*:CONSOLE:.*", done.stderr) == []
    assert missing == []
    probed = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert probed
    seen: dict[str, Any] = json.loads(html.unescape(probed[1]))
    return seen


browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@browser
@pytest.mark.parametrize(
    ("page", "name", "text"),
    [
        ("index.html", "home", "Ten questions"),
        ("docs/gallery.html", "gallery", "held-out error"),
        ("search.html?q=clipnorm", "search", "fusedadam.Adam.clipnorm"),
    ],
)
def test_page_has_its_text(page: str, name: str, text: str, server: tuple[str, list[str]]) -> None:
    assert text in look(server, page, name)["text"]


@browser
def test_formula_of_the_api_page_is_visible(server: tuple[str, list[str]]) -> None:
    seen = look(server, "docs/api.html", "api")
    assert "fusedadam.torch.AdamW" in seen["text"]
    assert seen["formula"]["width"] > 100
    assert seen["formula"]["height"] > 80  # four lines


@browser
def test_dark_mode(server: tuple[str, list[str]]) -> None:
    flag = "--blink-settings=preferredColorScheme=0"
    background = look(server, "docs/numerics.html", "dark", flag)["background"]
    red = int(background.removeprefix("rgb(").partition(",")[0])
    assert red < 64
