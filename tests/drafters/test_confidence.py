"""Draft models that stop where the next id is too unlikely to be accepted."""

from __future__ import annotations

import pytest
import torch

import specdec
from specdec.core.steps import RowStep
from specdec.draft_length.constant import ConstantK
from specdec.drafters.confidence import NUM_BINS, PRIOR_WEIGHT, AcceptanceByConfidence, StopRule
from specdec.drafters.model import ModelDrafter
from specdec.generation.inspection import observed_steps
from tests.helpers.families import VOCAB_SIZE, prompts
from tests.helpers.plain import WIDTH, continuation, pair
from tests.helpers.recording import recorded
from tests.helpers.tokenizers import other_tokenizer

K = 6


def distributions(*largest: float) -> torch.Tensor:
    """[B, 1, 2], each with this largest probability."""
    return torch.tensor([[[prob, 1 - prob]] for prob in largest])


def test_acceptance_is_learned_by_the_largest_probability() -> None:
    expected = AcceptanceByConfidence()
    before = expected.of(torch.tensor([0.0, 0.51, 0.95, 1.0, torch.nan]))
    assert before.tolist() == pytest.approx([0.53125, 0.78125, 0.96875, 0.96875, 0.53125])  # halfway to 1
    steps = [RowStep(3, 3, 1, 2, [0.9, 0.2]), None, RowStep(1, 1, 0, 1, [0.0])]
    expected.observe([[0.95, 0.51, 0.51], [0.95], [0.95]], steps)  # the third id follows a rejection
    after = expected.of(torch.tensor([0.0, 0.51, 0.95, 1.0]))
    assert after[0] == before[0]
    assert after[1].item() == pytest.approx((PRIOR_WEIGHT * 0.78125 + 0.2) / (PRIOR_WEIGHT + 1))
    assert after[2:].tolist() == pytest.approx(2 * [(PRIOR_WEIGHT * 0.96875 + 0.9) / (PRIOR_WEIGHT + 2)])


def test_a_draft_ends_where_the_mean_chance_of_the_rows_that_go_on_is_too_small() -> None:
    expected = AcceptanceByConfidence()
    expected.acceptance = torch.linspace(0.1, 0.8, NUM_BINS, dtype=torch.float64)
    limit = torch.tensor([3, 3, 1, 0])
    for min_chance, ends in ((0.32, False), (0.33, True)):
        rule = StopRule(expected, limit, min_chance)
        assert not rule.add(distributions(0.95, 0.55, 0.95, 0.95))  # 0.8 and 0.5; the others draft no more
        assert rule.add(distributions(0.55, 0.55, 1.0, 1.0)) == ends  # 0.4 and 0.25
    assert rule.largest_probs[0].tolist() == pytest.approx([0.95, 0.55, 0.95, 0.95])
    nobody = StopRule(expected, torch.tensor([1, 0]), 1.0)
    assert not nobody.add(distributions(0.6, 0.6))


DRAFTERS = {"model": lambda draft: ModelDrafter(draft, VOCAB_SIZE), "other_tokenizer": other_tokenizer}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_larger_threshold_gives_shorter_drafts_and_the_same_text(
    kind: str, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = pair("llama")
    steps: list[RowStep] = []
    means = []
    for min_chance in (0.0, 0.2, 1.1):
        monkeypatch.setattr(ConstantK, "min_chance", min_chance)
        drafter = DRAFTERS[kind](draft)
        specdec.enable(target, drafter, num_draft_tokens=K)
        steps.clear()
        with observed_steps(target, lambda result: steps.extend(step for step in result.steps if step)):
            text = target.generate(**prompts(batch_size), max_new_tokens=24, do_sample=False)
        assert text[:, WIDTH:].tolist() == continuation("llama", batch_size)
        assert kind == "other_tokenizer" or all(step.drafted == step.requested for step in steps)
        means.append(sum(step.drafted for step in steps) / len(steps))
        is_learned = not torch.equal(drafter.expected.acceptance, AcceptanceByConfidence().acceptance)
        assert is_learned == (min_chance > 0)
    specdec.disable(target)
    assert means[0] > means[1] > means[2]
    assert means[2] <= 1


def test_recorded_steps_do_not_stop() -> None:
    """They would wait for the host after each draft id."""
    target, draft = pair("llama")
    with recorded():
        specdec.enable(target, drafter := ModelDrafter(draft, VOCAB_SIZE), num_draft_tokens="auto")
        target.generate(**prompts(1), max_new_tokens=24, do_sample=False)
    specdec.disable(target)
    assert torch.equal(drafter.expected.acceptance, AcceptanceByConfidence().acceptance)
