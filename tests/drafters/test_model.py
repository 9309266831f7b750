"""A draft model's cache is right after any history of accepted, rejected and missing drafts."""

from __future__ import annotations

from copy import deepcopy
from itertools import cycle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.speculative import step
from specdec.core.steps import Draft, StepResult
from specdec.drafters.model import ModelDrafter
from specdec.runtime.runner import ModelRunner
from tests.helpers.drafters import AlwaysRight
from tests.helpers.families import CACHE_FAMILIES, FAMILIES, VOCAB_SIZE, family, make_model, prompts

K = 4

schedules = st.lists(st.integers(0, K), min_size=1, max_size=6).filter(any)  # K of each step


class CheckedDrafter:
    """A drafter whose proposals are compared with the draft model on the committed ids without a cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.drafter: Any = ModelDrafter(model, VOCAB_SIZE)
        self.plain = AlwaysRight(model)
        self.num_compared = self.num_accepted = 0

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        self.drafter.begin(sequences, sampling)

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        draft = self.drafter.propose(sequences, limit)
        lengths = [length if self.is_of_model(row) else 0 for row, length in enumerate(draft.lengths.tolist())]
        for row, length in enumerate(lengths):
            if draft.probs is None:
                want = self.plain.propose(sequences, torch.tensor(lengths)).ids
                assert draft.ids[row, :length].tolist() == want[row, :length].tolist()
            elif length:
                text = torch.cat([sequences.ids[row, : sequences.lengths[row]], draft.ids[row, :length]])
                logits = self.plain.model(input_ids=text[None], use_cache=False).logits[0, -length - 1 : -1]
                torch.testing.assert_close(draft.probs[row, :length], logits.softmax(-1), rtol=1e-3, atol=1e-5)
            self.num_compared += length
        return draft

    def is_of_model(self, row: int) -> bool:
        """Whether the draft model proposed for the row in this step."""
        return True

    def observe(self, result: StepResult) -> None:
        self.drafter.observe(result)
        self.num_accepted += int(result.accepted.sum())


def noisy(model_type: str, noise: float) -> PreTrainedModel:
    """The family's model with noise added to its weights."""
    model = deepcopy(family(model_type))
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    return model


@torch.no_grad()
def run(
    target: PreTrainedModel, drafter: CheckedDrafter, schedule: list[int], batch_size: int = 3, do_sample: bool = False,
    length: int = 40, stop_ids: Tensor | None = None,
) -> Sequences:  # fmt: skip
    """Run steps with K from the schedule, repeated, until all rows have finished."""
    batch = prompts(batch_size) if batch_size > 1 else {k: v[1:] for k, v in prompts(2).items()}  # a prompt of one id
    lengths = batch["attention_mask"].sum(1)
    sequences = Sequences(batch["input_ids"], lengths, max_length=11 + length, num_draft_tokens=K, stop_ids=stop_ids)
    sampling, runner = Sampling(do_sample=do_sample), ModelRunner(target)
    torch.manual_seed(0)
    runner.begin(len(lengths))
    drafter.begin(sequences, sampling)
    runner.prefill(sequences.ids, lengths - 2)
    scheduled = cycle(schedule)
    while not sequences.finished.all():
        step(runner, drafter, sequences, sampling, next(scheduled))
    return sequences


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.03, 0.5])
def test_the_draft_cache_is_right_after_acceptance_and_rejection(
    noise: float, batch_size: int, do_sample: bool
) -> None:
    drafter = CheckedDrafter(noisy("llama", noise))
    run(family("llama"), drafter, [K], batch_size, do_sample)
    rate = drafter.num_accepted / drafter.num_compared
    assert {0.0: rate == 1, 0.03: 0 < rate < 1, 0.5: rate < 0.5}[noise]


@pytest.mark.parametrize("model_type", CACHE_FAMILIES)
def test_the_draft_cache_is_right_in_every_kind_of_attention(model_type: str) -> None:
    run(family(model_type), drafter := CheckedDrafter(noisy(model_type, 0.03)), [K])
    assert drafter.num_compared > 20


