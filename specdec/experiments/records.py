"""The records of a run: one JSON object per line, appended as results arrive, readable after any interruption.

    header    first line of each file: format version, provenance, config
    record    one prompt (one turn of it), one repetition, one engine: ids, steps, seconds
    error     the same where generate() failed: its message, no figures
    skipped   a prompt that does not fit the context
    costs     seconds of a step's parts by K, in each repetition of the calibration calls
    memory    predicted and measured peak memory of a call
    sample    the generated tokens of one prompt with both models' most likely tokens

A run folder contains `records.jsonl`, or, until the run is complete, one `records-RANK.jsonl` for each process.

Format 4 is written; older formats are read:

    1    records contain counts (FORMAT_1_COUNTS) that follow other definitions, and steps name `asked` or nothing
    2    steps name `asked` instead of `requested`
    3    costs contain one median over all repetitions for each K
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.core.timing import StepTimes

FORMAT = 4
FORMAT_1_COUNTS = (  # dropped when they are read: figures are computed from the steps
    "num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens", "num_emitted_tokens", "acceptance_histogram",
)  # fmt: skip
SPECULATIVE, PLAIN = "speculative", "plain"


class Key(NamedTuple):
    """Identifies a result within a run."""

    prompt_id: str
    turn: int
    repetition: int
    engine: str


@dataclass(frozen=True)
class Header:
    """provenance: commit, versions, device, command. config: resolved plain values. version: of the record format."""

    kind: ClassVar[str] = "header"
    provenance: dict[str, Any]
    config: dict[str, Any]
    version: int = FORMAT

    def flat(self) -> dict[str, Any]:
        """The config's values by their full names, as on a command line: sampling.temperature, …"""
        return _flatten(self.config)


@dataclass(frozen=True)
class Seconds:
    """Times of the generate() call that a record's row took part in; `other_s` is the rest of `total_s`.

    first_token_s: until the first step is verified. token_s: after that, per further token of the record's row; None
    where there is no further token.
    """

    total_s: float
    first_token_s: float
    token_s: float | None
    prefill_s: float
    draft_s: float
    target_s: float
    verification_s: float
    other_s: float


@dataclass(frozen=True)
class Record:
    """One row of one generate() call.

    engine: "speculative" or "plain". call: number of the call. rows: number of rows of the call.
    prompt_hash: of the prompt's ids. ids: generated, the stop included. tokens: their texts.
    steps: what each step did to the row; all counts are computed from them.
    seconds: of the whole call, so a row's share is 1 / rows.
    choice: how the call chose K, where num_draft_tokens is "auto".
    """

    kind: ClassVar[str] = "record"
    prompt_id: str
    task: str
    turn: int
    repetition: int
    engine: str
    seed: int
    call: int
    rows: int
    num_prompt_tokens: int
    prompt_hash: str
    ids: list[int]
    tokens: list[str]
    steps: list[RowStep]
    seconds: Seconds
    choice: Choice | None = None

    @property
    def key(self) -> Key:
        return Key(self.prompt_id, self.turn, self.repetition, self.engine)


@dataclass(frozen=True)
class Failure:
    """A prompt for which generate() failed."""

    kind: ClassVar[str] = "error"
    prompt_id: str
    task: str
    turn: int
    repetition: int
    engine: str
    error: str

    @property
    def key(self) -> Key:
        return Key(self.prompt_id, self.turn, self.repetition, self.engine)


@dataclass(frozen=True)
class Skipped:
    """A prompt that does not fit the context, from this turn on."""

    kind: ClassVar[str] = "skipped"
    prompt_id: str
    task: str
    turn: int
    repetition: int
    reason: str

    @property
    def key(self) -> Key:
        return Key(self.prompt_id, self.turn, self.repetition, "")


