"""The models of a run: one target, enabled once, and the drafters that it is called with."""

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
from specdec.drafters.none import NoDrafter
from specdec.drafters.resolve import AUTO, resolve_drafter
from specdec.experiments.config import DraftHead, DraftModel, ExperimentConfig
from specdec.experiments.records import PLAIN, SPECULATIVE
from specdec.experiments.workloads import encode, uses_chat_template
from specdec.generation.state import feature_layers_of, model_drafter_of
from specdec.runtime.loading import load_tokenizer
from specdec.runtime.runner import ModelRunner, context_of

NUM_LIKELIEST = 5  # tokens that are recorded for each position

Likeliest = list[tuple[int, float]]  # ids with their probabilities, in falling order


@dataclass(eq=False)
class SwitchableDrafter:
    """Delegates to a drafter that can be replaced between calls, so that the target is enabled and checked only once.

    recorded: for each token that row 0 of the last call emitted, the likeliest ids of target and draft; filled only
    where record is True.
    """

    drafter: Drafter
    record: bool = False
    recorded: list[tuple[Likeliest, Likeliest]] = field(default_factory=list)

    @property
    def runner(self) -> Any:
        """The current drafter's runner, so that its model is compiled too; None where it has none."""
        return getattr(self.drafter, "runner", None)

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """The hidden states of the target that the current drafter reads."""
        return feature_layers_of(self.drafter)

    def match_target(self, target: ModelRunner) -> None:
        """Pass on the target of the call that begins."""
        if (match_target := getattr(self.drafter, "match_target", None)) is not None:
            match_target(target)

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.recorded = []
        self.drafter.begin(sequences, sampling)

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        return self.drafter.propose(sequences, limit)

    def observe(self, result: StepResult) -> None:
        self.drafter.observe(result)
        if not self.record:
            return
        draft = result.draft
        for at in range(int(result.emitted[0])):
            proposed: Likeliest = []
            if at < int(draft.lengths[0]):
                proposed = [(int(draft.ids[0, at]), 1.0)] if draft.probs is None else _likeliest(draft.probs[0, at])
            self.recorded.append((_likeliest(result.scores[0, at].softmax(-1)), proposed))


@dataclass
class Pair:
    """The models of a run, and how they are called.

    engines: a drafter by name; conversations continue with the first engine's answers. call: arguments of generate().
    plain_call: further arguments for the plain engine; with "auto" they keep its calls out of the choice of K.
    """

    target: Any
    tokenizer: Any
    switch: SwitchableDrafter
    engines: dict[str, Drafter]
    call: dict[str, Any]
    chat_template: bool
    plain_call: dict[str, Any]

    @classmethod
    def load(cls, config: ExperimentConfig, device: str) -> Pair:
        """Load the models that the config names; raises ValueError where they do not work together."""
        target = config.target.load(device, config.quant)
        tokenizer = load_tokenizer(config.target.path)
        drafter = config.drafter.load(target) if isinstance(config.drafter, DraftModel | DraftHead) else config.drafter
        drafter = resolve_drafter(drafter, target)
        engines: dict[str, Drafter] = {PLAIN: NoDrafter()} if config.baseline else {}
        if not isinstance(drafter, NoDrafter):
            engines[SPECULATIVE] = drafter
        elif not config.baseline:
            raise ValueError(
                "drafter=none runs the baseline alone, and baseline=false excludes it, so there is nothing to run;"
                " leave out one of them"
            )
        switch = SwitchableDrafter(drafter)
        compile: Any = config.compile
        verification: Any = config.verification
        specdec.enable(
            target,
            switch,
            num_draft_tokens=config.num_draft_tokens,
            compile=compile,
            verification=verification,
            timing=True,
        )
        call = config.sampling.call() | {"pad_token_id": tokenizer.pad_token_id}
        plain_call = {"num_assistant_tokens": 1} if config.num_draft_tokens == AUTO else {}
        return cls(target, tokenizer, switch, engines, call, uses_chat_template(config.workload, tokenizer), plain_call)

    def too_long(self, ids: list[int]) -> str | None:
        """Why these prompt ids and the answer do not fit the context, None where they do."""
        context, max_new_tokens = context_of(self.target), self.call["max_new_tokens"]
        if context is None or len(ids) + max_new_tokens <= context:
            return None
        return f"its {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed the context of {context}"

    @property
    def models(self) -> list[Any]:
        """The target, then the draft model where there is one."""
        drafters = map(model_drafter_of, self.engines.values())
        return [self.target, *(drafter.runner.model for drafter in drafters if drafter is not None)]

    def encode(self, turns: tuple[str, ...], answers: list[str]) -> list[int]:
        """The ids of a conversation up to the turn that follows the answers."""
        return encode(turns, answers, self.tokenizer, self.chat_template)

    def generate(
        self, drafter: Drafter, prompts: list[list[int]], seed: int, **changes: Any
    ) -> tuple[list[list[int]], Stats, float]:
        """One call -> the generated ids of each row, the Stats, and the seconds of the whole call.

        changes: arguments of generate() that replace those of the run.
        """
        batch = self.tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(self.target.device)
        self.switch.drafter = drafter
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
        prompt_width = batch["input_ids"].shape[1]
        ends = [prompt_width + row.num_emitted_tokens for row in stats.per_row]
        return [row[prompt_width:end] for row, end in zip(output.tolist(), ends, strict=True)], stats, seconds


def _likeliest(probs: Tensor) -> Likeliest:
    """[V] -> at most NUM_LIKELIEST ids with a probability above 0."""
    values, ids = probs.topk(min(NUM_LIKELIEST, probs.shape[-1]))
    return [(token, value) for token, value in zip(ids.tolist(), values.tolist(), strict=True) if value > 0]
