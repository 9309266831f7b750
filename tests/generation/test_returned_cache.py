"""What an enabled model returns with the text: plain decoding's KV cache, scores and logits."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import StoppingCriteria

import specdec
from specdec.core.steps import Draft
from specdec.generation import output as output_module
from specdec.generation.output import CACHE_FIELD
from tests.generation.test_lossless import perturbed
from tests.helpers.drafters import AlwaysRight
from tests.helpers.families import VOCAB_SIZE, family, prompts
from tests.helpers.plain import NEVER, pair
from tests.helpers.recording import recorded

NEW_TOKENS = 14
TURN_IDS = 3  # of a user, between two turns
TURNS = 3
ATOL = 1e-4
FAMILIES = (
    "llama", "mistral", "gemma3_text", "gpt2", "qwen3", "deepseek_v3", "llama4_text", "gpt_oss", "falcon", "mpt",
)  # fmt: skip
DRAFTERS = ("model", "prompt_lookup", "none")
NUM_DRAFT_TOKENS = (3, "auto")
BATCHES = (1, 4)
WAYS = ("eager", "recorded", "lockstep")


class Case(NamedTuple):
    family: str
    drafter: str
    num_draft_tokens: int | str
    batch_size: int
    way: str


FULL = [Case(*values) for values in itertools.product(FAMILIES, DRAFTERS, NUM_DRAFT_TOKENS, BATCHES, WAYS)]


def covering() -> list[Case]:
    """Every family in batches of both sizes and each way; drafters and K in turns."""
    return [
        Case(name, DRAFTERS[(f + w) % 3], NUM_DRAFT_TOKENS[(f + w) // 2 % 2], BATCHES[(f + w) % 2], way)
        for (f, name), (w, way) in itertools.product(enumerate(FAMILIES), enumerate(WAYS))
    ]


class Never(StoppingCriteria):
    """Stops nothing; of unknown type, so the call advances in lockstep."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.zeros(len(input_ids), dtype=torch.bool)


@cache
def stops(model_type: str, batch_size: int) -> tuple[int, ...]:
    """Ids that end the rows of a plain text at different places: the first row's fourth, the last one's eighth."""
    text = family(model_type).generate(**prompts(batch_size), max_new_tokens=NEW_TOKENS)[:, 11:].tolist()
    return (text[0][3], text[-1][7]) if batch_size > 1 else (NEVER,)


def turn(model: PreTrainedModel, inputs: dict[str, Tensor], call: dict[str, Any], past: Any = None) -> Any:
    """One turn: generate() from the full ids, as transformers documents it for a cache of an earlier turn."""
    extra = {} if past is None else {CACHE_FIELD: past}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.generate(**inputs, **call, **extra, max_new_tokens=NEW_TOKENS, return_dict_in_generate=True)


def cache_of(output: Any) -> DynamicCache:
    return output[CACHE_FIELD]


