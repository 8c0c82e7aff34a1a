# SPDX-License-Identifier: MIT
"""Programs of valid and refused calls of `fusedadam.torch`, compared with the oracle.

Each parameter has its own state and step count, as in torch's optimizers, so the oracle steps each
parameter separately. Parameters and gradients lie between inaccessible pages. So do the moments,
once a program has moved them there.
"""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Sequence
from typing import Any

import fuzz_runs
import fuzz_values as fuzz
import numpy as np
import oracle
import pytest
import storage_oracle as storage
from faults import CallersError
from guarded import PLACES, Guarded
from helpers import Array, assert_same_bits
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW

STOCK = {Adam: torch.optim.Adam, AdamW: torch.optim.AdamW}

# Values to which a group may be set between two steps.
SETTINGS: dict[str, list[Any]] = {
    "lr": [0.0, 0.001, 0.3, torch.tensor(0.01)],
    "betas": [(0.9, 0.999), (0.0, 0.5), (0.8, 0.0)],
    "eps": [0.0, 1e-13, 1e-8, 0.01],
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
    "max_grad_norm": [None, 0.0, 0.5, 1e30],
    "ema_decay": [None, 0.0, 0.9, 1.0],
    "zero_grad_in_step": [False, True],
    "moments": ["auto", "float32", "bfloat16", "packed"],
    "low_bits": [None, "int8", "int16"],
    "rounding": ["stochastic", "nearest"],
    "seed": [0, 7, 2**63 - 1],
}
FORMATS = ("moments", "low_bits", "rounding")
# The oracle's names of the arrays of state, and torch's.
NAMES = {
    "m": "exp_avg",
    "v": "exp_avg_sq",
    "packed": "packed_moments",
    "low_bits": "low_bits",
    "vhat": "max_exp_avg_sq",
    "ema": "ema",
}
BAD_SETTINGS: dict[str, list[Any]] = {
    "lr": [math.nan, math.inf, "fast", None],
    "betas": [(1.0, 0.9), (0.9, -0.1), (0.9,), (0.9, math.nan)],
    "eps": [-1.0, math.nan, "small"],
    "weight_decay": [-0.1, math.inf],
    "max_grad_norm": [-1.0, math.nan, "long"],
    "ema_decay": [-0.1, 1.5, "slow"],
    "differentiable": [True],
    "moments": ["float16", 16],
    "low_bits": ["int32", 8, False],
    "rounding": ["up"],
    "seed": [-1, 0.5, 2**63],
}
formats = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(SETTINGS[name]) for name in (*FORMATS, "seed")}
)


def tensor_of(array: Array) -> Any:
    """A tensor in the memory of an array."""
    if array.dtype != storage.BFLOAT16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view("int16")).view(torch.bfloat16)


def array_of(tensor: Any) -> Array:
    """An array in the memory of a tensor."""
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return np.asarray(tensor.numpy())
    return np.asarray(tensor.view(torch.int16).numpy().view(storage.BFLOAT16))


