"""Sampled texts have the target's distribution: chi-square over texts of three ids, through generate().

The expected probabilities come from transformers alone: the stock model's own scores after every prefix. Equal rows of
one batch are the samples. Control tests run the same check on broken loops, where it must fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import specdec
from specdec.audit.controls import replace_verifier
from specdec.core import verification
from specdec.core.interfaces import Drafter
from specdec.core.sampling import Sampling, Verification, draw
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft, Verdict
from specdec.drafters.hybrid import SuffixHybrid
from specdec.drafters.model import ModelDrafter
from specdec.drafters.other_tokenizer import OtherTokenizerDrafter
from specdec.drafters.prompt_lookup import PromptLookup
from specdec.drafters.shared_vocabulary import SharedVocabulary
from specdec.drafters.suffix import SuffixDecoding
from specdec.runtime.cuda_graphs import RECORDINGS
from tests.helpers.draft_length import erratic_k
from tests.helpers.drafters import AlwaysRight, Empty, Random, Uneven
from tests.helpers.families import make_model
from tests.helpers.heads import random_dflash, random_dspark, random_head, random_peagle
from tests.helpers.mtp import random_mtp
from tests.helpers.tokenizers import tokenizer_of

pytestmark = pytest.mark.usefixtures("either_way")
V = 5
LENGTH = 3
NUM_DRAFT_TOKENS = 2  # one step may draft all but the last id, or several may share the text
SAMPLES = 3000
SIGNIFICANCE = 1e-4
PAD = 0

Text = tuple[int, ...]

PROMPT = (1, 2, 4, 3, 1, 2)  # prompt lookup finds (1, 2) and proposes (4, 3)
UNEVEN_PROMPTS = (PROMPT, (3,), (4, 1, 4))

CALLS: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.8},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "all": {"temperature": 0.7, "top_k": 4, "top_p": 0.9, "repetition_penalty": 1.3},
}
NO_CUT = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": PAD}

# Each test makes its own, from the target.
DRAFTERS: dict[str, Callable[[PreTrainedModel], Drafter]] = {
    "model": lambda target: ModelDrafter(tiny_model(1), V),
    "prompt_lookup": lambda target: PromptLookup(),
    "suffix": lambda target: SuffixDecoding(),
    "suffix+model": lambda target: SuffixHybrid(ModelDrafter(tiny_model(1), V)),
    "eagle3": lambda target: random_head(target, draft_ids=list(range(0, V, 2))),
    "peagle": lambda target: random_peagle(target, draft_ids=list(range(1, V, 2))),
    "dflash": lambda target: random_dflash(target, draft_ids=list(range(0, V, 2))),
    "dspark": lambda target: random_dspark(target, draft_ids=list(range(0, V, 2))),
    "mtp": lambda target: random_mtp(target),
    "other_tokenizer": lambda target: OtherTokenizerDrafter(tiny_model(1), V, shared_letters()),
    "always_right": lambda target: AlwaysRight(target, V),
    "random": lambda target: Random(2, V),
    "uneven": lambda target: Uneven(3, V),
    "empty": lambda target: Empty(),
}


@cache
def tiny_model(seed: int) -> PreTrainedModel:
    """A stock model; never enabled."""
    return new_model(seed)


def new_model(seed: int) -> PreTrainedModel:
    return make_model(
        "llama", seed, vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip


@cache
def shared_letters() -> SharedVocabulary:
    """A target with "ab" as a token and a draft model with "cd"."""
    return SharedVocabulary(tokenizer_of(["a", "b", "c", "d", "ab"]), tokenizer_of(["d", "cd", "a", "c", "b"]))


def batch(prompts: tuple[Text, ...]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


@cache
def expected(prompt: Text, width: int, call: str) -> dict[Text, float]:
    """Probability of every text of LENGTH ids after a prompt padded to `width`, from stock generate()'s scores."""
    probability: dict[Text, float] = {(): 1.0}
    for length in range(LENGTH):
        texts = list(product(range(V), repeat=length))
        inputs = batch(tuple(prompt + text for text in texts))
        padding = torch.full((len(texts), width - len(prompt)), PAD)
        inputs["input_ids"] = torch.cat([padding, inputs["input_ids"]], dim=1)
        inputs["attention_mask"] = torch.cat([torch.zeros_like(padding), inputs["attention_mask"]], dim=1)
        output = tiny_model(0).generate(
            **inputs, **NO_CUT | CALLS[call], max_new_tokens=1, output_scores=True, return_dict_in_generate=True
        )
        probs = output.scores[0].double().softmax(-1).tolist()
        probability |= {
            (*text, x): probability[text] * p for text, row in zip(texts, probs, strict=True) for x, p in enumerate(row)
        }
    return {text: p for text, p in probability.items() if len(text) == LENGTH}


