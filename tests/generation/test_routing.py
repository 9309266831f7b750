"""Which calls specdec serves, and which the stock loop, with a reason; the text is plain generate()'s either way."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.generation.utils import GenerationMixin

import specdec
import specdec.runtime.support
from tests.helpers.families import CONTEXT, FAMILIES, VOCAB_SIZE, make_model, prompts
from tests.helpers.plain import WIDTH, pair, tokenizer

STOCK_LOOP = "specdec leaves this call to the stock loop: "
NEW = {"max_new_tokens": 12}
CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"


def fresh(model_type: str = "llama", **values: Any) -> Any:
    return make_model(model_type, **FAMILIES[model_type] | values)


def fresh_draft(model_type: str = "llama") -> Any:
    return copy.deepcopy(pair(model_type)[1])


@contextmanager
def stock_class(model: PreTrainedModel) -> Iterator[None]:
    """Within, the enabled model is of its own class, so that generate() is transformers'."""
    enabled = type(model)
    model.__class__ = enabled.__mro__[1]
    try:
        yield
    finally:
        model.__class__ = enabled


def result_of(model: PreTrainedModel, call: dict[str, Any]) -> tuple[Any, list[str]]:
    """What generate() returns, or its error as text, and specdec's warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.manual_seed(0)
        try:
            text = model.generate(**call)
            result = (text if isinstance(text, Tensor) else text.sequences).tolist()
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
    return result, [str(warning.message) for warning in caught if "specdec" in str(warning.message)]


def served(model: Any, call: dict[str, Any], exact: bool = True) -> str | None:
    """Compare a call of an enabled model with plain generate(): -> the reason of the stock loop, or None.

    An error that both raise is a reason too. exact=False: 16-bit logits are rounded, so texts may differ at a near tie.
    """
    with stock_class(model):
        want, _ = result_of(model, call)
    got, given = result_of(model, call)
    if isinstance(want, str) or exact:
        assert got == want
    else:
        assert_equal_but_for_ties(model, want, got)
    if isinstance(want, str):
        return want
    if specdec.last_stats(model) is not None:
        assert given == []
        return None
    assert len(given) == 1
    assert given[0].startswith(STOCK_LOOP)
    return given[0].removeprefix(STOCK_LOOP)


@torch.no_grad()
def assert_equal_but_for_ties(model: Any, want: list[list[int]], got: list[list[int]]) -> None:
    """Where texts of such prompts first differ, the model's logits for the two ids are as good as equal."""
    assert [len(row) for row in got] == [len(row) for row in want]
    starts = (1 - prompts(len(want))["attention_mask"]).sum(1).tolist()
    for start, speculative, plain in zip(starts, got, want, strict=True):
        at = next((i for i, (one, other) in enumerate(zip(speculative, plain, strict=True)) if one != other), None)
        if at is not None:
            logits = model(input_ids=torch.tensor([plain[start:at]])).logits[0, -1].float()
            assert abs(logits[speculative[at]] - logits[plain[at]]) < 0.1 * logits.std()


def assert_served(reason: str | None, words: str | None) -> None:
    """words: a pattern of the reason; None if specdec has to serve the call."""
    if words is None:
        assert reason is None
    else:
        assert reason is not None, "specdec served the call"
        assert re.search(words, reason), reason


# -- prepare_inputs_for_generation and forward of the model's own


class Shifted(LlamaForCausalLM):
    """Counts positions from 1."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return inputs | {"position_ids": inputs["position_ids"] + 1}


class LaterIds(LlamaForCausalLM):
    """Feeds another id, in every forward but the first."""

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        return inputs if is_first_iteration else inputs | {"input_ids": (inputs["input_ids"] + 1) % VOCAB_SIZE}


class Masked(LlamaForCausalLM):
    """Hides the first column."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.clone()
        mask[:, 0] = 0
        return super().prepare_inputs_for_generation(input_ids, attention_mask=mask, **kwargs)


