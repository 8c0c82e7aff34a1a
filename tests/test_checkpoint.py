# SPDX-License-Identifier: MIT
"""Checkpoints: what comes back, what is refused, and what a save leaves behind when it fails."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
import pickle
import stat
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fresh_python import output_of, run_python
from fusedadam import Adam
from fusedadam.checkpoint import load as load_checkpoint
from helpers import Array, assert_all_same_bits, values
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

SHAPES_AND_DTYPES = [((3, 5), "float32"), ((7,), "float64"), ((), "float32"), ((0, 2), "float64")]
posix = pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

# An importable function that is a schedule: from 0 up to 1.
SCHEDULE = math.erf
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "numbers": {
        "lr": 1 / 3,
        "beta_1": 0.1 + 0.2,
        "beta_2": 0.99,
        "epsilon": 5e-324,
        "decay": 0.05,
        "clipnorm": 3.0,
        "clipvalue": 0.5,
        "flush_denormals": False,
    },
    "amsgrad": {"amsgrad": True},
    "weight decay": {"weight_decay": 0.01, "l2": 0.001},
    "norm of each": {"clipnorm_per_tensor": 0.1},
    "averages": {"use_ema": True, "ema_momentum": 0.75},
    "averages taken over": {"use_ema": True, "ema_overwrite_frequency": 3},
    "constant scale": {"loss_scale": 2.0**-20},
    "dynamic scale": {"loss_scale": "dynamic"},
    "skips": {"skip_nonfinite": True},
    "accumulation": {"gradient_accumulation_steps": 3},
    "one at a time": {"gradient_accumulation_steps": 1},
    "zeroed": {"zero_grad": True},
    "maximize": {"maximize": True},
    "schedule": {"lr": SCHEDULE},
    "everything": {
        "lr": SCHEDULE,
        "decay": 0.01,
        "amsgrad": True,
        "weight_decay": 0.01,
        "l2": 0.001,
        "clipnorm": 2.0,
        "clipvalue": 0.5,
        "use_ema": True,
        "ema_overwrite_frequency": 2,
        "loss_scale": "dynamic",
        "skip_nonfinite": True,
        "gradient_accumulation_steps": 4,
        "zero_grad": True,
        "maximize": True,
        "flush_denormals": False,
    },
}


class Training:
    """An optimizer and its parameters; the same gradients whoever takes the call."""

    def __init__(self, **options: Any) -> None:
        rng = np.random.default_rng(7)
        self.params = [values(rng, *of) for of in SHAPES_AND_DTYPES]
        self.optimizer = Adam(**options)
        self.calls = 0

    def step(self, calls: int) -> None:
        for _ in range(calls):
            self.calls += 1
            rng = np.random.default_rng(self.calls)
            grads = [values(rng, *of) for of in SHAPES_AND_DTYPES]
            if self.calls in (4, 9) and self.skips:
                grads[0][1, 2] = np.inf
            self.optimizer.apply_gradients(list(zip(grads, self.params, strict=True)))

    @property
    def skips(self) -> bool:
        config = self.optimizer.get_config()
        return bool(config.get("skip_nonfinite")) or config.get("loss_scale") == "dynamic"

    def resumed(self, path: Path) -> Training:
        """Go on from a checkpoint: this training, as far as a file and the parameters carry it."""
        self.optimizer.save(path)
        other = copy.copy(self)
        other.params = [param.copy() for param in self.params]
        schedule = SCHEDULE if self.optimizer.lr is SCHEDULE else None
        other.optimizer = Adam.load(path, other.params, lr=schedule)
        return other

    def assert_same_as(self, other: Training) -> None:
        assert_all_same_bits(self.params, other.params, "params")
        assert_same_state(self.optimizer, other.optimizer)


def assert_same_state(actual: Adam, expected: Adam) -> None:
    ours, theirs = actual._snapshot(), expected._snapshot()
    for part in ("config", "progress", "excluded"):
        assert ours[part] == theirs[part]
    assert sorted(ours["slots"]) == sorted(theirs["slots"])
    for kind, arrays in theirs["slots"].items():
        assert_all_same_bits(ours["slots"][kind], arrays, kind)


def names_beside(path: Path) -> list[str]:
    return sorted(file.name for file in path.parent.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A path in an otherwise empty directory."""
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    return directory / "adam.safetensors"