def next_inputs(inputs: dict[str, Tensor], text: Tensor, seed: int) -> dict[str, Tensor]:
    """The text with the ids that a user appends."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([text, torch.randint(3, VOCAB_SIZE, (len(text), TURN_IDS), generator=generator)], dim=1)
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], dim=1)
    return {"input_ids": ids, "attention_mask": mask}


def assert_same_cache(got: DynamicCache, want: DynamicCache, mask: Tensor) -> None:
    """Layer for layer; values at the columns that the mask [B, P] of the prompt does not hide."""
    assert type(got) is type(want)
    assert got.get_seq_length() == want.get_seq_length()
    assert [type(layer) for layer in got.layers] == [type(layer) for layer in want.layers]
    assert [layer.get_seq_length() for layer in got.layers] == [layer.get_seq_length() for layer in want.layers]
    assert [layer.get_mask_sizes(1) for layer in got.layers] == [layer.get_mask_sizes(1) for layer in want.layers]
    for layer, plain in zip(got.layers, want.layers, strict=True):
        for name in ("keys", "values"):
            states, expected = getattr(layer, name), getattr(plain, name)
            assert states.shape == expected.shape
            assert states.dtype == expected.dtype
            assert states.device == expected.device
            assert states.untyped_storage().nbytes() <= 2 * states.nbytes, "it keeps what the layer does not"
            shown = torch.ones(len(states), want.get_seq_length(), dtype=torch.bool)
            shown[:, : mask.shape[1]] = mask.bool()[:, : shown.shape[1]]
            shown = shown[:, shown.shape[1] - states.shape[2] :, None].expand(-1, -1, states.shape[3])[:, None]
            torch.testing.assert_close(states * shown, expected * shown, atol=ATOL, rtol=0)


def snapshot(cache: DynamicCache) -> list[Tensor]:
    return [states.clone() for layer in cache.layers for states in (layer.keys, layer.values)]


def assert_a_conversation_goes_on(model: PreTrainedModel, drafter: Any, case: Case, **enabling: Any) -> None:
    """Three turns, of plain decoding, of the enabled model, and of plain decoding from the enabled model's cache."""
    call = {"eos_token_id": list(stops(case.family, case.batch_size)), "pad_token_id": 0}
    if case.way == "lockstep":
        call["stopping_criteria"] = [Never()]
    inputs = prompts(case.batch_size)
    specdec.disable(model)
    want = turn(model, inputs, call)
    with recorded() if case.way == "recorded" else nullcontext():
        specdec.enable(model, drafter, num_draft_tokens=case.num_draft_tokens, **enabling)
        for _ in range(3 if case.way == "recorded" else 1):  # the last one's steps are replayed
            got = turn(model, inputs, call)
            assert specdec.last_stats(model) is not None
        assert got.sequences.tolist() == want.sequences.tolist()
        assert_same_cache(cache_of(got), cache_of(want), inputs["attention_mask"])
        before = snapshot(cache_of(got))
        model.generate(**prompts(case.batch_size, seed=5), max_new_tokens=NEW_TOKENS)
        assert all(map(torch.equal, snapshot(cache_of(got)), before)), "a later call has changed it"
        pasts = {False: copy.deepcopy(cache_of(got)), True: cache_of(got)}  # by whether the enabled model goes on
        outputs = dict.fromkeys(pasts, got)
        past, plain = cache_of(want), want
        for number in range(1, TURNS):
            inputs = next_inputs(inputs, plain.sequences, seed=number)
            specdec.disable(model)
            plain = turn(model, inputs, call, past)
            past = cache_of(plain)
            for is_enabled in pasts:
                specdec.disable(model)
                if is_enabled:
                    specdec.enable(model, drafter, num_draft_tokens=case.num_draft_tokens, **enabling)
                outputs[is_enabled] = turn(model, inputs, call, pasts[is_enabled])
                pasts[is_enabled] = cache_of(outputs[is_enabled])
                assert outputs[is_enabled].sequences.tolist() == plain.sequences.tolist()
                assert_same_cache(pasts[is_enabled], past, inputs["attention_mask"])
    specdec.disable(model)


def drafter_of(case: Case) -> Any:
    return perturbed(case.family) if case.drafter == "model" else case.drafter


@pytest.mark.parametrize("case", covering(), ids=lambda case: "-".join(map(str, case)))
def test_the_cache_is_plain_decodings(case: Case) -> None:
    assert_a_conversation_goes_on(family(case.family), drafter_of(case), case)


@pytest.mark.full
@pytest.mark.parametrize("case", FULL, ids=lambda case: "-".join(map(str, case)))
def test_the_cache_is_plain_decodings_in_every_case(case: Case) -> None:
    assert_a_conversation_goes_on(family(case.family), drafter_of(case), case)


class FirstRowEmpty(AlwaysRight):
    """Drafts nothing for the first row."""

    def propose(self, sequences: Any, limit: Tensor) -> Draft:
        draft = super().propose(sequences, limit)
        return Draft(draft.ids, None, draft.lengths * (torch.arange(len(limit)) > 0))


