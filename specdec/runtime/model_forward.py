"""A transformers model's own forward, with the inputs that a ragged KV cache needs."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Container, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdec.quant.batch_invariant import ATTENTION, is_decoding
from specdec.runtime.attention.blocks import KEY_BLOCK
from specdec.runtime.attention.override import attention_override, implementation_of
from specdec.runtime.attention.select import takes_intervals
from specdec.runtime.kv_cache.masks import attention_kinds, attention_masks
from specdec.runtime.kv_cache.ragged import RaggedCache


class ModelForward:
    """Runs a model's forward on ids [B, W], positions [B, W] and a ragged cache whose window is at these positions.

    config: the model's text config.
    parameters: names of the arguments that its forward takes. cache_argument: the name of the KV cache among them.
    right_aligned, key_block: of its caches, see `Window`.
    feature_layers: which hidden states each forward writes to the cache's features, as transformers counts them: 0 are
        the embeddings, i what layer i - 1 returns, the number of layers what the last norm returns.
    """

    def __init__(self, model: PreTrainedModel, right_aligned: bool, feature_layers: Sequence[int] = ()) -> None:
        self.model = model
        self.right_aligned = right_aligned
        self.feature_layers = tuple(feature_layers)
        self.config = model.config.get_text_config(decoder=True)
        self.kinds = attention_kinds(self.config)
        self.refresh()

    def refresh(self) -> None:
        """Read from the model which arguments its forward takes and which attention implementation it has."""
        self.parameters = forward_parameters(self.model)
        self.cache_argument = cache_argument(self.parameters)
        implementation = implementation_of(self.config)
        self.key_block = KEY_BLOCK if implementation == ATTENTION else 1
        self.holds_scores = implementation == "eager"
        self.mask_dtype = self.model.dtype if self.holds_scores else torch.bool
        self.takes_intervals = takes_intervals(self.model)

    def new_cache(self, max_slots: int | None = None) -> RaggedCache:
        """An empty cache, whose buffers grow to max_slots at most; None: no limit."""
        return RaggedCache(self.key_block, max_slots, self.right_aligned)

    def run(self, ids: Tensor, positions: Tensor, last_only: bool, cache: RaggedCache) -> Tensor:
        """Run the model eagerly: -> logits [B, W, V] float32, or [B, 1, V] of the last column."""
        decodes = self.takes_intervals and is_decoding(positions.shape[1], positions.device)
        mask_dtype = torch.int32 if decodes else self.mask_dtype
        # inference_mode takes 10 % less time per operator than no_grad
        with attention_override(self.config) if decodes else nullcontext(), torch.inference_mode():
            logits = self.call(ids, positions, cache, mask_dtype, int(last_only))
        return logits.to(device=ids.device, dtype=torch.float32, copy=True)  # the copy is not an inference tensor

    def call(
        self, ids: Tensor, positions: Tensor, cache: RaggedCache, mask_dtype: torch.dtype, columns: int | Tensor
    ) -> Tensor:
        """Call the model: -> logits [B, columns, V] in its dtype.

        columns: how many of the last columns, 0 for all; or the indices of the columns.
        """
        window = cache.window
        query_positions = positions if window.padding is None else window.positions
        inputs: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": attention_masks(
                query_positions, window.key_length, self.config, self.kinds, mask_dtype, window.padding
            ),
            self.cache_argument: cache,
            "use_cache": True,
            "return_dict": True,
        }
        if "position_ids" in self.parameters:
            inputs["position_ids"] = positions
        selects_columns = "logits_to_keep" in self.parameters
        if selects_columns:
            inputs["logits_to_keep"] = columns
        if self.feature_layers:
            inputs["output_hidden_states"] = list(self.feature_layers)
        output = self.model(**inputs)
        if self.feature_layers:
            states = [output.hidden_states[layer] for layer in self.feature_layers]
            cache.features.write(window.positions, torch.stack([state.to(ids.device) for state in states], dim=2))
        logits: Tensor = output.logits
        if selects_columns:
            return logits
        return logits[:, columns] if isinstance(columns, Tensor) else logits[:, -columns:]


def forward_parameters(model: PreTrainedModel) -> frozenset[str]:
    """Names of the arguments that the model's forward takes; with **kwargs, also those of the one it overrides."""
    overridden = [cls.__dict__["forward"] for cls in type(model).__mro__ if "forward" in cls.__dict__]
    names: frozenset[str] = frozenset()
    for function in (model.forward, *overridden):
        own_names, takes_any = _signature_of(getattr(function, "__func__", function))
        names |= own_names
        if not takes_any:
            break
    return names


def cache_argument(parameters: Container[str]) -> str:
    """A forward's name of the KV cache: `cache` since transformers 5.24, `past_key_values` before."""
    return "cache" if "cache" in parameters else "past_key_values"


_SIGNATURES: weakref.WeakKeyDictionary[Any, tuple[frozenset[str], bool]] = weakref.WeakKeyDictionary()


def _signature_of(function: Any) -> tuple[frozenset[str], bool]:
    """A function's parameter names, and whether it takes **kwargs. Cached: inspecting takes 50 us."""
    with suppress(TypeError):  # a callable object may not be hashable
        if (cached := _SIGNATURES.get(function)) is not None:
            return cached
    parameters = inspect.signature(function).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    signature = frozenset(parameters), takes_any
    with suppress(TypeError):
        _SIGNATURES[function] = signature
    return signature