@pytest.fixture
def training() -> Training:
    made = Training(lr=0.01, amsgrad=True)
    made.step(3)
    return made


# -- what comes back --------------------------------------------------------------------------

options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@options
@pytest.mark.parametrize("before", [0, 1, 5, 6])
def test_resumed_training_equals_one_that_never_stopped(
    path: Path, options: dict[str, Any], before: int
) -> None:
    unstopped = Training(**options)
    if "weight_decay" in options:
        unstopped.optimizer.exclude_from_weight_decay([unstopped.params[1]])
    unstopped.optimizer.build(unstopped.params)
    unstopped.step(before)
    resumed = unstopped.resumed(path)
    resumed.assert_same_as(unstopped)
    for training in (unstopped, resumed):
        training.step(8)
    resumed.assert_same_as(unstopped)
    assert resumed.optimizer.iterations > 0


def test_the_trainings_above_reach_what_is_to_be_kept() -> None:
    training = Training(**OPTIONS["everything"])
    training.optimizer.exclude_from_weight_decay([training.params[1]])
    training.step(6)
    snapshot = training.optimizer._snapshot()
    assert sorted(snapshot["slots"]) == ["accumulator", "ema", "m", "v", "vhat"]
    assert snapshot["progress"]["accumulated"] == 2
    assert snapshot["excluded"] == [1]
    assert training.optimizer.skipped_steps == 1
    assert training.optimizer.current_loss_scale == 2.0**14


@options
def test_optimizer_without_state(path: Path, options: dict[str, Any]) -> None:
    fresh = Training(**options)
    resumed = fresh.resumed(path)
    assert resumed.optimizer.get_config() == fresh.optimizer.get_config()
    assert resumed.optimizer.iterations == 0
    for training in (fresh, resumed):
        training.step(5)
    resumed.assert_same_as(fresh)


def test_no_parameters(path: Path) -> None:
    optimizer = Adam()
    optimizer.build([])
    optimizer.save(path)
    assert Adam.load(path, []).iterations == 0


def test_steps_over_no_parameters_are_not_those_of_others(path: Path) -> None:
    optimizer = Adam()
    optimizer.apply_gradients([])
    optimizer.save(path)
    assert Adam.load(path, []).iterations == 1
    with pytest.raises(ValueError, match=r"the state of 0\. Received: 1"):
        Adam.load(path, [np.ones(3)])


def test_special_values_keep_their_bits(path: Path) -> None:
    optimizer = Adam()
    params = [np.zeros(6, "float32"), np.zeros(6)]
    optimizer.build(params)
    for moment in optimizer.weights[1:]:
        tiny = np.finfo(moment.dtype).smallest_subnormal
        moment[...] = [np.nan, -np.nan, np.inf, -np.inf, -0.0, tiny]
    optimizer.save(path)
    loaded = Adam.load(path, params).weights[1:]
    assert [m.tobytes() for m in loaded] == [m.tobytes() for m in optimizer.weights[1:]]


def test_what_was_set_later_is_kept(path: Path, training: Training) -> None:
    training.optimizer.lr = 0.125
    training.optimizer.beta_2 = 0.5
    loaded = training.resumed(path).optimizer
    assert (loaded.lr, loaded.beta_2) == (0.125, 0.5)


def test_lr_replaces_the_saved_one(path: Path, training: Training) -> None:
    training.optimizer.save(path)
    assert Adam.load(path, training.params, lr=0.5).lr == 0.5
    assert Adam.load(path, training.params, lr=SCHEDULE).lr is SCHEDULE
    assert Adam.load(path, training.params, lr=0.5).iterations == 3


