"""Which models are accepted, and for which text lengths: the trials of support.py, and the table of docs/models.md."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any

import check_models
import pytest
import torch
import transformers
from transformers import AutoConfig, LlamaForCausalLM

import specdec
import specdec.runtime.kv_cache.ragged
import specdec.runtime.runner
import specdec.runtime.support
from specdec.runtime.support import TRIAL_LENGTH, Support, largest_window, support_of
from tests.helpers.families import FAMILIES, VOCAB_SIZE, make_model, prompts

ROWS = {row["class"]: row for row in json.loads(specdec.runtime.support.MODELS_FILE.read_text())["models"]}
# For each way in which classes of the table work or fail, one or two classes that no other test uses.
SAMPLE = (
    "Olmo3ForCausalLM", "Exaone4ForCausalLM", "Gemma3nForCausalLM", "Gemma4ForCausalLM",  # windows, shared caches
    "ModernBertDecoderForCausalLM", "BertLMHeadModel", "BigBirdForCausalLM", "CTRLLMHeadModel",  # position_ids
    "MiniCPM3ForCausalLM", "Qwen3MoeForCausalLM", "DiffLlamaForCausalLM", "GPTNeoForCausalLM",
    "Glm4vForConditionalGeneration", "LlavaForConditionalGeneration", "Exaone4_5_ForConditionalGeneration",
    "GitForCausalLM", "MoshiForCausalLM", "BartForCausalLM", "Lfm2ForCausalLM", "JambaForCausalLM", "BloomForCausalLM",
    "BlipForConditionalGeneration", "T5Gemma2ForConditionalGeneration",
)  # fmt: skip
IS_NEWEST = transformers.__version__ == json.loads(specdec.runtime.support.MODELS_FILE.read_text())["transformers"]


def families() -> list[Any]:
    marks = {True: [], False: [pytest.mark.full]}
    return [pytest.param(one, id=one.name, marks=marks[one.name in SAMPLE]) for one in check_models.families()]


@pytest.mark.parametrize("family", families())
def test_a_class_is_what_the_table_says(family: check_models.Family) -> None:
    row = check_models.check(family)
    assert row["result"] != check_models.WRONG, row["reason"]
    if IS_NEWEST:
        assert row["result"] == ROWS[family.name]["result"], row["reason"]


def test_the_page_is_the_table() -> None:
    rows = list(ROWS.values())
    assert all(row["result"] != check_models.WRONG for row in rows)
    if IS_NEWEST:
        assert {row["class"] for row in rows} == {family.name for family in check_models.families()}
        assert check_models.page(rows) == check_models.PAGE.read_text()


def test_the_families_of_the_lossless_tests_are_tested_classes() -> None:
    names = {type(make_model(model_type, **values)).__name__ for model_type, values in FAMILIES.items()}
    assert names <= specdec.runtime.support.tested_classes()


class Spanned(LlamaForCausalLM):
    """Correct up to config.block_span positions; beyond, its logits depend on the longest row of the batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        length = kwargs["input_ids"].shape[1] + (0 if cache is None else cache.get_seq_length())
        output = super().forward(*args, **kwargs)
        beyond = max(length - self.config.block_span, 0)
        output.logits = output.logits + beyond * torch.arange(VOCAB_SIZE).remainder(7)
        return output