def p_value(counts: Counter[Text], probability: dict[Text, float]) -> float:
    """Pearson's chi-square test; cells that expect fewer than 5 are merged into one."""
    total = counts.total()
    if any(probability[text] < 1e-12 for text in counts):
        return 0.0
    large = [text for text, p in probability.items() if total * p >= 5]
    cells = [(counts[text], total * probability[text]) for text in large]
    rest = total * (1 - sum(probability[text] for text in large))
    if rest >= 1:
        cells.append((total - sum(counts[text] for text in large), rest))
    statistic = sum((observed - want) ** 2 / want for observed, want in cells)
    return float(
        torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2).double(), torch.tensor(statistic / 2).double())
    )


def sampled_p_values(
    drafter: Drafter,
    call: str,
    prompts: tuple[Text, ...] = (PROMPT,),
    num_draft_tokens: int | str = NUM_DRAFT_TOKENS,
    verification: Verification = "block",
) -> list[float]:
    """One for each prompt, of SAMPLES speculative texts each."""
    model = specdec.enable(new_model(0), drafter, num_draft_tokens=num_draft_tokens, verification=verification)
    inputs = batch(prompts * SAMPLES)
    torch.manual_seed(0)
    for _ in range(3 if "cpu" in RECORDINGS else 1):  # the last call's steps are replayed, all of them
        texts = model.generate(**inputs, **NO_CUT | CALLS[call], max_new_tokens=LENGTH)[:, -LENGTH:].tolist()
    assert specdec.last_stats(model) is not None
    width = inputs["input_ids"].shape[1]
    return [
        p_value(Counter(map(tuple, texts[row :: len(prompts)])), expected(prompt, width, call))
        for row, prompt in enumerate(prompts)
    ]


# every drafter with all processors together, and each processor alone with a drafter that has probabilities and without
COVERING = [(drafter, "all") for drafter in DRAFTERS] + list(product(("model", "prompt_lookup"), list(CALLS)[:-1]))


@pytest.mark.parametrize(("drafter", "call"), COVERING)
def test_sampled_texts_have_the_targets_distribution(drafter: str, call: str) -> None:
    [p] = sampled_p_values(DRAFTERS[drafter](tiny_model(0)), call)
    assert p > SIGNIFICANCE


@pytest.mark.full
@pytest.mark.parametrize(("drafter", "call"), sorted(set(product(DRAFTERS, CALLS)) - set(COVERING)))
def test_sampled_texts_have_the_targets_distribution_full_product(drafter: str, call: str) -> None:
    test_sampled_texts_have_the_targets_distribution(drafter, call)


@pytest.mark.parametrize("drafter", ["model", "random", "uneven"])
def test_token_verification_keeps_the_distribution(drafter: str) -> None:
    """That of drafters with probabilities; the others are verified so in any call."""
    [p] = sampled_p_values(DRAFTERS[drafter](tiny_model(0)), "all", verification="token")
    assert p > SIGNIFICANCE


