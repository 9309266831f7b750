"""One run: every prompt by every engine, in turns, each result written as it comes.

The plain engine is the same loop with no drafter, on the same prompts, between the speculative calls: a drift of the machine
meets both. Under `accelerate launch` the processes take batches of prompts in turn and each writes a file of its own; seeds hang
on the prompt, its turn and the repetition, so how many processes there are changes nothing in the texts.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from specdec.core.stats import Stats
from specdec.experiments.calibration import warm_up
from specdec.experiments.config import ExperimentConfig
from specdec.experiments.pair import Pair
from specdec.experiments.records import (
    FORMAT,
    PLAIN,
    SPECULATIVE,
    Failure,
    Header,
    Key,
    Record,
    RecordFile,
    Run,
    Seconds,
    Skipped,
    files_of,
    merge,
    read_run,
    repair,
)
from specdec.experiments.workloads import Prompt
from specdec.generation.enable import decoding_of
from specdec.utils.provenance import provenance
from specdec.utils.text import pieces

PER_RUN = {"folder", "resume"}  # a run that is gone on with may differ in these


def processes() -> PartialState:
    """This process among those that share the run: one, unless a launcher started several."""
    return PartialState(cpu=not torch.accelerator.is_available())


def run(config: ExperimentConfig, values: dict[str, Any], console: Console) -> Run:
    """Run the experiment; returns all its records, those of other processes included.

    values: the config as plain values, for the header. Raises ValueError for what can't be run, before anything is written.
    """
    folder = Path(config.folder)
    prompts: list[Prompt] = config.workload.prompts()
    state = processes()
    before = _what_is_there(folder, config.resume, values)
    if config.resume and before is None:
        console.print(f"{folder} holds no run to go on with, so this is a new one; another is named by folder=…")
    device = config.target.device
    if device == "auto":  # a launcher counts CPUs too
        device = "cpu" if state.device.type == "cpu" else str(state.device)
    with console.status("loading the models"):
        pair = Pair.load(config, device)
    first = _first_batch(config, pair, prompts)
    state.wait_for_everyone()  # all have read what is there before one of them writes
    folder.mkdir(parents=True, exist_ok=True)
    origin = provenance(device) | {name: version(name) for name in ("accelerate", "datasets", "hydra-core")}
    origin["decoding"] = decoding_of(pair.target)
    origin["processes"] = state.num_processes
    file = RecordFile(folder / f"records-{state.process_index}.jsonl", Header(origin, values))
    batches = [prompts[start : start + config.batch_size] for start in range(0, len(prompts), config.batch_size)]
    mine = list(enumerate(product(range(config.repetitions), batches)))[state.process_index :: state.num_processes]
    turns = sum(len(prompt.turns) for _, (_, batch) in mine for prompt in batch)
    try:
        with _Bar(turns * len(pair.engines), console) as bar:
            try:
                warm_up(config, pair, first, file if state.is_main_process else None, before, bar.say)
            except Exception as error:  # no figure of the prompts hangs on it, and what fails here may work for others
                console.print(f"memory, sample and step costs are not all there: {type(error).__name__}: {error}")
            known: list[Record | Skipped] = [] if before is None else [*before.records, *before.skipped]
            results = {line.key: line for line in known}
            worker = Worker(config, pair, file, results, bar, max(len(prompt.turns) for prompt in prompts))
            for number, (repetition, batch) in mine:
                worker.hold(number, repetition, batch)
    except KeyboardInterrupt:
        console.print(
            f"interrupted; what is done is kept. Go on with the same command and: folder={folder} resume=true"
        )
        raise
    finally:
        file.close()
    state.wait_for_everyone()
    if state.is_main_process:
        merge(folder)
    state.wait_for_everyone()
    return read_run(folder)


@dataclass
class Worker:
    """One process' way through its batches. results: what there is by key, of earlier attempts and of this one."""

    config: ExperimentConfig
    pair: Pair
    file: RecordFile
    results: dict[Key, Record | Skipped]
    bar: _Bar
    max_turns: int

    def hold(self, number: int, repetition: int, batch: list[Prompt]) -> None:
        """All turns of a batch of conversations, which go on with the first engine's answers, whoever speaks."""
        answers: dict[str, list[str]] = {prompt.id: [] for prompt in batch}
        engines = list(self.pair.engines)
        for turn in range(max(len(prompt.turns) for prompt in batch)):
            rows: list[tuple[Prompt, list[int]]] = []
            for prompt in batch:
                if turn < len(prompt.turns) and len(answers[prompt.id]) == turn:
                    ids = self.pair.encode(prompt.turns, answers[prompt.id])
                    if reason := self.pair.too_long(ids):
                        self._leave_out(prompt, turn, repetition, reason)
                    else:
                        rows.append((prompt, ids))
            for index in range(len(engines)):
                engine = engines[(index + number + turn) % len(engines)]  # each of them first in turn
                call = (number * self.max_turns + turn) * len(engines) + engines.index(engine)
                self._call(engine, call, turn, repetition, rows)
            for prompt, _ in rows:
                answer = self.results.get(Key(prompt.id, turn, repetition, engines[0]))
                if isinstance(answer, Record):
                    answers[prompt.id].append(self.pair.tokenizer.decode(answer.ids, skip_special_tokens=True))

    def _leave_out(self, prompt: Prompt, turn: int, repetition: int, reason: str) -> None:
        if self.config.too_long == "error":
            for engine in self.pair.engines:
                self.file.write(Failure(prompt.id, prompt.task, turn, repetition, engine, f"does not fit: {reason}"))
        else:
            line = Skipped(prompt.id, prompt.task, turn, repetition, reason)
            if line.key not in self.results:
                self.file.write(line)
        self.bar.advance((len(prompt.turns) - turn) * len(self.pair.engines))

    def _call(self, engine: str, call: int, turn: int, repetition: int, rows: list[tuple[Prompt, list[int]]]) -> None:
        """Generate for all rows, unless all are there already; a batch is never made smaller, since its draws hang together."""
        keys = [Key(prompt.id, turn, repetition, engine) for prompt, _ in rows]
        missing = [key not in self.results for key in keys]
        if any(missing):
            name = "/".join([str(self.config.seed), *(prompt.id for prompt, _ in rows), str(turn), str(repetition)])
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])
            try:
                texts, stats, seconds = self.pair.generate(self.pair.engines[engine], [ids for _, ids in rows], seed)
            except Exception as error:  # whatever a model fails with, the other prompts are still wanted
                message = f"{type(error).__name__}: {error}"
                lines: list[Any] = [
                    Failure(key.prompt_id, prompt.task, *key[1:], message)
                    for key, (prompt, _) in zip(keys, rows, strict=True)
                ]
            else:
                lines = [
                    self._record(key, prompt, seed, call, len(rows), ids, text, row, stats, seconds)
                    for key, (prompt, ids), text, row in zip(keys, rows, texts, stats.per_row, strict=True)
                ]
                self.results |= {line.key: line for line in lines}
                self.bar.count(engine, stats, seconds)
            for line, is_missing in zip(lines, missing, strict=True):
                if is_missing:
                    self.file.write(line)
        self.bar.advance(len(rows))

    def _record(
        self, key: Key, prompt: Prompt, seed: int, call: int, rows: int, prompt_ids: list[int], ids: list[int], row: Stats,
        stats: Stats, seconds: float,
    ) -> Record:  # fmt: skip
        return Record(
            prompt_id=prompt.id,
            task=prompt.task,
            turn=key.turn,
            repetition=key.repetition,
            engine=key.engine,
            seed=seed,
            call=call,
            rows=rows,
            num_prompt_tokens=len(prompt_ids),
            prompt_hash=hashlib.sha256(str(prompt_ids).encode()).hexdigest()[:16],
            ids=ids,
            tokens=pieces(self.pair.tokenizer, ids),
            steps=[replace(step, overlap=[round(value, 6) for value in step.overlap]) for step in row.steps],
            seconds=_seconds(stats, seconds, len(ids)),
            choice=stats.choice,
        )