class Slot:
    """A parameter with its expected values and state."""

    def __init__(self, values: Array, place: Any) -> None:
        self.held = Guarded(values, place)
        self.param = torch.nn.Parameter(tensor_of(self.held.array))
        self.expected = values
        self.state: dict[str, Array] = {}
        self.grad: Guarded | None = None

    @property
    def dtype(self) -> str:
        return str(self.expected.dtype)

    def stored(self) -> dict[str, Array]:
        """The arrays by the oracle's names."""
        state = {kind: self.state[name] for kind, name in NAMES.items() if name in self.state}
        return {"params": self.expected, **state}

    def begin(self, group: dict[str, Any]) -> None:
        """Make the state that a step of this group begins with."""
        formats = self.formats(group)
        self.state = {NAMES[k]: np.zeros_like(self.expected, d) for k, d in formats.items()}
        self.state["step"] = np.zeros((), "float32")

    def formats(self, group: dict[str, Any]) -> dict[str, Any]:
        """The dtypes of the state, but the average, by the oracle's names."""
        moments, low_bits = group.get("moments", "auto"), group.get("low_bits")
        moment = storage.moment_dtype(self.expected.dtype, moments)
        is_packed = moments == "packed"
        dtypes: dict[str, Any] = {"packed": "int16"} if is_packed else {"m": moment, "v": moment}
        if group["amsgrad"]:
            dtypes["vhat"] = moment
        if low_bits and self.expected.dtype == storage.BFLOAT16:
            dtypes["low_bits"] = low_bits
        return dtypes

    @np.errstate(all="ignore")
    def convert(self, group: dict[str, Any]) -> None:
        """Round the state to nearest in the formats of its group."""
        if not self.state:
            return
        formats, old = self.formats(group), self.stored()
        values = storage.load(old)
        for kind, name in NAMES.items():
            if kind not in ("ema", "low_bits"):
                self.state.pop(name, None)
        if "packed" in formats:
            words = old.get("packed")
            packed = storage.encode(values["m"], values["v"]) if words is None else words
            self.state[NAMES["packed"]] = packed
        for kind in ("m", "v", "vhat"):
            if kind in formats:
                is_half, value = formats[kind] == storage.BFLOAT16, values[kind]
                self.state[NAMES[kind]] = storage.to_bfloat16(value) if is_half else value
        low = formats.get("low_bits")
        if low is None:
            self.state.pop("low_bits", None)
        elif "low_bits" not in old:
            self.state["low_bits"] = np.zeros_like(self.expected, low)
        elif old["low_bits"].dtype != low:
            self.expected, self.state["low_bits"] = storage.split(values["params"], low)


