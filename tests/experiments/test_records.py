"""Record files: round trip, incomplete and malformed lines, older formats, merging the files of processes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.core.timing import StepTimes
from specdec.experiments.records import (
    FORMAT,
    FORMAT_1_COUNTS,
    LINE_TYPES,
    PLAIN,
    SPECULATIVE,
    Costs,
    Failure,
    Header,
    Memory,
    Record,
    RecordFile,
    Sample,
    SampleToken,
    Seconds,
    Skipped,
    merge,
    read_run,
    repair,
)
from specdec.experiments.report.labels import has_format_1_counts

FORMAT_1 = Path(__file__).parents[1] / "data" / "run-format-1"
HEADER = Header({"commit": "abc"}, {"sampling": {"temperature": 0}})
SECONDS = Seconds(0.5, 0.1, 0.2, 0.05, 0.1, 0.2, 0.1, 0.05)


def record(prompt_id: str = "a", engine: str = SPECULATIVE, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "prompt_id": prompt_id, "task": "t", "turn": 0, "repetition": 0, "engine": engine, "seed": 1, "call": 0,
        "rows": 1, "num_prompt_tokens": 3, "prompt_hash": "00", "ids": [5, 6, 7], "tokens": ["x", "\u2028", "é\n"],
        "steps": [RowStep(2, 2, 2, 3, [0.5, 0.25])], "seconds": SECONDS,
    }  # fmt: skip
    return Record(**values | changes)


CHOICE = Choice([0, 0, 1], StepTimes([0.0, 0.1], [0.2, 0.3], [0.03, 0.03]), 0.5, 1.5, 1.25, None)
LINES = [
    record("b", choice=CHOICE),
    record("a", PLAIN),
    Failure("c", "t", 0, 0, SPECULATIVE, "RuntimeError: no"),
    Skipped("d", "t", 1, 0, "too long"),
    Costs(1, [[0.0, 0.0], [0.1, 0.11]], [[0.2, 0.21], [0.3, 0.31]], [[0.01] * 2] * 2, [[0.02] * 2] * 2),
    Memory({"weights_bytes": 3}, 4, None),
    Sample("a", "def", [SampleToken("x", "bonus", [("x", 0.5)], [])]),
]


def write(path: Path, *lines: Any) -> Path:
    file = RecordFile(path, HEADER)
    for line in lines:
        file.write(line)
    file.close()
    return path


def test_format_1_is_read_without_its_counts(tmp_path: Path) -> None:
    run = read_run(FORMAT_1)
    assert run.header.version == 1 < FORMAT
    assert [len(record.ids) for record in run.records] == [7, 7, 8, 8]
    assert [record.steps for record in run.of(SPECULATIVE)] == [
        [RowStep(4, 4, 4, 5, [1.0] * 4), RowStep(2, 2, 2, 2, [1.0, 1.0])],
        [
            RowStep(4, 4, 3, 4, [1.0, 1.0, 1.0, 0.0]),
            RowStep(3, 0, 0, 1, []),
            RowStep(2, 2, 1, 2, [1.0, 0.0]),
            RowStep(0, 0, 0, 1, []),
        ],
    ]
    file = tmp_path / "records.jsonl"  # the oldest records, from before K could change
    text = re.sub(r'"asked": \d, ', "", (FORMAT_1 / "records.jsonl").read_text()).replace(', "choice": null', "")
    file.write_text(text)
    assert read_run(file).of(SPECULATIVE)[1].steps[1] == RowStep(4, 0, 0, 1, [])


def format_2(path: Path) -> Path:
    """The fixture of format 1 as format 2 wrote it: without counts, steps name `asked`."""
    header, *lines = map(json.loads, (FORMAT_1 / "records.jsonl").read_text().splitlines())
    values = [header | {"version": 2}]
    values += [{name: value for name, value in line.items() if name not in FORMAT_1_COUNTS} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in values))
    return path


def test_format_2_is_read_like_format_1(tmp_path: Path) -> None:
    file = format_2(tmp_path / "records.jsonl")
    assert '"asked"' in file.read_text()
    run, format_1 = read_run(file), read_run(FORMAT_1)
    assert run.header.version == 2 < FORMAT
    assert run.records == format_1.records
    assert (run.costs, run.memory, run.sample) == (format_1.costs, format_1.memory, format_1.sample)
    assert not has_format_1_counts(run)
    assert has_format_1_counts(format_1)


def test_the_step_costs_of_format_3_are_one_repetition(tmp_path: Path) -> None:
    file = write(
        tmp_path / "records.jsonl", record(), Costs(2, [[0.0], [0.1]], [[0.2], [0.3]], [[0.01]] * 2, [[0.02]] * 2)
    )
    old = {"kind": "costs", "rows": 2, "draft_s": [0.0, 0.1], "target_s": [0.2, 0.3]}
    old |= {"verification_s": [0.01, 0.01], "other_s": [0.02, 0.02]}
    header, first, *_ = file.read_text().split("\n")
    lines = [json.dumps(json.loads(header) | {"version": 3}), first, json.dumps(old)]
    old_file = tmp_path / "old.jsonl"
    old_file.write_text("".join(line + "\n" for line in lines))
    old_run, run = read_run(old_file), read_run(file)
    assert (old_run.header.version, old_run.records) == (3, run.records)
    assert old_run.costs == run.costs
    assert run.costs is not None
    assert run.costs.repetitions == 1


def test_a_step_of_format_2_without_its_requested_ids_is_refused(tmp_path: Path) -> None:
    file = format_2(tmp_path / "records.jsonl")
    file.write_text(re.sub(r'"asked": \d, ', "", file.read_text()))
    with pytest.raises(ValueError, match=r"a line of kind 'record' has the fields .*'asked'"):
        read_run(file)


def test_a_record_of_format_1_without_its_counts_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text((FORMAT_1 / "records.jsonl").read_text().replace('"num_spec_steps": 4, ', ""))
    with pytest.raises(ValueError, match=r"line 4: a line of kind 'record' has the fields .*num_spec_steps"):
        read_run(file)


def test_lines_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert {type(line) for line in LINES} | {Header} == set(LINE_TYPES.values())
    write(tmp_path / "records-0.jsonl", *LINES)
    run = read_run(tmp_path)
    assert run.header == HEADER
    assert run.records == [LINES[0], LINES[1]]
    assert run.of(PLAIN) == [LINES[1]]
    assert (run.failures, run.skipped) == ([LINES[2]], [LINES[3]])
    assert run.costs == LINES[4]
    assert run.memory == LINES[5]
    assert run.sample is not None
    assert run.sample.tokens[0].text == "x"
    assert not run.torn


def test_each_line_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records-0.jsonl", HEADER)
    file.write(record())
    assert len(read_run(tmp_path).records) == 1
    file.close()


@pytest.mark.parametrize("length", [1, 5, 40])
def test_an_incomplete_last_line_is_ignored_then_removed(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "records-0.jsonl", record("a"), record("b"))
    content = path.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    path.write_bytes(content[: start + length])
    run = read_run(tmp_path)
    assert [r.prompt_id for r in run.records] == ["a"]
    assert run.torn
    write(path, record("c"))  # opening it again repairs it
    run = read_run(tmp_path)
    assert [r.prompt_id for r in run.records] == ["a", "c"]
    assert not run.torn


def test_a_complete_file_is_not_repaired(tmp_path: Path) -> None:
    path = write(tmp_path / "records-0.jsonl", record())
    before = path.read_bytes()
    repair(path)
    assert path.read_bytes() == before
    repair(tmp_path / "none")


def test_a_line_that_ends_inside_a_character(tmp_path: Path) -> None:
    path = write(tmp_path / "records-0.jsonl", record("a"), record("é"))
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex("é".encode()) + 1])
    assert [r.prompt_id for r in read_run(tmp_path).records] == ["a"]
    assert read_run(tmp_path).torn
    path.write_bytes(content.replace("é".encode(), b"\xff"))
    with pytest.raises(ValueError, match=r"records-0\.jsonl, line 2 is not a record of a run: '\{"):
        read_run(tmp_path)
    path.write_bytes(content + b"[" * 100_000 + b"\n")
    with pytest.raises(ValueError, match=r"line 4 is not a record of a run: '\[\["):
        read_run(tmp_path)


def test_files_of_processes_are_merged_without_duplicates(tmp_path: Path) -> None:
    write(tmp_path / "records-0.jsonl", record("a"), Failure("b", "t", 0, 0, SPECULATIVE, "no"), LINES[4])
    write(tmp_path / "records-1.jsonl", record("b"), record("a", PLAIN))
    merge(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
    run = read_run(tmp_path)
    assert [(r.prompt_id, r.engine) for r in run.records] == [("a", PLAIN), ("a", SPECULATIVE), ("b", SPECULATIVE)]
    assert run.failures == []  # the retry succeeded
    assert run.costs == LINES[4]
    merge(tmp_path)
    assert read_run(tmp_path).records == run.records


def test_an_interrupted_merge_neither_loses_nor_duplicates_records(tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "records-0.jsonl", record("a"), record("b"))
    merged = tmp_path / "merged"
    shutil.copytree(parts, merged)
    merge(merged)
    shutil.copy(parts / "records-0.jsonl", merged)  # it was not deleted yet
    assert read_run(merged).records == read_run(parts).records


BAD: dict[str, tuple[str, str]] = {
    "no json": ("{", "line 3 is not a record of a run"),
    "no object": ("[1]", "line 3 is not a record of a run"),
    "no kind": ('{"a": 1}', "line 3 is not a record of a run"),
    "another kind": ('{"kind": "poem"}', "line 3 is not a record of a run"),
    "a field less": ('{"kind": "memory", "predicted": {}}', "line 3: a line of kind 'memory' has the fields"),
    "a field more": ('{"kind": "memory", "predicted": {}, "measured_bytes": 1, "extra": 2}', "extra"),
    "an empty line": ("", "line 3 is not a record of a run"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_line_is_an_error_with_its_number(tmp_path: Path, name: str) -> None:
    text, message = BAD[name]
    path = write(tmp_path / "records.jsonl", record())
    with path.open("a") as stream:
        stream.write(text + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_run(tmp_path)
    assert "records.jsonl" in str(error.value)


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "records.jsonl", record())
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps(json.loads(first) | {"version": FORMAT + 1}) + "\n" + rest)
    message = f"has record format {FORMAT + 1}, but this version of specdec reads formats 1 to {FORMAT}"
    with pytest.raises(ValueError, match=message):
        read_run(tmp_path)


def test_a_missing_header_an_empty_folder_and_an_incomplete_header_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="contains no records"):
        read_run(tmp_path)
    path = write(tmp_path / "records.jsonl", record())
    path.write_text(path.read_text().split("\n", 1)[1])
    with pytest.raises(ValueError, match="begins with a header"):
        read_run(path)
    path.write_text('{"kind": "hea')
    with pytest.raises(ValueError, match="interrupted before its first line was complete"):
        read_run(path)


def test_nan_is_refused_when_it_is_written(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records-0.jsonl", HEADER)
    with pytest.raises(ValueError, match="JSON compliant"):
        file.write(Memory({}, float("nan")))  # type: ignore[arg-type]
    file.close()
