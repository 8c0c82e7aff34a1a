# SPDX-License-Identifier: MIT
"""Tests of bench/quality.py: the formats that it compares, and its statistics."""

from __future__ import annotations

import re
from typing import Any

import pytest

for needed in ("matplotlib", "scipy", "tabulate"):
    pytest.importorskip(needed)
pd = pytest.importorskip("pandas")
pytest.importorskip("torch")

import quality
from matplotlib.figure import Figure
from quality_tasks import FORMATS, REFERENCE


def test_bytes_are_those_of_the_name() -> None:
    named = {name: form.bytes for name, form in FORMATS.items() if "-bytes" in name}
    assert named == {name: int(name.partition("-")[0]) for name in named}


def rows(form: str, *losses: float | None) -> list[dict[str, Any]]:
    return [
        {"task": "mlp", "form": form, "seed": seed, "loss": loss, "update": 2.0}
        for seed, loss in enumerate(losses)
    ]


def test_differences_are_in_standard_deviations_of_float32() -> None:
    trials = rows(REFERENCE, 1.0, 2.0, 3.0) + rows("9-bytes", 2.0, 2.0, 3.5)
    trials += rows("7-bytes", 6.0, 6.0, 6.0) + rows("6-bytes", 2.0, None, None)
    frame = pd.DataFrame(trials)
    assert quality.difference(frame, "mlp", "9-bytes") == pytest.approx(0.5)
    text = re.sub(" +", " ", quality.losses_table(frame))
    assert "| float32 | | | | 2.000 ± 1.0 | | | 2.00 |" in text
    assert "| 9-bytes | | | | +0.5 |" in text
    assert "| 7-bytes | | | | **+4.0** |" in text
    assert "| 6-bytes | | | | **2 diverged** |" in text
    figure = Figure()
    quality.losses_plot(figure, frame)
    figure.canvas.draw()
