# SPDX-License-Identifier: MIT
"""Malicious files: what loading costs in memory and time, and what it may run, open or wait for."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    Edit,
    content,
    entry,
    metadata,
    metadata_of,
    own,
    rejson,
    tensor,
    with_header,
)
from fresh_python import output_of
from fusedadam import Adam
from helpers import assert_all_same_bits

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")


def saved(path: Path, size: int = 2) -> Adam:
    """Save an optimizer of one parameter."""
    optimizer = Adam(lr=0.5)
    optimizer.build([np.ones(size)])
    optimizer.save(path)
    return optimizer


def each_of(files: dict[str, Edit], folder: Path, code: str, prelude: str = "") -> dict[str, Any]:
    """Run code for each edited file, in one process, and return its `result` by name.

    In a process of its own, which is killed if it hangs, and whose memory is its own.
    """
    for i, edit in enumerate(files.values()):
        saved(folder / str(i))
        edit(folder / str(i))
    script = f"""
import json, os, sys
import numpy as np
from fusedadam import Adam

params = [np.ones(2)]
folder = {str(folder)!r}
Adam().save(os.path.join(folder, "good"))
Adam.load(os.path.join(folder, "good"), params)  # imports what loading needs
{prelude}
results = []
for number in range({len(files)}):
    path = os.path.join(folder, str(number))
{code}
    results.append(result)
print(json.dumps(results))
"""
    return dict(zip(files, json.loads(output_of(script)), strict=True))


# -- paths that are no regular files ----------------------------------------------------------


def test_missing_file_is_a_file_not_found_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(str(path))):
        Adam.load(path, [])
    with pytest.raises(OSError):
        Adam.load(path.parent, [])


@posix
def test_what_is_no_regular_file_is_refused_and_not_waited_for(path: Path) -> None:
    # In a separate process, which is killed if it blocks. Some files of Linux report a size of zero
    # or one larger than memory.
    refused = ["pipe", "written", "/dev/zero"]
    others = ["socket", "/proc/kmsg", "/proc/self/mem", "/proc/self/maps", "/proc/kcore"]
    code = f"""
        import os, socket
        from fusedadam import Adam

        os.chdir({str(path.parent)!r})
        os.mkfifo("pipe")
        os.mkfifo("written")
        writer = os.open("written", os.O_RDWR)
        os.write(writer, bytes(9))
        listening = socket.socket(socket.AF_UNIX)
        listening.bind("socket")
        for path in {refused + others}:
            try:
                Adam.load(path, [])
            except (OSError, ValueError) as error:
                print(path if "regular" not in str(error) else error, flush=True)
    """
    why = "path must be that of a regular file. Received: "
    assert output_of(code).splitlines() == [*(f"{why}{name!r}" for name in refused), *others]


# -- memory and time of loading ---------------------------------------------------------------


def padded(text: str, size: int) -> str:
    """Repeat the text between < and > until the whole has this many bytes."""
    before, _, rest = text.partition("<")
    again, _, after = rest.partition(">")
    return before + again * ((size - len(before) - len(after)) // len(again)) + after


def header(text: str, size: int = 0) -> Edit:
    """Write a file with this header and `size` bytes of data that take no disk space."""

    def write(path: Path) -> None:
        data = with_header(text)
        path.write_bytes(data)
        os.truncate(path, len(data) + size)

    return write


def numbered(text: str, count: int) -> str:
    return ",".join(text % i for i in range(count))


def claims_a_header(length: int) -> Edit:
    """Write a sparse file as long as the header that it claims, with one byte of it."""

    def write(path: Path) -> None:
        path.write_bytes(length.to_bytes(8, "little") + b"{")
        os.truncate(path, 8 + length)

    return write


def claims_terabytes(path: Path) -> None:
    tensors = {"m.0": entry(0, 8 * TIB, "F64", f"[{TIB}]"), "v.0": entry(8 * TIB, 8 * TIB + 16)}
    described = ",".join(f'"{name}":{tensor}' for name, tensor in tensors.items())
    header(f'{{"__metadata__":{json.dumps(metadata_of(path))},{described}}}', 8 * TIB + 16)(path)


TIB = 2**40
# Just below the longest header that is accepted for a few parameters. Quotes in a nested JSON text
# take two bytes.
LONGEST = 990_000
WITHIN = LONGEST // 2
DIMENSIONS = padded("[<9223372036854775807,>0]", LONGEST)
BOMBS: dict[str, Edit] = {
    "a header of 99 MB": claims_a_header(99_000_000),
    "a header of 1 TiB": claims_a_header(TIB),
    "20 MB of metadata": header(padded('{"__metadata__":{"format":"<x>"}}', 20_000_000)),
    "20 MB of tensors": header(padded('{<"a":[],>"b":[]}', 20_000_000)),
    "arrays of terabytes": claims_terabytes,
    "many tensors": header("{" + numbered(f'"m.%d":{entry(0, 0, "F32", "[0]")}', 15_000) + "}"),
    "many names": header('{"__metadata__":{' + numbered('"%x":""', 90_000) + "}}"),
    "many lists": header(padded('{"a":[<[],>0]}', LONGEST)),
    "many objects": header(padded('{"a":[<{},>0]}', LONGEST)),
    "many fractions": header(padded('{"a":[<1.5,>0]}', LONGEST)),
    "many levels": header(padded('{"a":<[>}', LONGEST)),
    "many dimensions": header(f'{{"a":{entry(0, 0, "F32", DIMENSIONS)}}}'),
    "many digits": header(padded('{"a":<9>}', LONGEST)),
    "many excluded": metadata(excluded=padded("[<1,>1]", WITHIN)),
    "excluded lists": metadata(excluded=padded("[<[],>0]", WITHIN)),
    "excluded objects": metadata(excluded=padded("[<{},>0]", WITHIN)),
    "many own steps": own(padded('{"steps":[<1,>1]}', WITHIN)),
    "many waiting": own(padded('{"waiting":[<0,>0]}', WITHIN)),
    "own lists": own(padded('{"overrides":[<[],>0]}', WITHIN)),
    "many overrides": own(padded('{"overrides":[<[[],{}],>0]}', WITHIN)),
    "own objects": own("{" + numbered('"%x":{}', 50_000) + "}"),
    "own settings": own('{"overrides":[[[0],{' + numbered('"%x":1', 50_000) + "}]]}"),
    "many settings": metadata(config="{" + numbered('"%x":{}', 50_000) + "}"),
    "many counts": metadata(progress="{" + numbered('"%x":1', 50_000) + "}"),
    "a count of many digits": metadata(progress=padded('{"iterations":<9>}', WITHIN)),
}


@posix
def test_file_is_refused_without_the_memory_that_it_claims(tmp_path: Path) -> None:
    prelude = """
