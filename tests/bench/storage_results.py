# SPDX-License-Identifier: MIT
"""Synthetic results of the sections `storage` and `storage_memory`, from a cost model."""

from __future__ import annotations

from typing import Any

from formats import FORMATS, PACKED, contender
from peers import STORING_PEERS

ROUNDS = 9
BANDWIDTH = 25e9  # of a core
CALL = 8e-6  # seconds
# Seconds per element and thread in cache: those of formats with packed moments, and of others.
COMPUTE = {"avx512": (1.1e-9, 0.3e-9), "avx2": (1.6e-9, 0.4e-9)}
# Seconds per element and thread of a peer, and the bytes that it holds.
PEERS = {
    "torch fused bf16": (1.4e-9, 8),
    "deepspeed bf16": (1.1e-9, 8),
    "bitsandbytes 8 bit": (50e-9, 6),
    "bitsandbytes-cpu-fork 8 bit": (11e-9, 6),
    "torchao 8 bit": (45e-9, 6),
}
assert PEERS.keys() == STORING_PEERS.keys()


def compute(name: str, isa: str) -> float:
    """Return the seconds of an element and thread in cache."""
    packed, other = COMPUTE[isa]
    return packed if FORMATS[name].settings.get("moments") == "packed" else other


def row(elements: int, threads: int, *, cached: bool) -> dict[str, Any]:
    """Return a row of all contenders; in cache, of the formats."""
    seconds, held = {}, {}
    for isa in COMPUTE:
        for name, stored in FORMATS.items():
            element = max(compute(name, isa), 0 if cached else stored.moved / BANDWIDTH)
            seconds[contender(name, isa)] = [CALL + element * elements / threads] * ROUNDS
            held[contender(name, isa)] = stored.held * elements + 4
    for name, (element, held_bytes) in {} if cached else PEERS.items():
        seconds[name] = [CALL + element * elements / threads] * ROUNDS
        held[name] = held_bytes * elements
    return {
        "ours": contender("float32", "avx512"),
        "case": f"1 x {elements:,}",
        "dtype": "float32",
        "threads": threads,
        "tensors": 1,
        "elements": elements,
        "seconds": seconds,
        "not_run": {},
        **({} if cached else {"held_bytes": held}),
    }


def storage() -> dict[str, Any]:
    """Return the results of the section `storage`."""
    large = [row(elements, 2, cached=False) for elements in (1 << 26, 1 << 24)]
    cached = [row(elements, 1, cached=True) for elements in (1 << 12, 1 << 15)]
    return {"rows": large + cached, "isa": "avx512"}


def storage_memory() -> dict[str, Any]:
    """Return the results of the section `storage_memory`."""
    baseline = 400_000_000
    trainings = [
        {
            "contender": f"{PACKED}: {name}",
            "attached": held == 5,
            "elements": 1 << 28,
            "peak_bytes": baseline + (held << 28) + 30_000_000,
            "baseline_bytes": baseline,
            "expected_bytes": held << 28,
            "held_bytes": held << 28,
        }
        for name, held in (("backward, then step", 7), ("attach", 5))
    ]
    elements = 2_500_000_000
    large = {
        "case": f"1 x {elements:,}",
        "contender": PACKED,
        "elements": elements,
        "seconds": {PACKED: [1.5] * 3},
        "peak_bytes": baseline + 7 * elements + 4_000_000,
        "baseline_bytes": baseline,
        "expected_bytes": 7 * elements,
        "held_bytes": 7 * elements,
    }
    return {"rows": [*trainings, large], "not_run": {}}
