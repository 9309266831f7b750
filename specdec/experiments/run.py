"""One run: every prompt with every engine, alternating, each result written as it arrives.

The plain engine is the same loop with no drafter, on the same prompts, between the speculative calls, so a drift of the
machine's speed affects both. Under `accelerate launch` the processes take batches in turn and each writes a file of its
own; seeds depend on the prompts, the turn and the repetition, so the texts do not depend on the number of processes.
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

from specdec.core.stats import Stats
from specdec.experiments.calibration import calibrate
from specdec.experiments.config import ExperimentConfig, TargetConfig
from specdec.experiments.pair import Pair
from specdec.experiments.progress import ProgressBar
from specdec.experiments.records import (
    FORMAT,
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
from specdec.utils.provenance import model_identity, provenance
from specdec.utils.text import pieces

MAY_DIFFER_ON_RESUME = {"folder", "resume"}


def processes() -> PartialState:
    """This process among those that share the run: one, unless a launcher started several."""
    return PartialState(cpu=not torch.accelerator.is_available())


def device_of(target: TargetConfig) -> str:
    """The device of the target in this process."""
    if target.device != "auto":
        return target.device
    device = processes().device
    return "cpu" if device.type == "cpu" else str(device)  # accelerate numbers CPUs, torch's models do not


def run(config: ExperimentConfig, values: dict[str, Any], console: Console, resumed: str | None = None) -> Run:
    """Run the experiment; returns all its records, those of other processes included.

    values: the config as plain values, for the header. resumed: in words, how a run that is interrupted is resumed.
    Raises ValueError, before anything is written, for a config that can't be run.
    """
    folder = Path(config.folder)
    prompts: list[Prompt] = config.workload.prompts()
    state = processes()
    previous = _previous_run(folder, config.resume, values)
    if config.resume and previous is None:
        console.print(f"{folder} contains no run to resume, so a new run begins; name another folder with folder=…")
    device = device_of(config.target)
    with console.status("loading the models"):
        pair = Pair.load(config, device)
    first_batch = _first_batch(config, pair, prompts)
    state.wait_for_everyone()  # all have read the folder before one of them writes
    folder.mkdir(parents=True, exist_ok=True)
    header = Header(_provenance(config, pair, device, state.num_processes), values)
    file = RecordFile(folder / f"records-{state.process_index}.jsonl", header)
    batches = [prompts[start : start + config.batch_size] for start in range(0, len(prompts), config.batch_size)]
    work = list(enumerate(product(range(config.repetitions), batches)))[state.process_index :: state.num_processes]
    num_turns = sum(len(prompt.turns) for _, (_, batch) in work for prompt in batch)
    try:
        with ProgressBar(num_turns * len(pair.engines), console) as bar:
            try:
                own_file = file if state.is_main_process else None
                calibrate(config, pair, first_batch, own_file, previous, bar.describe)
            except Exception as error:  # no figure of the prompts depends on it, and other calls may still work
                console.print(f"memory, sample and step costs are incomplete: {type(error).__name__}: {error}")
            worker = Worker(config, pair, file, _results(previous), bar, max(len(prompt.turns) for prompt in prompts))
            for number, (repetition, batch) in work:
                worker.run_batch(number, repetition, batch)
    except KeyboardInterrupt:
        how = resumed or f"with the same command and: folder={folder} resume=true"
        console.print(f"interrupted; finished results are saved. Resume {how}")
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
    """Runs one process' batches. results: by key, of earlier attempts and of this one."""

    config: ExperimentConfig
    pair: Pair
    file: RecordFile
    results: dict[Key, Record | Skipped]
    bar: ProgressBar
    max_turns: int

    def run_batch(self, number: int, repetition: int, batch: list[Prompt]) -> None:
        """All turns of a batch of conversations; with every engine they continue with the first engine's answers."""
        answers: dict[str, list[str]] = {prompt.id: [] for prompt in batch}
        engines = list(self.pair.engines)
        for turn in range(max(len(prompt.turns) for prompt in batch)):
            rows = self._rows(turn, repetition, batch, answers)
            for index in range(len(engines)):
                engine = engines[(index + number + turn) % len(engines)]  # they alternate in which runs first
                call = (number * self.max_turns + turn) * len(engines) + engines.index(engine)
                self._call(engine, call, turn, repetition, rows)
            for prompt, _ in rows:
                answer = self.results.get(Key(prompt.id, turn, repetition, engines[0]))
                if isinstance(answer, Record):
                    answers[prompt.id].append(self.pair.tokenizer.decode(answer.ids, skip_special_tokens=True))

    def _rows(
        self, turn: int, repetition: int, batch: list[Prompt], answers: dict[str, list[str]]
    ) -> list[tuple[Prompt, list[int]]]:
        """The prompts that have this turn and all earlier answers, with their ids; skips those that do not fit."""
        rows: list[tuple[Prompt, list[int]]] = []
        for prompt in batch:
            if turn < len(prompt.turns) and len(answers[prompt.id]) == turn:
                ids = self.pair.encode(prompt.turns, answers[prompt.id])
                if reason := self.pair.too_long(ids):
                    self._skip(prompt, turn, repetition, reason)
                else:
                    rows.append((prompt, ids))
        return rows

    def _skip(self, prompt: Prompt, turn: int, repetition: int, reason: str) -> None:
        if self.config.too_long == "error":
            for engine in self.pair.engines:
                self.file.write(Failure(prompt.id, prompt.task, turn, repetition, engine, f"does not fit: {reason}"))
        else:
            line = Skipped(prompt.id, prompt.task, turn, repetition, reason)
            if line.key not in self.results:
                self.file.write(line)
        self.bar.advance((len(prompt.turns) - turn) * len(self.pair.engines))

    def _call(self, engine: str, call: int, turn: int, repetition: int, rows: list[tuple[Prompt, list[int]]]) -> None:
        """Generate for all rows unless all have a result; always the whole batch, since its rows share random draws."""
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
        self, key: Key, prompt: Prompt, seed: int, call: int, rows: int, prompt_ids: list[int], ids: list[int],
        row: Stats, stats: Stats, seconds: float,
    ) -> Record:  # fmt: skip
        """row: the Stats of this row. stats, seconds: of the whole call."""
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


