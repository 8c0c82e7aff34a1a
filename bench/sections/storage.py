# SPDX-License-Identifier: MIT
"""The formats that store less than float32, and optimizers of others that do."""

from __future__ import annotations

from peers import STORED, STORING
from peers.formats import FORMATS, PACKED
from runner import Bench, Row, not_run
from runner.contestant import total_seconds
from runner.machine import baseline_bytes, process_bytes, too_large
from runner.worker import absence, call

from sections.frameworks import Training, peak_rows

# They take up to 50 times as long as float32, so that they would leave few rounds to the others.
SLOW = ("bitsandbytes 8 bit", "bitsandbytes-cpu-fork 8 bit", "torchao 8 bit")


def storage(bench: Bench) -> list[Row]:
    """Time all contenders, the slow ones at the smaller size only."""
    import fusedadam

    isa = fusedadam.active_isa()
    # AVX2 beside AVX-512, since most CPUs have no AVX-512.
    isas = [isa, *(["avx2"] if isa == "avx512" and "avx2" in fusedadam.supported_isas() else [])]
    formats = [name for name in STORED if name.rpartition(", ")[2] in isas]
    both = [*formats, *STORING]
    large, of_all = (1 << 18, 1 << 16) if bench.quick else (1 << 26, 1 << 24)
    fast = [name for name in both if name not in SLOW]
    row = bench.contest.row
    return [
        row(bench, fast, [large], count_bytes=True),
        row(bench, both, [of_all], count_bytes=True),
    ]


def storage_memory(bench: Bench) -> list[Row]:
    """The peaks of packed trainings, and of a step that would take 40 GB in float32."""
    form = FORMATS[PACKED]
    # 256M parameters in layers of 4M, which bounds the gradients that `attach` holds at a time.
    layers, width, elements = (8, 128, 1 << 20) if bench.quick else (64, 2_048, 2_500_000_000)
    trainings = {
        "packed, backward, then step": Training(layers, width, False, form.held, form.settings),
        "packed, attach": Training(layers, width, True, form.held - form.gradient, form.settings),
    }
    rows = peak_rows(bench, trainings)
    case = f"packed, a step of {elements:,}"
    why = too_large(form.held * elements) or absence("torch")
    if why:
        return [*rows, not_run(case, {case: why})]
    found = call(step_largest, elements, threads=bench.threads)
    return [*rows, bench.row(case, elements, {}, expected_bytes=form.held * elements, **found)]


def step_largest(elements: int) -> dict[str, float]:
    """Step one packed tensor, and return its seconds and bytes. Runs in a fresh process."""
    import fusedadam.torch
    import torch
    from peers.torch_adam import held_bytes

    def optimizer_of(size: int) -> tuple[torch.nn.Parameter, fusedadam.torch.Adam]:
        param = torch.nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
        param.grad = torch.full_like(param, 1e-3)
        return param, fusedadam.torch.Adam([param], **FORMATS[PACKED].settings)

    optimizer_of(1 << 16)[1].step()  # loads everything that a step needs
    baseline = baseline_bytes()
    param, optimizer = optimizer_of(elements)
    optimizer.step()  # makes the moments
    seconds = total_seconds(optimizer.step, 3) / 3
    # Fewer steps would not reach the next bfloat16.
    if not all(float(param[i]) < 1 for i in (0, elements // 2, elements - 1)):
        raise ArithmeticError("wrong result: a weight stands still")
    return {
        "step_seconds": seconds, "baseline_bytes": baseline, "peak_bytes": process_bytes("VmHWM"),
        "held_bytes": held_bytes([param], optimizer),
    }  # fmt: skip
