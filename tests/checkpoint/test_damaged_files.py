# SPDX-License-Identifier: MIT
"""Files that are not complete checkpoints of these parameters: each is refused with a reason."""

from __future__ import annotations

import json
import math
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_files import (
    Edit,
    content,
    entry,
    every_tensor,
    metadata,
    names_beside,
    own,
    rejson,
    tensor,
    with_header,
)
from fusedadam import Adam
from helpers import Array, assert_all_same_bits
from training import Training


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, list[Array]]:
    """The bytes of a valid file, and its parameters."""
    training = Training(lr=0.01, amsgrad=True)
    training.step(3)
    path = tmp_path_factory.mktemp("good") / "adam.safetensors"
    training.optimizer.save(path)
    return path.read_bytes(), training.params


@pytest.fixture
def refused(path: Path, good: tuple[bytes, list[Array]]) -> Callable[[Edit, str], None]:
    """Check that the valid file, once edited, is refused for this reason and nothing changes."""

    def check(edit: Edit, reason: str) -> None:
        whole, params = good
        path.write_bytes(whole)
        edit(path)
        params_before = [param.copy() for param in params]
        file_before = path.read_bytes()
        modules = set(sys.modules)
        with pytest.raises(ValueError, match=reason) as caught:
            Adam.load(path, params)
        message = str(caught.value)
        assert str(path) in message
        assert len(message) < 1000
        assert re.search(r"Received: .+\Z", message, re.DOTALL), message
        assert set(sys.modules) == modules
        assert_all_same_bits(params, params_before)
        assert path.read_bytes() == file_before
        assert names_beside(path) == [path.name]

    return check


# -- edited files -----------------------------------------------------------------------------


def huge_shape(path: Path) -> None:
    """Give v.3, which has no elements, a shape that NumPy cannot hold."""
    tensor("v.3", np.ones((5, 0)))(path)
    data = path.read_bytes()
    assert data.count(b"[5,0]") == 1
    huge = data.replace(b"[5,0]", b"[%d,0]" % 2**62)
    length = int.from_bytes(data[:8], "little") + len(huge) - len(data)
    path.write_bytes(length.to_bytes(8, "little") + huge[8:])


