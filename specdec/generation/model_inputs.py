"""What generate() feeds the model, compared with what specdec feeds it.

It is not derived from the model's class: the model's own `prepare_inputs_for_generation` prepares the inputs of the
first two forwards of each call, and specdec serves the call only where they equal its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from specdec.generation.request import Request

TOKEN_TYPES = {"token_type_ids", "mm_token_type_ids"}  # zeros for the text of a multimodal model
FORWARD_SETTINGS = {"use_cache", "logits_to_keep", "return_dict"}  # keywords of a forward that are not inputs
STOCK_METHODS = (GenerationMixin.prepare_inputs_for_generation, GenerationMixin._update_model_kwargs_for_generation)


@dataclass(frozen=True)
class _Window:
    """What specdec feeds in one forward.

    ids, positions: int64 [B, W]. mask: [B, L] of the text so far, None where nothing is masked.
    is_shown: bool [B, W], False for padding, whose positions do not matter.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    is_shown: Tensor


def find_other_inputs(request: Request) -> str | None:
    """How the inputs of the first two forwards differ from those that specdec feeds; None where they are the same."""
    model, ids, mask = request.model, request.input_ids, request.model_kwargs.get("attention_mask")
    assert ids is not None
    cache_argument = request.runner.cache_argument
    is_shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    positions = (is_shown.long().cumsum(1) - 1).clamp(min=0)
    window = _Window(ids, positions, mask, is_shown)
    if _has_stock_methods(model):  # they feed what they are given
        return _difference(request, request.model_kwargs | {"input_ids": ids, cache_argument: None}, None, window)
    cache = DynamicCache(config=request.runner.config)
    kwargs = request.model_kwargs | {cache_argument: cache}
    try:
        first = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **kwargs)
        if reason := _difference(request, first, cache, window):
            return reason
        entries = torch.zeros(len(ids), 1, ids.shape[1], 1)  # of the prompt, because models read the cache's length
        cache.update(entries, entries, 0)
        outputs: Any = CausalLMOutputWithPast(**{cache_argument: cache})  # type: ignore[arg-type]
        kwargs = model._update_model_kwargs_for_generation(outputs, kwargs, is_encoder_decoder=False)
        longer = torch.cat([ids, ids[:, -1:]], dim=1)
        second = model.prepare_inputs_for_generation(longer, next_sequence_length=1, **kwargs)
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        window = _Window(ids[:, -1:], positions[:, -1:] + 1, mask, torch.ones_like(is_shown[:, -1:]))
        return _difference(request, second, cache, window)
    except Exception as error:  # a model's own code, called outside its loop, may fail in any way
        return f"its prepare_inputs_for_generation could not be compared ({type(error).__name__}: {_first_line(error)})"


def is_empty(model: Any, name: str, value: Any) -> bool:
    """Whether a model input has no content: None, an empty list, the token types of text in a multimodal model."""
    if value is None or (isinstance(value, dict | list | tuple) and not value):
        return True
    modalities = getattr(model, "input_modalities", "text")  # one name, or several
    is_multimodal = not isinstance(modalities, str) and len(modalities) > 1
    return is_multimodal and name in TOKEN_TYPES and isinstance(value, Tensor) and not value.any()


def _has_stock_methods(model: Any) -> bool:
    """Whether transformers' own methods, not overridden, prepare the model's inputs."""
    names = [method.__name__ for method in STOCK_METHODS]
    overridden = vars(model).keys() & set(names)
    methods = tuple(getattr(type(model), name) for name in names)
    return not overridden and not model.is_remote_code() and methods == STOCK_METHODS


def _difference(request: Request, fed: dict[str, Any], cache: Cache | None, window: _Window) -> str | None:
    """How the prepared inputs of one forward differ from what specdec feeds in it."""
    method, parameters = "its prepare_inputs_for_generation", request.runner.parameters
    if (fed_ids := fed.get("input_ids")) is None or not _equal(fed_ids, window.ids):
        return f"{method} does not feed the ids of the text"
    if fed.get(request.runner.cache_argument) is not cache:
        return f"{method} feeds another cache"
    positions = fed.get("position_ids")
    if positions is None:  # then the model counts from the cache's length, padding included
        if "position_ids" in parameters and window.mask is not None and not window.mask.all():
            return "its forward is not given position_ids, which the padding of its prompts needs"
    elif (
        "position_ids" not in parameters
        or not ((positions.to(window.ids.device) == window.positions) | ~window.is_shown).all()
    ):
        return f"{method} feeds other positions"
    if not _is_same_mask(fed.get("attention_mask"), window.mask):
        return f"{method} feeds another attention_mask"
    compared = {"input_ids", "position_ids", "attention_mask", request.runner.cache_argument}
    for name, value in fed.items():
        is_setting = name in FORWARD_SETTINGS and not isinstance(value, Tensor)  # logits_to_keep may be indices
        if name not in compared and not is_setting and not is_empty(request.model, name, value):
            return f"{method} adds {name}"
    return None


def _is_same_mask(fed: Any, mask: Tensor | None) -> bool:
    if mask is None:
        return fed is None or (isinstance(fed, Tensor) and bool(fed.bool().all()))
    return fed is mask or (isinstance(fed, Tensor) and _equal(fed.bool(), mask.bool()))


def _equal(fed: Tensor, expected: Tensor) -> bool:
    return fed is expected or (fed.shape == expected.shape and bool((fed.to(expected.device) == expected).all()))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0]
