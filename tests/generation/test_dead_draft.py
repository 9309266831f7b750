"""A draft model that is of no use is named, once; one that is weak is not."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import specdec
from specdec.core.stats import RowStep, Stats, chance_acceptance
from specdec.generation.dead_draft import MIN_TRIED, AcceptanceWatch
from specdec.utils import embedded
from tests.helpers.heads import random_head

ROWS, NEW_TOKENS = 12, 40


@cache
def load(folder: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


@pytest.fixture
def draft() -> PreTrainedModel:
    return copy.deepcopy(load(str(embedded.DRAFT)))


@pytest.fixture
def target() -> Iterator[PreTrainedModel]:
    model = load(str(embedded.TARGET))
    yield model
    specdec.disable(model)


def generate(target: PreTrainedModel, **call: Any) -> tuple[list[str], Stats]:
    """The warnings of a call, and its statistics."""
    tokenizer = AutoTokenizer.from_pretrained(embedded.TARGET, padding_side="left")
    texts = [prompt["prompt"] for prompt in embedded.prompts()[:ROWS]]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        target.generate(**inputs, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0, **call)
    stats = specdec.last_stats(target)
    assert stats is not None
    return [str(one.message) for one in caught if "of no use" in str(one.message)], stats


def shuffle_vocabulary(draft: PreTrainedModel) -> None:
    """As where ids are those of another tokenizer."""
    weight = draft.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])


def forget(draft: PreTrainedModel) -> None:
    """The weights of no training at all."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.copy_(0.02 * torch.randn_like(parameter))


def lose_the_norm(draft: PreTrainedModel) -> None:
    """A weight that was not read from the checkpoint."""
    with torch.no_grad():
        draft.model.norm.weight.copy_(-draft.model.norm.weight)


@pytest.mark.parametrize(
    ("damage", "do_sample"),
    [(shuffle_vocabulary, False), (shuffle_vocabulary, True), (forget, False), (lose_the_norm, False)],
)
def test_a_draft_model_that_is_of_no_use_is_named_once(
    target: PreTrainedModel, draft: PreTrainedModel, damage: Any, do_sample: bool
) -> None:
    damage(draft)
    specdec.enable(target, draft, num_draft_tokens=2)
    torch.manual_seed(0)
    messages, stats = generate(target, do_sample=do_sample)
    assert len(messages) == 1
    assert "check that its weights, its dtype and its tokenizer" in messages[0]
    assert stats.chance_acceptance is not None
    assert stats.expected_acceptance is not None
    assert stats.expected_acceptance < 2 * stats.chance_acceptance
    assert f"would reach {stats.chance_acceptance:.1%}" in messages[0]
    assert generate(target, do_sample=do_sample)[0] == []


@pytest.mark.parametrize(("noise", "do_sample"), [(0.0, False), (0.35, False), (0.35, True)])
def test_a_draft_model_that_is_weak_is_not(
    target: PreTrainedModel, draft: PreTrainedModel, noise: float, do_sample: bool
) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0
    specdec.enable(target, draft, num_draft_tokens=2)
    messages, stats = generate(target, do_sample=do_sample)
    assert messages == []
    assert stats.expected_acceptance is not None
    assert stats.chance_acceptance is not None
    assert 2 * stats.chance_acceptance < stats.expected_acceptance < (1.0 if noise == 0 else 0.5)


def test_prompt_lookup_is_never_of_no_use(target: PreTrainedModel) -> None:
    specdec.enable(target, "prompt_lookup", num_draft_tokens=2)
    assert generate(target)[0] == []


@pytest.mark.parametrize(
    ("accepted", "is_named"), [(0.0, True), (0.05, True), (0.08, True), (0.15, False), (1.0, False)]
)
def test_it_takes_enough_ids_and_more_than_chance(accepted: float, is_named: bool) -> None:
    """By chance 5 % are accepted; the numbers of calls add up."""
    steps = [RowStep(1, 1, 0, 1, [accepted])] * 100
    row = Stats.of(steps, 1, len(steps))
    row.steps = steps
    stats = Stats(chance_acceptance=0.05, per_row=[row])
    watch = AcceptanceWatch()
    found = [watch.add(stats) for _ in range(5)]
    assert watch.tried == MIN_TRIED == 300
    assert [one is not None for one in found] == [False, False, is_named, False, False]
    if is_named:
        assert f"{accepted:.1%} of 300 draft tokens were accepted" in (found[2] or "")


def test_chance_is_that_two_ids_of_the_answers_are_equal() -> None:
    assert chance_acceptance([[1, 2], [1, 3]]) == pytest.approx(2 / 12)
    assert chance_acceptance([[7, 7, 7]]) == 1.0
    assert chance_acceptance([[7], []]) is None


def test_a_draft_head_that_was_not_trained_is_named_and_a_trained_one_is_not(target: PreTrainedModel) -> None:
    for drafter, is_dead in ((str(embedded.EAGLE3), False), (random_head(target), True)):
        specdec.enable(target, drafter, num_draft_tokens=3, compile=False)
        messages, stats = generate(target)
        assert len(messages) == is_dead
        assert (stats.draft_acceptance_rate > 0.2) != is_dead
        assert not is_dead or "of a draft head, that it was trained for this target" in messages[0]