OTHER = "is not a fusedadam checkpoint"
METADATA: dict[str, tuple[Edit, str]] = {
    "no format": (metadata(format=None), OTHER),
    "another format": (metadata(format="pt"), OTHER),
    "no version": (metadata(version=None), "format version None"),
    "version 2": (metadata(version="2"), "damaged: 'own' is missing"),
    "next version": (metadata(version="4"), "version '4', of a later .* reads versions 1, 2, 3"),
    "long version": (metadata(version="9" * 10_000), r"format version '9+\.\.\.9+'"),
    "another optimizer": (metadata(optimizer="Sgd"), "an optimizer 'Sgd', not of 'Adam'"),
    "no config": (metadata(config=None), "damaged: 'config' is missing"),
    "no progress": (metadata(progress=None), "damaged: 'progress' is missing"),
    "no excluded": (metadata(excluded=None), "damaged: 'excluded' is missing"),
    "lr missing": (rejson("config", lr=...), "'config' is not what get_config"),
    "long unknown setting": (rejson("config", **{"x" * 10_000: 1}), r"x\.\.\.\. Received"),
    "long text": (rejson("config", beta_1="9" * 10_000), "beta_1"),
    "out of range": (rejson("config", beta_2=1.0), "beta_2 must be >= 0 and < 1. Rec.*beta_2=1.0"),
    "too large": (rejson("config", lr=10**30), "in 'config', a number is no integer"),
    "twice": (metadata(config='{"lr": 0.1, "lr": 0.2}'), "in 'config', a name stands twice"),
    "text": (rejson("config", beta_1="0.9"), "beta_1"),
    "named half a character": (rejson("config", **{"\ud800": 1}), "'config', .* surrogates not al"),
    "setting of a list": (rejson("config", epsilon=[1e-8]), "something else than settings"),
    "a path as lr": (rejson("config", lr="os:system"), "names 'os:system', which is not imported"),
    "switched off": (rejson("config", amsgrad=...), "tensor 'vhat.0' should not be there"),
    "switched on": (rejson("config", use_ema=True), "tensor 'ema.0' is missing"),
    "accumulates": (rejson("config", gradient_accumulation_steps=2), "'accumulator.0' is missing"),
    "too many steps": (rejson("progress", iterations=2**53 + 1), "iterations"),
    "accumulated beyond": (rejson("progress", accumulated=1), "accumulated"),
    "unknown count": (rejson("progress", momentum=1), "'progress' has more or fewer counts"),
    "excluded beyond": (metadata(excluded="[4]"), "an excluded parameter does not exist"),
    "excluded twice": (metadata(excluded="[1, 1]"), "excluded"),
}
TENSORS: dict[str, tuple[Edit, str]] = {
    "no m.0": (tensor("m.0", None), "tensor 'm.0' is missing"),
    "no vhat": (every_tensor(lambda n, a: None if "vhat" in n else (n, a)), "'vhat.0' is missing"),
    "no tensor": (every_tensor(lambda *_: None), "has the state of 0. Received: 4"),
    "another kind": (tensor("q.0", np.ones(1)), "tensor 'q.0' should not be there"),
    "a whole other kind": (
        every_tensor(lambda n, a: (n.replace("vhat", "second"), a)),
        "tensor 'second.0' should not be there",
    ),
    "a tensor more": (tensor("m.4", np.ones(1)), "tensor '(m.4' should not|v.4' is missing)"),
    "a number twice": (tensor("m.00", np.ones(1)), "tensor 'm.00' should not be there"),
    "a huge number": (tensor("m.99999999999999", np.ones(1)), "is missing"),
    "a name without number": (tensor("m", np.ones(1)), "tensor 'm' should not be there"),
    "odd names only": (every_tensor(lambda n, a: (n.upper(), a)), "should not be there"),
    "wider": (tensor("v.0", np.ones((3, 5))), "params.0. must have the dtype of v.0 in .*, F64"),
    "half": (tensor("m.2", np.ones((), "f2")), "params.2. must have the dtype of m.2"),
    "integers": (tensor("vhat.1", np.ones(7, "i8")), "params.1. must have the dtype of vhat.1"),
    "flat": (tensor("m.0", np.ones(15, "f4")), "params.0. must have the shape of m.0"),
    "0-d no more": (tensor("v.2", np.ones(1, "f4")), "params.2. must have the shape of v.2"),
    "no shape of NumPy's": (huge_shape, "params.3. must have the shape of v.3"),
    "a byte more": (lambda p: p.write_bytes(p.read_bytes() + b"\n"), "this file is damaged"),
    "empty otherwise": (tensor("v.3", np.ones((2, 0))), "params.3. must have the shape of v.3"),
}
# JSON with numbers and structures that are hard for parsers.
HOSTILE = [
    *("", "{", "NaN", "Infinity", "1e400", "-1", "9" * 400, "9" * 5000, "[" * 100_000),
    *('{"a":' * 100_000, "[" * 900 + "]" * 900, "[[[]]]", "null", "true", '"text"', '"\\ud800"'),
    *("3", "[true]", "[0.5]", "[-1]", "[99]", "[0, 0]", "[1e400]", '["0"]', "{}", '{"lr": {}}'),
    '{"": 1}',
]
NO_COUNTS = [-1, 0.5, math.nan, math.inf, 2**63, 10**400, "1", None, True, [0], {}, ...]
COUNTS: dict[str, tuple[Edit, str]] = {
    f"{name}={value!s:.20}": (rejson("progress", **{name: value}), rf"{name}|\bprogress\b")
    for name in ("iterations", "skipped_steps", "accumulated", "good_steps", "dynamic_loss_scale")
    for value in NO_COUNTS
}
NO_LISTS: list[Any] = [
    *(None, 3, "text", {}, [None], [True], [0.5], ["0"], [[0]], [-1], [2**63]),
]
ODD = "'own' has something else"
# The steps, waiting or overrides of single parameters.
OWN: list[tuple[dict[str, Any], str]] = [
    *(({what: v}, ODD) for what in ("steps", "waiting", "overrides") for v in NO_LISTS),
    ({"momentum": [1]}, ODD),
    ({"steps": [1, 2, 3]}, ODD),
    ({"steps": [1] * 5}, ODD),
    ({"steps": [1, 2, 3, 2**53 + 1]}, "steps"),
    ({"waiting": [1, 1]}, ODD),
    ({"waiting": [4]}, ODD),
    *(
        ({"overrides": entries}, ODD)
        for entries in (
            *([[{"lr": 0.5}]], [[[1]]], [[[1], {"lr": 0.5}, {}]], [[{"lr": 0.5}, [1]]]),
            *([[[position], {"lr": 0.5}]] for position in (0.5, True, 4, -1)),
            *([[[1, 1], {"lr": 0.5}]], [[[1], {"lr": 0.5}], [[1], {"l2": 0.5}]]),
            [[[1], {"lr": [0.5]}]],
        )
    ),
    ({"overrides": [[[10**30], {"lr": 0.5}]]}, "in 'own', a number is no"),
    *(
        ({"overrides": [[[1], its]]}, reason)
        for its, reason in (
            ({"momentum": 0.5}, "momentum"),
            ({"x" * 10_000: 0.5}, r"x\.\.\.\. Received"),
            ({"amsgrad": True}, "amsgrad concerns"),
            ({"beta_1": 1.0}, "beta_1 must be"),
            ({"lr": math.inf}, "in 'own', Infinity"),
            ({"lr": "os:system"}, "lr must be"),
            ({"l2": "0.5"}, "l2 must be"),
            ({"clipnorm": 1.0, "clipnorm_per_tensor": 1.0}, "exclude each other"),
        )
    ),
]
HOSTILE_PARTS: dict[str, tuple[Edit, str]] = {
    f"{part}: {text[:12]}:{len(text)}": (
        own(text) if part == "own" else metadata(**{part: text}),
        f"'{part}'|excluded parameter|Unexpected keyword",
    )
    for part in ("config", "progress", "excluded", "own")
    for text in [*HOSTILE, *(["[]"] if part == "own" else [])]
    if (part, text) != ("own", "{}")
}
OWNS = {f"{its!r:.60}": (own(json.dumps(its)), reason) for its, reason in OWN}
EDITS = METADATA | TENSORS | COUNTS | HOSTILE_PARTS | OWNS


