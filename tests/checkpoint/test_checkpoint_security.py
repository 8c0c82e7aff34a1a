# SPDX-License-Identifier: MIT
"""Malicious files: what loading costs in memory and time, and what it may run, open or wait for."""

from __future__ import annotations

import errno
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    Edited,
    assert_same_state,
    edited,
    entry,
    metadata,
    names_beside,
    rejson,
    tensor,
    with_header,
)
from fresh_python import output_of
from fusedadam import Adam
from helpers import Array

posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")


def test_no_module_is_imported_by_the_files_word(path: Path, tmp_path: Path) -> None:
    code = f"""
        import json, sys
        import numpy as np
        from fusedadam import Adam
        from fusedadam.snapshots import snapshot
        from safetensors.numpy import save_file
        sys.path.insert(0, {str(tmp_path)!r})
        config = Adam().get_config() | {{"lr": "trap:spring"}}
        metadata = {{
            "format": "fusedadam", "version": "1", "optimizer": "Adam", "excluded": "[]",
            "config": json.dumps(config), "progress": json.dumps(snapshot(Adam())["progress"]),
        }}
        save_file({{}}, {str(path)!r}, metadata)
        try:
            Adam.load({str(path)!r}, [])
        except ValueError as error:
            assert "trap:spring" in str(error)
        print(Adam.load({str(path)!r}, [], lr=lambda iterations: 0.5).iterations)
        assert "trap" not in sys.modules
    """
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    assert output_of(code) == "0"


