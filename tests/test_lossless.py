"""Greedy output is the stock generate()'s, id for id: every family, drafter, K, batch and stop."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from tests.drafters import AlwaysRight, AlwaysWrong, Empty, Random, Uneven
from tests.families import FAMILIES, REFUSED, family, make_model, prompts

NEW_TOKENS = 17  # no multiple of any K + 1 below


@cache
def perturbed(model_type: str) -> PreTrainedModel:
    """A draft that agrees with its target now and then: the target with a little noise."""
    draft = copy.deepcopy(family(model_type))
    torch.manual_seed(1)
    for parameter in draft.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    return draft


# The list every lossless test runs over: a new drafter joins it.
DRAFTERS: dict[str, Callable[[str, int], Any]] = {
    "none": lambda model_type, k: "none",
    "model": lambda model_type, k: perturbed(model_type),
    "prompt_lookup": lambda model_type, k: "prompt_lookup",
    "always_right": lambda model_type, k: AlwaysRight(family(model_type)),
    "always_wrong": lambda model_type, k: AlwaysWrong(family(model_type)),
    "random": lambda model_type, k: Random(seed=k),
    "uneven": lambda model_type, k: Uneven(seed=k),
    "empty": lambda model_type, k: Empty(width=k),
}
NUM_DRAFT_TOKENS = (1, 2, 5, 8)
BATCHES = (1, 4)
STOPS = (False, True)


class Case(NamedTuple):
    family: str
    drafter: str
    num_draft_tokens: int
    batch_size: int
    has_eos: bool


FULL = [Case(*values) for values in itertools.product(FAMILIES, DRAFTERS, NUM_DRAFT_TOKENS, BATCHES, STOPS)]


def covering() -> list[Case]:
    """Every family with every drafter, the other values dealt out so that each pair of values meets (tested below)."""
    return [
        Case(
            model_type,
            drafter,
            NUM_DRAFT_TOKENS[(f + d) % 4],
            BATCHES[(f + d // 2 + f // 4) % 2],
            STOPS[(d // 4 + f // 2 + f) % 2],
        )
        for (f, model_type), (d, drafter) in itertools.product(enumerate(FAMILIES), enumerate(DRAFTERS))
    ]


@cache
def plain_text(model_type: str, batch_size: int, eos_token_id: int | None) -> Tensor:
    """Stock greedy output, computed before the model is ever enabled."""
    return family(model_type).generate(
        **prompts(batch_size), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos_token_id
    )


def check_identical(case: Case) -> None:
    model = family(case.family)
    eos_token_id = None
    if case.has_eos:  # an id that the model does write, in the middle of some row
        eos_token_id = int(plain_text(case.family, case.batch_size, None)[-1, 11 + 6])
    expected = plain_text(case.family, case.batch_size, eos_token_id)
    specdec.enable(model, DRAFTERS[case.drafter](case.family, case.num_draft_tokens), num_draft_tokens=case.num_draft_tokens)
    try:
        got = model.generate(**prompts(case.batch_size), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=eos_token_id)
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
def test_greedy_text_is_the_plain_one(case: Case) -> None:
    check_identical(case)


@pytest.mark.full
@pytest.mark.parametrize("case", FULL, ids=lambda case: "-".join(map(str, case)))
def test_greedy_text_is_the_plain_one_in_the_full_product(case: Case) -> None:
    check_identical(case)


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
