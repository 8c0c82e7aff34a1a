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
    OPTIONS,
    Edited,
    Training,
    edited,
    entry,
    every_tensor,
    metadata,
    names_beside,
    rejson,
    tensor,
    with_header,
)
from fusedadam import Adam
from helpers import Array, assert_all_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

# JSON with numbers and structures that are hard for parsers.
HOSTILE = [
    "",
    "{",
    "NaN",
    "Infinity",
    "1e400",
    "-1",
    "9" * 400,
    "9" * 5000,
    "[" * 100_000,
    '{"a":' * 100_000,
    "[" * 900 + "]" * 900,
    "[[[]]]",
    "null",
    "true",
    '"text"',
    '"\\ud800"',
    "3",
    "[true]",
    "[0.5]",
    "[-1]",
    "[99]",
    "[0, 0]",
    "[1e400]",
    '["0"]',
    "{}",
    '{"lr": {}}',
    '{"": 1}',
]
EDITS: dict[str, tuple[Callable[[Edited], None], str]] = {
    "no format": (metadata("format", None), "is not a fusedadam checkpoint"),
    "another format": (metadata("format", "pt"), "is not a fusedadam checkpoint"),
    "no version": (metadata("version", None), "format version None"),
    "version 2": (metadata("version", "2"), "damaged: 'own' is missing"),
    "next version": (
        metadata("version", "4"),
        "format version '4', of a later .* reads versions 1, 2, 3",
    ),
    "empty version": (metadata("version", ""), "format version ''"),
    "long version": (metadata("version", "9" * 10_000), r"format version '9+\.\.\.9+'"),
    "no optimizer": (metadata("optimizer", None), "an optimizer None"),
    "another optimizer": (metadata("optimizer", "Sgd"), "an optimizer 'Sgd', not of 'Adam'"),
    **{
        f"no {part}": (metadata(part, None), f"damaged: '{part}' is missing")
        for part in ("config", "progress", "excluded")
    },
    "lr missing": (rejson("config", lr=...), "'config' is not what get_config"),
    "beta_1 missing": (rejson("config", beta_1=...), "'config' is not what get_config"),
    "unknown setting": (rejson("config", momentum=0.5), "momentum"),
    "unknown setting of a long name": (
        rejson("config", **{"x" * 10_000: 1}),
        r"x\.\.\.\. Received",
    ),
    "setting of a long text": (rejson("config", beta_1="9" * 10_000), "beta_1"),
    "setting out of range": (
        rejson("config", beta_2=1.0),
        "beta_2 must be >= 0 and < 1. Received: beta_2=1.0",
    ),
    "setting too large": (rejson("config", lr=10**30), "in 'config', a number is no integer"),
    "setting not finite": (rejson("config", lr=math.inf), "in 'config', Infinity is no number"),
    "setting twice": (
        metadata("config", '{"lr": 0.1, "lr": 0.2}'),
        "in 'config', a name stands twice",
    ),
    "setting of text": (rejson("config", beta_1="0.9"), "beta_1"),
    "setting of half a character": (
        rejson("config", loss_scale="\ud800"),
        "in 'config', .* surrogates not allowed",
    ),
    "unknown setting of half a character": (
        rejson("config", **{"\ud800": 1}),
        "in 'config', .* surrogates not allowed",
    ),
    "setting of None": (rejson("config", decay=None), "decay"),
    "setting of a list": (rejson("config", epsilon=[1e-8]), "something else than settings"),
    "switch of text": (rejson("config", amsgrad="yes"), "amsgrad"),
    "a path as lr": (rejson("config", lr="os:system"), "names 'os:system', which is not imported"),
    "text as lr": (rejson("config", lr=""), "names '', which is not imported"),
    "switched off": (rejson("config", amsgrad=...), "tensor 'vhat.0' should not be there"),
    "switched on": (rejson("config", use_ema=True), "tensor 'ema.0' is missing"),
    "accumulates": (
        rejson("config", gradient_accumulation_steps=2),
        "tensor 'accumulator.0' is missing",
    ),
    "too many steps": (rejson("progress", iterations=2**53 + 1), "iterations"),
    "far too many steps": (rejson("progress", iterations=2**63), "something else than counts"),
    "accumulated beyond": (rejson("progress", accumulated=1), "accumulated"),
    "excluded beyond": (metadata("excluded", "[4]"), "an excluded parameter does not exist"),
    "excluded twice": (metadata("excluded", "[1, 1]"), "excluded"),
    "no m.0": (tensor("m.0", None), "tensor 'm.0' is missing"),
    "no v.3": (tensor("v.3", None), "tensor '(v.3' is missing|vhat.3' should not be there)"),
    "no vhat": (
        every_tensor(lambda n, a: None if n.startswith("vhat") else (n, a)),
        "tensor 'vhat.0' is missing",
    ),
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
    "no name": (tensor("", np.ones(1)), "tensor '' should not be there"),
    "odd names only": (every_tensor(lambda n, a: (n.upper(), a)), "should not be there"),
    "wider": (tensor("v.0", np.ones((3, 5))), "params.0. must have the dtype of v.0 in .*, F64"),
    "narrower": (tensor("v.1", np.ones(7, "f4")), "params.1. must have the dtype of v.1"),
    "half": (tensor("m.2", np.ones((), "f2")), "params.2. must have the dtype of m.2"),
    "integers": (tensor("vhat.1", np.ones(7, "i8")), "params.1. must have the dtype of vhat.1"),
    "longer": (tensor("m.1", np.ones(8)), r"params.1. must have the shape of m.1 in .*, \(8,\)"),
    "flat": (tensor("m.0", np.ones(15, "f4")), "params.0. must have the shape of m.0"),
    "0-d no more": (tensor("v.2", np.ones(1, "f4")), "params.2. must have the shape of v.2"),
    "empty otherwise": (tensor("v.3", np.ones((2, 0))), "params.3. must have the shape of v.3"),
}