def test_missing_file_is_a_file_not_found_error(path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        Adam.load(path, [])
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(path)


def test_directory_cannot_be_loaded(path: Path) -> None:
    with pytest.raises(OSError):
        Adam.load(path.parent, [])


# -- paths that are no regular files ----------------------------------------------------------


@posix
@pytest.mark.parametrize("kind", ["pipe", "pipe with a writer", "device", "socket"])
def test_what_is_no_regular_file_is_not_waited_for(path: Path, kind: str) -> None:
    # In a separate process, which is killed if it blocks.
    code = f"""
        import os, socket
        from fusedadam import Adam
        path, kind = {str(path)!r}, {kind!r}
        if kind == "device":
            path = "/dev/zero"
        elif kind == "socket":
            os.chdir(os.path.dirname(path))  # its path may have some 100 bytes
            path = "socket"
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(path)
        else:
            os.mkfifo(path)
            if kind == "pipe with a writer":
                writer = os.open(path, os.O_RDWR)
                os.write(writer, bytes(9))
        try:
            Adam.load(path, [])
        except (OSError, ValueError) as error:
            print(type(error).__name__, error)
    """
    done = output_of(code)
    if kind == "socket":
        assert done.startswith("OSError ")
    else:
        assert done.startswith("ValueError path must be that of a regular file. Received: ")


@pytest.mark.skipif(sys.platform != "linux", reason="files of Linux")
@pytest.mark.parametrize("name", ["/proc/kmsg", "/proc/self/mem", "/proc/self/maps", "/proc/kcore"])
def test_files_of_the_systems_are_refused(name: str) -> None:
    # Some of them report a size of zero or one larger than memory, and some block.
    code = f"""
        from fusedadam import Adam
        try:
            Adam.load({name!r}, [])
        except (OSError, ValueError):
            print("refused")
    """
    assert output_of(code) == "refused"


# -- memory and time of loading ---------------------------------------------------------------


def padded(text: str, size: int) -> str:
    """Repeat the text between < and > until the whole has this many bytes."""
    before, _, rest = text.partition("<")
    again, _, after = rest.partition(">")
    return before + again * ((size - len(before) - len(after)) // len(again)) + after


def header(text: str, size: int = 0) -> Callable[[Path], None]:
    """Write a file with this header and `size` bytes of data that take no disk space."""

    def write(path: Path) -> None:
        content = with_header(text)
        path.write_bytes(content)
        os.truncate(path, len(content) + size)

    return write


def part(name: str, text: str) -> Callable[[Path], None]:
    """Change a part of the metadata of a good file."""
    return lambda path: edited(path, metadata(name, text))


def own(text: str) -> Callable[[Path], None]:
    """Change the settings of single parameters in a valid file."""
    return lambda path: edited(path, lambda file: file.metadata.update(version="2", own=text))


def numbered(text: str, count: int) -> str:
    return ",".join(text % i for i in range(count))


def claims_a_header(length: int) -> Callable[[Path], None]:
    """Write a sparse file as long as the header that it claims, with one byte of it."""

    def write(path: Path) -> None:
        path.write_bytes(length.to_bytes(8, "little") + b"{")
        os.truncate(path, 8 + length)

    return write


def claims_terabytes(path: Path) -> None:
    good = json.dumps(Edited(path).metadata)
    tensors = {"m.0": entry(0, 8 * TIB, "F64", f"[{TIB}]"), "v.0": entry(8 * TIB, 8 * TIB + 16)}
    described = ",".join(f'"{name}":{tensor}' for name, tensor in tensors.items())
    header(f'{{"__metadata__":{good},{described}}}', 8 * TIB + 16)(path)


TIB = 2**40
# Just below the longest header that is accepted for a few parameters. Quotes in a nested JSON text
# take two bytes.
LONGEST = 990_000
WITHIN = LONGEST // 2
BOMBS: dict[str, Callable[[Path], None]] = {
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
    "many dimensions": header(
        f'{{"a":{entry(0, 0, "F32", padded("[<9223372036854775807,>0]", LONGEST))}}}'
    ),
    "many digits": header(padded('{"a":<9>}', LONGEST)),
    "many excluded": part("excluded", padded("[<1,>1]", WITHIN)),
    "excluded lists": part("excluded", padded("[<[],>0]", WITHIN)),
    "excluded objects": part("excluded", padded("[<{},>0]", WITHIN)),
    "many own steps": own(padded('{"steps":[<1,>1]}', WITHIN)),
    "many waiting": own(padded('{"waiting":[<0,>0]}', WITHIN)),
    "own lists": own(padded('{"overrides":[<[],>0]}', WITHIN)),
    "many overrides": own(padded('{"overrides":[<[[],{}],>0]}', WITHIN)),
    "own objects": own("{" + numbered('"%x":{}', 50_000) + "}"),
    "many settings of a parameter": own(
        '{"overrides":[[[0],{' + numbered('"%x":1', 50_000) + "}]]}"
    ),
    "many settings": part("config", "{" + numbered('"%x":{}', 50_000) + "}"),
    "many counts": part("progress", "{" + numbered('"%x":1', 50_000) + "}"),
    "a count of many digits": part("progress", padded('{"iterations":<9>}', WITHIN)),
}


@posix
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_file_is_refused_without_the_memory_that_it_claims(
    path: Path, bomb: Callable[[Path], None]
) -> None:
    optimizer = Adam()
    optimizer.build([np.ones(2)])
    optimizer.save(path)
    bomb(path)
    # In a separate process, whose peak memory includes allocations outside Python. It is killed if
    # it takes long.
    code = f"""
        import resource, sys
        import numpy as np
        from fusedadam import Adam

        def most_used_mb():
            unit = 1e6 if sys.platform == "darwin" else 1e3
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

        params = [np.ones(2)]
        Adam().save({str(path.with_name("good"))!r})
        Adam.load({str(path.with_name("good"))!r}, params)
        before = most_used_mb()
        try:
            Adam.load({str(path)!r}, params)
        except ValueError as error:
            assert "Received: " in str(error), error
            print(most_used_mb() - before)
    """
    # A list takes 3 bytes in JSON and 64 in memory: at most 21 MB, and twice that for intermediate
    # copies.
    assert float(output_of(code)) < 64


def test_header_longer_than_the_parameters_make_it_is_not_read(path: Path) -> None:
    params = [np.ones(1) for _ in range(4000)]
    optimizer = Adam(amsgrad=True, use_ema=True, gradient_accumulation_steps=2)
    optimizer.build(params)
    optimizer.save(path)
    with pytest.raises(ValueError, match=r"its header, of [0-9]{7} bytes, is longer than .* Rec"):
        Adam.load(path, params[:10])
    assert Adam.load(path, params).iterations == 0


def test_state_that_makes_too_long_a_header_is_not_saved(path: Path) -> None:
    class Named(Adam):
        def get_config(self) -> dict[str, Any]:
            return super().get_config() | {"name": "x" * 1_000_000}

    with pytest.raises(ValueError, match=r"less than 1000000 bytes to be saved\. Received: "):
        Named().save(path)
    assert names_beside(path) == []


# -- side effects of loading ------------------------------------------------------------------


def written(path: Path, content: bytes) -> None:
    path.write_bytes(content)


TRAPS: dict[str, Callable[[Path], None]] = {
    "good": lambda _: None,
    "a pickle": lambda path: written(path, pickle.dumps(os.getcwd)),
    "a pickle in the metadata": part("config", "cos\nsystem\n(S'true'\ntR."),
    "a function as lr": lambda path: edited(path, rejson("config", lr="colorsys:rgb_to_hls")),
    "a function as learning_rate": lambda path: edited(
        path, rejson("config", lr=..., learning_rate="colorsys:rgb_to_hls")
    ),
    "a class": part("optimizer", "subprocess.Popen"),
    "a function as lr of a parameter": own('{"overrides":[[[0],{"lr":"colorsys:rgb_to_hls"}]]}'),
    "a file as tensor": lambda path: edited(path, tensor("../../etc/passwd", np.ones(2))),
    "a file as metadata": part("file", "/etc/passwd"),
    "an expression": part("progress", "__import__('os').system('true')"),
    "an index of files": header('{"weight_map":{"m.0":"/etc/passwd"}}'),
}


@pytest.mark.parametrize("trap", TRAPS.values(), ids=TRAPS)
def test_loading_opens_the_path_and_does_nothing_else(
    path: Path, trap: Callable[[Path], None]
) -> None:
    # Audit hooks report files that are opened or mapped, imports, code that is compiled or run,
    # pickles, sockets and processes. An audit hook cannot be removed.
    code = f"""
        import json, sys
        import numpy as np
        from fusedadam import Adam

        params = [np.ones(2)]
        path = {str(path)!r}
        Adam.load({str(path.with_name("good"))!r}, params)  # imports what loading needs
        seen = []
        listens = False

        def listen(event, arguments):
            if listens:
                seen.append((event, arguments))

        sys.addaudithook(listen)
        listens = True
        try:
            Adam.load(path, params)
        except ValueError as error:
            pass
        listens = False
        # An error is followed to where it leaves the package.
        seen = [(e, a) for e, a in seen if e != "object.__getattr__" or a[1] != "tb_frame"]
        told = sorted({{(event, str(a[0]) if event == "open" else "") for event, a in seen}})
        print(json.dumps(told))
    """
    optimizer = Adam()
    optimizer.build([np.ones(2)])
    for file in (path, path.with_name("good")):
        optimizer.save(file)
    trap(path)
    assert json.loads(output_of(code)) == [["open", str(path)]]


@pytest.mark.parametrize("swap", ["another", "pipe", "nothing"])
@posix
def test_file_that_replaces_the_path_meanwhile_is_not_read(path: Path, swap: str) -> None:
    params = [np.ones(1000)]
    first = Adam(lr=0.5)
    first.build(params)
    first.save(path)

    class Swapping(Adam):
        @classmethod
        def from_config(cls, config: Any) -> Any:
            # After the header is read and before the arrays are.
            path.unlink()
            if swap == "pipe":
                os.mkfifo(path)
            elif swap == "another":
                path.write_bytes(bytes(20_000))
            return super().from_config(config)

    Swapping.__name__ = "Adam"
    assert_same_state(Swapping.load(path, params), first)


@posix
@pytest.mark.parametrize("left", [0, 100, 5000, 1_000_000])
def test_file_that_is_cut_off_meanwhile_is_refused(path: Path, left: int) -> None:
    # In a separate process: a process that had mapped the file would be killed by SIGBUS.
    code = f"""
        import os
        import numpy as np
        from fusedadam import Adam

        params = [np.ones(1_000_000)]
        path = {str(path)!r}

        class Cutting(Adam):
            @classmethod
            def from_config(cls, config):
                os.truncate(path, {left})
                return super().from_config(config)

        Cutting.__name__ = "Adam"
        optimizer = Adam()
        optimizer.build(params)
        optimizer.save(path)
        try:
            Cutting.load(path, params)
        except ValueError as error:
            print(error)
    """
    assert "this file was truncated while it was read. Received: " in output_of(code)


# -- pickles ----------------------------------------------------------------------------------


def state_with(**changes: Any) -> dict[str, Any]:
    """The contents of a pickle with changed entries. `...` removes one; `m` and `v` are arrays."""
    optimizer = Adam(weight_decay=0.1, gradient_accumulation_steps=2)
    params = [np.ones(3), np.ones((2, 2), "float32")]
    optimizer.step(params, params)
    state = optimizer.__getstate__()
    for name, value in changes.items():
        entries = state["_state"] if name in state["_state"] else state
        entries[name] = value
        if value is ...:
            del entries[name]
    return state


def huge() -> Array:
    array: Array = np.lib.stride_tricks.as_strided(np.zeros(1), (2**40,), (0,))
    return array


# A pickle can run any code by design. Wrong contents must still raise an error and not crash.
WRONG_STATES: dict[str, dict[str, Any]] = {
    **{f"no {name}": {name: ...} for name in (*state_with(), "m", "v")},
    **{
        f"{name} {value}": {name: value}
        for name in ("_state", "_options", "_progress", "_own", "_counts")
        for value in (5, "text", [None])
    },
    **{
        f"{what} {position}": {"_own": own}
        for position in (99, -1, 2**70, 0.5, "0", None)
        for what, own in {
            "excluded": ((position,), {}),
            "override": ((), {position: {"lr": 0.5}}),
        }.items()
    },
    **{
        f"override by {own!r}": {"_own": ((), {0: own})}
        for own in (5, {"lr": "fast"}, {"momentum": 1}, {"lr": 2**5000}, {5: 5})
    },
    **{
        f"{what} {value!r:.20}": {"_counts": {"steps": [1, 1], "waiting": [], what: value}}
        for what, values in {
            "steps": ([1], [1] * 3, [-1, 1], [2**70, 1], [0.5, 1], ["1", 1], 5, None),
            "waiting": ([2], [-1], [2**70], [0.5], ["0"], 5, None),
        }.items()
        for value in values
    },
    "a structure that is none": {"_structure": (5,)},
    "to override what is no array": {"_to_find": (None, [([5], {})])},
    "to override by what is none": {"_to_find": (None, 5)},
    "a schedule that is none": {"_schedule": 5},
    "to exclude what is no array": {"_to_find": ([5], [])},
    "fewer": {"v": [np.ones(3)]},
    "more": {"v": [np.ones(3)] * 3},
    "none": {"m": []},
    "other shapes": {"v": [np.ones(4), np.ones((2, 2))]},
    "objects": {"m": [np.array([None] * 3), None]},
    "integers": {"m": [np.ones(3, "int64"), np.ones((2, 2), "int64")]},
    "columns": {"m": [np.ones(3), np.asfortranarray(np.eye(2)[:, ::-1])]},
    "one element as many": {"m": [huge(), np.ones(2)]},
    "many from one element": {"v": [huge(), np.ones(2)]},
}


@pytest.mark.parametrize("changes", WRONG_STATES.values(), ids=WRONG_STATES)
def test_wrong_state_of_a_pickle_is_an_error(changes: dict[str, Any]) -> None:
    pickled = pickle.dumps(Adam())
    assert pickle.loads(pickled).iterations == 0
    optimizer = Adam.__new__(Adam)
    params = [np.ones(3), np.ones((2, 2), "float32")]
    grads = [np.ones(3), np.ones((2, 2), "float32")]
    errors = (AttributeError, LookupError, MemoryError, TypeError, ValueError)
    with pytest.raises(errors):  # noqa: PT012
        optimizer.__setstate__(state_with(**changes))
        # Some of it only matters for a step.
        optimizer.step(params, grads)
    assert np.all(params[0] == 1)