def test_loading_writes_to_no_parameter_and_shares_nothing(path: Path, training: Training) -> None:
    training.optimizer.save(path)
    before = [param.copy() for param in training.params]
    loaded = [Adam.load(path, training.params) for _ in range(2)]
    assert_all_same_bits(training.params, before)
    assert_same_state(loaded[0], loaded[1])
    training.step(1)
    assert_same_state(loaded[0], loaded[1])


def test_torch_parameters(path: Path) -> None:
    torch = pytest.importorskip("torch")
    params = [torch.ones(3, requires_grad=True), torch.ones((), dtype=torch.float64)]
    optimizer = Adam()
    optimizer.apply_gradients([(np.ones(3, "float32"), params[0]), (np.ones(()), params[1])])
    optimizer.save(path)
    assert_same_state(Adam.load(path, params), optimizer)


class Named(Adam):
    """A user's own."""


def test_subclass(path: Path) -> None:
    Named().save(path)
    assert type(Named.load(path, [])) is Named
    with pytest.raises(ValueError, match="of an optimizer 'Named', not of 'Adam'"):
        Adam.load(path, [])


# -- the file ---------------------------------------------------------------------------------


def test_the_file_is_as_documented(path: Path, training: Training) -> None:
    training.optimizer.save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
        names = set(file.keys())
    assert set(metadata) == {"format", "version", "optimizer", "config", "progress", "excluded"}
    assert (metadata["format"], metadata["version"]) == ("fusedadam", "1")
    assert metadata["optimizer"] == "Adam"
    assert json.loads(metadata["config"]) == training.optimizer.get_config()
    assert json.loads(metadata["progress"])["iterations"] == 3
    assert names == {f"{kind}.{i}" for kind in ("m", "v", "vhat") for i in range(4)}
    assert_all_same_bits([load_file(path)["vhat.1"]], [training.optimizer.weights[-3]])


def test_the_same_state_gives_the_same_bytes(path: Path, training: Training) -> None:
    training.optimizer.save(path)
    first = path.read_bytes()
    Adam.load(path, training.params).save(path)
    assert path.read_bytes() == first


def test_arrays_in_the_file_are_aligned_to_their_elements(path: Path) -> None:
    optimizer = Adam(amsgrad=True)
    optimizer.build([np.ones(3, "float32"), np.ones(2), np.ones((2, 2), "float32"), np.ones(())])
    optimizer.save(path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for name, entry in json.loads(data[8:start]).items():
        if name != "__metadata__":
            size = {"F32": 4, "F64": 8}[entry["dtype"]]
            assert (start + entry["data_offsets"][0]) % size == 0


def test_file_that_the_safetensors_library_wrote_again_loads(
    path: Path, training: Training
) -> None:
    training.optimizer.save(path)
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata)
    assert_same_state(Adam.load(path, training.params), training.optimizer)


def test_neither_saving_nor_loading_copies_the_whole_state(path: Path) -> None:
    params = [np.ones(250_000, "float32") for _ in range(8)]  # 1 MB each
    optimizer = Adam()
    optimizer.build(params)

    def peak(act: Callable[[], object]) -> int:
        tracemalloc.start()
        try:
            act()
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(lambda: optimizer.save(path)) < 300_000
    # The new state is not among this: its memory is the core's.
    assert peak(lambda: Adam.load(path, params)) < 3_000_000


# -- files that are refused -------------------------------------------------------------------