def test_rows_that_end_in_one_step_at_different_places() -> None:
    """The first one's last id is then in no forward."""
    model, inputs = copy.deepcopy(family("llama")), prompts(2)
    text = model.generate(**inputs, max_new_tokens=5)[:, 11:].tolist()
    call = {"eos_token_id": [text[0][0], text[1][4]], "pad_token_id": 0}
    want = turn(model, inputs, call)
    got = turn(specdec.enable(model, FirstRowEmpty(family("llama")), num_draft_tokens=6), inputs, call)
    assert specdec.last_stats(model).num_steps == 2, "a step for each row, all at once"
    assert got.sequences.tolist() == want.sequences.tolist()
    assert_same_cache(cache_of(got), cache_of(want), inputs["attention_mask"])


@pytest.mark.usefixtures("cpu_kernels")
def test_the_cache_of_a_compiled_call() -> None:
    model, draft = pair("llama")
    try:
        assert_a_conversation_goes_on(model, draft, Case("llama", "model", 3, 4, "eager"), compile=True)
    finally:
        specdec.disable(model)


def test_rows_end_at_different_places() -> None:
    """The conversations cover padding after the stop of a row whose batch goes on."""
    texts = []
    for name in FAMILIES:
        call = {"eos_token_id": list(stops(name, 4)), "pad_token_id": 0}
        texts.append(family(name).generate(**prompts(4), **call, max_new_tokens=NEW_TOKENS)[:, 11:])
    assert all((text == 0).any() for text in texts)
    assert all(len(set((text == 0).sum(1).tolist())) > 1 for text in texts)


def test_the_cache_is_built_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    model = specdec.enable(copy.deepcopy(family("llama")), "prompt_lookup", num_draft_tokens=3)
    monkeypatch.setattr(output_module, "plain_cache", None)
    assert model.generate(**prompts(4), max_new_tokens=4).shape == (4, 15)


@contextmanager
def either(is_recorded: bool) -> Iterator[None]:
    with recorded() if is_recorded else nullcontext():
        yield


@pytest.mark.parametrize("has_eos", [True, False])
@pytest.mark.parametrize("is_recorded", [False, True])
@pytest.mark.parametrize("in_lockstep", [True, False])
def test_scores_and_logits(in_lockstep: bool, is_recorded: bool, has_eos: bool) -> None:
    """Plain decoding's at each position; out of lockstep, zeros after a row's stop, where plain decoding has others."""
    model, inputs = copy.deepcopy(family("llama")), prompts(4)
    stop_ids = list(stops("llama", 4)) if has_eos else [NEVER]
    call: dict[str, Any] = {
        "eos_token_id": stop_ids, "pad_token_id": 0, "max_new_tokens": NEW_TOKENS, "repetition_penalty": 1.3,
        "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
    }  # fmt: skip
    if in_lockstep:
        call["stopping_criteria"] = [Never()]
    want = model.generate(**inputs, **call)
    with either(is_recorded):
        specdec.enable(model, perturbed("llama"), num_draft_tokens=3)
        for _ in range(2):
            got = model.generate(**inputs, **call)
    assert got.sequences.tolist() == want.sequences.tolist()
    new_ids = got.sequences[:, 11:]
    stopped = torch.isin(new_ids, torch.tensor(stop_ids)).long().cumsum(1)
    is_padding = (stopped - torch.isin(new_ids, torch.tensor(stop_ids)).long()) > 0  # [B, L], after a row's stop
    assert is_padding.any() == has_eos
    for name in ("scores", "logits"):
        speculative, plain = (torch.stack(output[name], dim=1) for output in (got, want))
        assert len(got[name]) == len(want[name]) == new_ids.shape[1]
        assert speculative.shape == plain.shape
        assert speculative.dtype == plain.dtype
        if not in_lockstep:
            assert not speculative[is_padding].any()
            assert plain[is_padding].any() or not has_eos
            speculative, plain = speculative[~is_padding], plain[~is_padding]
        torch.testing.assert_close(speculative, plain, atol=ATOL, rtol=0)