@dataclass(frozen=True)
class Costs:
    """Seconds of a step's parts for a batch of `rows` rows: [K][repetition], each the median of one calibration call.

    A repetition calls every K in turn, so what slows the machine down slows all of them down. draft_s[0] is 0.
    target_s[k]: one forward of the target over k + 1 positions of each row.
    weights_bytes, weights_read_s: the target's weights that a forward reads, and the seconds that reading so many bytes
    takes on this device, with the run's threads; None where they are not known: mixtures of experts, older records.
    """

    kind: ClassVar[str] = "costs"
    rows: int
    draft_s: list[list[float]]
    target_s: list[list[float]]
    verification_s: list[list[float]]
    other_s: list[list[float]]
    weights_bytes: int | None = None
    weights_read_s: float | None = None

    @property
    def repetitions(self) -> int:
        return len(self.target_s[0])


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one call with the first prompts: predicted by part from the models' configs, and measured.

    unplanned: why there is no prediction, None where there is one.
    """

    kind: ClassVar[str] = "memory"
    predicted: dict[str, int]
    measured_bytes: int
    unplanned: str | None = None


@dataclass(frozen=True)
class SampleToken:
    """A generated token. origin: as in RowStep.origins().

    target, draft: each model's most likely tokens with probabilities; draft is empty where there is no draft token.
    """

    text: str
    origin: str
    target: list[tuple[str, float]]
    draft: list[tuple[str, float]]


@dataclass(frozen=True)
class Sample:
    """The end of one prompt, and the tokens generated after it."""

    kind: ClassVar[str] = "sample"
    prompt_id: str
    prompt: str
    tokens: list[SampleToken]


Result = Record | Failure | Skipped  # of one key
Line = Header | Record | Failure | Skipped | Costs | Memory | Sample
LINE_TYPES: dict[str, Any] = {line.kind: line for line in (Header, Record, Failure, Skipped, Costs, Memory, Sample)}


@dataclass
class Run:
    """The contents of a run folder. torn: a last line is incomplete after an interruption."""

    folder: Path
    header: Header
    records: list[Record] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    costs: Costs | None = None
    memory: Memory | None = None
    sample: Sample | None = None
    torn: bool = False

    def of(self, engine: str) -> list[Record]:
        """The records of one engine."""
        return [record for record in self.records if record.engine == engine]


class RecordFile:
    """The record file of one process. When write() returns, the operating system has the line."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        repair(path)
        self.stream = path.open("a", encoding="utf-8")
        if path.stat().st_size == 0:
            self.write(header)

    def write(self, line: Line) -> None:
        self.stream.write(_encode(line))
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def repair(path: Path) -> None:
    """Remove a last line that is incomplete after an interruption."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        content = stream.read()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            stream.truncate(end)


def files_of(folder: Path) -> list[Path]:
    """The record files of a run folder, the merged file first."""
    merged = folder / "records.jsonl"
    return [merged] * merged.is_file() + sorted(folder.glob("records-*.jsonl"))


def read_run(path: Path) -> Run:
    """Read a run from its folder or from one record file, in any format up to FORMAT.

    Of several lines with the same key (a failed prompt and its retry) the last one counts. Raises ValueError, with file
    and line number, for a line that is not a record, and for a file in an unknown format.
    """
    files = [path] if path.is_file() else files_of(path)
    if not files:
        raise ValueError(f"{path} contains no records; pass a run folder (with a records.jsonl) or a record file")
    run: Run | None = None
    results: dict[Key, Result] = {}
    for file in files:
        lines, torn = _read_lines(file)
        for line in lines:
            if isinstance(line, Header):
                run = run or Run(file.parent, line)
            elif isinstance(line, Record | Failure | Skipped):
                results[line.key] = line
            else:
                assert run is not None
                setattr(run, line.kind, line)
        if run is not None:
            run.torn |= torn
    if run is None:
        raise ValueError(f"{path} was interrupted before its first line was complete; start the run again")
    for result in results.values():
        if isinstance(result, Record):
            run.records.append(result)
        elif isinstance(result, Failure):
            run.failures.append(result)
        else:
            run.skipped.append(result)
    return run


def merge(folder: Path) -> None:
    """Merge the processes' files into records.jsonl, ordered by key; an interruption loses nothing."""
    run = read_run(folder)
    extras: list[Line] = [line for line in (run.costs, run.memory, run.sample) if line is not None]
    everything: list[Result] = [*run.records, *run.failures, *run.skipped]
    results = sorted(everything, key=lambda line: line.key)
    partial = folder / "merging.tmp"
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(_encode(line) for line in (run.header, *extras, *results))
        stream.flush()
        os.fsync(stream.fileno())
    merged_files = files_of(folder)
    partial.replace(folder / "records.jsonl")
    for file in merged_files:
        if file.name != "records.jsonl":
            file.unlink()


