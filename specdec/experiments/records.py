"""What a run leaves behind: one JSON object a line, written as it comes, readable after any interruption.

    header    first line of each file: format version, provenance, config
    record    one prompt (one turn of it), one repetition, one engine: ids, steps, seconds
    error     the same where generate() failed: what it said; no figures
    skipped   a prompt that does not fit the context
    costs     seconds of a step by K, each part a median, from calls beside the prompts'
    memory    the peak that was predicted for a call and the one that was measured
    sample    one prompt's tokens with the distributions they were drawn from

A run folder holds `records.jsonl`, or, while it is not complete, one `records-RANK.jsonl` a process.
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

FORMAT = 3
COUNTS = (  # of a record of format 1, by other definitions than today's; they are made of its steps, as they were then
    "num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens", "num_emitted_tokens", "acceptance_histogram",
)  # fmt: skip
SPECULATIVE, PLAIN = "speculative", "plain"


class Key(NamedTuple):
    """What a record is of; a run has no two of one key."""

    prompt_id: str
    turn: int
    repetition: int
    engine: str


@dataclass(frozen=True)
class Header:
    """provenance: commit, versions, device, command. config: of the run, resolved, plain values. version: of the format."""

    kind: ClassVar[str] = "header"
    provenance: dict[str, Any]
    config: dict[str, Any]
    version: int = FORMAT

    def flat(self) -> dict[str, Any]:
        """The config's values by their full names, as on a command line."""
        return _flat(self.config)


@dataclass(frozen=True)
class Seconds:
    """Of the generate() call that a record's row took part in; `other_s` is what no other part holds.

    first_token_s: until the first step was verified. token_s: from then on, for each further token of the record's row; None
    where there is none.
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

    engine: "speculative" or "plain". rows: how many shared the call. call: its number, the same for those rows.
    prompt_hash: of the prompt's ids. ids: generated, the stop included. tokens: their texts.
    steps: asked, drafted, accepted, emitted and overlap of each step; what figures count is made of them when they are read.
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
    """A prompt that generate() failed on."""

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
    """A prompt, from this turn on, that does not fit."""

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
    """Median seconds of one step's parts, indexed by the number of drafted ids, 0 … K; `draft_s[0]` is 0.

    target_s[k]: one forward of the target over k + 1 positions of each of `rows` rows.
    """

    kind: ClassVar[str] = "costs"
    rows: int
    draft_s: list[float]
    target_s: list[float]
    verification_s: list[float]
    other_s: list[float]


@dataclass(frozen=True)
class Memory:
    """Peak bytes of one call of the run's first prompts: predicted by part from the configs, and measured.

    unplanned: why there is no prediction, where there is none.
    """

    kind: ClassVar[str] = "memory"
    predicted: dict[str, int]
    measured_bytes: int
    unplanned: str | None = None


@dataclass(frozen=True)
class SampleToken:
    """text, origin: as in Step.origins(). target, draft: the likeliest tokens with their probability, where there is one."""

    text: str
    origin: str
    target: list[tuple[str, float]]
    draft: list[tuple[str, float]]


@dataclass(frozen=True)
class Sample:
    """One prompt's end and what was generated behind it."""

    kind: ClassVar[str] = "sample"
    prompt_id: str
    prompt: str
    tokens: list[SampleToken]


Result = Record | Failure | Skipped  # what there is of one key
Line = Header | Record | Failure | Skipped | Costs | Memory | Sample
KINDS: dict[str, Any] = {line.kind: line for line in (Header, Record, Failure, Skipped, Costs, Memory, Sample)}


@dataclass
class Run:
    """All that a run folder holds. torn: an interruption cut a last line short."""

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
        return [record for record in self.records if record.engine == engine]


class RecordFile:
    """A process' own file, appended to line by line; every line is handed to the system before write() returns."""

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        repair(path)
        self.stream = path.open("a", encoding="utf-8")
        if path.stat().st_size == 0:
            self.write(header)

    def write(self, line: Line) -> None:
        self.stream.write(_encoded(line))
        self.stream.flush()

    def close(self) -> None:
        self.stream.close()


def repair(path: Path) -> None:
    """Cut off a last line that an interruption left unfinished."""
    if not path.exists():
        return
    with path.open("rb+") as stream:
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            stream.truncate(whole)


