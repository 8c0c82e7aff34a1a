# SPDX-License-Identifier: MIT
"""Tests of the comparison of instruction counts with their record."""

from __future__ import annotations

import pytest
from native.count_instructions import compare


@pytest.mark.parametrize(
    ("stage", "count", "same_compiler", "failed"),
    [
        ("plain", 3.7, True, 0), ("plain", 3.72, True, 1), ("plain", 5.9, False, 0),
        # The smallest possible loss is half of the vector width, which doubles the count.
        ("plain", 6.75, False, 1), ("a row of 64", 4.2, True, 0), ("a row of 64", 4.3, True, 1),
    ],
)  # fmt: skip
def test_the_margin_decides(stage: str, count: float, same_compiler: bool, failed: int) -> None:
    counts, record = {stage: {"avx2 float32": count}}, {stage: {"avx2 float32": 3.375}}
    assert compare(counts, record, same_compiler=same_compiler) == failed
    assert compare({}, record, same_compiler=True) == compare(record, {}, same_compiler=True) == 1