def group_by_prompt(records: Iterable[Record]) -> list[list[Record]]:
    """The records of each prompt id, in the order in which the ids first occur."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.prompt_id, []).append(record)
    return list(groups.values())


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _encode(line: Line) -> str:
    return json.dumps({"kind": line.kind} | asdict(line), ensure_ascii=False, allow_nan=False) + "\n"


def _read_lines(path: Path) -> tuple[list[Line], bool]:
    """The complete lines of a file, and whether an incomplete one follows."""
    complete, _, rest = path.read_bytes().rpartition(b"\n")  # bytes: an interruption may split a character
    return list(_parse(path, complete.split(b"\n") if complete else [])), bool(rest)


def _parse(path: Path, lines: Iterable[bytes]) -> Iterator[Line]:
    version = FORMAT
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line.decode())
            line_type = LINE_TYPES[values.pop("kind")]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            text = line[:60].decode(errors="replace")
            raise ValueError(f"{path}, line {number} is not a record of a run: {text!r}") from error
        if number == 1 and line_type is not Header:
            raise ValueError(
                f"{path}, line 1: a record file begins with a header, but this line is of kind {line_type.kind!r}"
            )
        if line_type is Header:
            version = values.get("version")
            if version not in range(1, FORMAT + 1):
                raise ValueError(
                    f"{path} has record format {version}, but this version of specdec reads formats 1 to {FORMAT};"
                    " use the version that wrote it, or run it again"
                )
        try:
            yield _build_line(line_type, values, version)
        except (TypeError, KeyError) as error:
            names = ", ".join(f.name for f in fields(line_type))
            raise ValueError(
                f"{path}, line {number}: a line of kind {line_type.kind!r} has the fields {names}: {error}"
            ) from error


def _build_line(line_type: Any, values: dict[str, Any], version: int) -> Line:
    """values: the parsed JSON object, which is changed in place."""
    if line_type is Record:
        if version < 3:
            _upgrade_record(values, version)
        values["steps"] = [RowStep(**step) for step in values["steps"]]
        values["seconds"] = Seconds(**values["seconds"])
        if values.get("choice"):
            times = StepTimes(**values["choice"]["times"])
            values["choice"] = Choice(**values["choice"] | {"times": times})
    if line_type is Costs and version < 4:
        values |= {part: [[seconds] for seconds in by_k] for part, by_k in values.items() if part != "rows"}
    if line_type is Sample:
        values["tokens"] = [SampleToken(**token) for token in values["tokens"]]
    line: Line = line_type(**values)
    return line


def _upgrade_record(values: dict[str, Any], version: int) -> None:
    """Change the values of a record in format 1 or 2 to those of format 3, in place."""
    if version == 1:
        counts = {name: values.pop(name) for name in FORMAT_1_COUNTS}
        for step in values["steps"]:  # the oldest records have the same K in all steps and don't name it
            step.setdefault("asked", len(counts["acceptance_histogram"]) - 1)
    values["steps"] = [{"requested": step.pop("asked")} | step for step in values["steps"]]