class Scaled(LlamaForCausalLM):
    """Has an input of its own."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        return inputs | {"scale": -1.0}

    def forward(self, *args: Any, scale: float = 1.0, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = scale * outputs.logits
        return outputs


class Embedded(LlamaForCausalLM):
    """A soft prompt: feeds embeddings in place of the ids of its first forward."""

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration:
            inputs["inputs_embeds"] = 0.5 * self.get_input_embeddings()(inputs.pop("input_ids"))
        return inputs


class Odd(LlamaForCausalLM):
    """Feeds positions that cannot be compared, in every forward but the first."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        odd = {} if kwargs.get("is_first_iteration") else {"position_ids": Positions(inputs["position_ids"])}
        return inputs | odd

    def forward(self, *args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        position_ids = position_ids.values if isinstance(position_ids, Positions) else position_ids
        return super().forward(*args, position_ids=position_ids, **kwargs)


class Positions:
    def __init__(self, values: Tensor) -> None:
        self.values = values


class Raising(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not today")


class Careful(LlamaForCausalLM):
    """Raises after the first forward where the cache is not what a forward of its own leaves."""

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        assert type(cache) is DynamicCache
        if not is_first_iteration and cache.layers[0].keys.shape[1] != 2:
            raise TypeError("of another kind\nand a second line")
        return super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)


class Prefixed(LlamaForCausalLM):
    """Feeds a cache of its own."""

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration:
            inputs[CACHE] = DynamicCache(config=self.config)
            keys = torch.ones(len(inputs["input_ids"]), 2, 3, 8)
            for layer in range(2):
                inputs[CACHE].update(keys, keys, layer)
        return inputs


class Updating(LlamaForCausalLM):
    """Skips a position after the prompt."""

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **kwargs: Any) -> Any:
        width = model_kwargs["position_ids"].shape[-1]
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if width == WIDTH:
            model_kwargs["position_ids"][:, -1] += 1
        return model_kwargs


