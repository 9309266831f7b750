"""One run: every prompt by every engine, in turns, each result written as it comes.

The plain engine is the same loop with no drafter, on the same prompts, between the speculative calls: a drift of the machine
meets both. Under `accelerate launch` the processes take batches of prompts in turn and each writes a file of its own; seeds hang
on the prompt, its turn and the repetition, so how many processes there are changes nothing in the texts.
"""

from __future__ import annotations

import hashlib
import statistics
import time
import warnings
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import specdec
from specdec import planning
from specdec.drafters.model import ModelDrafter
from specdec.drafters.none import NoDrafter
from specdec.experiments.config import DraftModel, ExperimentConfig
from specdec.experiments.memory import PeakMemory
from specdec.experiments.records import (
    PLAIN,
    SPECULATIVE,
    Costs,
    Failure,
    Header,
    Key,
    Memory,
    Record,
    RecordFile,
    Run,
    Sample,
    SampleToken,
    Seconds,
    Skipped,
    files_of,
    merge,
    read_run,
)
from specdec.experiments.workloads import Prompt
from specdec.generate import resolve_drafter
from specdec.interfaces import Draft, Drafter, Outcome
from specdec.loading import load, load_tokenizer
from specdec.models import context_of
from specdec.provenance import provenance
from specdec.quant.quantizer import is_4bit
from specdec.sampling import Sampling
from specdec.sequences import Sequences
from specdec.stats import Stats
from specdec.text import pieces

PER_RUN = {"folder", "resume"}  # a run that is gone on with may differ in these
COST_ROUNDS, COST_SECONDS = 3, 10.0  # no further round begins after so many seconds
COST_STEPS, COST_TOKENS = 3, 12  # the least of a call: steps, should every draft be accepted, and tokens
WARM_UP_TOKENS = 8
SAMPLE_TOKENS, SAMPLE_CHARACTERS = 5, 400


@dataclass
class Seat:
    """The drafter of the next call. The engines take turns in it, so that the target is enabled, and tried, once.

    watched: what was seen of the first row while `watch` holds, the likeliest ids of target and draft for each committed one.
    """

    drafter: Drafter
    watch: bool = False
    watched: list[tuple[list[tuple[int, float]], list[tuple[int, float]]]] = field(default_factory=list)

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.watched = []
        self.drafter.begin(sequences, sampling)

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        return self.drafter.propose(sequences, limit)

    def observe(self, outcome: Outcome) -> None:
        self.drafter.observe(outcome)
        if not self.watch:
            return
        draft = outcome.draft
        for at in range(int(outcome.emitted[0])):
            proposed: list[tuple[int, float]] = []
            if at < int(draft.lengths[0]):
                proposed = [(int(draft.ids[0, at]), 1.0)] if draft.probs is None else _likeliest(draft.probs[0, at])
            self.watched.append((_likeliest(outcome.scores[0, at].softmax(-1)), proposed))


