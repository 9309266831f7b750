"""Bad input raises an error that says what is wrong, what was given and what to do, and changes nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedModel

import specdec
from specdec import Draft
from specdec.drafters.prompt_lookup import PromptLookup
from tests.helpers.families import CONTEXT, FAMILIES, VOCAB_SIZE, make_model, prompts
from tests.helpers.plain import WIDTH, continuation, drafter, target, tokenizer


def writes_plain_text(model: PreTrainedModel) -> bool:
    return model.generate(**prompts(4), max_new_tokens=24)[:, WIDTH:].tolist() == continuation("llama", 4)


def refused_by_enable(error: type[Exception], words: str, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """enable() raises and leaves the model as it was, whether it was enabled or not."""
    specdec.disable(model)
    for earlier in ("stock", "enabled"):
        with pytest.raises(error, match=words):
            specdec.enable(model, *args, **kwargs)
        assert (type(model) is LlamaForCausalLM) == (earlier == "stock")
        assert writes_plain_text(model)
        assert (specdec.last_stats(model) is None) == (earlier == "stock")
        specdec.enable(model, "none")


def refused_by_generate(words: str, call: dict[str, Any], drafter: Any = "prompt_lookup", **values: Any) -> None:
    """generate() raises; afterwards both the enabled model and plain decoding work."""
    model = specdec.enable(target(), drafter, **values)
    with pytest.raises(ValueError, match=words):
        model.generate(**{"max_new_tokens": 8} | call)
    assert specdec.last_stats(model) is None
    specdec.enable(model, "prompt_lookup")
    assert writes_plain_text(model)
    specdec.disable(model)
    assert writes_plain_text(model)


@pytest.mark.parametrize("given", [0, -1, 2.5, True, "3", "Auto", None])
def test_num_draft_tokens_is_a_whole_number_or_auto(given: Any) -> None:
    words = rf"num_draft_tokens={given!r} must be a whole number, 1 or more, or 'auto'; .*drafter='none'"
    refused_by_enable(ValueError, words, target(), drafter(), num_draft_tokens=given)


@pytest.mark.parametrize("given", [CONTEXT, 10**6])
def test_num_draft_tokens_fits_the_context(given: int) -> None:
    words = f"num_draft_tokens={given} does not fit the model's context of {CONTEXT}; 2 to 8"
    refused_by_enable(ValueError, words, target(), drafter(), num_draft_tokens=given)


@pytest.mark.parametrize("given", [0, -1, CONTEXT, 2.5, True])
def test_num_assistant_tokens_of_a_call_is_checked_too(given: Any) -> None:
    refused_by_generate(
        rf"={given!r} (must be a whole number|does not fit)", prompts(4) | {"num_assistant_tokens": given}
    )


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (
            "no such drafter",
            ValueError,
            r"'no such drafter' is not one of \['mtp', 'none', 'prompt_lookup', 'suffix'\], and no model",
        ),
        (
            Path("no/such/folder"),
            ValueError,
            r"'no/such/folder' is not one of .* it is no local folder and cannot be",
        ),
        (PromptLookup, TypeError, r"<class .*PromptLookup'> must be a transformers model.* object with begin\(\)"),
        (LlamaForCausalLM, TypeError, r"<class .*LlamaForCausalLM'> must be a transformers model"),
        (3, TypeError, r"drafter=3 must be a transformers model"),
        ([], TypeError, r"drafter=\[\] must be a transformers model"),
    ],
)
def test_anything_but_a_drafter_is_refused(given: Any, error: type[Exception], words: str) -> None:
    refused_by_enable(error, words, target(), given)


@pytest.mark.parametrize(
    "given", [None, "gpt2", 3, torch.nn.Linear(2, 2), LlamaForCausalLM, LlamaModel(target().config)]
)
def test_a_target_that_cannot_generate_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match=f"takes a transformers model that can generate, got {type(given).__name__}"):
        specdec.enable(given, "none")


def test_a_draft_model_on_another_device_is_refused() -> None:
    words = "draft model is on meta, the target on cpu; move one of them"
    refused_by_enable(ValueError, words, target(), copy.deepcopy(drafter()).to("meta"))
    refused_by_generate(words, prompts(1) | {"assistant_model": copy.deepcopy(drafter()).to("meta")})


def test_a_draft_model_that_was_moved_after_enable_is_named() -> None:
    draft = copy.deepcopy(drafter())
    specdec.enable(target(), draft)
    draft.to("meta")
    with pytest.raises(ValueError, match="draft model is on meta, the target on cpu"):
        target().generate(**prompts(4), max_new_tokens=3)


@pytest.mark.parametrize("as_path", [True, False])
def test_a_draft_model_with_another_tokenizer_is_named(as_path: bool, tmp_path: Path) -> None:
    target().save_pretrained(tmp_path / "target")
    tokenizer().save_pretrained(tmp_path / "target")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "target")
    for name in ("same", "other"):
        drafter().save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    file = tmp_path / "other" / "tokenizer.json"
    text = file.read_text()
    assert '"cd": ' in text
    file.write_text(text.replace('"cd": ', '"?": ').replace('"cc": ', '"cd": ').replace('"?": ', '"cc": '))
    same, other = tmp_path / "same", tmp_path / "other"
    if not as_path:
        same, other = (LlamaForCausalLM.from_pretrained(path) for path in (same, other))
    with pytest.warns(UserWarning, match="another tokenizer than the target: 100.0% of the target's"):
        specdec.enable(model, other, num_draft_tokens=5)
    assert writes_plain_text(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specdec.enable(model, same, num_draft_tokens=5)
    assert writes_plain_text(model)
    assert specdec.last_stats(model).num_accepted_draft_tokens > 0


def test_flex_attention_on_a_cpu_is_refused() -> None:
    model = make_model("llama", **FAMILIES["llama"] | {"attn": "flex_attention"})
    with pytest.raises(
        ValueError, match=r"'flex_attention' does not take a mask for each row; .*attn_implementation='sdpa'"
    ):
        specdec.enable(model, "none")
    assert type(model) is LlamaForCausalLM
    with pytest.raises(ValueError, match="flex_attention"):
        specdec.enable(target(), model)


@pytest.mark.parametrize("who", ["target", "draft model"])
def test_dropout_in_training_mode_is_refused(who: str) -> None:
    model, draft = copy.deepcopy(target()), copy.deepcopy(drafter())
    trained = model if who == "target" else draft
    trained.config.attention_dropout = 0.5
    for layer in trained.model.layers:
        layer.self_attn.attention_dropout = 0.5
    specdec.enable(model, draft)
    trained.train()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"in training mode, so dropout would .*\.eval\(\)"):
        model.generate(**prompts(4), max_new_tokens=3)
    assert torch.equal(state, torch.get_rng_state())
    trained.eval()
    assert writes_plain_text(model)


IDS = prompts(4)["input_ids"]
PROMPTS: dict[str, tuple[str, dict[str, Any]]] = {
    "empty prompt": (r"prompt is empty .*\[1, 0\]\); pass at least one token", {"input_ids": IDS[:1, :0]}),
    "empty prompt, inputs=": (r"prompt is empty .*\[1, 0\]\)", {"inputs": IDS[:1, :0]}),
    "empty batch": (r"batch is empty .*\[0, 11\]\)", {"input_ids": IDS[:0]}),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["model", "prompt_lookup", "none"])
@pytest.mark.parametrize("name", PROMPTS)
def test_bad_prompts_are_refused(name: str, kind: str) -> None:
    words, call = PROMPTS[name]
    refused_by_generate(words, call, drafter(kind))


class Proposes:
    """A drafter whose proposal is what make(limit) returns."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self.make = make

    def begin(self, *args: Any) -> None: ...

    def propose(self, sequences: Any, limit: Tensor) -> Any:
        return self.make(limit)

    def observe(self, *args: Any) -> None: ...


