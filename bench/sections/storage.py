# SPDX-License-Identifier: MIT
"""The formats that store less than float32, and optimizers of others that do, in one run.

The formats also step a tensor that stays in cache, on one thread, for the cost model: their time is
then that of instructions. A smaller tensor has nearly the same overhead of a call, which the
difference of both does not have.
"""

from __future__ import annotations

from formats import FLOAT32, contender
from peers import FORMAT_PEERS, STORING_PEERS
from rounds import Case, Contest
from settings import Results, Settings, Tick

TITLE = "Stored in fewer bits"

SIZE, SIZE_OF_ALL = 1 << 26, 1 << 24
QUICK_SIZE, QUICK_SIZE_OF_ALL = 1 << 18, 1 << 16
# They take up to 50 times as long as float32, so that they would leave few rounds to the others.
SLOW = ("bitsandbytes 8 bit", "bitsandbytes-cpu-fork 8 bit", "torchao 8 bit")
# On one thread. The larger tensor takes 512 KiB in float32, which the second level of a cache holds.
CACHED_SIZES = (1 << 12, 1 << 15)


def ticks(settings: Settings) -> int:  # noqa: ARG001 - the interface of all sections
    """One per case."""
    return 2 + len(CACHED_SIZES)


def run(settings: Settings, tick: Tick) -> Results:
    """Time all contenders, and the formats in cache."""
    import fusedadam

    isa = fusedadam.active_isa()
    # AVX2 beside AVX-512, since most CPUs have no AVX-512.
    isas = [isa, *(["avx2"] if isa == "avx512" and "avx2" in fusedadam.supported_isas() else [])]
    formats = [name for name in FORMAT_PEERS if name.rpartition(", ")[2] in isas]
    both = [*formats, *STORING_PEERS]
    large, of_all = (QUICK_SIZE, QUICK_SIZE_OF_ALL) if settings.quick else (SIZE, SIZE_OF_ALL)
    rows = []

    def add(contest: Contest, size: int, names: list[str]) -> None:
        row = contest.row(Case(f"1 x {size:,}", 1, size), names)
        rows.append({"ours": contender(FLOAT32, isa), **row})
        tick(row["case"])

    with Contest(both, settings, count_bytes=True) as contest:
        add(contest, large, [name for name in both if name not in SLOW])
        add(contest, of_all, both)
    with Contest(formats, settings, threads=1) as contest:
        for size in CACHED_SIZES:
            add(contest, size, formats)
    return {"rows": rows, "isa": isa}