class _Bar:
    """Progress of this process' calls, with the acceptance and the speed so far."""

    def __init__(self, total: int, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn(),
            TextColumn("{task.fields[so_far]}"), TimeRemainingColumn(compact=True),
        )  # fmt: skip
        self.progress = Progress(*columns, console=console, expand=True)
        self.task = self.progress.add_task("warming up", total=total, so_far="")
        self.accepted = self.drafted = 0
        self.tokens: dict[str, int] = {}
        self.seconds: dict[str, float] = {}

    def __enter__(self) -> _Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, what: str) -> None:
        self.progress.update(self.task, description=what)

    def advance(self, calls: int) -> None:
        self.progress.advance(self.task, calls)

    def count(self, engine: str, stats: Stats, seconds: float) -> None:
        """One call more."""
        self.accepted += stats.num_accepted_draft_tokens
        self.drafted += stats.num_draft_tokens
        self.tokens[engine] = self.tokens.get(engine, 0) + stats.num_emitted_tokens
        self.seconds[engine] = self.seconds.get(engine, 0.0) + seconds
        so_far = [f"{self.accepted / self.drafted:.0%} accepted"] if self.drafted else []
        for name, words in ((SPECULATIVE, "{:.0f} tok/s"), (PLAIN, "plain {:.0f} tok/s")):
            if name in self.tokens:
                so_far.append(words.format(self.tokens[name] / self.seconds[name]))
        self.progress.update(self.task, description="generating", so_far=", ".join(so_far))