def proposal(limit: Tensor, ids: Any = None, probs: Any = None, lengths: Any = None) -> Draft:
    return Draft(torch.full((4, 3), 7) if ids is None else ids, probs, limit if lengths is None else lengths)


PROPOSALS: dict[str, tuple[str, Callable[[Tensor], Any]]] = {
    "float ids": (r"ids float32 \[4, 3\]; it must return int64 \[4, K\]", partial(proposal, ids=torch.ones(4, 3))),
    "ids of another batch": (
        r"ids int64 \[2, 3\]; it must return int64 \[4, K\]", partial(proposal, ids=torch.full((2, 3), 7)),
    ),
    "flat ids": (r"ids int64 \[4\]", partial(proposal, ids=torch.full((4,), 7))),
    "ids too high": (
        rf"ids from {VOCAB_SIZE} .* is 0 … {VOCAB_SIZE - 1}", partial(proposal, ids=torch.full((4, 3), VOCAB_SIZE)),
    ),
    "ids too low": (r"ids from -1 ", partial(proposal, ids=torch.full((4, 3), -1))),
    "more ids than asked for": (r"50 ids a row", partial(proposal, ids=torch.full((4, 50), 7))),
    "int32 lengths": (r"lengths int32 \[4\]; it must", partial(proposal, lengths=torch.ones(4, dtype=torch.int32))),
    "lengths of another batch": (
        r"lengths int64 \[3\]; it must", partial(proposal, lengths=torch.ones(3, dtype=torch.int64)),
    ),
    "lengths beyond limit": (
        r"lengths \[4, 4, 4, 4\]; each must lie in", lambda limit: proposal(limit, lengths=limit + 1),
    ),
    "lengths below 0": (r"lengths \[-1, ", partial(proposal, lengths=torch.full((4,), -1))),
    "lengths beyond ids": (r"at most K=2", partial(proposal, ids=torch.full((4, 2), 7))),
    "float64 probs": (r"probs float64 ", partial(proposal, probs=torch.ones(4, 3, VOCAB_SIZE).double())),
    "narrow probs": (
        rf"probs float32 \[4, 3, 9\]; .*\[4, 3, {VOCAB_SIZE}\]", partial(proposal, probs=torch.ones(4, 3, 9)),
    ),
    "None": (r"propose returned", lambda limit: None),
    "a list": (r"returned ids as a list", partial(proposal, ids=[[7, 7, 7]] * 4)),
}  # fmt: skip


