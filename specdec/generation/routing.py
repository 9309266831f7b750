"""Which calls of an enabled model specdec's loop serves: one table of checks, each with the reason for the stock loop.

What cannot be shown to come out as plain decoding has it goes to transformers' own loop. What generate() would feed the model is
not derived from the model's class: the model's own `prepare_inputs_for_generation` prepares the first two forwards of each call,
and the call is served only where they are what specdec feeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks as _global
from torch.nn.modules.module import _global_forward_pre_hooks as _global_pre
from transformers import Cache, DynamicCache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from specdec.runtime.runner import ModelRunner
from specdec.runtime.support import dynamic_rope_limit

OUR_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION)
OUR_MODEL_KWARGS = {"attention_mask", "position_ids", "logits_to_keep", "use_cache"}
TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}  # of a multimodal model's text: zeros
CALL_SETTINGS = {"use_cache", "logits_to_keep", "return_dict"}  # keywords of a forward that say nothing of its inputs


@dataclass
class Request:
    """One generate() call on its way to a loop.

    runner: of the enabled model. num_draft_tokens: K, or "auto". max_draft_tokens: the largest K that a step may ask for.
    arguments: of generate(), by name. mode_kwargs: what generate() keeps for the decoding loop (streamer, tokenizer, …).
    input_ids: int64 [B, L], None before generate() has prepared them.
    """

    model: Any
    runner: ModelRunner
    config: GenerationConfig
    mode: GenerationMode
    arguments: dict[str, Any]
    mode_kwargs: dict[str, Any]
    model_kwargs: dict[str, Any]
    num_draft_tokens: int | str
    max_draft_tokens: int
    input_ids: Tensor | None = None

    @property
    def mask(self) -> Tensor | None:
        """int64 or bool [B, L], None where nothing is hidden."""
        return self.model_kwargs.get("attention_mask")

    @property
    def max_length(self) -> int:
        """Positions that the call may read, drafts included."""
        criteria = self.arguments.get("stopping_criteria") or ()
        lengths = [self.config.max_length, *(c.max_length for c in criteria if type(c) is MaxLengthCriteria)]
        return int(max(lengths)) + self.max_draft_tokens


@dataclass(frozen=True)
class Route:
    """A kind of call that the stock loop serves, as the README's table has it; of a call the reason, None where it is none."""

    calls: str
    reason: Callable[[Request], str | None]


def _other_mode(request: Request) -> str | None:
    if request.mode not in OUR_MODES:
        return f"{request.mode.value.replace('_', ' ')} is not sampling or greedy search"
    if request.arguments.get("custom_generate") is not None:
        return "it brings a decoding loop of its own (custom_generate)"
    return None


def _other_drafting(request: Request) -> str | None:
    config = request.config
    if request.mode_kwargs.get("assistant_tokenizer") is not None:
        return "assistant_tokenizer: the draft model has another tokenizer"
    for name in ("assistant_early_exit", "use_mtp"):
        if getattr(config, name, None):
            return f"{name} drafts with the target itself"
    if getattr(config, "speculation_type", None) == "dflash":
        return "speculation_type='dflash' reads the target's hidden states"
    if getattr(config, "assistant_ensemble_weight", None):
        return "assistant_ensemble_weight mixes the draft model's distribution into the target's"
    return None


def _synced(request: Request) -> str | None:
    return (
        "synced_gpus: processes must run the same number of forwards"
        if request.mode_kwargs.get("synced_gpus")
        else None
    )


def _other_cache(request: Request) -> str | None:
    config = request.config
    if config.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={config.cache_implementation!r} was asked for"
    return "use_cache=False was asked for" if config.use_cache is False else None


def _other_outputs(request: Request) -> str | None:
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(request.config, name, None):
            return f"{name}=True was asked for"
    return None


def _other_inputs(request: Request) -> str | None:
    if request.arguments.get("position_ids") is not None:
        return "position_ids were passed"
    for name, value in request.model_kwargs.items():
        if name not in OUR_MODEL_KWARGS and not _says_nothing(request.model, name, value):
            return "pictures, video or sound were passed" if name == "mm_encoder_outputs" else f"{name} was passed"
    return None