def spanned(block_span: int, context: int = 256) -> Any:
    config = AutoConfig.for_model(
        "llama", **FAMILIES["llama"] | {"vocab_size": VOCAB_SIZE, "max_position_embeddings": context}
    )
    config.block_span = block_span
    torch.manual_seed(0)
    model = Spanned(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def test_an_untested_class_is_tried_beyond_its_window() -> None:
    model = spanned(100)
    assert largest_window(model) == 100
    support = support_of(model)
    assert support.reason is None
    assert support.max_length == 100
    assert "over 100 positions" in (support.warning or "")
    assert "relative error" in (support.warning or "")


def test_a_model_that_fails_on_short_texts_is_refused() -> None:
    assert "relative error" in (support_of(spanned(16)).reason or "")


def test_a_window_beyond_the_context_needs_no_trial() -> None:
    assert support_of(spanned(300)) == Support()


def test_texts_longer_than_the_trial_go_to_the_stock_loop() -> None:
    model = spanned(100)
    ids = torch.randint(3, VOCAB_SIZE, (3, 11), generator=torch.Generator().manual_seed(1))
    calls: list[dict[str, Any]] = [{"input_ids": ids, "max_new_tokens": count} for count in (80, 120)]
    want = [model.generate(**call) for call in calls]
    with pytest.warns(UserWarning, match="over 100 positions go to the stock loop"):
        specdec.enable(model, "prompt_lookup", num_draft_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(**calls[0]).equal(want[0])
    assert specdec.last_stats(model) is not None
    with pytest.warns(UserWarning, match="its text may have 134 positions"):
        assert model.generate(**calls[1]).equal(want[1])
    assert specdec.last_stats(model) is None


def test_a_trial_that_takes_too_long_is_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(specdec.runtime.support.MAX_TRIAL_FLOPS, "cpu", 0)
    support = support_of(spanned(100))
    assert support.max_length == TRIAL_LENGTH
    assert "takes too long" in (support.warning or "")
    tested = make_model("mistral", **FAMILIES["mistral"] | {"sliding_window": 100})
    assert support_of(tested) == Support()


def test_windows_are_found_in_nested_lists_and_dicts() -> None:
    config = spanned(40).config
    config.attention = {"local": [{"size": 70}, 80], "heads": 99, "window": True}
    model = copy.copy(make_model("llama", **FAMILIES["llama"]))
    model.config = config
    assert largest_window(model) == 80


# Models that derive a query's position from the number of keys.


@pytest.mark.parametrize("window_size", [9, 256])
def test_without_alignment_gpt_neo_is_refused(window_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the window is longer than the trial, a draft that is shorter in one row than in the other detects it."""
    model = make_model("gpt_neo", **FAMILIES["gpt_neo"] | {"window_size": window_size})
    assert support_of(model) == Support(max_length=FAMILIES["gpt_neo"]["max_position_embeddings"])
    monkeypatch.setattr(specdec.runtime.runner, "masks_by_slot", lambda model: False)
    assert "relative error" in (support_of(model).reason or "")


def test_gpt_neo_near_its_context_goes_to_the_stock_loop() -> None:
    model = make_model("gpt_neo", **FAMILIES["gpt_neo"])
    call = prompts(3) | {"max_new_tokens": FAMILIES["gpt_neo"]["max_position_embeddings"] - 11}
    want = model.generate(**call)
    specdec.enable(model, "prompt_lookup", num_draft_tokens=3)
    with pytest.warns(UserWarning, match="the model's trial had 128"):
        assert model.generate(**call).equal(want)


# Layers that round a row depending on the other rows of the batch.


class RoundedByBatch(torch.nn.Module):
    """Quantizes activations to 8 bits with the scale of the largest one in the batch, as some 8-bit layers do."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.abs().max() / 127
        return self.linear((x / step).round() * step)


class Quantizer:
    """The attribute that transformers sets on a model that another library has quantized."""

    class quantization_config:
        quant_method = "of_another_library"


def test_layers_that_round_by_the_batch_are_accepted_with_a_warning() -> None:
    model = make_model("llama", **FAMILIES["llama"])
    for layer in model.model.layers:
        layer.mlp.up_proj = RoundedByBatch(layer.mlp.up_proj)
    assert "relative error" in (support_of(model).reason or "")
    model.hf_quantizer = Quantizer()
    with pytest.warns(UserWarning, match="nearly equal scores may be chosen differently"):
        specdec.enable(model, "prompt_lookup", num_draft_tokens=3)
    model.generate(**prompts(3), max_new_tokens=8)
    assert specdec.last_stats(model) is not None


def test_quantized_layers_that_do_not_round_by_the_batch_give_no_warning() -> None:
    model = make_model("llama", **FAMILIES["llama"])
    model.hf_quantizer = Quantizer()
    assert support_of(model) == Support()