import resource

def most_used_mb():
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

before = most_used_mb()
"""
    # The peak includes allocations outside Python. The first file that raises it is the culprit.
    code = """
    try:
        Adam.load(path, params)
    except ValueError as error:
        result = most_used_mb() - before if "Received: " in str(error) else str(error)
"""
    # A list takes 3 bytes in JSON and 64 in memory: at most 21 MB, and twice that for intermediate
    # copies.
    costs = each_of(BOMBS, tmp_path, code, prelude)
    assert {name: cost for name, cost in costs.items() if not cost < 64} == {}


def test_header_longer_than_the_parameters_make_it_is_not_read(path: Path) -> None:
    params = [np.ones(1) for _ in range(4000)]
    optimizer = Adam(amsgrad=True, use_ema=True, gradient_accumulation_steps=2)
    optimizer.build(params)
    optimizer.save(path)
    with pytest.raises(ValueError, match=r"its header, of [0-9]{7} bytes, is longer than .* Rec"):
        Adam.load(path, params[:10])
    assert Adam.load(path, params).iterations == 0


# -- side effects of loading ------------------------------------------------------------------

# colorsys is a module that nothing else imports.
TRAPS: dict[str, Edit] = {
    "good": lambda _: None,
    "a pickle": content(pickle.dumps(os.getcwd)),
    "a pickle in the metadata": metadata(config="cos\nsystem\n(S'true'\ntR."),
    "a function as lr": rejson("config", lr="colorsys:rgb_to_hls"),
    "as learning_rate": rejson("config", lr=..., learning_rate="colorsys:rgb_to_hls"),
    "a class": metadata(optimizer="subprocess.Popen"),
    "as lr of a parameter": own('{"overrides":[[[0],{"lr":"colorsys:rgb_to_hls"}]]}'),
    "a file as tensor": tensor("../../etc/passwd", np.ones(2)),
    "a file as metadata": metadata(file="/etc/passwd"),
    "an expression": metadata(progress="__import__('os').system('true')"),
    "an index of files": header('{"weight_map":{"m.0":"/etc/passwd"}}'),
}


def test_loading_opens_the_path_and_does_nothing_else(tmp_path: Path) -> None:
    # Audit hooks report files that are opened or mapped, imports, code that is compiled or run,
    # pickles, sockets and processes. An audit hook cannot be removed.
    prelude = """
seen = []
listens = False

def listen(event, arguments):
    if listens:
        seen.append((event, arguments))

sys.addaudithook(listen)
"""
    # An error is followed to where it leaves the package.
    code = """
    seen.clear()
    loaded = []
    for schedule in (None, abs):
        listens = True
        try:
            loaded.append(Adam.load(path, params, lr=schedule))
        except ValueError:
            loaded.append(None)
        listens = False
    told = [(e, a) for e, a in seen if e != "object.__getattr__" or a[1] != "tb_frame"]
    names = sorted({(event, str(a[0]) if event == "open" else "") for event, a in told})
    result = names, [adam is not None for adam in loaded]
"""
    effects = each_of(TRAPS, tmp_path, code, prelude)
    for i, (name, (events, loads)) in enumerate(effects.items()):
        assert events == [["open", str(tmp_path / str(i))]], name
        # With a schedule of the caller's, the name in the file does not matter.
        by_name = {"good": [True, True], "a file as metadata": [True, True]}
        assert loads == (by_name | {"a function as lr": [False, True]}).get(name, [False] * 2), name


def loaded_while(monkeypatch: pytest.MonkeyPatch, path: Path, change: Callable[[], object]) -> Adam:
    """Load while the file changes after its header is read and before its arrays are."""
    from_config = Adam.from_config

    def slowly(config: Any) -> Adam:
        change()
        return from_config(config)

    monkeypatch.setattr(Adam, "from_config", slowly)
    return Adam.load(path, [np.ones(100_000)])


@posix
def test_file_that_replaces_the_path_meanwhile_is_not_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = saved(path, 100_000)

    def replace() -> None:
        path.unlink()
        path.write_bytes(bytes(2_000_000))

    loaded = loaded_while(monkeypatch, path, replace)
    assert_all_same_bits(loaded.weights, first.weights)


# A process that had mapped the file would be killed by SIGBUS.
@pytest.mark.parametrize("left", [0, 100, 5000, 1_000_000])
@posix
def test_file_that_is_cut_off_meanwhile_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    saved(path, 100_000)
    why = r"this file was truncated while it was read\. Received: "
    with pytest.raises(ValueError, match=why):
        loaded_while(monkeypatch, path, lambda: os.truncate(path, left))
