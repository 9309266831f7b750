"""enable() and disable(): what they change, which calls go to the stock loop, and which models they refuse."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSeq2SeqLM, LlamaForCausalLM, PreTrainedModel
from transformers.generation.stopping_criteria import MaxLengthCriteria

import specdec
from specdec.generation import enable as generation_enable
from specdec.generation.state import Call
from specdec.runtime.model_forward import cache_argument, forward_parameters
from tests.helpers.families import FAMILIES, REFUSED, VOCAB_SIZE, make_model, prompts
from tests.helpers.heads import random_head
from tests.helpers.mtp import random_mtp
from tests.helpers.plain import WIDTH, continuation, drafter, target


def fresh(model_type: str = "llama", **values: Any) -> PreTrainedModel:
    return make_model(model_type, **FAMILIES[model_type] | values)


def holds_plain_text(model: PreTrainedModel, batch_size: int = 4) -> bool:
    text = model.generate(**prompts(batch_size), max_new_tokens=24)[:, WIDTH:].tolist()
    return text == continuation("llama", batch_size)


def test_enabling_keeps_the_class_in_every_visible_way() -> None:
    model = fresh()
    assert specdec.enable(model, "none") is model
    assert isinstance(model, LlamaForCausalLM)
    shown = ("__name__", "__qualname__", "__module__", "__doc__")
    assert [getattr(type(model), name) for name in shown] == [getattr(LlamaForCausalLM, name) for name in shown]
    assert str(type(model)) == str(LlamaForCausalLM)
    specdec.disable(model)
    assert type(model) is LlamaForCausalLM
    assert holds_plain_text(model)
    specdec.disable(model)
    assert type(model) is LlamaForCausalLM


def test_enabling_again_replaces_and_a_refused_enable_changes_nothing() -> None:
    model = specdec.enable(fresh(), "none")
    specdec.enable(model, drafter(), num_draft_tokens=2)
    assert type(model).__mro__[1] is LlamaForCausalLM
    with pytest.raises(ValueError, match="num_draft_tokens"):
        specdec.enable(model, "prompt_lookup", num_draft_tokens=0)
    assert holds_plain_text(model)
    assert len(specdec.last_stats(model).acceptance_histogram) == 3
    assert specdec.last_stats(model).num_draft_tokens > 0


def test_enabling_draws_no_random_numbers() -> None:
    model = fresh()
    state = torch.get_rng_state()
    specdec.enable(model, drafter())
    assert torch.equal(state, torch.get_rng_state())


def test_a_call_is_freed_without_a_garbage_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    model = specdec.enable(fresh(), drafter())
    model.generate(**prompts(1), max_new_tokens=2)
    calls: list[weakref.ref[Call]] = []

    def make_call(arguments: dict[str, Any]) -> Call:
        call = Call(arguments)
        calls.append(weakref.ref(call))
        return call

    monkeypatch.setattr(generation_enable, "Call", make_call)
    gc.disable()
    try:
        model.generate(**prompts(1), max_new_tokens=2)
        assert [call() for call in calls] == [None]
    finally:
        gc.enable()


def test_last_stats_are_those_of_the_last_call() -> None:
    model = fresh()
    assert specdec.last_stats(model) is None
    specdec.enable(model, drafter())
    assert specdec.last_stats(model) is None
    output = model.generate(**prompts(4), max_new_tokens=7, return_dict_in_generate=True)
    assert output.speculation is specdec.last_stats(model)
    assert output.speculation.num_emitted_tokens == 28
    assert "speculation" not in output, "it is an attribute, not one of the fields"
    model.generate(**prompts(1), max_new_tokens=5)
    assert specdec.last_stats(model).num_emitted_tokens == 5
    with pytest.raises(ValueError, match="empty"):
        model.generate(torch.empty(1, 0, dtype=torch.int64))
    assert specdec.last_stats(model) is None
    specdec.disable(model)
    assert specdec.last_stats(model) is None


def saved_and_loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    assert "LlamaForCausalLM" in (folder / "config.json").read_text()
    return type(drafter()).from_pretrained(folder)


def torch_saved_and_loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


COPIES: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "copy": lambda model, folder: copy.copy(model),
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "torch.save": torch_saved_and_loaded,
    "save_pretrained": saved_and_loaded,
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_an_enabled_model_is_a_normal_model(name: str, tmp_path: Path) -> None:
    model = specdec.enable(fresh(), drafter())
    model.generate(**prompts(1), max_new_tokens=3)
    made = COPIES[name](model, tmp_path)
    assert type(made) is LlamaForCausalLM
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), model.state_dict().values(), strict=True))
    assert holds_plain_text(made)
    assert specdec.last_stats(made) is None
    assert holds_plain_text(specdec.enable(made, drafter()))


def test_a_new_model_of_an_enabled_model_s_class_generates() -> None:
    model = specdec.enable(fresh(), drafter())
    made = type(model)(model.config).eval()
    made.load_state_dict(model.state_dict())
    assert holds_plain_text(made)


def test_an_enabled_model_can_be_freed() -> None:
    model = specdec.enable(fresh(), "none")
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_weights_that_were_replaced_after_enable_are_freed_with_the_next_call() -> None:
    model = specdec.enable(fresh(), drafter())
    model.generate(**prompts(1), max_new_tokens=3)
    gone = [weakref.ref(model.lm_head), weakref.ref(model.lm_head.weight)]
    model.lm_head = torch.nn.Linear(32, VOCAB_SIZE, bias=False)
    model.generate(**prompts(1), max_new_tokens=3)
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_model_can_be_trained_after_generate() -> None:
    model = specdec.enable(fresh(), drafter())
    model.generate(**prompts(4), max_new_tokens=5)
    ids = prompts(1)["input_ids"]
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_an_enabled_model_still_assists_a_stock_one() -> None:
    model, draft = fresh(), specdec.enable(copy.deepcopy(drafter()), "none")
    text = model.generate(**prompts(1), max_new_tokens=24, assistant_model=draft)
    assert text[:, WIDTH:].tolist() == continuation("llama", 1)


CACHE = cache_argument(forward_parameters(target()))


def cache_of(ids: torch.Tensor) -> Any:
    return target()(input_ids=ids[:, :-1])[CACHE]


def sampling_loop(model: PreTrainedModel, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return torch.cat([input_ids, input_ids.new_full((len(input_ids), 2), 77)], dim=1)


# Calls that go to the stock loop, by a word of the warning: (model's config, the call's keywords)
HOLE = torch.tensor([[1] * 6 + [0, 0, 1, 1, 1]])
STOCK: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], dict[str, Any]]]] = {
    "beam search": ({}, lambda ids: {"num_beams": 2}),
    "cache_implementation": ({}, lambda ids: {"cache_implementation": "static", "disable_compile": True}),
    "use_cache=False": ({}, lambda ids: {"use_cache": False}),
    "output_attentions": ({"attn": "eager"}, lambda ids: {"output_attentions": True, "return_dict_in_generate": True}),
    "output_hidden_states": ({}, lambda ids: {"output_hidden_states": True, "return_dict_in_generate": True}),
    CACHE: ({}, lambda ids: {CACHE: cache_of(ids)}),
    "inputs_embeds": ({}, lambda ids: {"inputs_embeds": target().get_input_embeddings()(ids)}),
    "position_ids": ({}, lambda ids: {"position_ids": torch.arange(WIDTH)[None] + 1}),
    "attention_mask": ({}, lambda ids: {"attention_mask": HOLE}),
    "custom_generate": ({}, lambda ids: {"custom_generate": sampling_loop}),
    "rotary frequencies": (
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "max_position_embeddings": 32,
        },
        lambda ids: {"max_new_tokens": 40},
    ),
}  # fmt: skip


def generate_with_warnings(model: PreTrainedModel, **call: Any) -> tuple[Any, list[str]]:
    """What generate() returns, and specdec's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = model.generate(**call)
    return result, [str(warning.message) for warning in caught if "specdec" in str(warning.message)]


