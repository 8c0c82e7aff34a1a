# SPDX-License-Identifier: MIT
"""Programs of valid and refused calls of `fusedadam.torch`, compared with the oracle.

Parameters and gradients lie between inaccessible pages. So do the moments, once a program has moved
them there.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from typing import Any

import fuzz_runs
import fuzz_values as fuzz
import numpy as np
import pytest
import storage_oracle as storage
from faults import CallersError
from guarded import PLACES, Guarded
from helpers import Array, assert_all_same_bits
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

torch: Any = pytest.importorskip("torch")

from fusedadam.torch import Adam, AdamW
from torch_helpers import BAD_SETTINGS, STOCK, Training, array, arrays

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
formats = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(SETTINGS[name]) for name in (*FORMATS, "seed")}
)
REFUSALS = (KeyError, TypeError, ValueError, RuntimeError)


def tensor_of(x: Array) -> Any:
    """A tensor in the memory of an array."""
    if x.dtype != storage.BFLOAT16:
        return torch.from_numpy(x)
    return torch.from_numpy(x.view("int16")).view(torch.bfloat16)


def dtype_of(p: Any) -> str:
    return str(p.dtype).removeprefix("torch.")


class TorchMachine(fuzz_runs.Machine):
    """One optimizer in one program."""

    tally = fuzz_runs.tally("programs of torch")

    def __init__(self) -> None:
        super().__init__()
        self.training = Training(shapes=[])
        self._held: list[tuple[Any, Guarded]] = []  # parameters
        self._guards: list[Guarded] = []

    @property
    def optimizer(self) -> Any:
        return self.training.optimizer

    def _guarded(self, x: Array) -> Any:
        self._guards.append(Guarded(x, PLACES[int(self.rng.integers(2))]))
        return tensor_of(self._guards[-1].array)

    def _params_of(self, specs: list[fuzz.TensorSpec]) -> list[Any]:
        params = []
        for shape, dtype, place in specs:
            held = Guarded(fuzz.numbers(self.rng, shape, dtype, "plain"), place)
            params.append(torch.nn.Parameter(tensor_of(held.array)))
            self._held.append((params[-1], held))
        return params

    @initialize(
        specs=st.tuples(
            st.lists(fuzz.tensors, min_size=1, max_size=4), st.lists(fuzz.tensors, max_size=2)
        ),
        formats=st.tuples(formats, formats),
        process=fuzz.processes,
    )
    def begin(self, specs: Any, formats: Any, process: dict[str, Any]) -> None:
        self.start(process)
        self.kind = self.one((Adam, AdamW))
        self.options = {"amsgrad": self.one((False, True)), "ema_decay": self.one((None, 0.9))}
        groups = []
        for of, own in zip(specs, formats, strict=True):
            if self.options["amsgrad"] and own.get("moments") == "packed":
                del own["moments"]
            if fuzz.conflict(own):
                del own["rounding"]
            fitting = [(shape, fuzz.fitting(dtype, own), place) for shape, dtype, place in of]
            if of:
                groups.append({"params": self._params_of(fitting), **own})
        self.training = Training.of(self.kind(groups, **self.options))

    # ---- steps

    def _give_gradients(self, kind: str, forms: Sequence[str]) -> list[Any]:
        """Give gradients to the parameters, and return copies of them, or None."""
        self._guards = []
        training = self.training
        for k, (p, group) in enumerate(zip(training.params, training.group_of, strict=True)):
            form = forms[k % len(forms)]
            drawn = self.numbers(tuple(p.shape), dtype_of(p), kind)
            p.grad = None
            if form == "rows" and drawn.ndim and not group.get("zero_grad_in_step"):
                p.grad = self._rows(p, kind)
            elif form == "strided" and drawn.ndim > 1:
                p.grad = self._guarded(np.ascontiguousarray(drawn.T)).permute(
                    *reversed(range(drawn.ndim))
                )
            elif form != "none":
                p.grad = self._guarded(drawn)
        return [None if p.grad is None else p.grad.clone() for p in training.params]

    def _rows(self, p: Any, kind: str) -> Any:
        count = len(p)
        named = self.rng.integers(0, count, self.rng.integers(0, 20) if count else 0)
        indices = self._guarded(named.astype("int64"))
        rows = self._guarded(self.numbers((len(named), *p.shape[1:]), dtype_of(p), kind))
        return torch.sparse_coo_tensor(indices[None], rows, p.shape, check_invariants=False)

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
        self.tally["calls"] += 1
        closure = self.one((None, lambda: 0.25))
        self.training.stepped(grads, lambda: self.optimizer.step(closure))

    @rule()
    def set(self) -> None:
        self._set(self.one(list(SETTINGS)))

    @rule()
    def set_format(self) -> None:
        """A separate rule, because `set` draws formats too rarely."""
        self._set(self.one(FORMATS))

    def _set(self, name: str) -> None:
        group = self.one(self.optimizer.param_groups)
        now = {**group, name: self.one(SETTINGS[name])}
        formats = {key: now.get(key) for key in (*FORMATS, "amsgrad")}
        dtypes = map(dtype_of, group["params"])
        if not fuzz.conflict(formats) and all(d == fuzz.fitting(d, formats) for d in dtypes):
            group[name] = now[name]

    @rule()
    def swap_ema(self) -> None:
        averaged = [stored for stored in self.training.stored if "ema" in stored]
        if self.refuses(not averaged, self.optimizer.swap_ema):
            return
        for stored in averaged:
            # Low bits that do not belong to their parameter may make it a NaN.
            stored |= storage.store_weight_like(storage.load(stored)["params"], stored)
        self.training.swap_ema()

    @rule()
    def write_parameters(self) -> None:
        kind = self.one(fuzz.WILD)
        for p, held in self._held:
            held.array[...] = self.numbers(tuple(p.shape), dtype_of(p), kind)
        self.training.adopt()

    # ---- state

    @rule()
    def move_state_between_guards(self) -> None:
        for state in self.training.state:
            for name in state.keys() - {"step"}:
                state[name] = self._guarded(array(state[name]))

    @rule()
    def write_state(self) -> None:
        kind = self.one(fuzz.WILD)
        for state in self.training.state:
            for name in state.keys() - {"step"}:
                drawn = self.numbers(tuple(state[name].shape), dtype_of(state[name]), kind)
                drawn = np.abs(drawn) if name.endswith("sq") else drawn
                state[name].copy_(tensor_of(np.asarray(drawn)))
        self.training.adopt()

    @rule()
    def load_state_dict(self) -> None:
        """Continue with another optimizer that loads this one's state."""
        way = self.one(("copy", "file", "stock"))
        self.tally["calls"] += 1
        saved = self._state_dict()
        # torch would cast a state in 16 bits to the dtypes of the parameters.
        arrays = [x for stored in self.training.stored for x in stored.values()]
        if way == "file":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        elif way == "stock" and all(x.dtype.itemsize >= 4 for x in arrays):
            stock = self._new_optimizer(STOCK[self.kind], amsgrad=self.options["amsgrad"])
            stock.load_state_dict(saved)
            saved = copy.deepcopy(stock.state_dict())
        self.training.optimizer = self._new_optimizer(self.kind, **self.options)
        self.optimizer.load_state_dict(saved)

    def _new_optimizer(self, kind: Any, **options: Any) -> Any:
        groups = [{"params": list(group["params"])} for group in self.optimizer.param_groups]
        return kind(groups, **options)

    def _state_dict(self) -> dict[str, Any]:
        self.training.convert_all()
        saved: dict[str, Any] = copy.deepcopy(self.optimizer.state_dict())
        return saved

    @rule(specs=st.lists(fuzz.tensors, min_size=1, max_size=2))
    def add_param_group(self, specs: list[fuzz.TensorSpec]) -> None:
        if len(self.optimizer.param_groups) > 2:
            return
        self.tally["calls"] += 1
        params = self._params_of(specs)
        self.optimizer.add_param_group({"params": params, "weight_decay": self.one((0.0, 0.1))})
        self.training.stored += [{"params": array(p)} for p in params]
        self.training.steps += [0] * len(params)

    # ---- faults

    def _refuses_step(self, *errors: type[BaseException], closure: Any = None) -> None:
        dense = [
            p.grad for p in self.training.params if p.grad is not None and not p.grad.is_sparse
        ]
        before = arrays(dense)
        self.refuses(True, lambda: self.optimizer.step(closure), *(errors or REFUSALS))
        assert_all_same_bits(arrays(dense), before, "grads after the call")

    @rule()
    def step_with_bad_setting(self) -> None:
        self._give_gradients("plain", ["new"])
        group = self.one(self.optimizer.param_groups)
        before = dict(group)
        bad = {**group, **self.one(BAD_SETTINGS)[0]}
        if bad == before:  # True in place of 1.0
            return
        group.update(bad)
        self._refuses_step()
        group.clear()
        group.update(before)

    @rule()
    def step_with_bad_state(self) -> None:
        name = self.one(("exp_avg", "exp_avg_sq", "step"))
        training = self.training
        filled = [k for k, p in enumerate(training.params) if training.state[k] and p.numel()]
        if not filled:
            return
        self._state_dict()  # a state that is yet to be converted may be converted from others
        self._give_gradients("plain", ["new"])
        k = self.one(filled)
        p, state = training.params[k], training.state[k]
        name = name if name in state else "packed_moments"
        good = state.pop(name)
        bad: dict[str, Any] = {"NaN": torch.tensor(torch.nan), "half": torch.tensor(0.5)}
        if name != "step":
            bad = {
                "missing": None,
                "shape": torch.zeros(p.numel() + 1, dtype=good.dtype),
                "dtype": torch.zeros(good.shape, dtype=torch.int32),
            }
            if good.dtype == p.dtype:  # others may be converted
                bad["overlap"] = p.detach()
        fault = self.one(list(bad))
        if fault != "missing":
            state[name] = bad[fault]
        self._refuses_step()
        state[name] = good

    @rule()
    def step_with_bad_array(self) -> None:
        filled = [k for k, p in enumerate(self.training.params) if p.numel()]
        if not filled:
            return
        self._give_gradients("plain", ["new"])
        k = self.one(filled)
        p, group = self.training.params[k], self.training.group_of[k]
        others = (q for q in self.training.params if q is not p and q.shape == p.shape)
        twin = next((q for q in others if q.dtype == p.dtype), None)
        faults = ["shape", *(["rows beyond"] if p.dim() else [])]
        faults += ["a param to zero"] if group.get("zero_grad_in_step") else []
        faults += ["overlap"] if twin is not None else []
        fault = self.one(faults)
        own = None if twin is None else twin.data
        if fault == "shape":
            p.grad.data = torch.zeros(p.numel() + 1, dtype=p.dtype)
        elif fault == "rows beyond":
            rows = torch.zeros((1, *p.shape[1:]), dtype=p.dtype)
            beyond = torch.tensor([[len(p)]])
            p.grad = torch.sparse_coo_tensor(beyond, rows, p.shape, check_invariants=False)
        elif fault == "a param to zero":
            p.grad = p.detach()
        elif twin is not None:
            twin.data = p.data
        self._refuses_step()
        p.grad = None
        if twin is not None:
            twin.data = own

    @rule()
    def closure_that_raises(self) -> None:
        def closure() -> None:
            raise CallersError

        self._give_gradients("plain", ["new"])
        self._refuses_step(CallersError, closure=closure)

    @rule()
    def add_bad_param_group(self) -> None:
        bad = [
            {"params": self.training.params[:1]},
            {"params": [torch.ones(2, dtype=torch.int32), 3]},
            {"params": [np.ones(2)]},
            {"params": [torch.nn.Parameter(torch.ones(2))], **self.one(BAD_SETTINGS)[0]},
        ]
        group, count = self.one(bad), len(self.optimizer.param_groups)
        self.refuses(True, lambda: self.optimizer.add_param_group(group), *REFUSALS)
        assert len(self.optimizer.param_groups) == count

    @rule()
    def load_bad_state_dict(self) -> None:
        saved = self._state_dict()
        saved["param_groups"].append(saved["param_groups"][0])
        self.refuses(True, lambda: self.optimizer.load_state_dict(saved))

    # ---- after each call

    @invariant()
    def everything_is_as_the_oracle_says(self) -> None:
        self.training.check()
        for p, held in self._held:
            assert p.data_ptr() == held.array.ctypes.data or not p.numel()
            held.assert_canaries_alive()
        for guard in self._guards:
            guard.assert_canaries_alive()


def test_programs_of_torch_equal_oracle() -> None:
    with np.errstate(all="ignore"):
        TorchMachine.run(20)
