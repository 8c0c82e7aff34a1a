# SPDX-License-Identifier: MIT
"""Tests of bench/quality.py, with trainings of ten steps and with synthetic results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

import quality
import quality_tasks
from quality_tasks import FORMATS, REFERENCE, TASKS, Format, Training


def test_bytes_are_those_of_the_name() -> None:
    named = {name: form.bytes for name, form in FORMATS.items() if "-bytes" in name}
    assert named == {name: int(name.partition("-")[0]) for name in named}


def test_split_weights_of_32_bits_step_as_float32() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(30, 20)
    gradients = [torch.randn(p.shape).bfloat16().float() for p in model.parameters()]
    trainings = [
        Training(model, form, seed=0)
        for form in (FORMATS[REFERENCE], Format("bfloat16", "float32", "int16"))
    ]
    for training in trainings:
        for _ in range(3):
            training.step(gradients, 1e-2)
    for ours, theirs in zip(*(training.weights for training in trainings), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert trainings[0].largest == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("task", TASKS)
def test_task_depends_on_nothing_but_its_arguments(task: str) -> None:
    first, second = (TASKS[task](FORMATS["7-bytes"], 3, 0.002) for _ in range(2))
    assert first == second
    assert None not in first.values()


def test_command_writes_results_page_and_plot(tmp_path: Path) -> None:
    output, page = tmp_path / "quality.json", tmp_path / "quality.md"
    command = ["--output", str(output), "--page", str(page), "--scale", "0.002", "--workers", "1"]
    command += ["--formats", "6-bytes", "--seeds", "2", "--keep", "--tasks"]
    assert quality.main([*command, "mlp"]) == 0
    assert quality.main([*command, "mlp", "pause"]) == 0
    trials = json.loads(output.read_text())["trials"]
    assert [(row["task"], row["form"], row["seed"]) for row in trials] == [
        (task, form, seed)
        for task in ("mlp", "pause")
        for form in ("6-bytes", REFERENCE)
        for seed in (0, 1)
    ]
    text = page.read_text()
    assert "the figures mean nothing" in text
    assert "| 6-bytes |" in text
    assert (tmp_path / "benchmarks/quality.png").exists()
    assert quality.main([*command[:4], "--scale", "0.1"]) == 2
    assert json.loads(output.read_text())["trials"] == trials


def rows(form: str, *losses: float | None) -> list[dict[str, Any]]:
    return [
        {"task": "mlp", "form": form, "seed": seed, "loss": loss, "update": 2.0}
        for seed, loss in enumerate(losses)
    ]


def test_differences_are_in_standard_deviations_of_float32() -> None:
    trials = rows(REFERENCE, 1.0, 2.0, 3.0) + rows("9-bytes", 2.0, 2.0, 3.5)
    trials += rows("7-bytes", 6.0, 6.0, 6.0) + rows("6-bytes", 2.0, None, None)
    assert quality.difference(trials, "mlp", "9-bytes") == pytest.approx(0.5)
    text = quality.losses_table(trials)
    assert "| float32 |  |  |  | 2.000 ± 1.0 |" in text
    assert "| 9-bytes |  |  |  | +0.5 |" in text
    assert "| 7-bytes |  |  |  | **+4.0** |" in text
    assert "| 6-bytes |  |  |  | **2 diverged** |" in text
    assert math.isnan(quality.difference(trials, "mlp", "6-bytes") or 0.0)
    quality.losses_plot(trials).canvas.draw()


def test_larger_model_is_trained_in_turn() -> None:
    results = quality_tasks.large(minutes=1e-4, width=16)
    first, last = results["curve"][0], results["curve"][-1]
    assert first["step"] == 0
    assert last["step"] >= 1
    assert first[REFERENCE] == pytest.approx(first["7-bytes"], rel=1e-3)
    assert f"| 7-bytes | {last['7-bytes']:.4f} |" in quality.large_part(results)
    quality.large_plot(results).canvas.draw()