class Plain(LlamaForCausalLM):
    """Overrides all and changes nothing."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: Any, **kwargs: Any) -> Any:
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)


class NoTokenTypes(LlamaForCausalLM):
    """Adds inputs without content."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        inputs = super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)
        return inputs | {"token_type_ids": None, "pictures": []}

    def forward(self, *args: Any, token_type_ids: Any = None, pictures: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


OWN_CLASSES: dict[type, str | None] = {
    Shifted: "feeds other positions",
    LaterIds: "does not feed the ids of the text",
    Masked: "feeds another attention_mask",
    Scaled: "adds scale|not given position_ids",
    Embedded: "does not feed the ids of the text",
    Prefixed: "feeds another cache",
    Careful: r"could not be compared \(TypeError: of another kind\)$",
    Odd: r"could not be compared \(AttributeError: ",
    Updating: "feeds other positions",
    Plain: None,
}


@functools.cache
def of_class(cls: type) -> Any:
    model = cls(pair("llama")[0].config).eval()
    model.load_state_dict(pair("llama")[0].state_dict())
    model.generation_config = pair("llama")[0].generation_config
    return model


@pytest.mark.parametrize("kind", ["model", "prompt_lookup"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("cls", OWN_CLASSES, ids=lambda cls: cls.__name__)
def test_a_model_that_prepares_its_inputs_itself(cls: type, batch_size: int, kind: str) -> None:
    model = specdec.enable(of_class(cls), pair("llama")[1] if kind == "model" else kind, num_draft_tokens=3)
    assert_served(served(model, prompts(batch_size) | NEW), OWN_CLASSES[cls])


def test_inputs_without_content_are_served() -> None:
    model = specdec.enable(of_class(NoTokenTypes), "prompt_lookup")
    assert served(model, prompts(1) | NEW) is None


def test_an_error_of_a_model_that_prepares_its_inputs_is_its_own() -> None:
    model = specdec.enable(of_class(Raising), "prompt_lookup")
    assert served(model, prompts(4) | NEW) == "RuntimeError: not today"


@pytest.mark.parametrize("name", ["prepare_inputs_for_generation", "_update_model_kwargs_for_generation"])
def test_methods_that_are_replaced_after_enable(name: str) -> None:
    model = specdec.enable(fresh(), "prompt_lookup", num_draft_tokens=3)
    own, call = getattr(model, name), prompts(4) | NEW
    setattr(model, name, lambda *args, **kwargs: own(*args, **kwargs))
    assert served(model, call) is None

    def shifted(*args: Any, **kwargs: Any) -> Any:
        inputs = own(*args, **kwargs)
        return inputs | {"position_ids": inputs["position_ids"] + 1}

    setattr(model, name, shifted)
    assert_served(served(model, call), "feeds other positions")
    delattr(model, name)
    assert served(model, call) is None


class Hiding(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def lambda_forward(model: Any) -> Any:
    own = model.forward
    model.forward = lambda **inputs: own(**inputs)
    return model


def wrapped_forward(model: Any) -> Any:
    own = model.forward
    model.forward = functools.wraps(own)(lambda *args, **kwargs: own(*args, **kwargs))
    return model


def narrow_forward(model: Any) -> Any:
    """A forward that takes no positions and passes nothing on."""
    own = model.forward

    def forward(input_ids: Any, attention_mask: Any = None, use_cache: Any = None, **cache: Any) -> Any:
        return own(input_ids, attention_mask, use_cache=use_cache, **{CACHE: cache.get(CACHE)})

    model.forward = lambda return_dict=None, **inputs: forward(**inputs)
    return model


FORWARDS: dict[str, Callable[[], Any]] = {
    "subclass": lambda: copy.deepcopy(of_class(Hiding)),
    "lambda": lambda: lambda_forward(fresh()),
    "wraps": lambda: wrapped_forward(fresh()),
}


@pytest.mark.parametrize("kind", ["model", "prompt_lookup"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("has_mask", [True, False])
def test_a_forward_that_hides_its_parameters(name: str, batch_size: int, kind: str, has_mask: bool) -> None:
    model = specdec.enable(FORWARDS[name](), pair("llama")[1] if kind == "model" else kind, num_draft_tokens=3)
    call = prompts(batch_size) | NEW
    if not has_mask:
        del call["attention_mask"]
    is_hidden = name != "wraps" and batch_size == 4 and has_mask
    assert_served(served(model, call), "not given position_ids" if is_hidden else None)


def test_a_forward_that_is_wrapped_after_enable() -> None:
    model = specdec.enable(fresh(), "prompt_lookup", num_draft_tokens=3)
    lambda_forward(model)
    assert served(model, prompts(1) | NEW) is None
    assert_served(served(model, prompts(4) | NEW), "not given position_ids")
    del model.forward
    assert served(model, prompts(4) | NEW) is None


def test_a_forward_without_positions() -> None:
    with pytest.raises(ValueError, match=r"cannot decode speculatively: (it does not run|on a ragged batch)"):
        specdec.enable(narrow_forward(fresh()), "prompt_lookup")
    model = specdec.enable(fresh(), "prompt_lookup")
    narrow_forward(model)
    assert_served(served(model, prompts(1) | NEW), "does not run|differ")


@pytest.mark.parametrize("context", [3, 4, 5, 6, 7, 8])
def test_a_trial_fits_a_short_context(context: int) -> None:
    model = specdec.enable(fresh(max_position_embeddings=context), "prompt_lookup", num_draft_tokens=1)
    assert served(model, {"input_ids": IDS[:1, :2], "max_new_tokens": context}) is None


def test_the_ensemble_of_target_and_draft_goes_to_the_stock_loop() -> None:
    model = specdec.enable(fresh(), fresh_draft())
    model.generation_config.assistant_ensemble_weight = 0.5
    with stock_class(model):
        want = model.generate(**prompts(1), **NEW, assistant_model=fresh_draft())
    with pytest.warns(UserWarning, match=f"{STOCK_LOOP}assistant_ensemble_weight mixes") as caught:
        got = model.generate(**prompts(1), **NEW, assistant_model=fresh_draft())
    assert got.tolist() == want.tolist()
    assert specdec.last_stats(model) is None
    assert [warning.filename for warning in caught] == [__file__]


def test_other_inputs_than_ids_and_mask() -> None:
    model = specdec.enable(fresh("gpt2"), "prompt_lookup")
    ones = torch.ones_like(prompts(4)["input_ids"])
    assert_served(served(model, prompts(4) | NEW | {"token_type_ids": ones}), "^token_type_ids was passed")
    assert_served(served(model, prompts(4) | NEW | {"token_type_ids": 0 * ones}), "^token_type_ids was passed")
    assert served(model, prompts(4) | NEW | {"token_type_ids": None}) is None
    model = specdec.enable(fresh(), "prompt_lookup")
    assert_served(served(model, prompts(4) | NEW | {"token_type_ids": ones}), "^ValueError: .*token_type_ids")
    assert served(model, prompts(4) | NEW | {"logits_to_keep": 3}) is None
    assert_served(served(model, prompts(1) | NEW | {"logits_to_keep": torch.tensor([0])}), "adds logits_to_keep")


# -- padding and length

IDS = prompts(4)["input_ids"]
LEFT = prompts(4)["attention_mask"]
RIGHT = torch.ones(4, WIDTH, dtype=torch.int64).tril(diagonal=7)  # rows of 8 to 11 tokens, padded on the right
HOLE = torch.ones(4, WIDTH, dtype=torch.int64)
HOLE[2, 4:6] = 0
EMPTY_ROW = LEFT.clone()
EMPTY_ROW[2] = 0
LONG = torch.randint(3, VOCAB_SIZE, (4, CONTEXT + 2), generator=torch.Generator().manual_seed(3))
LONG_MASK = (torch.arange(CONTEXT + 2) >= torch.tensor([0, 5, 40, 2])[:, None]).long()
ENDS_IN_PAD = torch.cat([LONG[:, :9], torch.zeros(4, 2, dtype=torch.int64)], dim=1)
CALLS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "right padding": ("hides the end of .*padding_side = 'left'", {"input_ids": IDS + 3, "attention_mask": RIGHT}),
    "right padding, batch 1": (
        "hides the end of a prompt",
        {"input_ids": LONG[:1, :WIDTH], "attention_mask": RIGHT[:1]},
    ),
    "pad ids at the end, no mask": ("hides the end of a prompt", {"input_ids": ENDS_IN_PAD}),
    "pad ids at the end, no mask, batch 1": ("hides the end of a prompt", {"input_ids": ENDS_IN_PAD[:1]}),
    "pad ids at the end, all shown": (None, {"input_ids": ENDS_IN_PAD, "attention_mask": torch.ones_like(ENDS_IN_PAD)}),
    "a row of padding": ("row 2 of its attention_mask is all zeros", {"input_ids": IDS, "attention_mask": EMPTY_ROW}),
    "nothing but padding": (
        "row 0 of its attention_mask is all zeros",
        {"input_ids": IDS[:1], "attention_mask": 0 * IDS[:1]},
    ),
    "a hole": ("hides more than left padding", {"input_ids": IDS + 3, "attention_mask": HOLE}),
    "a hole, batch 1": ("hides more than left padding", {"input_ids": IDS[:1], "attention_mask": HOLE[2:3]}),
    "a mask of fewer columns": ("^RuntimeError: ", {"input_ids": IDS, "attention_mask": LEFT[:, 1:]}),
    "a mask of more columns": (
        r"^its attention_mask is \[4, 16\] and its prompts are \[4, 11\]",
        {"input_ids": IDS, "attention_mask": LONG_MASK[:, 3:19]},
    ),
    "a mask of halves": ("feeds other positions", {"input_ids": IDS, "attention_mask": 0.5 * LEFT}),
    "a mask of floats": (None, {"input_ids": IDS, "attention_mask": LEFT.float()}),
    "longer than the context": ("^its prompt has 130 tokens, more than the .* 128$", {"input_ids": LONG}),
    "longer than the context, batch 1": ("130 tokens", {"input_ids": LONG[:1]}),
    "longer than the context, padded": ("130 tokens", {"input_ids": LONG * LONG_MASK, "attention_mask": LONG_MASK}),
    "longer than the context by padding alone": (
        None,
        {"input_ids": (LONG * LONG_MASK)[1:3], "attention_mask": LONG_MASK[1:3]},
    ),
    "up to the context": (None, {"input_ids": LONG[:, :CONTEXT]}),
    "past the context": (None, {"input_ids": LONG[:, : CONTEXT - 4]}),
    "cache_implementation": (None, prompts(4) | {"cache_implementation": "dynamic"}),
}


@pytest.mark.parametrize("name", CALLS)
def test_padding_and_length(name: str) -> None:
    words, call = CALLS[name]
    for drafter in (pair("llama")[1], "prompt_lookup"):
        model = specdec.enable(pair("llama")[0], drafter, num_draft_tokens=3)
        assert_served(served(model, call | NEW), words)


def test_beyond_learned_positions_plain_decodings_error_is_raised() -> None:
    model = specdec.enable(fresh("gpt2"), "prompt_lookup", num_draft_tokens=3)
    for length in (CONTEXT - 4, CONTEXT + 2):
        for batch_size in (1, 4):
            assert_served(served(model, {"input_ids": LONG[:batch_size, :length]} | NEW), "^IndexError")
    assert served(model, {"input_ids": LONG[:, : CONTEXT - 4], "max_new_tokens": 5}) is None


# -- training mode


def count_trials(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that are tried from now on."""
    tried: list[Any] = []
    trial = specdec.runtime.support._trial
    monkeypatch.setattr(
        specdec.runtime.support, "_trial", lambda model, length: tried.append(model) or trial(model, length)
    )
    return tried


def test_a_model_that_is_trained_between_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = fresh(), fresh_draft()
    specdec.enable(model, draft, num_draft_tokens=3)
    tried = count_trials(monkeypatch)
    counts = []
    for _ in range(3):
        model.train()
        draft.train()
        state = torch.get_rng_state()
        with torch.no_grad():
            assert served(model, prompts(4) | NEW) is None
            torch.set_rng_state(state)
            model.generate(**prompts(4), **NEW)
        assert torch.equal(state, torch.get_rng_state())
        assert model.training
        model.zero_grad()
        model(input_ids=prompts(1)["input_ids"], labels=prompts(1)["input_ids"]).loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        model.eval()
        draft.eval()
        assert served(model, prompts(4) | NEW) is None
        counts.append(len(tried))
    assert counts[0] <= 4
    assert counts == counts[:1] * 3, "states that were tried before are not tried again"


def test_a_model_is_enabled_in_training_mode() -> None:
    model = fresh().train()
    specdec.enable(model, fresh_draft().train(), num_draft_tokens=3)
    assert model.training
    assert served(model, prompts(4) | NEW) is None


def with_dropout(model_type: str) -> Any:
    model = fresh(model_type)
    if model_type == "llama":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
    return model


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_dropout_that_acts_is_an_error(model_type: str) -> None:
    model = specdec.enable(with_dropout(model_type), "prompt_lookup").train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"in training mode, so dropout would change its output; call model\.eval\(\)"):
        model.generate(**prompts(4), **NEW)
    assert torch.equal(state, torch.get_rng_state())
    model.eval()
    assert served(model, prompts(4) | NEW) is None
    draft = with_dropout(model_type)
    specdec.enable(model, draft).eval()
    draft.train()
    with pytest.raises(ValueError, match=r"the draft model is in training mode"):
        model.generate(**prompts(4), **NEW)


def test_dropout_of_one_module_is_an_error() -> None:
    model = specdec.enable(fresh("gpt2"), "prompt_lookup")
    model.transformer.h[1].mlp.dropout.train()
    with pytest.raises(ValueError, match="in training mode"):
        model.generate(**prompts(4), **NEW)


def test_gradient_checkpointing_in_training_mode() -> None:
    model = specdec.enable(fresh(), "prompt_lookup")
    model.activation_checkpointing_enable()
    assert served(model, prompts(4) | NEW) is None
    model.train()
    with torch.no_grad():
        assert_served(served(model, prompts(4) | NEW), "^gradient checkpointing in training mode drops the KV cache")
    model(input_ids=IDS, labels=IDS).loss.backward()
    model.activation_checkpointing_disable()
    assert served(model, prompts(4) | NEW) is None


# -- autocast

AUTOCAST = {False: nullcontext, True: lambda: torch.autocast("cpu", dtype=torch.bfloat16)}


@pytest.mark.parametrize("kind", ["model", "prompt_lookup"])
@pytest.mark.parametrize("at_call", [False, True])
@pytest.mark.parametrize("at_enable", [False, True])
def test_autocast(at_enable: bool, at_call: bool, kind: str) -> None:
    model = fresh()
    with AUTOCAST[at_enable]():
        specdec.enable(model, fresh_draft() if kind == "model" else kind, num_draft_tokens=3)
    with AUTOCAST[at_call]():
        assert served(model, prompts(4) | NEW, exact=not at_call) is None
        assert served(model, prompts(1) | NEW, exact=not at_call) is None
    assert specdec.last_stats(model).num_emitted_tokens == 12


# -- a model that changes between enable() and a call


def resized(size: int) -> Callable[[Any], None]:
    return lambda model: model.resize_token_embeddings(size)


def narrower_head(model: Any) -> None:
    head = nn.Linear(model.config.hidden_size, VOCAB_SIZE - 30, bias=False)
    head.weight.data = model.lm_head.weight.data[: VOCAB_SIZE - 30].clone()
    model.lm_head = head


def wider_head(model: Any) -> None:
    """Its additional ids have no embedding, and are never the best."""
    head = nn.Linear(model.config.hidden_size, VOCAB_SIZE + 3, bias=False)
    head.weight.data = torch.cat([model.lm_head.weight.data, torch.zeros(3, model.config.hidden_size)])
    model.lm_head = head


def implementation(name: str) -> Callable[[Any], None]:
    return lambda model: model.set_attn_implementation(name)


def adapted(model: Any) -> None:
    """As adapters do: a module replaces another."""

    class Adapted(nn.Module):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base, self.more = base, nn.Linear(32, 32, bias=False)

        def forward(self, states: Tensor) -> Tensor:
            return self.base(states) + self.more(states)

    torch.manual_seed(7)
    model.model.layers[0].self_attn.q_proj = Adapted(model.model.layers[0].self_attn.q_proj)


def mixed(model: Any) -> None:
    model.model.layers[0].mlp = Mixing(model.model.layers[0].mlp)


class Mixing(nn.Module):
    """Adds the mean of the window, which is one position in plain decoding and several in a verification."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, states: Tensor) -> Tensor:
        return self.base(states) + 0.5 * self.base(states.mean(1, keepdim=True))


# How a model changes; the reason of the stock loop where it is the target, and the draft (None: specdec serves it).
CHANGES: dict[str, tuple[Callable[[Any], Any], str | None, str | None]] = {
    "eager": (implementation("eager"), None, None),
    "sdpa": (implementation("sdpa"), None, None),
    "grown": (resized(VOCAB_SIZE + 11), None, None),
    "shrunk": (resized(VOCAB_SIZE - 20), None, None),
    "a narrower head": (narrower_head, None, None),
    "a wider head": (wider_head, None, None),
    "double": (lambda model: model.double(), None, None),
    "bfloat16": (lambda model: model.bfloat16(), None, None),
    "meta": (lambda model: model.to("meta"), "Error|offloaded", "^ValueError: the draft model is on meta"),
    "a module in place of another": (adapted, None, None),
    "positions that mix": (mixed, "differ", "cannot draft: on a ragged batch"),
}


@pytest.mark.parametrize("who", ["target", "draft"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_model_that_changes_after_enable(name: str, who: str) -> None:
    change, *words = CHANGES[name]
    model, draft = fresh(), fresh_draft()
    specdec.enable(model, draft, num_draft_tokens=3)
    assert served(model, prompts(1) | NEW) is None
    torch.manual_seed(0)
    change(model if who == "target" else draft)
    reason = words[0] if who == "target" else words[1]
    for batch_size, sampled in ((1, {}), (4, {"do_sample": True, "top_k": 1}), (4, {})):
        call = prompts(batch_size, vocab_size=VOCAB_SIZE - 30) | NEW | sampled
        if reason is not None and reason.startswith("^ValueError"):  # plain decoding has no draft model
            with pytest.raises(ValueError, match=reason.removeprefix("^ValueError: ")):
                model.generate(**call)
        else:
            assert_served(served(model, call, exact=name != "bfloat16"), reason)


def test_a_prompt_that_the_embeddings_no_longer_hold() -> None:
    model = specdec.enable(fresh(), "prompt_lookup")
    model.resize_token_embeddings(VOCAB_SIZE - 20)
    assert_served(served(model, prompts(4) | NEW), "^IndexError: index out of range")  # plain decoding's own


def test_a_sample_of_a_head_narrower_than_the_config_says() -> None:
    for who in ("target", "draft"):
        model, draft = fresh(), fresh_draft()
        specdec.enable(model, draft, num_draft_tokens=3)
        narrower_head(model if who == "target" else draft)
        call = prompts(4) | {"max_new_tokens": 40, "do_sample": True, "temperature": 3.0}
        text = model.generate(**call)[:, WIDTH:]
        assert specdec.last_stats(model).num_draft_tokens > 0
        assert (text.max() >= VOCAB_SIZE - 30) == (who == "draft")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("who", ["target", "draft"])
def test_flex_attention_is_never_run_on_a_cpu(who: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, draft = fresh(), fresh_draft()
    specdec.enable(model, draft, num_draft_tokens=3)
    changed = model if who == "target" else draft
    changed.set_attn_implementation("flex_attention")
    changed.train(training)
    stock = GenerationMixin._sample

    def stub(self: Any, input_ids: Tensor, **kwargs: Any) -> Tensor:  # flex_attention compiles for minutes
        return input_ids if who == "target" else stock(self, input_ids, **kwargs)

    monkeypatch.setattr(GenerationMixin, "_sample", stub)
    changed.forward = lambda *args, **kwargs: pytest.fail("it ran")
    for batch_size in (1, 4):
        reason = served(model, prompts(batch_size) | NEW)
        whose = "" if who == "target" else "its draft model, a LlamaForCausalLM, cannot draft: "
        assert_served(reason, f"^{whose}its attention implementation 'flex_attention' does not take a mask for each")
    changed.set_attn_implementation("sdpa")
    del changed.forward
    monkeypatch.setattr(GenerationMixin, "_sample", stock)
    assert served(model, prompts(4) | NEW) is None


@pytest.mark.parametrize("who", ["target", "draft"])
def test_hooks_of_accelerate(who: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    hooks = accelerate.hooks
    model, draft = fresh(), fresh_draft()
    specdec.enable(model, draft, num_draft_tokens=3)
    hooked, call = model if who == "target" else draft, prompts(4) | NEW
    accelerate.cpu_offload(hooked, execution_device="cpu")
    if who == "target":
        assert_served(served(model, call), "^its weights are offloaded")
    else:
        with pytest.raises(ValueError, match="the draft model is on meta"):
            model.generate(**call)
    hooks.remove_hook_from_submodules(hooked)
    assert served(model, call) is None
    hooks.attach_align_device_hook(hooked.model.layers[1], execution_device="cpu", offload=True)  # this layer alone
    assert served(model, call) is None
    hooks.remove_hook_from_submodules(hooked)
    hooks.add_hook_to_module(hooked, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert served(model, call) is None
    hooks.remove_hook_from_submodules(hooked)
    assert served(model, call) is None


def test_a_hook_of_the_user() -> None:
    model = specdec.enable(fresh(), "prompt_lookup")
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output * 1.5)
    assert_served(served(model, prompts(4) | NEW), r"^a hook on model\.layers\.0 would see several positions")
    hook.remove()
    assert served(model, prompts(4) | NEW) is None


# -- tokenizers and drafts by path

REMOTE = """
from pathlib import Path
Path(MARK).write_text("")  # in the folder: transformers runs a copy of this file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class RemoteConfig(LlamaConfig):
    model_type = "unknown"
class RemoteModel(LlamaForCausalLM): ...
class RemoteTokenizer(PreTrainedTokenizerFast): ...
"""
MODEL_MAP = {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteModel"}
TOKENIZER_MAP = {"AutoTokenizer": ["remote.RemoteTokenizer", "remote.RemoteTokenizer"]}


def edit(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def closed_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No question is put to the user, who could not answer."""
    questions = []
    monkeypatch.setattr("builtins.input", lambda *words: questions.append(words) or "n")
    monkeypatch.setattr("sys.stdin", None)
    yield
    assert questions == []


def saved(folder: Path, model: PreTrainedModel) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "remote.py").write_text(f"MARK = {str(folder / 'was_imported')!r}\n{REMOTE}")
    return folder


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "RemoteTokenizer", None])
def test_code_in_a_tokenizers_folder_is_not_run(
    tokenizer_class: str | None, tmp_path: Path, closed_input: None
) -> None:
    folders = [saved(tmp_path / name, model) for name, model in zip(("target", "draft"), pair("llama"), strict=True)]
    model = LlamaForCausalLM.from_pretrained(folders[0])
    draft = LlamaForCausalLM.from_pretrained(folders[1])
    for folder in folders:
        edit(folder / "tokenizer_config.json", auto_map=TOKENIZER_MAP, tokenizer_class=tokenizer_class)
        edit(folder / "config.json", auto_map=MODEL_MAP | TOKENIZER_MAP)
    for drafter in (draft, folders[1], str(folders[1])):
        specdec.enable(model, drafter, num_draft_tokens=3)
        assert served(model, prompts(4) | NEW) is None
    assert not list(tmp_path.rglob("was_imported"))


def test_tokenizers_that_need_code_of_their_folder_are_not_compared(tmp_path: Path, closed_input: None) -> None:
    folders = [saved(tmp_path / name, model) for name, model in zip(("target", "draft"), pair("llama"), strict=True)]
    model, draft = (LlamaForCausalLM.from_pretrained(folder) for folder in folders)
    for folder in folders:
        edit(folder / "tokenizer_config.json", auto_map=TOKENIZER_MAP, tokenizer_class="RemoteTokenizer")
        edit(folder / "config.json", auto_map=MODEL_MAP | TOKENIZER_MAP, model_type="unknown")
    specdec.enable(model, draft, num_draft_tokens=3)
    assert served(model, prompts(4) | NEW) is None
    assert not list(tmp_path.rglob("was_imported"))


def test_a_draft_that_needs_code_of_its_folder_is_refused(tmp_path: Path, closed_input: None) -> None:
    folder = saved(tmp_path, pair("llama")[1])
    edit(folder / "config.json", auto_map=MODEL_MAP, model_type="unknown", architectures=["RemoteModel"])
    model = fresh()
    with pytest.raises(ValueError, match=r"no model could be loaded from '.*': .*code"):
        specdec.enable(model, folder)
    assert type(model) is LlamaForCausalLM
    assert not list(tmp_path.rglob("was_imported"))


# -- generation modes that the model's own generation_config sets

SINGLE = ("prompt_lookup_num_tokens", "assistant_early_exit")  # transformers drafts for one row alone
# Values of the generation_config; a pattern of the reason, None if specdec serves the call.
MODES: dict[str, tuple[dict[str, Any], str | None]] = {
    "beams": ({"num_beams": 2}, "beam search is not sampling or greedy search"),
    "sampled beams": ({"num_beams": 2, "do_sample": True, "top_k": 1}, "beam sample|beam search"),
    "groups of beams": ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 1.0}, "."),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, "."),
    "DoLa": ({"dola_layers": "low"}, "."),
    "constraints": ({"force_words_ids": [[5]], "num_beams": 2}, "."),
    "sampling": ({"do_sample": True, "top_k": 1}, None),
    "sequences": ({"do_sample": True, "top_k": 1, "num_return_sequences": 3}, None),
    "sequences of greedy search": ({"num_return_sequences": 3}, "^ValueError: .*num_return_sequences"),
    "prompt lookup": ({"prompt_lookup_num_tokens": 2}, None),
    "prompt lookup of a sample": ({"prompt_lookup_num_tokens": 2, "do_sample": True, "top_k": 1}, None),
    "a dict": ({"return_dict_in_generate": True}, None),
    "scores": ({"return_dict_in_generate": True, "output_scores": True, "output_logits": True}, None),
    "scores without a dict": ({"output_scores": True}, None),
    "attentions": ({"return_dict_in_generate": True, "output_attentions": True}, "^output_attentions"),
    "a static cache": ({"cache_implementation": "static", "disable_compile": True}, "cache_implementation='static'"),
    "no cache": ({"use_cache": False}, "use_cache=False"),
    "early exit": ({"assistant_early_exit": 1}, "assistant_early_exit"),
    "guidance": ({"guidance_scale": 1.5}, None),
    "stop strings": ({"stop_strings": ["ab"]}, "^ValueError: .*stop string"),
    "chunked prefill": ({"prefill_chunk_size": 3}, None),
    "token healing": ({"token_healing": True}, "."),
}


@pytest.mark.parametrize("kind", ["model", "prompt_lookup"])
@pytest.mark.parametrize("name", MODES)
def test_modes_of_the_generation_config(name: str, kind: str) -> None:
    values, words = MODES[name]
    model = specdec.enable(of_class(Plain), pair("llama")[1] if kind == "model" else kind, num_draft_tokens=3)
    own = model.generation_config
    model.generation_config = copy.deepcopy(own)
    for key, value in values.items():
        setattr(model.generation_config, key, value)
    try:
        for batch_size in (1,) if any(key in SINGLE for key in values) else (1, 4):
            assert_served(served(model, prompts(batch_size) | NEW), words)
    finally:
        model.generation_config = own


def test_prompt_lookup_of_the_generation_config_serves_a_batch() -> None:
    model = specdec.enable(fresh(), "none")
    want = model.generate(**prompts(4), **NEW)
    model.generation_config.prompt_lookup_num_tokens = 2
    assert model.generate(**prompts(4), **NEW).tolist() == want.tolist()
    assert len(specdec.last_stats(model).acceptance_histogram) == 3
