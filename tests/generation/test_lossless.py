"""Greedy output is the stock generate()'s, id for id: every family, weights, drafter, K, batch and stop."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.draft_length.settings import MAX_DRAFT_TOKENS
from specdec.drafters.hybrid import SuffixHybrid
from specdec.drafters.model import ModelDrafter
from tests.helpers.draft_length import erratic_k
from tests.helpers.drafters import AlwaysRight, AlwaysWrong, Empty, Random, Uneven
from tests.helpers.families import FAMILIES, REFUSED, VOCAB_SIZE, WEIGHTS, family, make_model, prompts
from tests.helpers.heads import random_dflash, random_dspark, random_head, random_peagle
from tests.helpers.mtp import MTP_FAMILIES, random_mtp
from tests.helpers.recording import recorded
from tests.helpers.tokenizers import other_tokenizer

NEW_TOKENS = 17  # no multiple of any K + 1 below


@cache
def perturbed(model_type: str) -> PreTrainedModel:
    """A draft that agrees with its target now and then: the target with a little noise."""
    draft = copy.deepcopy(family(model_type))
    torch.manual_seed(1)
    for parameter in draft.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return draft


# "auto": with random step times, so K changes from step to step
NUM_DRAFT_TOKENS: tuple[int | str, ...] = (1, 2, 5, 8, "auto")
BATCHES = (1, 4)
STOPS = (False, True)
WAYS = ("eager", "recorded")  # steps run directly, or recorded and replayed as on a CUDA device


class Case(NamedTuple):
    family: str
    weights: str
    drafter: str
    num_draft_tokens: int | str
    batch_size: int
    has_eos: bool
    way: str


# The list every lossless test runs over: a new drafter joins it.
DRAFTERS: dict[str, Callable[[Case], Any]] = {
    "none": lambda case: "none",
    "model": lambda case: perturbed(case.family),
    "prompt_lookup": lambda case: "prompt_lookup",
    "suffix": lambda case: "suffix",
    "suffix+model": lambda case: SuffixHybrid(ModelDrafter(perturbed(case.family), VOCAB_SIZE)),
    "eagle3": lambda case: random_head(family(case.family, case.weights), draft_ids=list(range(3, VOCAB_SIZE, 2))),
    "peagle": lambda case: random_peagle(family(case.family, case.weights)),
    "dflash": lambda case: random_dflash(family(case.family, case.weights)),
    "dspark": lambda case: random_dspark(family(case.family, case.weights)),
    "mtp": lambda case: random_mtp(family(case.family, case.weights)),
    "other_tokenizer": lambda case: other_tokenizer(perturbed(case.family)),
    "always_right": lambda case: AlwaysRight(family(case.family, case.weights)),
    "always_wrong": lambda case: AlwaysWrong(family(case.family, case.weights)),
    "random": lambda case: Random(seed=largest_k(case)),
    "uneven": lambda case: Uneven(seed=largest_k(case)),
    "empty": lambda case: Empty(width=largest_k(case)),
}


def largest_k(case: Case) -> int:
    return case.num_draft_tokens if isinstance(case.num_draft_tokens, int) else MAX_DRAFT_TOKENS


def exists(case: Case) -> bool:
    """Whether the family can have the drafter."""
    return case.drafter != "mtp" or case.family in MTP_FAMILIES


FULL = [
    case
    for values in itertools.product(FAMILIES, WEIGHTS, DRAFTERS, NUM_DRAFT_TOKENS, BATCHES, STOPS, WAYS)
    if exists(case := Case(*values))
]


def covering() -> list[Case]:
    """Every family with each drafter it can have; the other values rotate. All pairs of values occur (tested below)."""
    weights = tuple(WEIGHTS)
    cases = [
        Case(
            model_type,
            weights[(f + d) % len(weights)],
            drafter,
            NUM_DRAFT_TOKENS[(f + d) % 5],
            BATCHES[(f // 3 + d // 2) % 2],
            STOPS[(f + d // 4) % 2],
            WAYS[(f // 2 + d) % 2],
        )
        for (f, model_type), (d, drafter) in itertools.product(enumerate(FAMILIES), enumerate(DRAFTERS))
    ]
    return [case for case in cases if exists(case)]


@cache
def plain_text(model_type: str, weights: str, batch_size: int, eos_token_id: int | None) -> Tensor:
    """Stock greedy output, computed before the model is ever enabled."""
    return family(model_type, weights).generate(
        **prompts(batch_size), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos_token_id
    )


def check_identical(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = family(case.family, case.weights)
    eos_token_id = None
    if case.has_eos:  # an id that the model does write, in the middle of some row
        eos_token_id = int(plain_text(case.family, case.weights, case.batch_size, None)[-1, 11 + 6])
    expected = plain_text(case.family, case.weights, case.batch_size, eos_token_id)
    erratic_k(monkeypatch, seed=len(case.family))
    with recorded() if case.way == "recorded" else nullcontext():
        check_call(model, case, expected, eos_token_id)


def check_call(model: PreTrainedModel, case: Case, expected: Tensor, eos_token_id: int | None) -> None:
    specdec.enable(model, DRAFTERS[case.drafter](case), num_draft_tokens=case.num_draft_tokens)
    try:
        got = model.generate(
            **prompts(case.batch_size), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos_token_id
        )
        stats = specdec.last_stats(model)
    finally:
        specdec.disable(model)
    assert got.tolist() == expected.tolist()
    assert stats is not None, "the stock loop served the call"
    if case.drafter == "always_right" and not case.has_eos:
        assert stats.draft_acceptance_rate == 1.0
    if case.drafter == "always_wrong":
        assert stats.num_accepted_draft_tokens == 0


@pytest.mark.parametrize("case", covering(), ids=lambda case: "-".join(map(str, case)))
def test_greedy_text_is_the_plain_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_identical(case, monkeypatch)


@pytest.mark.full
@pytest.mark.parametrize("case", FULL, ids=lambda case: "-".join(map(str, case)))
def test_greedy_text_is_the_plain_one_in_the_full_product(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check_identical(case, monkeypatch)


def test_the_selection_covers_every_pair_of_values() -> None:
    selected = covering()
    assert len(FAMILIES) >= 20
    for first, second in itertools.combinations(range(len(Case._fields)), 2):
        assert {(c[first], c[second]) for c in selected} == {(c[first], c[second]) for c in FULL}, (first, second)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_family_that_cannot_run_is_refused_and_left_as_it_was(model_type: str) -> None:
    model = make_model(model_type, **REFUSED[model_type])
    stock = type(model)
    with pytest.raises(ValueError, match="cannot decode speculatively"):
        specdec.enable(model, "prompt_lookup")
    assert type(model) is stock