@pytest.fixture
def refused(path: Path, training: Training) -> Callable[[str], None]:
    """Check that the file at `path` is refused for this reason, and that nothing changes."""

    def check(reason: str) -> None:
        training_before = [param.copy() for param in training.params]
        file_before = path.read_bytes()
        modules = set(sys.modules)
        with pytest.raises(ValueError, match=reason) as caught:
            Adam.load(path, training.params)
        message = str(caught.value)
        assert str(path) in message
        assert len(message) < 1000
        assert re.search(r"Received: .+\Z", message, re.DOTALL), message
        assert set(sys.modules) == modules
        assert_all_same_bits(training.params, training_before)
        assert path.read_bytes() == file_before
        assert names_beside(path) == [path.name]

    training.optimizer.save(path)
    return check


@pytest.mark.parametrize(("edit", "reason"), EDITS.values(), ids=EDITS)
def test_changed_file_is_refused(
    path: Path, refused: Callable[[str], None], edit: Callable[[Edited], None], reason: str
) -> None:
    edited(path, edit)
    refused(reason)


@pytest.mark.parametrize("part", ["config", "progress", "excluded"])
@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: f"{text[:12]}:{len(text)}")
def test_hostile_json_is_refused(
    path: Path, refused: Callable[[str], None], part: str, text: str
) -> None:
    edited(path, metadata(part, text))
    refused(f"'{part}'|excluded parameter|Unexpected keyword")


@pytest.mark.parametrize(
    "name", ["iterations", "skipped_steps", "accumulated", "good_steps", "dynamic_loss_scale"]
)
@pytest.mark.parametrize(
    "value", [-1, 0.5, math.nan, math.inf, 2**63, 10**400, "1", None, True, [0], {}, ...], ids=str
)
def test_counts_are_checked(
    path: Path, refused: Callable[[str], None], name: str, value: Any
) -> None:
    edited(path, rejson("progress", **{name: value}))
    refused(rf"{name}|\bprogress\b")


def test_unknown_count_is_refused(path: Path, refused: Callable[[str], None]) -> None:
    edited(path, rejson("progress", momentum=1))
    refused("'progress' has more or fewer counts")


