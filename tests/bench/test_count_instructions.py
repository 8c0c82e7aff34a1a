# SPDX-License-Identifier: MIT
"""Tests of the instruction counter: its differences, the comparison, and the record."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from count_instructions import (
    ISAS,
    OTHER_COMPILER_MARGIN,
    RECORD,
    Call,
    CountError,
    Counts,
    Key,
    Record,
    compare,
    counts_of,
    equal_calls,
    main,
    parse,
    read_record,
    same_compiler,
    table,
    verdict,
    write_record,
)

PLAIN = Key("avx2", "float32", "plain", "element")
CALL = Key("avx2", "float32", "prepared", "call")
COMPILER = "GNU 12.2.0"


def record_of(counts: Counts) -> Record:
    return Record(COMPILER, "3.19.0", counts)


def judge(counts: Counts, recorded: Counts, compiler: str = COMPILER) -> tuple[int, str]:
    record = record_of(recorded)
    return verdict(compare(counts, compiler, record), compiler, record)


# ---- from files to counts ----------------------------------------------------------------------


def callgrind_file(label: str, instructions: int) -> str:
    return f"""# callgrind format
version: 1

desc: I1 cache:{" "}
desc: Timerange: Basic block 0 - 499944
desc: Trigger: Client Request: {label}

events: Ir
summary: {instructions}