@pytest.mark.parametrize(("edit", "reason"), EDITS.values(), ids=EDITS)
def test_changed_file_is_refused(
    refused: Callable[[Edit, str], None], edit: Edit, reason: str
) -> None:
    refused(edit, reason)


def test_no_settings_of_single_parameters_load(path: Path, good: tuple[bytes, list[Array]]) -> None:
    path.write_bytes(good[0])
    own("{}")(path)
    assert Adam.load(path, good[1]).iterations == 3


def test_file_truncated_anywhere_is_refused(
    good: tuple[bytes, list[Array]], refused: Callable[[Edit, str], None]
) -> None:
    whole = good[0]
    header = 8 + int.from_bytes(whole[:8], "little")
    near = {*range(12), *range(header - 4, header + 4), len(whole) - 1}
    for length in sorted(near | {*range(12, len(whole), 41)}):
        of = f" of {len(whole)}" if length >= header else ""
        where = "" if of else ", in its header"
        refused(
            content(whole[:length]), f"this file is truncated{where}: it has {length} bytes{of}"
        )


# -- files of others --------------------------------------------------------------------------


def described(**changes: str) -> str:
    """The header's entry of an empty tensor, with other or more values."""
    entries = {"dtype": '"F32"', "shape": "[0]", "data_offsets": "[0,0]"} | changes
    return '{"a":{' + ",".join(f'"{name}":{text}' for name, text in entries.items()) + "}}"


def tensors(size: int, *entries: str, names: str = "ab") -> bytes:
    """A file with these entries and `size` bytes of data."""
    named = zip(names, entries, strict=False)
    return with_header("{" + ",".join(f'"{n}":{e}' for n, e in named) + "}", bytes(size))