@pytest.mark.parametrize("name", PROPOSALS)
def test_a_drafter_that_breaks_the_protocol_is_named(name: str) -> None:
    words, make = PROPOSALS[name]
    refused_by_generate(
        f"Proposes.propose.*{words}" if name != "None" else words, prompts(4), Proposes(make), num_draft_tokens=3
    )


def poisoned(model: PreTrainedModel) -> PreTrainedModel:
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight[50] = torch.nan
    return model


@pytest.mark.parametrize("sample", [{}, {"do_sample": True}])
@pytest.mark.parametrize("who", ["target", "draft model"])
def test_nan_logits_are_named(who: str, sample: dict[str, Any]) -> None:
    model, draft = copy.deepcopy(target()), copy.deepcopy(drafter())
    specdec.enable(model, draft)
    broken = model if who == "target" else draft
    broken.load_state_dict(poisoned(broken).state_dict())
    if who == "draft model" and not sample:
        assert writes_plain_text(model), "a greedy draft can be no more than wrong"
        return
    with pytest.raises(ValueError, match=f"the {who} returned NaN logits .*; check its weights and dtype"):
        model.generate(**prompts(4), max_new_tokens=8, **sample)
    broken.load_state_dict((target() if who == "target" else drafter()).state_dict())
    assert writes_plain_text(model)


@pytest.mark.parametrize("who", ["target", "draft model"])
def test_nan_weights_are_named_by_enable(who: str) -> None:
    model, draft = (poisoned(target()), drafter()) if who == "target" else (target(), poisoned(drafter()))
    with pytest.raises(ValueError, match="NaN"):
        specdec.enable(model, draft)