@dataclass
class Pair:
    """The models of a run, and how they are called. engines: a drafter by name, the first one's answers go on conversations."""

    target: Any
    tokenizer: Any
    seat: Seat
    engines: dict[str, Drafter]
    call: dict[str, Any]
    chat_template: bool

    @classmethod
    def load(cls, config: ExperimentConfig, device: str) -> Pair:
        """From where the config says; raises ValueError where the two don't fit."""
        dtype = config.target.dtype
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        target = load(config.target.path, dtype, device, config.quant.int4_config())
        tokenizer = load_tokenizer(config.target.path)
        drafter = config.drafter.load(target) if isinstance(config.drafter, DraftModel) else config.drafter
        drafter = resolve_drafter(drafter, target)
        engines: dict[str, Drafter] = {PLAIN: NoDrafter()} if config.baseline else {}
        if not isinstance(drafter, NoDrafter):
            engines[SPECULATIVE] = drafter
        elif not config.baseline:
            raise ValueError("drafter=none is the baseline itself; with baseline=false nothing is left to run")
        seat = Seat(drafter)
        specdec.enable(target, seat, num_draft_tokens=config.num_draft_tokens, timing=True)
        call = config.sampling.call() | {"pad_token_id": tokenizer.pad_token_id}
        has_template = getattr(tokenizer, "chat_template", None) is not None
        asked = config.workload.chat_template
        if asked and not has_template:
            raise ValueError(f"workload.chat_template=true, but the tokenizer of {config.target.path} has none")
        return cls(target, tokenizer, seat, engines, call, has_template if asked is None else asked)

    def too_long(self, ids: list[int]) -> str | None:
        """Why a prompt of these ids has no room for its answer, None where it has."""
        context, asked = context_of(self.target), self.call["max_new_tokens"]
        if context is None or len(ids) + asked <= context:
            return None
        return f"its {len(ids)} tokens and max_new_tokens={asked} are more than the context of {context}"

    @property
    def models(self) -> list[Any]:
        drafters = [drafter.runner.model for drafter in self.engines.values() if isinstance(drafter, ModelDrafter)]
        return [self.target, *drafters]

    def encode(self, turns: tuple[str, ...], answers: list[str]) -> list[int]:
        """The ids of a conversation up to the turn that follows the answers."""
        turns = turns[: len(answers) + 1]
        if not self.chat_template:
            text = "\n\n".join(said + answer for said, answer in zip(turns, [*answers, ""], strict=True))
            return list(self.tokenizer(text).input_ids)
        messages = [{"role": "user", "content": turns[0]}]
        for answer, said in zip(answers, turns[1:], strict=True):
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": said}]
        return list(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))

    def generate(
        self, drafter: Drafter, prompts: list[list[int]], seed: int, **changes: Any
    ) -> tuple[list[list[int]], Stats, float]:
        """One call: -> the ids of each row, its Stats, and the seconds of the whole call. changes: to the call's arguments."""
        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.target.device)
        self.seat.drafter = drafter
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="specdec leaves this call to the stock loop")
            started = time.perf_counter()
            output = self.target.generate(**batch, **self.call | changes)
            if output.is_cuda:
                torch.cuda.synchronize(output.device)
            seconds = time.perf_counter() - started
        stats = specdec.last_stats(self.target)
        assert stats is not None
        width = batch["input_ids"].shape[1]
        counts = [row.num_emitted_tokens for row in stats.per_row]
        return [row[width : width + count] for row, count in zip(output.tolist(), counts, strict=True)], stats, seconds


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
    device = config.target.device
    if device == "auto":  # a launcher counts CPUs too
        device = "cpu" if state.device.type == "cpu" else str(state.device)
    with console.status("loading the models"):
        pair = Pair.load(config, device)
    first = _first_batch(config, pair, prompts)
    state.wait_for_everyone()  # all have read what is there before one of them writes
    folder.mkdir(parents=True, exist_ok=True)
    origin = provenance(device) | {name: version(name) for name in ("accelerate", "datasets", "hydra-core")}
    origin["processes"] = state.num_processes
    file = RecordFile(folder / f"records-{state.process_index}.jsonl", Header(origin, values))
    batches = [prompts[start : start + config.batch_size] for start in range(0, len(prompts), config.batch_size)]
    mine = list(enumerate(product(range(config.repetitions), batches)))[state.process_index :: state.num_processes]
    turns = sum(len(prompt.turns) for _, (_, batch) in mine for prompt in batch)
    try:
        with _Bar(turns * len(pair.engines), console) as bar:
            _warm_up(config, pair, first, file if state.is_main_process else None, before, bar)
            known: list[Record | Skipped] = [] if before is None else [*before.records, *before.skipped]
            results = {line.key: line for line in known}
            worker = Worker(config, pair, file, results, bar, max(len(prompt.turns) for prompt in prompts))
            for number, (repetition, batch) in mine:
                worker.hold(number, repetition, batch)
    except KeyboardInterrupt:
        console.print(f"interrupted; what is done is kept. Go on with the same command and: folder={folder} resume=true")
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
                    Failure(key.prompt_id, prompt.task, *key[1:], message) for key, (prompt, _) in zip(keys, rows, strict=True)
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
            num_spec_steps=row.num_spec_steps,
            num_draft_tokens=row.num_draft_tokens,
            num_accepted_draft_tokens=row.num_accepted_draft_tokens,
            num_emitted_tokens=row.num_emitted_tokens,
            acceptance_histogram=row.acceptance_histogram,
            steps=[replace(step, overlap=[round(value, 6) for value in step.overlap]) for step in row.steps],
            seconds=_seconds(stats, seconds, len(ids)),
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
    if not any(file.stat().st_size for file in files_of(folder)):
        return None
    if not resume:
        raise ValueError(f"{folder} holds a run already; go on with it by resume=true, or name another folder=…")
    before = read_run(folder)
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
        raise ValueError(f"none of {len(prompts)} prompts fits: of {prompts[-1].id!r}, {reason}; lower sampling.max_new_tokens")
    return first[: config.batch_size]