fn=(1) step
4 {instructions}
totals: {instructions + 3}
"""


def test_a_file_has_a_label_and_a_count() -> None:
    label = "float32/accumulate, first/1/4096/0"
    assert parse(callgrind_file(label, 14980)) == (label, 14980)


def test_a_file_without_a_label_is_not_a_call() -> None:
    assert parse("desc: Trigger: Program termination\n\nsummary: 5\n") is None


def test_calls_are_named_by_their_labels() -> None:
    labelled = [("float64/lazy rows/100/64/0", 7), None, ("float64/lazy rows/100/64/1", 7)]
    assert equal_calls(iter(labelled)) == {Call("float64", "lazy rows", 100, 64): 7}


@pytest.mark.parametrize("repeats", [[7, 8], [7], [7, 7, 7]])
def test_a_call_that_does_not_repeat_is_refused(repeats: list[int]) -> None:
    labelled = [(f"float32/plain/1/64/{i}", count) for i, count in enumerate(repeats)]
    with pytest.raises(
        CountError, match=r"two equal calls must .* Received: Call\(dtype='float32'"
    ):
        equal_calls(iter(labelled))


def test_no_calls_at_all_are_refused() -> None:
    with pytest.raises(CountError, match="Received: none"):
        equal_calls(iter([None]))


def test_differences_free_the_counts_of_what_is_done_once() -> None:
    # Tensors: 1,000 per call, 50 per tensor, 3 per element. Rows: 500 per call, 20 per row, 2 per
    # element.
    calls = {Call("float32", "plain", 1, n): 1000 + 50 + 3 * n for n in (4096, 16384)}
    calls |= {Call("float32", "prepared", n, 64): 1000 + n * (50 + 3 * 64) for n in (500, 1, 100)}
    calls |= {
        Call("float32", "lazy rows", n, size): 500 + n * (20 + 2 * size)
        for n, size in [(100, 64), (100, 128), (200, 64)]
    }
    assert counts_of(calls, "avx2") == {
        PLAIN: 3,
        Key("avx2", "float32", "prepared", "tensor"): 50,
        CALL: 1050,  # with one tensor
        Key("avx2", "float32", "lazy rows", "element"): 2,
        Key("avx2", "float32", "lazy rows", "row"): 20,
    }


# ---- comparing ---------------------------------------------------------------------------------


def test_equal_counts_pass() -> None:
    assert judge({PLAIN: 3.375}, {PLAIN: 3.375}) == (
        0,
        "All counts are as recorded, within the margin.",
    )


@pytest.mark.parametrize(
    ("key", "factor", "fails"),
    [(PLAIN, 1.09, 0), (PLAIN, 1.11, 1), (CALL, 1.24, 0), (CALL, 1.26, 1)],
)
def test_the_margin_decides(key: Key, factor: float, fails: int) -> None:
    assert judge({key: 100 * factor}, {key: 100})[0] == fails


def test_a_loop_that_lost_its_vectors_fails_with_any_compiler() -> None:
    # The smallest possible loss is half of the vector width, which doubles the count.
    for compiler in (COMPILER, "GNU 14.1.0", "Clang 17.0.6"):
        status, words = judge({PLAIN: 6.75}, {PLAIN: 3.375}, compiler)
        assert status == 1
        assert "Above the record by more than the margin: 1." in words


def test_another_compiler_has_a_wider_margin_and_is_named() -> None:
    counts = {PLAIN: 3.375 * (1 + 0.9 * OTHER_COMPILER_MARGIN)}
    assert judge(counts, {PLAIN: 3.375}, "GNU 12.4.1")[0] == 1
    status, words = judge(counts, {PLAIN: 3.375}, "Clang 17.0.6")
    assert status == 0
    assert "The record is of GNU 12.2.0, this is Clang 17.0.6" in words


@pytest.mark.parametrize(
    ("other", "same"), [("GNU 12.4.0", True), ("GNU 13.2.0", False), ("Clang 12.2.0", False)]
)
def test_a_compiler_is_its_family_and_major_version(other: str, same: bool) -> None:
    assert same_compiler(COMPILER, other) is same


def test_far_below_passes_and_asks_for_an_update() -> None:
    status, words = judge({PLAIN: 2.5}, {PLAIN: 3.375})
    assert status == 0
    assert "--update records what was gained" in words


@pytest.mark.parametrize(("counts", "recorded"), [({PLAIN: 1.0}, {}), ({}, {PLAIN: 1.0})])
def test_a_count_on_one_side_only_fails(counts: Counts, recorded: Counts) -> None:
    status, words = judge(counts, recorded)
    assert status == 1
    assert "New or gone: 1." in words


def test_the_table_marks_what_fails() -> None:
    counts = {PLAIN: 28.0, CALL: 100.0}
    rows = compare(counts, COMPILER, record_of({PLAIN: 3.375, CALL: 100.0}))
    _, first, second = table(rows)
    assert " ".join(first.split()) == "avx2 float32 plain element 28.000 3.375 +729.6% <-- fails"
    assert " ".join(second.split()) == "avx2 float32 prepared call 100.000 100.000 +0.0%"


# ---- the record --------------------------------------------------------------------------------


def test_a_record_survives_being_written(tmp_path: Path) -> None:
    record = record_of({PLAIN: 3.375, CALL: 1156.0, PLAIN._replace(isa="baseline"): 8.25})
    path = tmp_path / "record.json"
    write_record(path, record)
    assert read_record(path) == record
    assert all(len(line) < 60 for line in path.read_text().splitlines())


def test_counts_are_rounded_in_the_record(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, record_of({PLAIN: 1 / 3}))
    assert read_record(path) == replace(record_of({}), counts={PLAIN: 0.333})


def test_the_record_has_every_instruction_set_and_dtype() -> None:
    record = read_record(RECORD)
    assert record.compiler.split()[0] == "GNU"
    by_isa = {isa: {key[1:] for key in record.counts if key.isa == isa} for isa in ISAS}
    assert by_isa["avx2"] == by_isa["baseline"]
    float32, float64 = (
        {key[2:] for key in record.counts if key.dtype == dtype} for dtype in ("float32", "float64")
    )
    assert float32 == float64
    assert all(count > 0 for count in record.counts.values())


def test_the_record_shows_vectors() -> None:
    # An AVX2 register holds eight float32 or four float64, so a float64 costs about twice as much.
    counts = read_record(RECORD).counts
    for stage in ("plain", "tail"):
        float32, float64 = (
            counts[Key("avx2", dtype, stage, "element")] for dtype in ("float32", "float64")
        )
        assert 1.5 < float64 / float32 < 2.5


# ---- the command line --------------------------------------------------------------------------


def test_the_program_must_exist(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none")])
    assert "program must be a file. Received: " in capsys.readouterr().err


def test_check_and_update_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["program", "--check", "--update"])
    assert "must not be given together" in capsys.readouterr().err


def test_the_record_is_json_that_a_diff_can_show() -> None:
    data = json.loads(RECORD.read_text())
    assert list(data) == ["compiler", "valgrind", "instructions"]