FOREIGN = {
    "JSON": b'{"config": {"lr": 0.001}}',
    "pickle": pickle.dumps({"lr": 0.001, "iterations": 5}),
    "zeros": bytes(100),
    "a byte order mark": (5).to_bytes(8, "little") + b"\xef\xbb\xbf{}",
    "a list": with_header("[[]]"),
    "blanks first": with_header(" {}"),
    "a header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 100 MB and a byte": (100_000_001).to_bytes(8, "little") + b"{}",
}
BROKEN = {
    "no JSON": with_header("{]}"),
    "deep JSON": with_header('{"a":' * 100_000),
    "overlapping tensors": tensors(4, entry(0, 4), entry(0, 4)),
    "an empty tensor in another": tensors(8, entry(0, 8, shape="[2]"), entry(4, 4, shape="[0]")),
    "a hole before all": tensors(8, entry(4, 8)),
    "a hole": tensors(12, entry(0, 4), entry(8, 12)),
    "huge shape": tensors(4, entry(0, 4, shape=f"[{2**62}, {2**62}]")),
    "bytes of 0 modulo 2**64": tensors(0, entry(0, 0, shape=f"[{2**32}, {2**32}]")),
    "more dimensions than NumPy takes": tensors(4, entry(0, 4, shape=str([1] * 65))),
    "long shape": tensors(0, entry(0, 0, shape=str([2**63] * 40_000))),
    **{
        f"shape {shape}": tensors(4, entry(0, 4, shape=shape))
        for shape in ("[-1, -1]", "[1.0]", "[true]", "null")
    },
    "shape of minus zero": tensors(0, entry(0, 0, shape="[-0]")),
    "offset beyond 2**64": tensors(4, entry(2**64 - 4, 2**64)),
    "offset below 0": tensors(4, entry(-4, 0)),
    "huge offset": tensors(4, entry(0, 10**30)),
    "backwards": tensors(4, entry(4, 0)),
    "three offsets": tensors(4, entry(0, "2,4")),
    "no offsets": with_header('{"a":{"dtype":"F32","shape":[0]}}'),
    "more than a tensor": with_header(described(file='"/etc/passwd"')),
    "dtype that is none": with_header(described(dtype="4")),
    "tensor that is none": tensors(4, "[0,4]"),
    "tensor twice": tensors(8, entry(0, 4), entry(4, 8), names="aa"),
    "tensor twice, escaped": with_header(
        f'{{"a":{entry(0, 4)},"\\u0061":{entry(4, 8)}}}', bytes(8)
    ),
    "shape twice": with_header(described(shape='[0],"shape":[0]')),
    "bytes after the tensors": tensors(5, entry(0, 4)),
    "not UTF-8": (3).to_bytes(8, "little") + b'{"\xff',
    "half a surrogate pair": with_header('{"__metadata__":{"format":"\\ud800"}}'),
    "huge number": with_header('{"a":' + "9" * 500_000 + "}"),
    "huge fraction": with_header('{"a":0.' + "9" * 500_000 + "}"),
    "huge exponent": with_header('{"a":1e' + "9" * 500_000 + "}"),
    "metadata in a list": with_header('{"__metadata__":["format"]}'),
    "metadata of numbers": with_header('{"__metadata__":{"format":1}}'),
    "metadata twice": with_header('{"__metadata__":{},"__metadata__":{}}'),
}
OTHERS = {
    "empty": with_header("{}"),
    "null": with_header('{"__metadata__":null}'),
    "of torch": with_header('{"__metadata__":{"format":"pt"}}'),
    "BF16": tensors(2, entry(0, 2, dtype="BF16")),
    "F33": tensors(4, entry(0, 4, dtype="F33")),
}
FILES = {
    f"{reason}: {name}": (data, reason)
    for files, reason in (
        *((FOREIGN, "this is no safetensors file"), (BROKEN, "this file is damaged")),
        (OTHERS, OTHER),
    )
    for name, data in files.items()
}


@pytest.mark.parametrize(("data", "reason"), FILES.values(), ids=FILES)
def test_file_of_others_is_refused(
    refused: Callable[[Edit, str], None], data: bytes, reason: str
) -> None:
    refused(content(data), reason)