class TorchMachine(fuzz_runs.Machine):
    """One optimizer in one program."""

    tally = fuzz_runs.tally("programs of torch")

    def __init__(self) -> None:
        super().__init__()
        self.groups: list[list[Slot]] = []
        self._guards: list[Guarded] = []

    @property
    def slots(self) -> list[Slot]:
        return [slot for group in self.groups for slot in group]

    def _slots_of(self, specs: list[fuzz.TensorSpec]) -> list[Slot]:
        return [Slot(fuzz.numbers(self.rng, s, dtype, "plain"), place) for s, dtype, place in specs]

    def _held(self, array: Array) -> Guarded:
        return Guarded(array, PLACES[int(self.rng.integers(2))])

    @initialize(
        specs=st.tuples(
            st.lists(fuzz.tensors, min_size=1, max_size=4), st.lists(fuzz.tensors, max_size=2)
        ),
        formats=st.tuples(formats, formats),
        process=fuzz.processes,
    )
    def begin(self, specs: Any, formats: Any, process: dict[str, Any]) -> None:
        self.start(process)
        kind, amsgrad, ema_decay = (
            self.one((Adam, AdamW)),
            self.one((False, True)),
            self.one((None, 0.9)),
        )
        self.kind = kind
        self.options = {"amsgrad": amsgrad, "ema_decay": ema_decay}
        for own in formats:
            if amsgrad and own.get("moments") == "packed":
                del own["moments"]
            if fuzz.conflict(own):
                del own["rounding"]
        self.groups = [
            self._slots_of([(shape, fuzz.fitting(dtype, own), place) for shape, dtype, place in of])
            for of, own in zip(specs, formats, strict=True)
            if of
        ]
        self.optimizer = self._new_optimizer(kind, **self.options)
        for group, own in zip(self.optimizer.param_groups, formats, strict=False):
            group.update(own)

    def _new_optimizer(self, kind: Any, **options: Any) -> Any:
        return kind(
            [{"params": [slot.param for slot in group]} for group in self.groups], **options
        )

    def _with_groups(self) -> list[tuple[Slot, dict[str, Any]]]:
        pairs = zip(self.groups, self.optimizer.param_groups, strict=True)
        return [(slot, group) for slots, group in pairs for slot in slots]

    # ---- the oracle

    def _model_step(self, grads: list[Any]) -> None:
        """Step the expected state. A gradient is None, an array, or a pair of indices and rows."""
        summed = [
            oracle.sum_rows(g[0], storage.widen(g[1]))
            if isinstance(g, tuple)
            else (..., g if g is None else storage.widen(g))
            for g in grads
        ]
        groups = self.optimizer.param_groups
        is_clipped = any(group.get("max_grad_norm") for group in groups)
        norm = oracle.global_norm([g for _, g in summed if g is not None]) if is_clipped else 0.0
        for (slot, group), (rows, g), given in zip(self._with_groups(), summed, grads, strict=True):
            if g is not None:
                bound = group.get("max_grad_norm") or 0.0
                factor = bound / norm if 0 < bound <= norm else 1.0
                self._model_step_of(slot, group, rows, g, factor, given)

    @np.errstate(all="ignore")
    def _model_step_of(
        self, slot: Slot, group: dict[str, Any], rows: Any, g: Array, factor: float, given: Any
    ) -> None:
        factor *= -1.0 if group["maximize"] else 1.0
        if factor != 1:
            g = np.asarray(g.dtype.type(factor) * g)
        slot.convert(group)
        if not slot.state:
            slot.begin(group)
        state = slot.state
        averages = group.get("ema_decay") is not None
        if averages and "ema" not in state:
            state["ema"] = storage.load(slot.stored())["params"].copy()
        state["step"] = np.asarray(state["step"] + 1, "float32")
        step = int(state["step"])
        stored = {kind: x for kind, x in slot.stored().items() if averages or kind != "ema"}
        index = np.asarray(np.arange(slot.expected.size).reshape(slot.expected.shape)[rows])
        is_nearest, is_apart = group.get("rounding") == "nearest", self.kind is AdamW
        stepped = oracle.stored_step(
            {kind: np.asarray(x[rows]) for kind, x in stored.items()},
            g,
            None if is_nearest else storage.dither(group.get("seed", 0), step, index),
            step=step,
            lr=float(group["lr"]),
            beta_1=group["betas"][0],
            beta_2=group["betas"][1],
            epsilon=group["eps"],
            bias_corrected_epsilon=not isinstance(given, tuple),
            weight_decay=group["weight_decay"] if is_apart else None,
            l2=0.0 if is_apart else group["weight_decay"],
            ema_momentum=group.get("ema_decay") or 0.0,
            flush_denormals=group["eps"] >= 1e-12,
        )
        for kind, new in stepped.items():
            stored[kind][rows] = new

    # ---- steps

    def _give_gradients(self, kind: str, forms: Sequence[str]) -> list[Any]:
        """Give gradients to the parameters. Return them as the oracle takes them, or None."""
        self._guards = []
        given: list[Any] = []
        for k, (slot, group) in enumerate(self._with_groups()):
            form = forms[k % len(forms)]
            drawn = self.numbers(slot.expected.shape, slot.dtype, kind)
            slot.grad = slot.param.grad = None
            if form == "none":
                given.append(None)
            elif form == "rows" and drawn.ndim and not group.get("zero_grad_in_step"):
                given.append(self._give_rows(slot, kind))
            else:
                turned = drawn.T if form == "strided" and drawn.ndim > 1 else None
                slot.grad = self._held(drawn if turned is None else np.ascontiguousarray(turned))
                array = slot.grad.array if turned is None else slot.grad.array.T
                slot.param.grad = tensor_of(array)
                given.append(drawn)
        return given

    def _give_rows(self, slot: Slot, kind: str) -> tuple[Array, Array]:
        count = len(slot.expected)
        named = self.rng.integers(0, count, self.rng.integers(0, 20) if count else 0)
        indices = self._held(named.astype("int64"))
        rows = self._held(self.numbers((len(named), *slot.expected.shape[1:]), slot.dtype, kind))
        self._guards += [indices, rows]
        slot.param.grad = torch.sparse_coo_tensor(
            torch.from_numpy(indices.array)[None],
            tensor_of(rows.array),
            slot.param.shape,
            check_invariants=False,
        )
        return indices.array.copy(), rows.array.copy()

    @rule()
    def step(self) -> None:
        forms = ("new", "new", "new", "none", "strided", "rows")
        self._step([self.one(forms) for _ in range(4)])

    @rule()
    def step_of_all(self) -> None:
        """A separate rule, because `step` draws all-new gradients too rarely."""
        self._step(["new"])

    def _step(self, forms: Sequence[str]) -> None:
        grads = self._give_gradients(self.one(fuzz.WILD), forms)
        self._model_step(grads)
        self.tally["calls"] += 1
        if self.one((False, True)):
            assert self.optimizer.step(lambda: 0.25) == 0.25
        else:
            assert self.optimizer.step() is None
        for (slot, group), g in zip(self._with_groups(), grads, strict=True):
            # A step may also convert the state of parameters without gradients.
            state = self.optimizer.state.get(slot.param, {})
            dtypes = {name: array_of(value).dtype for name, value in state.items()}
            if g is None and dtypes != {name: x.dtype for name, x in slot.state.items()}:
                slot.convert(group)
        self._check_gradients(grads)

    def _check_gradients(self, grads: list[Any], *, refused: bool = False) -> None:
        for (slot, group), g in zip(self._with_groups(), grads, strict=True):
            if slot.grad is not None:
                left = np.zeros_like(g) if group.get("zero_grad_in_step") and not refused else g
                assert_same_bits(array_of(slot.param.grad), left, "grad after the call")
                slot.grad.assert_canaries_alive()
            elif isinstance(g, tuple):
                assert_same_bits(array_of(slot.param.grad._values()), g[1], "rows after the call")
        for held in self._guards:
            held.assert_canaries_alive()

    @rule()
    def set(self) -> None:
        self._set(self.one(list(SETTINGS)))

    @rule()
    def set_format(self) -> None:
        """A separate rule, because `set` draws formats too rarely."""
        self._set(self.one(FORMATS))

    def _set(self, name: str) -> None:
        slots, group = self.one(list(zip(self.groups, self.optimizer.param_groups, strict=True)))
        now = {**group, name: self.one(SETTINGS[name])}
        formats = {key: now.get(key) for key in (*FORMATS, "amsgrad")}
        if not fuzz.conflict(formats) and all(
            slot.dtype == fuzz.fitting(slot.dtype, formats) for slot in slots
        ):
            group[name] = now[name]

    @rule()
    def swap_ema(self) -> None:
        averaged = [slot for slot in self.slots if "ema" in slot.state]
        if self.refuses(not averaged, self.optimizer.swap_ema):
            return
        self.optimizer.swap_ema()
        for slot in averaged:
            new = storage.store_weight_like(slot.state["ema"], slot.stored())
            assert_same_bits(slot.held.array, new["params"], "parameter swapped in")
            if "low_bits" in new:
                actual = array_of(self.optimizer.state[slot.param]["low_bits"])
                assert_same_bits(actual, new["low_bits"], "low bits swapped in")
        for refused in (self.optimizer.step, self.optimizer.state_dict):
            with pytest.raises(ValueError, match="averages must be swapped out first"):
                refused()
        self.optimizer.swap_ema()
        for slot in averaged:
            # Low bits that do not belong to their parameter may make it a NaN.
            stored = slot.stored()
            new = storage.store_weight_like(storage.load(stored)["params"].copy(), stored)
            slot.expected = new["params"]
            if "low_bits" in new:
                slot.state["low_bits"] = new["low_bits"]

    @rule()
    def write_parameters(self) -> None:
        kind = self.one(fuzz.WILD)
        for slot in self.slots:
            slot.expected = self.numbers(slot.expected.shape, slot.dtype, kind)
            slot.held.array[...] = slot.expected

    # ---- state

    @rule()
    def move_state_between_guards(self) -> None:
        for slot in self.slots:
            state = self.optimizer.state.get(slot.param, {})
            for name in state.keys() - {"step"}:
                self._guards.append(self._held(array_of(state[name])))
                state[name] = tensor_of(self._guards[-1].array)

    @rule()
    def write_state(self) -> None:
        kind = self.one(fuzz.WILD)
        for slot in self.slots:
            for name in slot.state.keys() - {"step"}:
                mirror = slot.state[name]
                drawn = self.numbers(mirror.shape, mirror.dtype, kind)
                mirror[...] = np.abs(drawn) if name.endswith("sq") else drawn
                array_of(self.optimizer.state[slot.param][name])[...] = mirror

    @rule()
    def load_state_dict(self) -> None:
        """Continue with another optimizer that loads this one's state."""
        way = self.one(("copy", "file", "stock"))
        self.tally["calls"] += 1
        saved = self._state_dict()
        # torch would cast a state in 16 bits to the dtypes of the parameters.
        is_wide = all(x.dtype.itemsize >= 4 for slot in self.slots for x in slot.stored().values())
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        elif way == "stock" and is_wide:
            stock = self._new_optimizer(STOCK[self.kind], amsgrad=self.options["amsgrad"])
            stock.load_state_dict(saved)
            saved = copy.deepcopy(stock.state_dict())
        self.optimizer = self._new_optimizer(self.kind, **self.options)
        self.optimizer.load_state_dict(saved)

    def _state_dict(self) -> dict[str, Any]:
        for slot, group in self._with_groups():
            slot.convert(group)
        return copy.deepcopy(self.optimizer.state_dict())

    @rule(specs=st.lists(fuzz.tensors, min_size=1, max_size=2))
    def add_param_group(self, specs: list[fuzz.TensorSpec]) -> None:
        if len(self.groups) > 2:
            return
        self.tally["calls"] += 1
        slots = self._slots_of(specs)
        params = [slot.param for slot in slots]
        self.optimizer.add_param_group({"params": params, "weight_decay": self.one((0.0, 0.1))})
        self.groups.append(slots)

    # ---- faults

    def _refuses_step(self, grads: list[Any], *errors: type[BaseException]) -> None:
        self.refuses(True, self.optimizer.step, *(errors or (TypeError, ValueError, RuntimeError)))
        self._check_gradients(grads, refused=True)

    @rule()
    def step_with_bad_setting(self) -> None:
        grads = self._give_gradients("plain", ["new"])
        group = self.one(self.optimizer.param_groups)
        before = dict(group)
        group.update([self._bad_setting()])
        try:
            self._refuses_step(grads)
        finally:
            group.clear()
            group.update(before)

    def _bad_setting(self) -> tuple[str, Any]:
        name = self.one(list(BAD_SETTINGS))
        return name, self.one(BAD_SETTINGS[name])

    @rule()
    def step_with_bad_state(self) -> None:
        name = self.one(("exp_avg", "exp_avg_sq", "step"))
        fault = self.one(("shape", "dtype", "missing", "overlap", "NaN", "half"))
        filled = [slot for slot in self.slots if slot.state and slot.expected.size]
        if not filled:
            return
        self._state_dict()  # a state that is yet to be converted may be converted from others
        grads = self._give_gradients("plain", ["new"])
        slot = self.one(filled)
        state = self.optimizer.state[slot.param]
        name = name if name in state else "packed_moments"
        good = state[name]
        if fault == "overlap" and good.dtype != slot.param.dtype:
            fault = "shape"  # a tensor of another dtype may be converted
        bad: dict[str, Any] = {
            "shape": torch.zeros(slot.expected.size + 1, dtype=good.dtype),
            "dtype": torch.zeros(good.shape, dtype=torch.int32),
            "overlap": slot.param.detach(),
            "NaN": torch.tensor(math.nan),
            "half": torch.tensor(0.5),
        }
        if (name == "step") != (fault in ("NaN", "half")) or fault == "missing":
            fault = "half" if name == "step" else "missing"
        if fault == "missing":
            del state[name]
        else:
            state[name] = bad[fault]
        try:
            self._refuses_step(grads, KeyError, TypeError, ValueError, RuntimeError)
        finally:
            state[name] = good

    @rule()
    def step_with_bad_array(self) -> None:
        fault = self.one(("shape", "rows beyond", "overlap", "a param to zero"))
        filled = [k for k, slot in enumerate(self.slots) if slot.expected.size]
        if not filled:
            return
        grads = self._give_gradients("plain", ["new"])
        k = self.one(filled)
        slot, group = self._with_groups()[k]
        param = slot.param
        slot.grad = grads[k] = None
        if fault == "shape":
            param.grad.data = torch.zeros(slot.expected.size + 1, dtype=param.dtype)
        elif fault == "rows beyond" and slot.expected.ndim:
            rows = torch.zeros((1, *param.shape[1:]), dtype=param.dtype)
            beyond = torch.tensor([[len(param)]])
            param.grad = torch.sparse_coo_tensor(beyond, rows, param.shape, check_invariants=False)
        elif fault == "a param to zero" and group.get("zero_grad_in_step"):
            param.grad = param.detach()
        else:
            self._step_with_overlap(slot, grads)
            return
        self._refuses_step(grads)
        param.grad = None

    def _step_with_overlap(self, slot: Slot, grads: list[Any]) -> None:
        """Add another parameter in the memory of this one."""
        kind = (slot.expected.shape, slot.dtype)
        twins = [x for x in self.slots if x is not slot and (x.expected.shape, x.dtype) == kind]
        if twins:
            own = twins[0].param.data
            slot.param.grad = torch.zeros_like(slot.param)
            twins[0].param.data = slot.param.data
            try:
                self._refuses_step(grads)
            finally:
                twins[0].param.data = own
        slot.param.grad = None

    @rule()
    def closure_that_raises(self) -> None:
        def closure() -> None:
            raise CallersError

        grads = self._give_gradients("plain", ["new"])
        self.refuses(True, lambda: self.optimizer.step(closure), CallersError)
        self._check_gradients(grads, refused=True)

    @rule()
    def add_bad_param_group(self) -> None:
        bad = {
            "again": [self.slots[0].param],
            "integers": [torch.ones(2, dtype=torch.int32), 3],
            "no tensor": [np.ones(2)],
            "setting": [torch.nn.Parameter(torch.ones(2))],
        }
        fault = self.one((*bad, "setting"))
        group = dict(
            [("params", bad[fault]), *([self._bad_setting()] if fault == "setting" else [])]
        )
        errors = (TypeError, ValueError, RuntimeError)
        self.refuses(True, lambda: self.optimizer.add_param_group(group), *errors)
        assert len(self.optimizer.param_groups) == len(self.groups)

    @rule()
    def load_bad_state_dict(self) -> None:
        saved = self._state_dict()
        saved["param_groups"].append(saved["param_groups"][0])
        self.refuses(True, lambda: self.optimizer.load_state_dict(saved))

    # ---- after each call

    @invariant()
    def everything_is_as_the_oracle_says(self) -> None:
        for slot in self.slots:
            assert_same_bits(slot.held.array, slot.expected, "param")
            slot.held.assert_canaries_alive()
            assert slot.param.data_ptr() == slot.held.array.ctypes.data or not slot.expected.size
            state = self.optimizer.state.get(slot.param, {})
            assert sorted(state) == sorted(slot.state), "names of state"
            for name, expected in slot.state.items():
                assert_same_bits(array_of(state[name]), expected, name)
        for held in self._guards:
            held.assert_canaries_alive()


def test_programs_of_torch_equal_oracle() -> None:
    TorchMachine.run(20)