@pytest.mark.parametrize("drafter", ["model", "uneven", "other_tokenizer"])
def test_unevenly_padded_rows_each_have_their_own_distribution(drafter: str) -> None:
    assert min(sampled_p_values(DRAFTERS[drafter](tiny_model(0)), "all", UNEVEN_PROMPTS)) > SIGNIFICANCE


@pytest.mark.parametrize(
    ("drafter", "seed"), [("model", 0), ("model", 1), ("prompt_lookup", 2), ("uneven", 3), ("other_tokenizer", 4)]
)
def test_changing_k_from_step_to_step_keeps_the_distribution(
    drafter: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    erratic_k(monkeypatch, seed)
    [p] = sampled_p_values(DRAFTERS[drafter](tiny_model(0)), "all", num_draft_tokens="auto")
    assert p > SIGNIFICANCE


def test_the_expected_distribution_is_not_trivial() -> None:
    """Many texts share the probability mass, so that a broken loop cannot pass."""
    probability = expected(PROMPT, len(PROMPT), "temperature")
    assert sum(probability.values()) == pytest.approx(1)
    assert max(probability.values()) < 0.2
    assert sum(p * SAMPLES >= 5 for p in probability.values()) > 50


stock_verify = verification.verify


def accept_everything(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    rows = torch.arange(len(draft.lengths))
    return Verdict(draft.lengths, draw(target_probs[rows, draft.lengths], uniforms[:, -1]))


def recover_from_the_target(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
    """Rejects as it should, then draws from p, not from the residual."""
    accepted = stock_verify(draft, target_probs, uniforms).accepted
    return Verdict(accepted, draw(target_probs[torch.arange(len(accepted)), accepted], uniforms[:, -1]))


class OtherTemperature(ModelDrafter):
    """Draws its ids from one distribution and reports a flatter one."""

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        draft = super().propose(sequences, limit)
        probs = None if draft.probs is None else (draft.probs**0.6) / (draft.probs**0.6).sum(-1, keepdim=True)
        return Draft(draft.ids, probs, draft.lengths)


@pytest.mark.parametrize("drafter", ["model", "always_right", "prompt_lookup"])
@pytest.mark.parametrize("broken", [accept_everything, recover_from_the_target])
def test_control_a_broken_verifier_is_found(drafter: str, broken: Callable[..., Verdict]) -> None:
    with replace_verifier(broken)():
        [p] = sampled_p_values(DRAFTERS[drafter](tiny_model(0)), "temperature")
    assert p < SIGNIFICANCE


def test_control_draft_probs_of_another_temperature_are_found() -> None:
    [p] = sampled_p_values(OtherTemperature(tiny_model(1), V), "temperature")
    assert p < SIGNIFICANCE


class OtherMap(OtherTokenizerDrafter):
    """Draws with one map between the vocabularies and reports another."""

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        draft = super().propose(sequences, limit)
        probs = None if draft.probs is None else draft.probs[..., [1, 0, 2, 3, 4]]
        return Draft(draft.ids, probs, draft.lengths)


def test_control_draft_probs_of_another_map_are_found() -> None:
    [p] = sampled_p_values(OtherMap(tiny_model(1), V, shared_letters()), "temperature")
    assert p < SIGNIFICANCE


def test_control_a_call_without_its_processors_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampling, "scores", lambda self, logits, *args, **kwargs: logits)
    for call in CALLS:
        assert sampled_p_values(Empty(), call) < [SIGNIFICANCE], call


def test_the_p_value_of_known_counts() -> None:
    fair = {(0,): 0.5, (1,): 0.5}
    assert p_value(Counter({(0,): 50, (1,): 50}), fair) == pytest.approx(1)
    assert p_value(Counter({(0,): 60, (1,): 40}), fair) == pytest.approx(
        0.0455, abs=1e-4
    )  # chi-square 4, one degree of freedom
    assert p_value(Counter({(0,): 1}), {(0,): 0.0, (1,): 1.0}) == 0