def _says_nothing(model: Any, name: str, value: Any) -> bool:
    """Whether an input is as good as absent: None, no picture at all, the token types of text in a multimodal model."""
    if value is None or (isinstance(value, dict | list | tuple) and not value):
        return True
    modalities = getattr(model, "input_modalities", "text")  # one by its name, or several
    is_multimodal = not isinstance(modalities, str) and len(modalities) > 1
    return is_multimodal and name in TOKEN_TYPES and isinstance(value, Tensor) and not value.any()


def _offloaded(request: Request) -> str | None:
    return "its weights are offloaded, so it has no device of its own" if request.model.device.type == "meta" else None


def user_hook(model: nn.Module) -> str | None:
    """The reason of a model with a forward hook that torch, transformers and accelerate have not put there; else None."""
    everywhere = (*_global.values(), *_global_pre.values())
    for name, module in (("every module", None), *model.named_modules()):
        hooks = everywhere if module is None else (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if not all(map(_is_of_a_library, hooks)):
            return f"a hook on {name or 'the model'} would see several positions a forward, where plain decoding shows it one"
    return None


def _is_of_a_library(hook: Any) -> bool:
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return where.partition(".")[0] in ("torch", "transformers", "accelerate")


def _growing_rope(request: Request) -> str | None:
    limit = dynamic_rope_limit(request.model)
    if limit is not None and request.max_length > limit:
        return f"beyond {limit} positions its rotary frequencies change with the longest row of a batch"
    return None


def _other_padding(request: Request) -> str | None:
    if request.mask is None:
        return None
    assert request.input_ids is not None
    if request.mask.shape != request.input_ids.shape:
        return f"its attention_mask is {list(request.mask.shape)} and its prompts are {list(request.input_ids.shape)}"
    mask = request.mask.bool()
    if not mask.any(1).all():
        return f"row {int((~mask.any(1)).nonzero()[0])} of its attention_mask is all zeros, an empty prompt"
    if not mask[:, -1].all():
        return "its attention_mask hides the end of a prompt; for speculation set tokenizer.padding_side = 'left'"
    return None if (mask[:, 1:] >= mask[:, :-1]).all() else "its attention_mask hides more than left padding"


def _too_long(request: Request) -> str | None:
    assert request.input_ids is not None
    context = request.runner.context
    length = int(request.input_ids.shape[1] if request.mask is None else request.mask.long().sum(1).max())
    if context is not None and length > context:
        return f"its prompt has {length} tokens, more than the model's context of {context}"
    return None


def _fed_otherwise(request: Request) -> str | None:
    """Compare what generate() would feed the model, in its first two forwards, with what specdec does."""
    model, ids, mask = request.model, request.input_ids, request.mask
    assert ids is not None
    cache = DynamicCache(config=request.runner.config)
    kwargs = request.model_kwargs | {request.runner.cache_argument: cache}
    shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    positions = (shown.long().cumsum(1) - 1).clamp(min=0)
    if _is_stock(model):  # which feeds what it is given
        return _difference(request, kwargs | {"input_ids": ids}, cache, ids, mask, positions, shown)
    try:
        first = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        if reason := _difference(request, first, cache, ids, mask, positions, shown):
            return reason
        entries = torch.zeros(len(ids), 1, ids.shape[1], 1)  # of the prompt, since models ask for the cache's length
        cache.update(entries, entries, 0)
        outputs: Any = CausalLMOutputWithPast(**{request.runner.cache_argument: cache})  # type: ignore[arg-type]
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
        longer = torch.cat([ids, ids[:, -1:]], dim=1)
        second = model.prepare_inputs_for_generation(longer, next_sequence_length=1, **kwargs)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        last = torch.ones_like(shown[:, -1:])
        return _difference(request, second, cache, ids[:, -1:], mask, positions[:, -1:] + 1, last)
    except Exception as error:  # a model's own code, called outside its loop, may fail in any way
        return f"its prepare_inputs_for_generation could not be compared ({type(error).__name__}: {_first_line(error)})"


STOCK = (GenerationMixin.prepare_inputs_for_generation, GenerationMixin._update_model_kwargs_for_generation)


def _is_stock(model: Any) -> bool:
    """Whether transformers' own functions, not overridden, prepare what the model is fed."""
    names = [function.__name__ for function in STOCK]
    own = vars(model).keys() & set(names)
    return not own and not model.is_remote_code() and tuple(getattr(type(model), name) for name in names) == STOCK


def _difference(
    request: Request,
    fed: dict[str, Any],
    cache: Cache,
    ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    shown: Tensor,
) -> str | None:
    """How prepared inputs differ from ids [B, W] at positions [B, W] with a left-padded mask [B, L]; shown: what counts."""
    own = "its prepare_inputs_for_generation"
    device = ids.device
    if (fed_ids := fed.get("input_ids")) is None or not _equal(fed_ids, ids):
        return f"{own} does not feed the ids of the text"
    if fed.get(request.runner.cache_argument) is not cache:
        return f"{own} feeds another cache"
    fed_positions = fed.get("position_ids")
    if fed_positions is None:  # then the model counts from the cache's length, padding included
        if "position_ids" in request.runner.parameters and mask is not None and not mask.all():
            return "its forward is not given position_ids, which the padding of its prompts would need"
    elif (
        "position_ids" not in request.runner.parameters or not ((fed_positions.to(device) == positions) | ~shown).all()
    ):
        return f"{own} feeds other positions"
    fed_mask = fed.get("attention_mask")
    if mask is None:
        is_same_mask = fed_mask is None or (isinstance(fed_mask, Tensor) and bool(fed_mask.bool().all()))
    else:
        is_same_mask = isinstance(fed_mask, Tensor) and _equal(fed_mask.bool(), mask.bool())
    if not is_same_mask:
        return f"{own} feeds another attention_mask"
    known = {"input_ids", "position_ids", "attention_mask", request.runner.cache_argument}
    for name, value in fed.items():
        is_setting = name in CALL_SETTINGS and not isinstance(value, Tensor)  # logits_to_keep may be indices
        if name not in known and not is_setting and not _says_nothing(request.model, name, value):
            return f"{own} adds {name}"
    return None


def _equal(fed: Tensor, expected: Tensor) -> bool:
    return fed.shape == expected.shape and bool((fed.to(expected.device) == expected).all())


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]


