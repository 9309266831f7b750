"""Suffix decoding with a draft model: which of them a row takes, and that the model's KV cache is right after any."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft
from specdec.drafters.hybrid import ExpectedAcceptance, SuffixHybrid
from specdec.drafters.model import ModelDrafter
from specdec.drafters.resolve import resolve_drafter
from specdec.utils import embedded
from tests.drafters.test_model import CheckedDrafter, K, noisy, run
from tests.helpers.families import FAMILIES, VOCAB_SIZE, family, make_model, prompts
from tests.helpers.tokenizers import other_tokenizer


class AtRandom(ExpectedAcceptance):
    """Prefers either drafter at random, and counts the rows that took each."""

    def __init__(self) -> None:
        super().__init__()
        self.num_chosen: Counter[str] = Counter()

    def observe_model(self, drafted: int, accepted: int) -> None:
        self.num_chosen["model"] += 1

    def observe_suffix(self, score: float, accepted: int) -> None:
        self.num_chosen["suffix"] += 1

    def of_model(self, num_ids: int) -> float:
        return num_ids and random.random()

    def of_suffix(self, score: float) -> float:
        return random.random()


class CheckedHybrid(CheckedDrafter):
    """Rows take either drafter at random; the model's proposals are compared."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self.drafter = SuffixHybrid(ModelDrafter(model, VOCAB_SIZE))
        self.drafter.expected = AtRandom()
        self.num_mixed = 0
        random.seed(0)

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        draft = super().propose(sequences, limit)
        self.num_mixed += len({*map(self.is_of_model, range(len(limit)))}) > 1
        return draft

    def is_of_model(self, row: int) -> bool:
        return bool(self.drafter.takes_model[row])


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("schedule", [[K], [0, 1, 3], [2, 0, 0, K]])
def test_the_draft_cache_is_right_whichever_drafter_rows_took_before(
    do_sample: bool, batch_size: int, schedule: list[int]
) -> None:
    drafter = CheckedHybrid(noisy("llama", 0.03))
    run(family("llama"), drafter, schedule, batch_size, do_sample)
    assert drafter.num_compared >= K
    assert drafter.num_mixed > 2 or batch_size == 1


def test_a_row_beyond_the_draft_models_context_takes_suffix_decoding() -> None:
    small = make_model("gpt2", **FAMILIES["gpt2"] | {"n_positions": 24})
    small.transformer.h.load_state_dict(family("gpt2").transformer.h.state_dict())
    drafter = CheckedHybrid(small)
    assert run(family("gpt2"), drafter, [K], length=30).lengths.max() > 24
    assert drafter.num_compared


def test_expectations_are_of_what_was_accepted() -> None:
    expected = ExpectedAcceptance()
    assert expected.of_model(3) == 0.5 + 0.25 + 0.125
    assert expected.of_suffix(3.0) == 1.5
    expected.observe_model(drafted=3, accepted=3)  # 4 of 5 that were tried
    assert expected.of_model(2) == pytest.approx(0.8 + 0.64)
    expected.observe_model(drafted=3, accepted=0)  # 4 of 6
    assert expected.of_model(1) == pytest.approx(4 / 6)
    expected.observe_suffix(score=4.0, accepted=1)  # 2 of 6 that were promised
    assert expected.of_suffix(3.0) == pytest.approx(1.0)
    assert expected.of_model(0) == 0


def test_each_row_takes_the_drafter_that_promises_more() -> None:
    """The first row repeats itself, the second one does not."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8], [11, 12, 13, 14, 15, 16, 17, 18, 19]])
    sequences = Sequences(ids, torch.tensor([9, 9]), max_length=40, num_draft_tokens=K)
    drafter = SuffixHybrid(ModelDrafter(family("llama"), VOCAB_SIZE))
    drafter.begin(sequences, Sampling())
    draft = drafter.propose(sequences, sequences.begin_step(K))
    assert drafter.takes_model == [False, True]
    assert draft.ids[0, : draft.lengths[0]].tolist() == [9, 5, 6, 7]
    alone = ModelDrafter(family("llama"), VOCAB_SIZE)
    alone.begin(sequences, Sampling())
    assert draft.ids[1].tolist() == alone.propose(sequences, torch.tensor([0, K])).ids[1].tolist()


def test_it_is_named_by_the_folder_of_its_draft_model() -> None:
    target = family("llama")
    drafter = resolve_drafter(f"suffix+{embedded.DRAFT}", target)
    assert isinstance(drafter, SuffixHybrid)
    assert drafter.runner.model.name_or_path == str(embedded.DRAFT)
    for name in ("suffix+", "suffix+prompt_lookup"):
        with pytest.raises(ValueError, match="combines suffix decoding with a draft model: name its folder or hub id"):
            resolve_drafter(name, target)
    with pytest.raises(ValueError, match="no such folder"):
        resolve_drafter("suffix+no such folder", target)


@pytest.mark.parametrize("do_sample", [False, True])
def test_its_draft_model_may_have_another_tokenizer(do_sample: bool) -> None:
    """top_k=1 samples what greedy decoding writes."""
    model, call = family("llama"), prompts(3) | {"max_new_tokens": 24, "pad_token_id": 0}
    plain = model.generate(**call, do_sample=False)
    drafter = SuffixHybrid(other_tokenizer(noisy("llama", 0.03)))
    drafter.expected = AtRandom()
    specdec.enable(model, drafter, num_draft_tokens=4)
    try:
        for _ in range(3):
            assert model.generate(**call, do_sample=do_sample, top_k=1).equal(plain)
    finally:
        specdec.disable(model)
    assert drafter.expected.num_chosen["model"] > 3 < drafter.expected.num_chosen["suffix"]


def test_a_second_answer_is_drafted_from_the_first_though_the_draft_model_is_of_no_use() -> None:
    model, call = family("llama"), prompts(3) | {"max_new_tokens": 24, "do_sample": False}
    plain = model.generate(**call)
    specdec.enable(model, SuffixHybrid(ModelDrafter(noisy("llama", 0.5), VOCAB_SIZE)), num_draft_tokens=5)
    try:
        texts, forwards = [], []
        for _ in range(2):
            texts.append(model.generate(**call))
            forwards.append(specdec.last_stats(model).num_target_forwards)
    finally:
        specdec.disable(model)
    assert all(text.equal(plain) for text in texts)
    assert forwards[1] < forwards[0]
