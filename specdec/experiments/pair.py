"""The models of a run, and how they are called: one target, enabled once, whose drafters take turns."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import specdec
from specdec.core.interfaces import Drafter
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.stats import Stats
from specdec.core.steps import Draft, StepResult
from specdec.drafters.model import ModelDrafter
from specdec.drafters.none import NoDrafter
from specdec.drafters.resolve import AUTO, resolve_drafter
from specdec.experiments.config import DraftModel, ExperimentConfig
from specdec.experiments.records import PLAIN, SPECULATIVE
from specdec.runtime.loading import load, load_tokenizer
from specdec.runtime.runner import context_of

WATCHED_TOKENS = 5  # the likeliest at each place


@dataclass(eq=False)
class SwitchableDrafter:
    """The drafter of the next call. The engines take turns in it, so that the target is enabled, and tried, once.

    watched: what was seen of the first row while `watch` holds, the likeliest ids of target and draft for each committed one.
    """

    drafter: Drafter
    watch: bool = False
    watched: list[tuple[list[tuple[int, float]], list[tuple[int, float]]]] = field(default_factory=list)

    @property
    def runner(self) -> Any:
        """Of the one that sits in it, so that its model is compiled too."""
        return getattr(self.drafter, "runner", None)

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.watched = []
        self.drafter.begin(sequences, sampling)

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        return self.drafter.propose(sequences, limit)

    def observe(self, outcome: StepResult) -> None:
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
    """The models of a run, and how they are called. engines: a drafter by name, the first one's answers go on conversations.

    plain_call: what the call of the plain engine brings besides, so that a K that is learned is the other engine's alone.
    """

    target: Any
    tokenizer: Any
    seat: SwitchableDrafter
    engines: dict[str, Drafter]
    call: dict[str, Any]
    chat_template: bool
    plain_call: dict[str, Any]

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
        seat = SwitchableDrafter(drafter)
        compile: Any = config.compile
        specdec.enable(target, seat, num_draft_tokens=config.num_draft_tokens, compile=compile, timing=True)
        call = config.sampling.call() | {"pad_token_id": tokenizer.pad_token_id}
        has_template = getattr(tokenizer, "chat_template", None) is not None
        asked = config.workload.chat_template
        if asked and not has_template:
            raise ValueError(f"workload.chat_template=true, but the tokenizer of {config.target.path} has none")
        plain_call = {"num_assistant_tokens": 1} if config.num_draft_tokens == AUTO else {}
        return cls(target, tokenizer, seat, engines, call, has_template if asked is None else asked, plain_call)

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
        if isinstance(drafter, NoDrafter):
            changes = self.plain_call | changes
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="specdec leaves this call to the stock loop")
            started = time.perf_counter()
            try:
                output = self.target.generate(**batch, **self.call | changes)
            except UserWarning as warning:
                raise ValueError(f"this call cannot be measured: {warning}") from warning
            if output.is_cuda:
                torch.cuda.synchronize(output.device)
            seconds = time.perf_counter() - started
        stats = specdec.last_stats(self.target)
        assert stats is not None
        width = batch["input_ids"].shape[1]
        counts = [row.num_emitted_tokens for row in stats.per_row]
        return [row[width : width + count] for row, count in zip(output.tolist(), counts, strict=True)], stats, seconds


def _likeliest(probs: Tensor) -> list[tuple[int, float]]:
    values, ids = probs.topk(min(WATCHED_TOKENS, probs.shape[-1]))
    return [(token, value) for token, value in zip(ids.tolist(), values.tolist(), strict=True) if value > 0]