def files_of(folder: Path) -> list[Path]:
    """The record files of a run folder, the merged one first."""
    merged = folder / "records.jsonl"
    return [merged] * merged.is_file() + sorted(folder.glob("records-*.jsonl"))


def read_run(path: Path) -> Run:
    """A run from its folder or from one record file.

    Of several lines with one key (a failed prompt, tried again) the last one counts. Records of format 1 are read without their
    counts. Raises ValueError, naming file and line, for what is no record, and for a file of a format that is not known.
    """
    files = [path] if path.is_file() else files_of(path)
    if not files:
        raise ValueError(f"{path} holds no records; name a run folder (with a records.jsonl), or a record file")
    run: Run | None = None
    results: dict[Key, Result] = {}
    for file in files:
        lines, torn = _lines(file)
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
        raise ValueError(f"{path} was interrupted before its first line was whole; start the run again")
    for result in results.values():
        if isinstance(result, Record):
            run.records.append(result)
        elif isinstance(result, Failure):
            run.failures.append(result)
        else:
            run.skipped.append(result)
    return run


def merge(folder: Path) -> None:
    """Make the processes' files one, ordered by prompt id, repetition and engine; nothing is lost if this is interrupted."""
    run = read_run(folder)
    extras: list[Line] = [line for line in (run.costs, run.memory, run.sample) if line is not None]
    everything: list[Result] = [*run.records, *run.failures, *run.skipped]
    results = sorted(everything, key=lambda line: line.key)
    partial = folder / "merging.tmp"
    with partial.open("w", encoding="utf-8") as stream:
        stream.writelines(_encoded(line) for line in (run.header, *extras, *results))
        stream.flush()
        os.fsync(stream.fileno())
    parts = files_of(folder)
    partial.replace(folder / "records.jsonl")
    for part in parts:
        if part.name != "records.jsonl":
            part.unlink()


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _encoded(line: Line) -> str:
    return json.dumps({"kind": line.kind} | asdict(line), ensure_ascii=False, allow_nan=False) + "\n"


def _lines(path: Path) -> tuple[list[Line], bool]:
    """The lines of a file, and whether the last one is torn (then it is left out)."""
    whole, _, rest = path.read_bytes().rpartition(b"\n")  # bytes: an interruption may have cut a character in two
    return list(_parsed(path, whole.split(b"\n") if whole else [])), bool(rest)


def _parsed(path: Path, lines: Iterable[bytes]) -> Iterator[Line]:
    version = FORMAT
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line.decode())
            kind = KINDS[values.pop("kind")]
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            text = line[:60].decode(errors="replace")
            raise ValueError(f"{path}, line {number}: this is no record of a run: {text!r}") from error
        if number == 1 and kind is not Header:
            raise ValueError(
                f"{path}, line 1: a record file begins with a header, this one with a line of kind {kind.kind!r}"
            )
        if kind is Header:
            version = values.get("version")
            if version not in range(1, FORMAT + 1):
                raise ValueError(
                    f"{path} is of record format {version}, this specdec reads formats 1 to {FORMAT};"
                    " read it with the version that its header names, or run it again"
                )
        try:
            yield _built(kind, values, version)
        except (TypeError, KeyError) as error:
            names = ", ".join(f.name for f in fields(kind))
            raise ValueError(
                f"{path}, line {number}: a line of kind {kind.kind!r} has the fields {names}: {error}"
            ) from error


def _built(kind: Any, values: dict[str, Any], version: int) -> Line:
    if kind is Record:
        if version == 1:
            counts = {name: values.pop(name) for name in COUNTS}
            asked = len(counts["acceptance_histogram"]) - 1  # of the oldest records, which name one K for all steps
            values["steps"] = [{"requested": step.pop("asked", asked)} | step for step in values["steps"]]
        if version == 2:
            values["steps"] = [{"requested": step.pop("asked")} | step for step in values["steps"]]
        values["steps"] = [RowStep(**step) for step in values["steps"]]
        values["seconds"] = Seconds(**values["seconds"])
        if values.get("choice"):
            times = StepTimes(**values["choice"]["times"])
            values["choice"] = Choice(**values["choice"] | {"times": times})
    if kind is Sample:
        values["tokens"] = [SampleToken(**token) for token in values["tokens"]]
    line: Line = kind(**values)
    return line