# Known before generate() has prepared ids and mask.
BEFORE_INPUTS = (
    Route("beam search and other modes, `custom_generate`", _other_mode),
    Route(
        "drafts of another kind: `assistant_tokenizer`, `assistant_early_exit`, `use_mtp`, `speculation_type`,"
        " `assistant_ensemble_weight`",
        _other_drafting,
    ),
    Route("`synced_gpus`", _synced),
    Route('`use_cache=False`, a `cache_implementation` other than `"dynamic"`', _other_cache),
    Route("`output_attentions`, `output_hidden_states`", _other_outputs),
    Route(
        "model inputs other than ids and mask: pictures, sound, `inputs_embeds`, `position_ids`, `past_key_values`",
        _other_inputs,
    ),
    Route("weights that are offloaded", _offloaded),
    Route("rotary embeddings that change with length (dynamic, longrope) beyond their original context", _growing_rope),
)
# Known from ids and mask as they are fed.
WITH_INPUTS = (
    Route("prompts with right padding, holes or without a token", _other_padding),
    Route("prompts longer than the model's context", _too_long),
    Route(
        "a `prepare_inputs_for_generation` that feeds other things than ids, positions and mask (soft prompts)",
        _fed_otherwise,
    ),
)
# Known from what an enabled model keeps between calls: see state.py.
FROM_STATE = (
    "forward hooks of your own",
    "a target or a draft model that was changed after `enable` and no longer passes its trial",
    "texts longer than the trial of a model that specdec does not know (`enable` warns)",
    "a `Drafter` of your own that serves another call at the moment",
)


def all_calls() -> list[str]:
    """The kinds of calls that the stock loop serves, in the order of the README's table."""
    return [*(route.calls for route in (*BEFORE_INPUTS, *WITH_INPUTS)), *FROM_STATE]


def why_stock(routes: Iterable[Route], request: Request) -> str | None:
    """Why the stock loop has to serve this call; None where none of these routes takes it."""
    return next((reason for route in routes if (reason := route.reason(request)) is not None), None)