def _provenance(config: ExperimentConfig, pair: Pair, device: str, num_processes: int) -> dict[str, Any]:
    versions = {name: version(name) for name in ("accelerate", "datasets", "hydra-core")}
    paths = {"target_files": config.target.path, "drafter_files": getattr(config.drafter, "path", None)}
    files = {
        name: model_identity(path, getattr(model.config, "_commit_hash", None))
        for (name, path), model in zip(paths.items(), pair.models, strict=False)
        if path
    }
    return provenance(device) | versions | files | {"decoding": decoding_of(pair.target), "processes": num_processes}


def _previous_run(folder: Path, resume: bool, values: dict[str, Any]) -> Run | None:
    """The run in the folder that is resumed, None for a new run; raises ValueError where it can't be resumed."""
    if resume:  # a process that was killed while it wrote its first line left an incomplete one
        for file in files_of(folder):
            repair(file)
    if not any(file.stat().st_size for file in files_of(folder)):
        return None
    if not resume:
        raise ValueError(f"{folder} already contains a run; resume it with resume=true, or name another folder=…")
    previous = read_run(folder)
    if previous.header.version != FORMAT:
        raise ValueError(
            f"{folder} has record format {previous.header.version}, but this version of specdec writes format {FORMAT};"
            " finish the run with the version that began it, or name another folder=…"
        )
    old, new = previous.header.flat(), Header({}, values).flat()
    names = (old.keys() | new.keys()) - MAY_DIFFER_ON_RESUME
    if changed := sorted(name for name in names if old.get(name) != new.get(name)):
        name = changed[0]
        raise ValueError(
            f"{folder} was run with {name}={old.get(name)}, but now {name}={new.get(name)}; resume it with the same"
            " config, or name another folder=…"
        )
    return previous


def _results(previous: Run | None) -> dict[Key, Record | Skipped]:
    """What a resumed run need not do again; failed calls are tried again."""
    lines: list[Record | Skipped] = [] if previous is None else [*previous.records, *previous.skipped]
    return {line.key: line for line in lines}


def _first_batch(config: ExperimentConfig, pair: Pair, prompts: list[Prompt]) -> list[tuple[Prompt, list[int]]]:
    """The first prompts that fit; raises ValueError where none fits, or with too_long=error where one does not."""
    first: list[tuple[Prompt, list[int]]] = []
    for prompt in prompts:
        ids = pair.encode(prompt.turns, [])
        reason = pair.too_long(ids)
        if reason and config.too_long == "error":
            raise ValueError(
                f"the prompt {prompt.id!r} does not fit: {reason}; shorten it, or skip such prompts with too_long=skip"
            )
        if not reason:
            first.append((prompt, ids))
        if len(first) == config.batch_size and config.too_long == "skip":
            break
    if not first:
        raise ValueError(
            f"none of {len(prompts)} prompts fits; for {prompts[-1].id!r}, {reason}; lower sampling.max_new_tokens"
        )
    return first[: config.batch_size]


def _seconds(stats: Stats, total_s: float, num_tokens: int) -> Seconds:
    timing = stats.timing
    assert timing is not None
    first_token_s = total_s - timing.total_s + timing.first_token_s  # generate()'s preparation comes before the loop
    timed_s = timing.prefill_s + timing.draft_s + timing.target_s + timing.verification_s
    return Seconds(
        total_s=total_s,
        first_token_s=first_token_s,
        token_s=(total_s - first_token_s) / (num_tokens - 1) if num_tokens > 1 else None,
        prefill_s=timing.prefill_s,
        draft_s=timing.draft_s,
        target_s=timing.target_s,
        verification_s=timing.verification_s,
        other_s=total_s - timed_s,
    )