NO_LISTS: list[Any] = [
    *(None, 3, "text", {}),
    *([None], [True], [0.5], ["0"], [[0]], [-1], [2**63]),
]
OWN: dict[str, tuple[Any, str]] = {
    **{
        f"{what} {value!r:.20}": ({what: value}, "'own' has something else")
        for what in ("steps", "waiting", "overrides")
        for value in NO_LISTS
    },
    "unknown": ({"momentum": [1]}, "'own' has something else"),
    "fewer steps": ({"steps": [1, 2, 3]}, "'own' has something else"),
    "more steps": ({"steps": [1] * 5}, "'own' has something else"),
    "steps beyond": ({"steps": [1, 2, 3, 2**53 + 1]}, "steps"),
    "waiting twice": ({"waiting": [1, 1]}, "'own' has something else"),
    "waiting beyond": ({"waiting": [4]}, "'own' has something else"),
    "no positions": ({"overrides": [[{"lr": 0.5}]]}, "'own' has something else"),
    "no settings": ({"overrides": [[[1]]]}, "'own' has something else"),
    "three": ({"overrides": [[[1], {"lr": 0.5}, {}]]}, "'own' has something else"),
    "the other way round": ({"overrides": [[{"lr": 0.5}, [1]]]}, "'own' has something else"),
    "a position that is none": ({"overrides": [[[0.5], {"lr": 0.5}]]}, "'own' has something else"),
    "a position of truth": ({"overrides": [[[True], {"lr": 0.5}]]}, "'own' has something else"),
    "a position twice": ({"overrides": [[[1, 1], {"lr": 0.5}]]}, "'own' has something else"),
    "a position in two": (
        {"overrides": [[[1], {"lr": 0.5}], [[1], {"l2": 0.5}]]},
        "'own' has something else",
    ),
    "a position beyond": ({"overrides": [[[4], {"lr": 0.5}]]}, "'own' has something else"),
    "a position below 0": ({"overrides": [[[-1], {"lr": 0.5}]]}, "'own' has something else"),
    "a huge position": ({"overrides": [[[10**30], {"lr": 0.5}]]}, "in 'own', a number is no"),
    "a setting of a list": ({"overrides": [[[1], {"lr": [0.5]}]]}, "'own' has something else"),
    "an unknown setting": ({"overrides": [[[1], {"momentum": 0.5}]]}, "momentum"),
    "an unknown setting of a long name": (
        {"overrides": [[[1], {"x" * 10_000: 0.5}]]},
        r"x\.\.\.\. Received",
    ),
    "a setting of the step": ({"overrides": [[[1], {"amsgrad": True}]]}, "amsgrad concerns"),
    "a setting out of range": ({"overrides": [[[1], {"beta_1": 1.0}]]}, "beta_1 must be"),
    "a setting not finite": ({"overrides": [[[1], {"lr": math.inf}]]}, "in 'own', Infinity"),
    "a setting of text": ({"overrides": [[[1], {"lr": "os:system"}]]}, "lr must be"),
    "a setting of text elsewhere": ({"overrides": [[[1], {"l2": "0.5"}]]}, "l2 must be"),
    "settings that exclude each other": (
        {"overrides": [[[1], {"clipnorm": 1.0, "clipnorm_per_tensor": 1.0}]]},
        "exclude each other",
    ),
}


@pytest.mark.parametrize(("own", "reason"), OWN.values(), ids=OWN)
def test_counts_and_settings_of_parameters_are_checked(
    path: Path, refused: Callable[[str], None], own: Any, reason: str
) -> None:
    file = Edited(path)
    file.metadata |= {"version": "2", "own": json.dumps(own)}
    file.write(path)
    refused(reason)


@pytest.mark.parametrize("text", [*HOSTILE, "[]"], ids=lambda text: f"{text[:12]}:{len(text)}")
def test_hostile_counts_and_settings_of_parameters_are_refused(
    path: Path, refused: Callable[[str], None], training: Training, text: str
) -> None:
    file = Edited(path)
    file.metadata |= {"version": "2", "own": text}
    file.write(path)
    if text == "{}":  # no settings of single parameters
        assert Adam.load(path, training.params).iterations == 3
    else:
        refused("'own'")


def test_file_truncated_anywhere_is_refused(path: Path, refused: Callable[[str], None]) -> None:
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        if length < header:
            refused(f"this file is truncated, in its header: it has {length} bytes")
        else:
            refused(f"this file is truncated: it has {length} bytes of {len(whole)}")


