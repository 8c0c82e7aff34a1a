# SPDX-License-Identifier: MIT
"""The project's performance targets as data: work, bounds, and how to compute the figure."""

from __future__ import annotations

from figures import (
    Target,
    adapter_times,
    bytes_per_element,
    first_over_later,
    format_times,
    gibibytes_at_peak,
    gradients_saved,
    growth_of,
    import_milliseconds,
    megabytes_beyond,
    microseconds,
    slowdown_beside_runtimes,
    times,
    worst_at_once,
)
from formats import FLOAT32, PACKED, contender
from rows import TWIN, as_count

K = 1_000
M = 1 << 20
# 1B is 10**9. A parameter with its gradient and moments takes 16 bytes: 16 GB in total.
B = 1_000_000_000


def against(
    peer: str, bound: float, work: str, section: str, tensors: int, elements: int
) -> Target:
    """Return a target for the speed relative to a peer, or for the fraction of the twin's speed."""
    rule = f"at least {bound:g} of the twin" if peer == TWIN else f"at least {bound:g} x {peer}"
    return Target(work, rule, section, times(peer, section, tensors, elements), at_least=bound)


def adapter_against(
    peer: str, bound: float, work: str, adapter: str, tensors: int, elements: int
) -> Target:
    """Return a target for an adapter's speed relative to the framework's own optimizer."""
    figure = adapter_times(peer, adapter, tensors, elements)
    rule = f"at least {bound:g} x {peer}"
    return Target(f"`{adapter}`, {work}", rule, "adapters", figure, at_least=bound)


def format_against(
    other: str, bound: float, work: str, format_name: str, elements: int, isa: str = "avx512"
) -> Target:
    """Return a target for the speed of a format relative to float32, or to a peer."""
    peer = contender(other, isa) if other == FLOAT32 else other
    figure = format_times(peer, contender(format_name, isa), elements)
    rule = f"at least {bound:g} x {other}"
    where = {"avx512": "AVX-512", "avx2": "AVX2"}[isa]
    return Target(f"{work}, {as_count(elements)}, {where}", rule, "storage", figure, at_least=bound)


def packed_memory(training: str, bound: float) -> tuple[Target, Target]:
    """Return targets for the bytes of an element in a training, and for the peak beyond them."""
    name, elements = f"{PACKED}: {training}", 256 * M
    work = f"packed, {as_count(elements)}, {training}"
    held = bytes_per_element("storage_memory", name, elements)
    beyond = megabytes_beyond(elements, "storage_memory", name)
    return (
        Target(
            work,
            f"at most {bound:g} bytes a parameter",
            "storage_memory",
            held,
            at_most=bound,
            unit="bytes",
        ),
        Target(
            work,
            "peak memory at most 64 MB beyond that",
            "storage_memory",
            beyond,
            at_most=64.0,
            unit="MB",
        ),
    )


