"""After enable(), generate() gives what it gave before, for any arguments: the same ids, scores, streams and errors."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.stopping_criteria import MaxLengthCriteria

import specdec
from tests.helpers.families import CONTEXT, FAMILIES, VOCAB_SIZE, make_model, prompts
from tests.helpers.plain import (
    CALLS,
    DRAFTERS,
    NEVER,
    WAYS,
    WIDTH,
    K,
    both,
    continuation,
    drafter,
    keywords,
    stop_at,
    target,
)

pytestmark = pytest.mark.usefixtures("either_way")


@cache
def plain_text(name: str, model_type: str, batch_size: int) -> list[list[int]]:
    specdec.disable(target(model_type))
    return target(model_type).generate(**prompts(batch_size), **keywords(name, model_type, batch_size)()).tolist()


COVERING = [("llama", kind, 4) for kind in DRAFTERS] + [("gpt2", "model", 4), ("gpt2", "itself", 1)]
PRODUCT = [
    pytest.param(*combination, marks=() if combination in COVERING else pytest.mark.full)
    for combination in product(("llama", "gpt2"), DRAFTERS, (1, 4))
]


@pytest.mark.parametrize(("model_type", "kind", "batch_size"), PRODUCT)
@pytest.mark.parametrize("name", CALLS)
def test_greedy_text_is_plain(name: str, model_type: str, kind: str, batch_size: int) -> None:
    want = plain_text(name, model_type, batch_size)
    model = specdec.enable(target(model_type), drafter(kind, model_type), num_draft_tokens=K)
    assert model.generate(**prompts(batch_size), **keywords(name, model_type, batch_size)()).tolist() == want
    assert specdec.last_stats(model) is not None, "the stock loop served the call"


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_any_number_of_draft_tokens_gives_plain_text(k: int, kind: str) -> None:
    want, got = both(prompts(4), {"max_new_tokens": 21, "eos_token_id": continuation("llama", 4)[0][9]}, kind, k=k)
    assert got.tolist() == want.tolist()
    stats = specdec.last_stats(target())
    assert len(stats.acceptance_histogram) == (1 if kind == "none" else k + 1)
    if kind == "model":
        assert 0.1 < stats.draft_acceptance_rate < 0.9, "drafts must be partly accepted, or these tests show little"
    if kind == "itself":
        assert stats.draft_acceptance_rate == 1


SEVEN = GenerationConfig(num_assistant_tokens=7)


@pytest.mark.parametrize("how", ["keyword", "config", "positional config"])
def test_num_assistant_tokens_of_a_call_takes_precedence_over_enable(how: str) -> None:
    want = continuation("llama", 4)  # the first call of it disables the target
    specdec.enable(target(), drafter(), num_draft_tokens=K)
    args = (None, SEVEN) if how == "positional config" else ()
    own = {"keyword": {"num_assistant_tokens": 7}, "config": {"generation_config": SEVEN}}.get(how, {})
    text = target().generate(*args, **prompts(4), max_new_tokens=24, **own)
    assert text[:, WIDTH:].tolist() == want
    assert len(specdec.last_stats(target()).acceptance_histogram) == 8


@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("k", [3, 8])
def test_learned_positions_reach_the_end_of_the_context(k: int, kind: str, model_type: str) -> None:
    ids = torch.randint(3, VOCAB_SIZE, (3, CONTEXT - 20), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(CONTEXT - 20) >= torch.tensor([[0], [2], [CONTEXT - 21]])).long()
    want, got = both({"input_ids": ids * mask, "attention_mask": mask}, {"max_length": CONTEXT}, kind, model_type, k)
    assert got.tolist() == want.tolist()
    assert got.shape[1] == CONTEXT


@pytest.mark.parametrize("kind", DRAFTERS)
def test_without_an_eos_a_row_goes_on_after_its_own_stop_until_all_have_ended(kind: str) -> None:
    call = stop_at(lambda ids: ids[:, -1] % 5 == 0, eos_token_id=None, pad_token_id=1, max_new_tokens=18)
    want, got = (text[:, WIDTH:].tolist() for text in both(prompts(4), call, kind))
    stops = [next((i + 1 for i, token in enumerate(row) if token % 5 == 0), 18) for row in want]
    assert len(set(stops)) > 1, "rows stop at different places, or this test shows nothing"
    assert got == want


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_scores_and_logits_are_plain_up_to_each_stop(model_type: str, kind: str) -> None:
    stop = continuation(model_type, 4)[0][9]
    call = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "repetition_penalty": 1.5}
    want, got = both(
        prompts(4), call | {"max_new_tokens": 18, "eos_token_id": stop, "suppress_tokens": [5]}, kind, model_type
    )
    assert type(got) is type(want)
    assert got.sequences.tolist() == want.sequences.tolist()
    for name in ("scores", "logits"):
        assert len(got[name]) == len(want[name])
        for row, ids in enumerate(want.sequences[:, WIDTH:].tolist()):
            for column in range(ids.index(stop) + 1 if stop in ids else len(ids)):
                torch.testing.assert_close(got[name][column][row], want[name][column][row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("enabled_with", [None, "none"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("argument", ["assistant_model", "prompt_lookup_num_tokens"])
def test_a_call_can_bring_its_own_drafter(argument: str, batch_size: int, enabled_with: str | None) -> None:
    text, call = continuation("llama", batch_size), {"max_new_tokens": 24, **prompts(batch_size)}
    own = {"assistant_model": drafter(), "prompt_lookup_num_tokens": 4}[argument]
    specdec.enable(target(), enabled_with, num_draft_tokens=K)
    assert target().generate(**call, **{argument: own})[:, WIDTH:].tolist() == text
    assert specdec.last_stats(target()).num_draft_tokens > 0
    assert target().generate(**call)[:, WIDTH:].tolist() == text
    stats = specdec.last_stats(target())
    assert stats is None if enabled_with is None else stats.num_draft_tokens == 0


@pytest.mark.parametrize("sample", [{}, {"do_sample": True, "top_k": 1}])
@pytest.mark.parametrize("vocab_size", [90, 120])
def test_a_draft_vocabulary_may_be_narrower_or_wider(vocab_size: int, sample: dict[str, Any]) -> None:
    draft = copy.deepcopy(drafter())
    draft.resize_token_embeddings(vocab_size, mean_resizing=False)
    want = continuation("llama", 4)
    for enabled_with, own in ((draft, {}), (None, {"assistant_model": draft})):
        specdec.enable(target(), enabled_with, num_draft_tokens=K)
        assert target().generate(**prompts(4), max_new_tokens=24, **sample, **own)[:, WIDTH:].tolist() == want
        assert specdec.last_stats(target()).num_accepted_draft_tokens > 0


@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("name", WAYS)
def test_any_way_to_call_gives_the_plain_result(name: str, kind: str) -> None:
    call = {**prompts(4), "max_new_tokens": 18, "pad_token_id": 0, "eos_token_id": continuation("llama", 4)[0][9]}
    ids, mask = call.pop("input_ids"), call.pop("attention_mask")
    specdec.disable(target())
    want = WAYS[name](ids, mask, **call)
    specdec.enable(target(), drafter(kind), num_draft_tokens=K)
    got = WAYS[name](ids, mask, **call)
    assert got.tolist() == want.tolist() if isinstance(want, Tensor) else got == want


def grammar(path: list[int]) -> dict[str, Any]:
    """Allows one text only and, as tries do, no id at all after any other."""

    def allowed(row: int, ids: Tensor) -> list[int]:
        made = ids[WIDTH:].tolist()
        return path[len(made) : len(made) + 1] if made == path[: len(made)] else []

    return {"prefix_allowed_tokens_fn": allowed, "eos_token_id": NEVER}


def ask_the_model() -> dict[str, Any]:
    def allowed(row: int, ids: Tensor) -> list[int]:
        return target().generate(ids[-3:][None], max_new_tokens=4).unique().tolist()

    return {"prefix_allowed_tokens_fn": allowed}


@torch.enable_grad()
def guided(input_ids: Tensor, scores: Tensor) -> Tensor:
    scores = scores.detach().clone().requires_grad_()
    (scores.softmax(-1) * torch.arange(VOCAB_SIZE)).sum().backward()
    return (scores + 5 * scores.grad).detach()


# (rows, drafter, the call's keywords)
EDGES: dict[str, tuple[int, str, Callable[[], dict[str, Any]]]] = {
    "MaxLengthCriteria inside the prompt": (4, "model", lambda: {"stopping_criteria": [MaxLengthCriteria(5)]}),
    "MaxLengthCriteria behind max_new_tokens": (
        4, "model", lambda: {"stopping_criteria": [MaxLengthCriteria(WIDTH + 20)]},
    ),
    "a grammar, drafts leave it": (1, "prompt_lookup", lambda: grammar([9, 9, 8, 9, 9, 7, 9, 9, 6, NEVER])),
    "a grammar, drafts run on behind its eos": (1, "model", lambda: grammar([9, 8, 7, 6, 5, NEVER])),
    "a processor that takes gradients": (4, "model", lambda: {"logits_processor": [guided]}),
    "no limit on length": (4, "model", lambda: {"max_new_tokens": 10**14, "eos_token_id": list(range(VOCAB_SIZE))}),
    "generate() within generate()": (1, "model", ask_the_model),
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_edge_cases_give_plain_text(name: str) -> None:
    batch_size, kind, call = EDGES[name]
    want, got = both(prompts(batch_size), lambda: {"max_new_tokens": 14} | call(), kind)
    want, got = (text if isinstance(text, Tensor) else text.sequences for text in (want, got))
    assert got.tolist() == want.tolist()


@pytest.mark.parametrize("kind", DRAFTERS)
def test_sampling_follows_the_seed(kind: str) -> None:
    texts = []
    call = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 12, "top_p": 0.9, "temperature": 3.0}
    specdec.enable(target(), drafter(kind), num_draft_tokens=K)
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(target().generate(**prompts(2), **call).tolist())
    assert texts[0] == texts[1] != texts[2]
    assert torch.tensor(texts[0]).shape == (6, WIDTH + 12)
    assert len({tuple(row) for row in texts[0][:3]}) == 3, "sequences of one prompt are drawn apart"
    assert len(specdec.last_stats(target()).per_row) == 6


def test_a_grammar_that_raises_for_other_texts_works_with_uneven_rows() -> None:
    trie = {
        (): [3, 4],
        (3,): [5],
        (4,): [6, 7],
        (3, 5): [8],
        (4, 6): [8],
        (4, 7): [9],
        (3, 5, 8): [3],
        (4, 6, 8): [3],
        (4, 7, 9): [3],
    }
    call = {"max_new_tokens": 4, "prefix_allowed_tokens_fn": lambda row, ids: trie[tuple(ids[WIDTH:].tolist())]}
    for kind in DRAFTERS:
        want, got = both(prompts(4), call, kind, k=3)
        assert got.tolist() == want.tolist()


def test_a_draft_whose_every_id_is_suppressed_ends_no_call() -> None:
    model = specdec.enable(
        target(), make_model("llama", 1, **FAMILIES["llama"] | {"vocab_size": 94}), num_draft_tokens=3
    )
    text = model.generate(**prompts(4), max_new_tokens=8, do_sample=True, suppress_tokens=list(range(94)))
    assert (text[:, WIDTH:] >= 94).all()


@pytest.mark.parametrize("kind", DRAFTERS)
def test_each_row_may_have_a_grammar_of_its_own(kind: str) -> None:
    lengths = (5, 12, 8, 15)
    paths = [[*row[:n], NEVER, *[0] * 18] for row, n in zip(continuation("llama", 4), lengths, strict=True)]

    def allowed(row: int, ids: Tensor) -> list[int]:
        made = ids[WIDTH:].tolist()
        return [paths[row][len(made)]] if made == paths[row][: len(made)] else []

    want, got = both(
        prompts(4), {"max_new_tokens": 18, "prefix_allowed_tokens_fn": allowed, "eos_token_id": NEVER}, kind
    )
    assert got.tolist() == want.tolist()


def test_max_new_tokens_may_be_the_largest_int() -> None:
    call = {"max_new_tokens": sys.maxsize, **stop_at(lambda ids: ids.shape[1] > 20)}
    want, got = both(prompts(4), call)
    assert got.tolist() == want.tolist()