FOREIGN = {
    "text": b"These are my weights.\n",
    "JSON": b'{"config": {"lr": 0.001}}',
    "zip": b"PK\x03\x04" + bytes(100),
    "pickle": pickle.dumps({"lr": 0.001, "iterations": 5}),
    "zeros": bytes(100),
    "ones": b"\xff" * 100,
    "a byte order mark": (5).to_bytes(8, "little") + b"\xef\xbb\xbf{}",
    "a list": with_header("[[]]"),
    "blanks first": with_header(" {}"),
    "a header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}",
    "a header of 100 MB and a byte": (100_000_001).to_bytes(8, "little") + b"{}",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_file_is_refused(
    path: Path, refused: Callable[[str], None], content: bytes
) -> None:
    path.write_bytes(content)
    refused("this is no safetensors file")


BROKEN = {
    "no JSON": with_header("{]}"),
    "deep JSON": with_header('{"a":' * 100_000),
    "overlapping tensors": with_header(f'{{"a":{entry(0, 4)},"b":{entry(0, 4)}}}', bytes(4)),
    "tensors that share bytes": with_header(
        f'{{"a":{entry(0, 8, shape="[2]")},"b":{entry(4, 12, shape="[2]")}}}', bytes(12)
    ),
    "an empty tensor in another": with_header(
        f'{{"a":{entry(0, 8, shape="[2]")},"b":{entry(4, 4, shape="[0]")}}}', bytes(8)
    ),
    "a hole before all": with_header(f'{{"a":{entry(4, 8)}}}', bytes(8)),
    "a hole": with_header(f'{{"a":{entry(0, 4)},"b":{entry(8, 12)}}}', bytes(12)),
    "huge shape": with_header(f'{{"a":{entry(0, 4, shape=f"[{2**62}, {2**62}]")}}}', bytes(4)),
    "shape whose bytes are 0 modulo 2**64": with_header(
        f'{{"a":{entry(0, 0, shape=f"[{2**32}, {2**32}]")}}}'
    ),
    "shape of more numbers than NumPy takes": with_header(
        f'{{"a":{entry(0, 4, shape=str([1] * 65))}}}', bytes(4)
    ),
    "long shape": with_header(f'{{"a":{entry(0, 0, shape=str([2**63] * 40_000))}}}'),
    "shape below 0": with_header(f'{{"a":{entry(0, 4, shape="[-1, -1]")}}}', bytes(4)),
    "shape of fractions": with_header(f'{{"a":{entry(0, 4, shape="[1.0]")}}}', bytes(4)),
    "shape of truth": with_header(f'{{"a":{entry(0, 4, shape="[true]")}}}', bytes(4)),
    "shape of nothing": with_header(f'{{"a":{entry(0, 4, shape="null")}}}', bytes(4)),
    "shape that is none": with_header(f'{{"a":{entry(0, 4, shape="[-0]")}}}', bytes(4)),
    "offset beyond 2**64": with_header(f'{{"a":{entry(2**64 - 4, 2**64)}}}', bytes(4)),
    "offset below 0": with_header(f'{{"a":{entry(-4, 0)}}}', bytes(4)),
    "three offsets": with_header(f'{{"a":{entry(0, "2,4")}}}', bytes(4)),
    "no offsets": with_header('{"a":{"dtype":"F32","shape":[0]}}'),
    "more than a tensor": with_header(
        '{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"file":"/etc/passwd"}}'
    ),
    "dtype that is none": with_header('{"a":{"dtype":4,"shape":[0],"data_offsets":[0,0]}}'),
    "tensor that is none": with_header('{"a":[0,4]}', bytes(4)),
    "tensor twice": with_header(f'{{"a":{entry(0, 4)},"a":{entry(4, 8)}}}', bytes(8)),
    "tensor twice, escaped": with_header(
        f'{{"a":{entry(0, 4)},"\\u0061":{entry(4, 8)}}}', bytes(8)
    ),
    "shape twice": with_header(
        '{"a":{"dtype":"F32","shape":[0],"shape":[0],"data_offsets":[0,0]}}'
    ),
    "not a number": with_header('{"a":NaN}'),
    "no end": with_header('{"a":'),
    "two values": with_header("{}{}"),
    "bytes after the tensors": with_header(f'{{"a":{entry(0, 4)}}}', bytes(5)),
    "not UTF-8": (3).to_bytes(8, "little") + b'{"\xff',
    "half a surrogate pair": with_header('{"__metadata__":{"format":"\\ud800"}}'),
    "huge number": with_header('{"a":' + "9" * 500_000 + "}"),
    "huge fraction": with_header('{"a":0.' + "9" * 500_000 + "}"),
    "huge exponent": with_header('{"a":1e' + "9" * 500_000 + "}"),
    "metadata in a list": with_header('{"__metadata__":["format"]}'),
    "huge offset": with_header(f'{{"a":{entry(0, 10**30)}}}', bytes(4)),
    "backwards": with_header(f'{{"a":{entry(4, 0)}}}', bytes(4)),
    "metadata of numbers": with_header('{"__metadata__":{"format":1}}'),
    "metadata twice": with_header('{"__metadata__":{},"__metadata__":{}}'),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_safetensors_file_is_refused(
    path: Path, refused: Callable[[str], None], content: bytes
) -> None:
    path.write_bytes(content)
    refused("this file is damaged")


@pytest.mark.parametrize(
    "content",
    [
        with_header("{}"),
        with_header('{"__metadata__":null}'),
        with_header('{"__metadata__":{"format":"pt"}}'),
        with_header(f'{{"a":{entry(0, 2, dtype="BF16")}}}', bytes(2)),
        with_header(f'{{"a":{entry(0, 4, dtype="F33")}}}', bytes(4)),
    ],
)
def test_safetensors_file_of_others_is_refused(
    path: Path, refused: Callable[[str], None], content: bytes
) -> None:
    path.write_bytes(content)
    refused("is not a fusedadam checkpoint")


def test_appended_bytes_are_refused(path: Path, refused: Callable[[str], None]) -> None:
    path.write_bytes(path.read_bytes() + b"\n")
    refused("this file is damaged")


def test_shapes_that_numpy_cannot_hold_are_refused(
    path: Path, refused: Callable[[str], None]
) -> None:
    edited(path, tensor("v.3", np.ones((5, 0))))
    content = path.read_bytes()
    assert content.count(b"[5,0]") == 1
    huge = content.replace(b"[5,0]", b"[%d,0]" % 2**62)
    length = int.from_bytes(content[:8], "little") + len(huge) - len(content)
    path.write_bytes(length.to_bytes(8, "little") + huge[8:])
    refused("params.3. must have the shape of v.3")


# -- random files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[Array]]:
    """A path to write to, the bytes of a valid file, and its parameters."""
    training = Training(**{k: v for k, v in OPTIONS["everything"].items() if k != "lr"})
    training.optimizer.override(training.params[1:2], lr=0.5)
    training.step(5)
    frozen = [(None if p.size == 7 else np.ones_like(p), p) for p in training.params]
    training.optimizer.apply_gradients(frozen)
    path = tmp_path_factory.mktemp("fuzzed") / "adam.safetensors"
    training.optimizer.save(path)
    return path, path.read_bytes(), training.params


def loads_or_is_refused(path: Path, content: bytes, params: list[Array]) -> bool:
    # A new file each time, because the pages of the last one may still be mapped.
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    before = [param.copy() for param in params]
    modules = set(sys.modules)
    refusal, loaded = None, None
    try:
        loaded = Adam.load(path, params)
    except ValueError as error:
        refusal = str(error)
    assert set(sys.modules) == modules
    assert_all_same_bits(params, before)
    if loaded is None:
        assert refusal is not None
        assert str(path) in refusal
        return False
    # A file that loads is complete: the optimizer steps and can be saved.
    loaded.apply_gradients([(np.ones_like(p), p.copy()) for p in params])
    loaded.save(path)
    return True


@given(content=st.binary(max_size=300))
@settings(max_examples=200)
def test_arbitrary_bytes_are_refused(
    fuzzed: tuple[Path, bytes, list[Array]], content: bytes
) -> None:
    path, _, params = fuzzed
    assert not loads_or_is_refused(path, content, params)


@given(data=st.data())
@settings(max_examples=500)
def test_changed_byte_of_the_header_loads_or_is_refused(
    fuzzed: tuple[Path, bytes, list[Array]], data: st.DataObject
) -> None:
    path, whole, params = fuzzed
    header = 8 + int.from_bytes(whole[:8], "little")
    content = bytearray(whole)
    content[data.draw(st.integers(0, header - 1))] ^= data.draw(st.integers(1, 255))
    loads_or_is_refused(path, bytes(content), params)


@given(data=st.data())
@settings(max_examples=50)
def test_changed_byte_of_the_arrays_loads(
    fuzzed: tuple[Path, bytes, list[Array]], data: st.DataObject
) -> None:
    path, whole, params = fuzzed
    header = 8 + int.from_bytes(whole[:8], "little")
    content = bytearray(whole)
    content[data.draw(st.integers(header, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
    assert loads_or_is_refused(path, bytes(content), params)


numbers = st.integers() | st.floats() | st.booleans() | st.none() | st.text(max_size=5)
json_values = st.recursive(
    numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=300)
def test_changed_metadata_loads_or_is_refused(
    fuzzed: tuple[Path, bytes, list[Array]], data: st.DataObject
) -> None:
    path, whole, params = fuzzed
    path.unlink(missing_ok=True)
    path.write_bytes(whole)
    file = Edited(path)
    part = data.draw(st.sampled_from(["config", "progress", "excluded", "own"]))
    content = json.loads(file.metadata[part])
    if isinstance(content, dict) and data.draw(st.integers(0, 4)):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(json_values)
    else:
        content = data.draw(json_values)
    file.metadata[part] = json.dumps(content)
    path.unlink()
    file.write(path)
    loads_or_is_refused(path, path.read_bytes(), params)