def _what_is_there(folder: Path, resume: bool, values: dict[str, Any]) -> Run | None:
    """The run that this one goes on with, None where it starts anew."""
    if resume:  # a process that was killed in its very first line has left nothing
        for file in files_of(folder):
            repair(file)
    if not any(file.stat().st_size for file in files_of(folder)):
        return None
    if not resume:
        raise ValueError(f"{folder} holds a run already; go on with it by resume=true, or name another folder=…")
    before = read_run(folder)
    if before.header.version != FORMAT:
        raise ValueError(
            f"{folder} is of record format {before.header.version}, this specdec writes format {FORMAT}; finish it with the"
            " specdec that began it, or name another folder=…"
        )
    theirs, ours = before.header.flat(), Header({}, values).flat()
    names = (theirs.keys() | ours.keys()) - PER_RUN
    if changed := sorted(name for name in names if theirs.get(name) != ours.get(name)):
        name = changed[0]
        raise ValueError(
            f"{folder} was run with {name}={theirs.get(name)}, now it is {ours.get(name)}; resume with the same config, or name"
            " another folder=…"
        )
    return before


def _first_batch(config: ExperimentConfig, pair: Pair, prompts: list[Prompt]) -> list[tuple[Prompt, list[int]]]:
    """The first prompts that fit; raises ValueError where none does, or where one does not and that was to be an error."""
    first: list[tuple[Prompt, list[int]]] = []
    for prompt in prompts:
        ids = pair.encode(prompt.turns, [])
        reason = pair.too_long(ids)
        if reason and config.too_long == "error":
            raise ValueError(
                f"the prompt {prompt.id!r} does not fit: {reason}; shorten it, or leave such prompts out by too_long=skip"
            )
        if not reason:
            first.append((prompt, ids))
        if len(first) == config.batch_size and config.too_long == "skip":
            break
    if not first:
        raise ValueError(
            f"none of {len(prompts)} prompts fits: of {prompts[-1].id!r}, {reason}; lower sampling.max_new_tokens"
        )
    return first[: config.batch_size]


def _seconds(stats: Stats, total_s: float, num_tokens: int) -> Seconds:
    timing = stats.timing
    assert timing is not None
    first_token_s = total_s - timing.total_s + timing.first_token_s  # what comes before the loop is part of the wait
    named = timing.prefill_s + timing.draft_s + timing.target_s + timing.verification_s
    return Seconds(
        total_s=total_s,
        first_token_s=first_token_s,
        token_s=(total_s - first_token_s) / (num_tokens - 1) if num_tokens > 1 else None,
        prefill_s=timing.prefill_s,
        draft_s=timing.draft_s,
        target_s=timing.target_s,
        verification_s=timing.verification_s,
        other_s=total_s - named,
    )
