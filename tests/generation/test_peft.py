"""Models with peft's adapters: a PeftModel writes its plain text, however its adapters change between calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import specdec
from tests.generation.test_routing import assert_served, count_trials, result_of, stock_class
from tests.helpers.families import FAMILIES, make_model, prompts
from tests.helpers.plain import pair

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORAS = {"q and v": ("q_proj", "v_proj"), "all linear layers": ALL_LINEAR}
NEW = {"max_new_tokens": 12}


def lora(targets: tuple[str, ...] = LORAS["q and v"], **values: Any) -> Any:
    """An adapter with random weights, large enough that its text is another."""
    return peft.LoraConfig(
        r=4, lora_alpha=32, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM", **values
    )


def base() -> Any:
    return make_model("llama", **FAMILIES["llama"])


def adapted(config: Any = None, model: Any = None, seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return peft.get_peft_model(base() if model is None else model, config or lora()).eval()


def add_adapter(model: Any, name: str, config: Any, seed: int = 4) -> None:
    torch.manual_seed(seed)
    model.add_adapter(name, config)


def text_of(model: Any, batch_size: int = 4) -> Any:
    return result_of(model, prompts(batch_size) | NEW)[0]


def served(model: Any, **call: Any) -> str | None:
    """As test_routing's, of a call through the PeftModel, at both batch sizes: -> the reason of the stock loop."""
    reasons = {_served(model, prompts(batch_size) | NEW | call) for batch_size in (1, 4)}
    assert len(reasons) == 1
    return reasons.pop()


def _served(model: Any, call: dict[str, Any]) -> str | None:
    inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    if isinstance(call.get("adapter_names"), list):
        call["adapter_names"] = call["adapter_names"][: len(call["input_ids"])]
    with stock_class(inner):
        want, _ = result_of(model, call)
    got, given = result_of(model, call)
    assert not isinstance(want, str), want
    assert got == want
    if specdec.last_stats(model) is not None:
        assert given == []
        return None
    assert len(given) == 1
    return given[0]


@pytest.mark.parametrize("kind", ["model", "prompt_lookup"])
@pytest.mark.parametrize("targets", LORAS)
def test_lora(targets: str, kind: str) -> None:
    model = adapted(lora(LORAS[targets]))
    plain = text_of(model)
    assert plain != text_of(base())
    assert specdec.enable(model, pair("llama")[1] if kind == "model" else kind, num_draft_tokens=3) is model
    assert served(model) is None
    assert specdec.last_stats(model) is specdec.last_stats(model.get_base_model())
    model.merge_adapter()
    assert served(model) is None
    model.unmerge_adapter()
    assert served(model) is None
    specdec.disable(model)
    assert type(model.get_base_model()) is LlamaForCausalLM
    assert specdec.last_stats(model) is None
    assert text_of(model) == plain


def test_adapters_that_change_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    specdec.enable(model, "prompt_lookup", num_draft_tokens=3)
    tried = count_trials(monkeypatch)
    add_adapter(model, "second", lora(ALL_LINEAR))
    texts = []
    for _ in range(2):
        for name in ("default", "second"):
            model.set_adapter(name)
            assert served(model) is None
            texts.append(text_of(model))
        with model.disable_adapter():
            assert served(model) is None
            texts.append(text_of(model))
        counted = len(tried)
    assert texts[:3] == texts[3:]
    assert len({str(text) for text in texts}) == 3
    assert texts[2] == text_of(base())
    assert len(tried) == counted, "states that were tried before are not tried again"
    model.delete_adapter("second")
    assert served(model) is None
    add_adapter(model, "third", lora(lora_dropout=0.5))
    model.set_adapter("third")
    with pytest.raises(ValueError, match="in training mode, so dropout would"):  # peft adds modules in that mode
        model.generate(**prompts(4), **NEW)
    model.eval()
    assert served(model) is None
    whole = model.merge_and_unload()
    assert type(whole) is not LlamaForCausalLM, "it is still the enabled model"
    assert served(whole) is None


def test_a_base_model_that_is_enabled_before_it_is_adapted() -> None:
    model = specdec.enable(base(), "prompt_lookup", num_draft_tokens=3)
    plain = text_of(model)
    wrapped = adapted(model=model)
    assert served(wrapped) is None
    assert served(model) is None
    assert text_of(model) == text_of(wrapped) != plain
    assert wrapped.unload() is model
    assert served(model) is None
    assert text_of(model) == plain


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_peft_model_drafts(as_keyword: bool) -> None:
    model, draft = base(), adapted(model=base())
    if as_keyword:
        specdec.enable(model)
    else:
        specdec.enable(model, draft, num_draft_tokens=3)
    call = {"assistant_model": draft, "num_assistant_tokens": 3} if as_keyword else {}
    want = text_of(base())
    for change in (lambda: None, draft.merge_adapter, lambda: add_adapter(draft, "second", lora(ALL_LINEAR))):
        change()
        got, given = result_of(model, prompts(4) | NEW | call)
        assert (got, given) == (want, [])
        assert specdec.last_stats(model).num_draft_tokens > 0
    specdec.enable(adapted(model=model), draft.get_base_model(), num_draft_tokens=3)
    assert served(model) is None


def several(adapter: str = "second") -> Any:
    model = adapted()
    add_adapter(model, adapter, lora(ALL_LINEAR))
    return model


TOKENS = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
IDS = "prepare_inputs_for_generation does not feed the ids of the text"
HOOK = r"a hook on model\.layers\.0\.self_attn\.q_proj would see several positions"
ROWS = ["default", "second", "__base__", "second"]
# How a model is made, its calls' keywords, a pattern of the reason (None: specdec serves them).
METHODS: dict[str, tuple[Callable[[], Any], dict[str, Any], str | None]] = {
    "dora": (lambda: adapted(lora(use_dora=True)), {}, None),
    "prompt tuning": (lambda: adapted(peft.PromptTuningConfig(**TOKENS)), {}, IDS),
    "prefix tuning": (lambda: adapted(peft.PrefixTuningConfig(**TOKENS)), {}, "feeds (another cache|other positions)"),
    "p-tuning": (lambda: adapted(peft.PromptEncoderConfig(**TOKENS, encoder_hidden_size=16)), {}, IDS),
    "aLoRA": (lambda: adapted(lora(alora_invocation_tokens=[49])), {}, HOOK),
    "adapter_names": (several, {"adapter_names": ROWS}, HOOK),
}


@pytest.mark.parametrize("name", METHODS)
def test_methods(name: str) -> None:
    make, call, words = METHODS[name]
    model = make()
    assert text_of(model) != text_of(base())
    specdec.enable(model, "prompt_lookup", num_draft_tokens=3)
    assert_served(served(model, **call), words)
    if name == "adapter_names":
        assert served(model) is None, "the hooks are gone with the call"


def test_a_prompt_that_is_learned_by_a_model_that_is_enabled_already() -> None:
    model = specdec.enable(base(), pair("llama")[1], num_draft_tokens=3)
    wrapped = adapted(peft.PromptTuningConfig(**TOKENS), model)
    assert_served(served(wrapped), IDS)
    assert served(model) is None, "the base model alone has no soft prompt"