TARGETS = (
    *(
        against(peer, bound, f"one tensor, {name}", "sizes", 1, elements)
        for name, elements in (("64M", 64 * M), ("256M", 256 * M))
        for peer, bound in ((TWIN, 0.97), ("torch fused", 1.0), ("deepspeed", 1.0))
    ),
    against("torch fused", 2.0, "one tensor, 1M (in cache)", "sizes", 1, M),
    against("deepspeed", 1.2, "one tensor, 1M (in cache)", "sizes", 1, M),
    against("numba", 0.9, "one tensor, 1M (in cache)", "sizes", 1, M),
    against("torch fused", 10.0, "one tensor, 10k", "sizes", 1, 10 * K),
    Target(
        "one tensor, 1k, from Python",
        "at most 2.5 us a call",
        "sizes",
        microseconds("sizes", 1, K),
        at_most=2.5,
        unit="us",
    ),
    against("torch fused", 20.0, "1,000 tensors x 1,000", "many_tensors", 1_000, K),
    against("deepspeed", 20.0, "1,000 tensors x 1,000", "many_tensors", 1_000, K),
    against("torch fused", 20.0, "100,000 tensors x 100", "many_tensors", 100_000, 100),
    against(TWIN, 0.97, "float64, 32M", "float64", 1, 32 * M),
    against("torch", 1.6, "training tail, 64M", "tail", 1, 64 * M),
    *(
        target
        for memory in ("fresh", "recycled")
        for target in (
            Target(
                f"first step, 64M, {memory} memory",
                "`build` and first step together at most 3 x a later one",
                "first_step",
                first_over_later(memory, with_build=True),
                at_most=3.0,
            ),
            Target(
                f"first step, 64M, {memory} memory",
                "first step after `build` at most 1.2 x a later one",
                "first_step",
                first_over_later(memory, with_build=False),
                at_most=1.2,
            ),
        )
    ),
    Target(
        "peak memory, 256M",
        "parameters + gradients + moments + at most 64 MB",
        "memory",
        megabytes_beyond(256 * M),
        at_most=64.0,
        unit="MB",
    ),
    Target(
        "1B parameters",
        "time grows linearly from 64M within 10 %",
        "large",
        growth_of(B),
        at_least=0.9,
        at_most=1.1,
    ),
    Target(
        "`import fusedadam`",
        "at most 60 ms beyond `import numpy`",
        "imports",
        import_milliseconds,
        at_most=60.0,
        unit="ms",
    ),
    adapter_against("torch fused", 8.0, "1,000 tensors x 1,000", "fusedadam.torch", 1_000, K),
    adapter_against("torch fused", 1.0, "one tensor, 64M", "fusedadam.torch", 1, 64 * M),
    # 250k is the mean size of the model's 40 variables.
    adapter_against("keras torch", 5.0, "a model of 10M", "fusedadam.keras", 40, 250 * K),
    # Not 1.0: the gradients of a few of the 24 layers exist at a time, and the C library may keep
    # freed ones.
    Target(
        "`fusedadam.torch.attach`, 100M",
        "peak memory lower by at least 0.8 of the gradients",
        "adapters",
        gradients_saved(100_000_000),
        at_least=0.8,
    ),
    # No slower, within the difference between two processes.
    Target(
        "optimizers stepped at once, one thread each (worst case)",
        "at most 1.05 x one after the other",
        "at_once",
        worst_at_once,
        at_most=1.05,
    ),
    *(
        Target(
            f"{as_count(elements)}, next to torch or scikit-learn (worst case)",
            "at most 1.1 x alone",
            "runtimes",
            slowdown_beside_runtimes(elements),
            at_most=1.1,
        )
        for elements in (32 << 10, M, 16 * M)
    ),
    *(
        format_against(FLOAT32, bound, work, name, 64 * M, isa)
        for work, name, of_avx512, of_avx2 in (
            ("all bf16", "bf16", 1.7, 1.25),
            ("bf16 + int8 weights, bf16 moments", "bf16 + int8", 1.5, 1.05),
            ("packed, 7 bytes", PACKED, 0.85, 0.58),
        )
        for isa, bound in (("avx512", of_avx512), ("avx2", of_avx2))
    ),
    # No slower, within the noise of a round.
    format_against(
        FLOAT32, 0.97, "float32 state, bf16 gradients and copy", "float32 + bf16 copy", 64 * M
    ),
    format_against("torch fused bf16", 1.8, "all bf16", "bf16", 64 * M),
    format_against("bitsandbytes-cpu-fork 8 bit", 5.0, "packed, 7 bytes", PACKED, 16 * M),
    format_against("torchao 8 bit", 20.0, "packed, 7 bytes", PACKED, 16 * M),
    *packed_memory("backward, then step", 7.05),
    *packed_memory("attach", 5.05),
    Target(
        "packed, 2.5B parameters",
        "a step in at most 24 GiB",
        "storage_memory",
        gibibytes_at_peak("storage_memory", "1 x 2,500,000,000"),
        at_most=24.0,
        unit="GiB",
    ),
)