class Edited:
    """The parts of a checkpoint, to be changed and written again."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="numpy") as file:
            self.metadata: dict[str, str] = file.metadata()
        self.tensors: dict[str, Array] = load_file(path)

    def write(self, path: Path) -> None:
        save_file(self.tensors, path, self.metadata)


def rejson(part: str, **changes: Any) -> Callable[[Edited], None]:
    """Change entries of a part in JSON; `...` removes one."""

    def edit(file: Edited) -> None:
        entries = json.loads(file.metadata[part]) | changes
        file.metadata[part] = json.dumps({k: v for k, v in entries.items() if v is not ...})

    return edit


def metadata(name: str, value: str | None) -> Callable[[Edited], None]:
    def edit(file: Edited) -> None:
        if value is None:
            del file.metadata[name]
        else:
            file.metadata[name] = value

    return edit


def tensor(name: str, array: Array | None) -> Callable[[Edited], None]:
    def edit(file: Edited) -> None:
        if array is None:
            del file.tensors[name]
        else:
            file.tensors[name] = array

    return edit


def every_tensor(change: Callable[[str, Array], tuple[str, Array] | None]) -> Callable[..., None]:
    def edit(file: Edited) -> None:
        changed = [change(name, array) for name, array in file.tensors.items()]
        file.tensors = dict(pair for pair in changed if pair is not None)

    return edit


# Numbers and structures that parsers stumble over, as JSON.
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
    "no format": (metadata("format", None), "written by something else"),
    "another format": (metadata("format", "pt"), "written by something else"),
    "no version": (metadata("version", None), "format version None"),
    "next version": (metadata("version", "2"), "format version '2', of a later .* reads version 1"),
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
    "setting out of range": (
        rejson("config", beta_2=1.0),
        "beta_2 must be >= 0 and < 1. Received: beta_2=1.0",
    ),
    "setting too large": (rejson("config", lr=10**30), "'config' has something else than settings"),
    "setting not finite": (rejson("config", lr=math.inf), "something else than settings"),
    "setting of text": (rejson("config", beta_1="0.9"), "beta_1"),
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
    """Fails unless the file at `path` is refused, for this reason, and nothing changes."""

    def check(reason: str) -> None:
        training_before = [param.copy() for param in training.params]
        file_before = path.read_bytes()
        modules = set(sys.modules)
        with pytest.raises(ValueError, match=reason) as caught:
            Adam.load(path, training.params)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 1000
        assert set(sys.modules) == modules
        assert_all_same_bits(training.params, training_before)
        assert path.read_bytes() == file_before
        assert names_beside(path) == [path.name]

    training.optimizer.save(path)
    return check


def edited(path: Path, edit: Callable[[Edited], None]) -> None:
    file = Edited(path)
    edit(file)
    file.write(path)


def test_save_before_excluded_parameters_are_found(tmp_path: Path) -> None:
    kernel, bias = np.ones(3), np.ones(2)
    adam = Adam(weight_decay=0.1)
    adam.build([kernel, bias])
    adam.exclude_from_weight_decay([bias])
    with pytest.raises(ValueError, match=r"exclude_from_weight_decay.* Received: 1 "):
        adam.save(tmp_path / "adam")
    assert list(tmp_path.iterdir()) == []
    adam.apply_gradients([(np.zeros(3), kernel), (np.zeros(2), bias)])
    adam.save(tmp_path / "adam")
    resumed = Adam.load(tmp_path / "adam", [kernel, bias])
    resumed.apply_gradients([(np.zeros(3), kernel), (np.zeros(2), bias)])
    assert (kernel < 1).all()
    assert (bias == 1).all()


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
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_file_is_refused(
    path: Path, refused: Callable[[str], None], content: bytes
) -> None:
    path.write_bytes(content)
    refused("this is no safetensors file")


def with_header(header: str, data: bytes = b"") -> bytes:
    return len(header.encode()).to_bytes(8, "little") + header.encode() + data


def entry(begin: int, end: int, dtype: str = "F32", shape: str = "[1]") -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


BROKEN = {
    "no JSON": with_header("{]}"),
    "deep JSON": with_header('{"a":' * 100_000),
    "overlapping tensors": with_header(f'{{"a":{entry(0, 4)},"b":{entry(0, 4)}}}', bytes(4)),
    "a hole": with_header(f'{{"a":{entry(0, 4)},"b":{entry(8, 12)}}}', bytes(12)),
    "huge shape": with_header(f'{{"a":{entry(0, 4, shape=f"[{2**62}, {2**62}]")}}}', bytes(4)),
    "huge offset": with_header(f'{{"a":{entry(0, 10**30)}}}', bytes(4)),
    "backwards": with_header(f'{{"a":{entry(4, 0)}}}', bytes(4)),
    "unknown dtype": with_header(f'{{"a":{entry(0, 4, dtype="F33")}}}', bytes(4)),
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
    ],
)
def test_safetensors_file_of_others_is_refused(
    path: Path, refused: Callable[[str], None], content: bytes
) -> None:
    path.write_bytes(content)
    refused("written by something else")


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


# -- parameters and lr that do not fit --------------------------------------------------------


UNFIT: dict[str, tuple[Callable[[list[Array]], Any], type[Exception], str]] = {
    "fewer": (lambda p: p[:3], ValueError, "must be as many .* the state of 4. Received: 3"),
    "none": (lambda _: [], ValueError, "must be as many .* the state of 4. Received: 0"),
    "more": (lambda p: [*p, np.ones(2)], ValueError, "the state of 4. Received: 5"),
    "reversed": (lambda p: p[::-1], ValueError, "params.0. must have the shape of m.0"),
    "transposed": (lambda p: [p[0].T, *p[1:]], ValueError, "params.0. must have the shape of m.0"),
    "wider": (lambda p: [p[0].astype("f8"), *p[1:]], ValueError, "params.0. must have the dtype"),
    "swapped bytes": (lambda p: [p[0].astype(">f4")], TypeError, "params.0. must be float32"),
    "half": (lambda p: [p[0].astype("f2")], TypeError, "params.0. must be float32"),
    "lists": (lambda p: [p[0].tolist()], TypeError, "params.0. must be a numpy.ndarray"),
    "columns": (lambda p: [np.asfortranarray(p[0]), *p[1:]], ValueError, "params.0.*contiguous"),
    "an array": (lambda p: p[0], TypeError, "params must be a list or tuple"),
    "None": (lambda _: None, TypeError, "params must be a list or tuple"),
}


@pytest.mark.parametrize(("change", "error", "reason"), UNFIT.values(), ids=UNFIT)
def test_parameters_that_do_not_fit(
    path: Path,
    training: Training,
    change: Callable[[list[Array]], Any],
    error: type[Exception],
    reason: str,
) -> None:
    training.optimizer.save(path)
    with pytest.raises(error, match=reason):
        Adam.load(path, change(training.params))


@pytest.mark.parametrize(
    ("lr", "error"),
    [("0.1", TypeError), ("math:erf", TypeError), ([0.1], TypeError), (-1.0, ValueError)],
)
def test_lr_is_checked(path: Path, training: Training, lr: Any, error: type[Exception]) -> None:
    training.optimizer.save(path)
    # And not blamed on the file.
    with pytest.raises(error, match=r"^(lr|learning_rate) must be"):
        Adam.load(path, training.params, lr=lr)


@pytest.mark.parametrize("lr", [None, 0.1])
def test_saved_schedule_must_be_given_again(path: Path, lr: Any) -> None:
    training = Training(lr=SCHEDULE)
    training.step(2)
    training.optimizer.save(path)
    with pytest.raises(ValueError, match=r"lr must be given as a callable .* 'math:erf'"):
        Adam.load(path, training.params, lr=lr)
    assert Adam.load(path, training.params, lr=SCHEDULE).iterations == 2


def test_no_module_is_imported_by_the_files_word(path: Path, tmp_path: Path) -> None:
    code = f"""
        import json, sys
        import numpy as np
        from fusedadam import Adam
        from safetensors.numpy import save_file
        sys.path.insert(0, {str(tmp_path)!r})
        config = Adam().get_config() | {{"lr": "trap:spring"}}
        metadata = {{
            "format": "fusedadam", "version": "1", "optimizer": "Adam", "excluded": "[]",
            "config": json.dumps(config), "progress": json.dumps(Adam()._snapshot()["progress"]),
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


# -- files that nobody thought of -------------------------------------------------------------


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[Array]]:
    """A path to write to, the bytes of a good file, and its parameters."""
    training = Training(**{k: v for k, v in OPTIONS["everything"].items() if k != "lr"})
    training.step(6)
    path = tmp_path_factory.mktemp("fuzzed") / "adam.safetensors"
    training.optimizer.save(path)
    return path, path.read_bytes(), training.params


def loads_or_is_refused(path: Path, content: bytes, params: list[Array]) -> bool:
    # A new file each time: the pages of the last one may still be mapped.
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
    # What loads is whole: it steps, and can be saved.
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
    part = data.draw(st.sampled_from(["config", "progress", "excluded"]))
    content = json.loads(file.metadata[part])
    if isinstance(content, dict) and data.draw(st.integers(0, 4)):
        content[data.draw(st.sampled_from(sorted(content)))] = data.draw(json_values)
    else:
        content = data.draw(json_values)
    file.metadata[part] = json.dumps(content)
    path.unlink()
    file.write(path)
    loads_or_is_refused(path, path.read_bytes(), params)


# -- what a save leaves behind ----------------------------------------------------------------


@pytest.mark.parametrize("as_given", [Path, str, os.fsencode, Path.name.__get__])
def test_save_leaves_one_file(
    path: Path,
    training: Training,
    as_given: Callable[[Path], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(path.parent)
    for _ in range(3):
        training.optimizer.save(as_given(path))
        training.step(1)
    assert names_beside(path) == [path.name]
    assert Adam.load(as_given(path), training.params).iterations == 5


@pytest.mark.parametrize("name", ["a b.é", "*", "[x].?", "x" * 200, "-r", ".hidden", "a\nb"])
@posix
def test_names_with_odd_characters(path: Path, name: str) -> None:
    path = path.with_name(name)
    for _ in range(2):
        (path.parent / f".{name}.0123456789abcdef.tmp").touch()
        Adam().save(path)
        assert names_beside(path) == [name]
    assert Adam.load(path, []).iterations == 0


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000, 0o027])
def test_new_file_has_the_permissions_that_open_gives(path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        Adam().save(path)
        path.with_name("opened").touch()
    finally:
        os.umask(before)
    assert path.stat().st_mode == path.with_name("opened").stat().st_mode


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o777, 0o444])
def test_permissions_of_the_old_file_are_kept(path: Path, mode: int) -> None:
    path.touch()
    path.chmod(mode)
    before = os.umask(0o022)
    try:
        Adam().save(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert Adam.load(path, []).iterations == 0


@posix
@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("exists", [False, True])
def test_symbolic_link_is_written_through(
    path: Path, tmp_path: Path, training: Training, relative: bool, exists: bool
) -> None:
    target = tmp_path / "elsewhere" / "target"
    target.parent.mkdir()
    if exists:
        target.touch()
    path.symlink_to(Path("../elsewhere/target") if relative else target)
    abandoned = target.with_name(".target.0123456789abcdef.tmp")
    abandoned.touch()
    training.optimizer.save(path)
    assert path.is_symlink()
    assert not target.is_symlink()
    assert Adam.load(target, training.params).iterations == 3
    assert (names_beside(path), names_beside(target)) == ([path.name], ["target"])


def places_without_a_way_to_write(directory: Path) -> dict[str, Path]:
    places = {"no directory": directory / "missing/adam", "a directory": directory / "directory"}
    if os.name == "posix":
        places["a file as directory"] = directory / "file/adam"
        places["a loop"] = directory / "loop"
        places["a name too long"] = directory / ("x" * 300)
    if sys.platform == "linux":
        places["a file system of the kernel's"] = Path("/proc/adam")
    return places


@pytest.mark.parametrize("place", places_without_a_way_to_write(Path()))
def test_place_that_cannot_be_written_is_an_os_error(path: Path, place: str) -> None:
    (path.parent / "directory").mkdir()
    (path.parent / "file").touch()
    if os.name == "posix":
        (path.parent / "loop").symlink_to("loop")
    before = names_beside(path)
    with pytest.raises(OSError):
        Adam().save(places_without_a_way_to_write(path.parent)[place])
    assert names_beside(path) == before
    assert names_beside(path.parent / "directory/x") == []


@posix
def test_what_is_no_regular_file_is_not_replaced(path: Path) -> None:
    # In the place of a device, such as /dev/null, which no test should put at risk.
    os.mkfifo(path)
    with pytest.raises(ValueError, match="path must be that of a regular file"):
        Adam().save(path)
    assert path.is_fifo()
    assert names_beside(path) == [path.name]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a save does to the disk, in order."""
    seen: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def seen_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        kind = "directory" if stat.S_ISDIR(status.st_mode) else f"file of {status.st_size}"
        seen.append(f"flush {kind}")
        fsync(descriptor)

    def seen_replace(source: Path, target: Path) -> Path:
        seen.append(f"rename file of {source.stat().st_size}")
        assert source.parent == target.parent
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(Path, "replace", seen_replace)
    return seen


@posix
def test_the_whole_file_is_flushed_before_the_rename(
    path: Path, training: Training, events: list[str]
) -> None:
    training.optimizer.save(path)
    size = path.stat().st_size
    assert events == [f"flush file of {size}", f"rename file of {size}", "flush directory"]


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
@pytest.mark.parametrize("when", ["flush", "rename"])
def test_failed_save_leaves_the_old_file_alone(
    path: Path,
    training: Training,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    when: str,
) -> None:
    def fail(*_: object) -> None:
        assert len(names_beside(path)) == 2
        raise error

    training.optimizer.save(path)
    before = path.read_bytes()
    training.step(1)
    with monkeypatch.context() as patch:
        if when == "flush":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        with pytest.raises(type(error)):
            training.optimizer.save(path)
    assert names_beside(path) == [path.name]
    assert path.read_bytes() == before
    training.optimizer.save(path)
    assert Adam.load(path, training.params).iterations == 4


@posix
def test_directory_that_cannot_be_flushed_is_no_failure(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def only_files(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "as some file systems say")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    Adam().save(path)
    assert Adam.load(path, []).iterations == 0


@posix
@pytest.mark.parametrize("limit", [0, 100, 5000, 200_000])
def test_full_disk_leaves_the_old_file_alone(path: Path, limit: int) -> None:
    # A limit of file sizes, since a full disk needs a disk of one's own. Python ignores the signal.
    code = f"""
        import os, resource
        import numpy as np
        from fusedadam import Adam

        params = [np.ones(1000), np.ones(50_000)]
        optimizer = Adam(lr=0.5)
        optimizer.build(params)
        optimizer.save({str(path)!r})
        optimizer.lr = 0.25
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            optimizer.save({str(path)!r})
        except OSError as error:
            print(os.strerror(error.errno))
        assert Adam.load({str(path)!r}, params).lr == 0.5
    """
    assert output_of(code) == os.strerror(errno.EFBIG)
    assert names_beside(path) == [path.name]


def test_state_that_could_not_be_loaded_is_not_saved(path: Path) -> None:
    class Odd(Adam):
        def get_config(self) -> dict[str, Any]:
            return super().get_config() | {"groups": [1, 2]}

    with pytest.raises(TypeError, match=r"must consist of .* Received: groups=\[1, 2\]"):
        Odd().save(path)
    assert names_beside(path) == []


def test_nothing_is_saved_while_the_averages_are_swapped_in(path: Path) -> None:
    training = Training(use_ema=True)
    training.step(2)
    training.optimizer.save(path)
    before = path.read_bytes()
    training.optimizer.swap_ema()
    with pytest.raises(ValueError, match="swap_ema"):
        training.optimizer.save(path)
    assert path.read_bytes() == before
    assert names_beside(path) == [path.name]
    training.optimizer.swap_ema()
    training.optimizer.save(path)
    assert path.read_bytes() == before


def test_load_does_not_call_the_schedule(path: Path) -> None:
    param = np.ones(3)
    adam = Adam(lr=SCHEDULE)
    adam.apply_gradients([(np.ones(3), param)])
    adam.save(path)

    def schedule(iterations: int) -> float:
        raise AssertionError(iterations)

    assert Adam.load(path, [param], lr=schedule).lr is schedule


def test_schedule_without_a_name_is_not_saved(path: Path) -> None:
    with pytest.raises(ValueError, match="lr"):
        Adam(lr=lambda iterations: 1.0 / (1 + iterations)).save(path)
    assert names_beside(path) == []


# -- other threads and processes --------------------------------------------------------------


def test_save_during_steps_of_another_thread_is_of_one_step(path: Path) -> None:
    params = [np.ones(5000, "float32"), np.ones(3)]
    grads = [np.ones(5000, "float32"), np.ones(3)]
    optimizer = Adam()
    optimizer.build(params)
    stop = threading.Event()

    def step() -> None:
        while not stop.is_set():
            optimizer.apply_gradients(list(zip(grads, params, strict=True)))

    thread = threading.Thread(target=step)
    thread.start()
    found = []
    try:
        for _ in range(20):
            optimizer.save(path)
            found.append(Adam.load(path, params).get_weights())
    finally:
        stop.set()
        thread.join()
    expected = Adam()
    others = [param.copy() for param in params]
    expected.build(others)
    for weights in found:
        while expected.iterations < weights[0]:
            expected.apply_gradients(list(zip(grads, others, strict=True)))
        assert_all_same_bits(weights, expected.get_weights())


@forks
def test_temporary_files_of_the_dead_are_removed_and_of_the_living_are_not(path: Path) -> None:
    import fcntl

    def beside(name: str) -> Path:
        return path.with_name(name)

    living = beside(f".{path.name}.00000000000000aa.tmp")
    dead = beside(f".{path.name}.00000000000000bb.tmp")
    others = [
        beside(".adam.0123456789abcdef.tmp"),
        beside(f".{path.name}.tmp"),
        beside(f".{path.name}.0123456789abcde.tmp"),
        beside(f".{path.name}.0123456789abcdef"),
        beside(f"{path.name}.0123456789abcdef.tmp"),
        beside(f".{path.name}.0123456789abcdefg.tmp"),
        beside("0123456789abcdef"),
    ]
    for file in (living, dead, *others):
        file.touch()
    (link := beside(f".{path.name}.00000000000000cc.tmp")).symlink_to(others[0])
    (directory := beside(f".{path.name}.00000000000000dd.tmp")).mkdir()
    with living.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Adam().save(path)
        kept = [path, living, link, directory, *others]
        assert names_beside(path) == sorted(file.name for file in kept)
    Adam().save(path)
    kept.remove(living)
    assert names_beside(path) == sorted(file.name for file in kept)


# Without threads, so that the process may fork.
ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


@forks
def test_several_processes_save_to_one_path(path: Path) -> None:
    code = f"from crash import *; save_at_once(Path({str(path)!r}), writers=4, saves=100)"
    assert output_of(code, environment=ONE_THREAD) == ""
    assert names_beside(path) == [path.name]


@forks
def test_kill_at_any_instant_leaves_a_whole_file(path: Path) -> None:
    kills = int(os.environ.get("FUSEDADAM_KILLS", "300"))
    code = f"""
        import json
        from crash import *
        print(json.dumps(kill_savers(Path({str(path)!r}), kills={kills}, seed=1)))
    """
    done = run_python(code, environment=ONE_THREAD, time_limit=60 + kills)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    # Kills did come in the middle of a save, and saves did end in between.
    assert seen["unfinished"] > kills / 10
    assert seen["last"] > kills / 20
    # Each save removes what the last kill left behind.
    assert seen["most_left"] == 1
    params = [np.ones(2)]
    optimizer = Adam()
    optimizer.build(params)
    optimizer.save(path)
    assert names_beside(path) == [path.name]


def test_load_is_for_any_optimizer(path: Path) -> None:
    Adam(lr=0.5).save(path)
    loaded: Adam = load_checkpoint(Adam, path, [np.ones(2)])
    assert loaded.lr == 0.5