def _warm_up(
    config: ExperimentConfig,
    pair: Pair,
    first: list[tuple[Prompt, list[int]]],
    file: RecordFile | None,
    before: Run | None,
    bar: _Bar,
) -> None:
    """Calls that no figure counts: every engine once; then, where there is a file, what is measured beside the prompts."""
    prompts = [ids for _, ids in first]
    for drafter in pair.engines.values():
        pair.generate(drafter, prompts, 0, max_new_tokens=min(WARM_UP_TOKENS, pair.call["max_new_tokens"]))
    if file is None or SPECULATIVE not in pair.engines:
        return
    if before is None or before.memory is None:
        bar.say("memory")
        file.write(_memory(config, pair, prompts))
    if before is None or before.sample is None:
        bar.say("sample")
        file.write(_sample(pair, *first[0]))
    if before is None or before.costs is None:
        bar.say("step costs")
        if costs := _costs(config, pair, prompts):
            file.write(costs)


def _memory(config: ExperimentConfig, pair: Pair, prompts: list[list[int]]) -> Memory:
    device = pair.target.device.type

    def footprint(model: Any, path: str, group_size: int) -> planning.Footprint:
        return planning.footprint(path, dtype=model.dtype, device=device, group_size=group_size)

    target, *drafts = pair.models
    draft = footprint(drafts[0], config.drafter.path, config.drafter.group_size) if drafts else None
    longest = max(map(len, prompts))
    planned = planning.plan(
        footprint(target, config.target.path, config.quant.group_size),
        draft,
        context=longest + pair.call["max_new_tokens"],
        batch=len(prompts),
        num_draft_tokens=config.num_draft_tokens,
        prompt=longest,
        sampled=pair.call["do_sample"],
        target_int4=is_4bit(target),
        draft_int4=any(map(is_4bit, drafts)),
    )
    with PeakMemory(pair.target.device, *pair.models) as peak:
        pair.generate(pair.engines[SPECULATIVE], prompts, 0)
    return Memory(asdict(planned), peak.bytes)


def _sample(pair: Pair, prompt: Prompt, ids: list[int]) -> Sample:
    """What one prompt came to, with the likeliest tokens at each place."""
    pair.seat.watch = True
    texts, stats, _ = pair.generate(pair.engines[SPECULATIVE], [ids], 0)
    pair.seat.watch = False

    def named(likeliest: list[tuple[int, float]]) -> list[tuple[str, float]]:
        return [(pair.tokenizer.decode([token]), round(probability, 4)) for token, probability in likeliest]

    origins = [origin for step in stats.per_row[0].steps for origin in step.origins()]
    tokens = [
        SampleToken(text, origin, named(target), named(draft))
        for text, origin, (target, draft) in zip(pieces(pair.tokenizer, texts[0]), origins, pair.seat.watched, strict=True)
    ]
    return Sample(prompt.id, prompt.turns[0][-SAMPLE_CHARACTERS:], tokens)


def _costs(config: ExperimentConfig, pair: Pair, prompts: list[list[int]]) -> Costs | None:
    """Steps of every width, 0 … K drafted ids, in interleaved rounds; None where the texts are too short to tell."""
    context = context_of(pair.target)
    room = (context or 2**62) - max(map(len, prompts))
    steps: dict[int, list[Any]] = {k: [] for k in range(config.num_draft_tokens + 1)}
    started = time.perf_counter()
    for index in range(COST_ROUNDS):
        if index and time.perf_counter() - started > COST_SECONDS:
            break
        for k, timed in steps.items():
            changes = {"num_assistant_tokens": k} if k else {}
            length = min(max(COST_STEPS * (k + 1), COST_TOKENS), room)
            drafter = pair.engines[SPECULATIVE] if k else NoDrafter()
            _, stats, _ = pair.generate(drafter, prompts, 0, max_new_tokens=length, **changes)
            assert stats.timing is not None
            timed += [step for at, step in enumerate(stats.timing.steps) if _is_typical(at, stats.per_row, k, length)]
    if not all(steps.values()):
        return None
    draft, target, verification, other = (
        [statistics.median(getattr(step, part) for step in timed) for timed in steps.values()]
        for part in ("draft_s", "target_s", "verification_s", "other_s")
    )
    return Costs(len(prompts), [0.0, *draft[1:]], target, verification, other)


def _is_typical(index: int, rows: list[Stats], k: int, length: int) -> bool:
    """Whether all rows took part in the step, with room for k ids; the first one, where drafts read their prompts, is not."""
    if index == 0 or any(index >= len(row.steps) - 1 for row in rows):
        return False
    return all(length - sum(step.emitted for step in row.steps[:index]) > k for row in rows)


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


def _likeliest(probs: Tensor) -> list[tuple[int, float]]:
    values, ids = probs.topk(min(SAMPLE_TOKENS, probs.shape[-1]))
    return [(token, value) for token, value in zip(ids.tolist(), values.tolist(), strict=True) if value > 0]