@pytest.mark.parametrize("reason", STOCK)
def test_the_stock_loop_serves_other_calls_with_one_warning(reason: str) -> None:
    values, make_call = STOCK[reason]
    model, ids = fresh(**values), prompts(1)["input_ids"]

    def run() -> tuple[Any, list[str]]:
        call = {"max_new_tokens": 9, **make_call(ids)}
        prompt = {} if "inputs_embeds" in call else {"input_ids": ids}
        return generate_with_warnings(model, **prompt, **call)

    want, before = run()
    specdec.enable(model, drafter())
    got, warned = run()
    assert before == []
    assert len(warned) == 1
    assert reason in warned[0]
    assert specdec.last_stats(model) is None
    want, got = (text if isinstance(text, torch.Tensor) else text.sequences for text in (want, got))
    assert got.tolist() == want.tolist()
    specdec.enable(model)
    assert run()[1] == [], "no speculation was requested, so there is no warning"


def test_dynamic_rotary_frequencies_are_served_within_the_context() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = fresh(rope_parameters=rope, max_position_embeddings=32)
    want = model.generate(**prompts(4), max_length=32 - 5)
    got, warned = generate_with_warnings(
        specdec.enable(model, drafter(), num_draft_tokens=5), **prompts(4), max_length=32 - 5
    )
    assert warned == []
    assert specdec.last_stats(model).num_draft_tokens > 0
    assert got.tolist() == want.tolist()