@given(schedules, st.sampled_from([0, 0.03]), st.booleans(), st.sampled_from([9, 99]))
@settings(max_examples=20, deadline=None)
def test_the_draft_cache_is_right_after_any_history(
    schedule: list[int], noise: float, do_sample: bool, stride: int
) -> None:
    stop_ids = torch.arange(0, VOCAB_SIZE, stride)  # history includes a stop that is drafted and rejected
    run(
        family("llama"),
        CheckedDrafter(noisy("llama", noise)),
        schedule,
        do_sample=do_sample,
        length=20,
        stop_ids=stop_ids,
    )


@pytest.mark.parametrize(("schedule", "length"), [([0] * 100 + [K] * 5, 112), ([K, 0, 0, 2, 0, K], 30)])
@pytest.mark.parametrize(("batch_size", "noise"), [(1, 0.0), (3, 0.0), (3, 0.03)])
def test_the_draft_cache_is_right_after_steps_without_a_draft(
    schedule: list[int], length: int, batch_size: int, noise: float
) -> None:
    run(family("llama"), drafter := CheckedDrafter(noisy("llama", noise)), schedule, batch_size, length=length)
    assert drafter.num_compared >= K


def test_a_draft_model_goes_through_the_processors_of_the_call() -> None:
    """Where draft and target are one model, p == q at every position, so nothing is rejected."""
    model = deepcopy(family("llama"))
    specdec.enable(model, family("llama"), num_draft_tokens=K)
    call = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.8, "no_repeat_ngram_size": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model.generate(**prompts(3), do_sample=True, max_new_tokens=40, **call)
    assert specdec.last_stats(model).draft_acceptance_rate == 1


def test_a_drafter_starts_each_call_with_an_empty_cache() -> None:
    drafter = CheckedDrafter(noisy("llama", 0.03))
    for schedule, batch_size in (([K], 3), ([2, 0, K], 1), ([K], 3)):
        run(family("llama"), drafter, schedule, batch_size, length=12)


def test_a_draft_model_begins_with_the_first_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that drafts nothing does not pay for a draft model."""
    drafter = CheckedDrafter(noisy("llama", 0.03))
    begun: list[ModelRunner] = []
    stock = ModelRunner.begin
    monkeypatch.setattr(ModelRunner, "begin", lambda self, *args: begun.append(self) or stock(self, *args))
    run(family("llama"), drafter, [0], 2, length=6)
    assert drafter.drafter.runner not in begun
    run(family("llama"), drafter, [0, 0, K], 2, length=12)
    assert begun.count(drafter.drafter.runner) == 1


def test_a_draft_model_with_a_smaller_context_stops_drafting_there() -> None:
    small = make_model("gpt2", **FAMILIES["gpt2"] | {"n_positions": 24})
    small.transformer.h.load_state_dict(family("gpt2").transformer.h.state_dict())
    offered: list[tuple[int, int]] = []

    class RecordingDrafter(CheckedDrafter):
        def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
            draft = super().propose(sequences, limit)
            offered.extend(zip(sequences.lengths.tolist(), draft.lengths.tolist(), strict=True))
            return draft

    assert run(family("gpt2"), RecordingDrafter(small), [K], length=30).lengths.max() > 24
    assert max(length + count for length, count in offered if count) == 24


@pytest.mark.parametrize("draft_vocab_size", [VOCAB_SIZE - 7, VOCAB_SIZE + 7])
@torch.no_grad()
def test_ids_outside_either_vocabulary_are_never_drafted(draft_vocab_size: int) -> None:
    model = make_model("llama", **FAMILIES["llama"] | {"vocab_size": draft_vocab_size})
    batch = prompts(3)
    sequences = Sequences(batch["input_ids"], batch["attention_mask"].sum(1), max_length=40, num_draft_tokens=K)
    for do_sample in (False, True):
        drafter = ModelDrafter(model, VOCAB_SIZE)
        drafter.begin(sequences, Sampling(do_sample=do_sample))
        draft = drafter.propose(sequences, sequences.begin_step(K))
        assert draft.ids.max() < min(draft_vocab_size, VOCAB_SIZE)
        if draft.probs is not None:
            assert (draft.probs[..., draft_vocab_size:] == 0).all()