def tiny_t5() -> PreTrainedModel:
    config = AutoConfig.for_model("t5", vocab_size=101, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    return AutoModelForSeq2SeqLM.from_config(config).eval()


@pytest.mark.parametrize("name", ["t5", *REFUSED])
def test_models_without_a_ragged_cache_are_refused(name: str) -> None:
    model = tiny_t5() if name == "t5" else make_model(name, **REFUSED[name])
    stock = type(model)
    with pytest.raises(ValueError, match=f"{stock.__name__} cannot decode speculatively: (it|its|on) "):
        specdec.enable(model, "prompt_lookup")
    assert type(model) is stock
    assert specdec.last_stats(model) is None
    with pytest.raises(ValueError, match="cannot draft"):
        specdec.enable(target(), model)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "opt", "mpt", "gpt_oss", "deepseek_v3"])
def test_bf16_models_are_accepted(model_type: str) -> None:
    model = specdec.enable(fresh(model_type).to(torch.bfloat16), "prompt_lookup")
    assert model.generate(**prompts(4), max_new_tokens=6).shape == (4, WIDTH + 6)
    assert specdec.last_stats(model).num_emitted_tokens == 24


def test_generate_may_be_called_through_the_class() -> None:
    model = specdec.enable(fresh(), drafter())
    text = LlamaForCausalLM.generate(model, **prompts(4), max_new_tokens=24)
    assert text[:, WIDTH:].tolist() == continuation("llama", 4)


def test_dynamic_rotary_frequencies_beyond_the_context_go_to_the_stock_loop_whatever_sets_the_length() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = fresh(rope_parameters=rope, max_position_embeddings=32)
    call = {"max_new_tokens": 5, "stopping_criteria": [MaxLengthCriteria(64)], **prompts(4)}
    want = model.generate(**call)
    assert specdec.enable(model, drafter()).generate(**call).tolist() == want.tolist()


def test_enable_says_in_one_line_what_a_folder_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, draft, head, layer = fresh(), tmp_path / "draft", tmp_path / "head", tmp_path / "mtp"
    fresh().save_pretrained(draft)
    random_head(model, head, draft_ids=list(range(50)))
    random_mtp(model, layer)
    for given, line in (
        (draft, f"{draft}: a draft model, LlamaForCausalLM with 2 layers"),
        (
            f"suffix+{head}",
            f"{head}: an EAGLE-3 head with 1 layer, which reads the target's hidden states 0, 1 and drafts 50 of the"
            " target's 101 ids",
        ),
        (
            layer,
            f"{layer}: an MTP head with 1 layer, which reads the target's hidden state 2 and drafts all ids",
        ),
        ("prompt_lookup", None),
    ):
        capfd.readouterr()
        specdec.enable(model, given, compile=False)
        lines = [one for one in capfd.readouterr().err.splitlines() if one.startswith("specdec: ")]
        assert lines == ([] if line is None else [f"specdec: {line}"])
