"""transformers' sdpa attention: for calls that no other backend computes, and for prefill except its last position."""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from specdec.runtime.attention.blocks import KEY_BLOCK


class Sdpa(Protocol):
    """(key, value, mask) -> [B, W, H, DV], with the query and all else of one attention call."""

    def __call__(self, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor: ...


def sdpa_of(module: nn.Module, query: Tensor, **keywords: Any) -> Sdpa:
    """sdpa for the query and the keywords of one call of transformers' attention interface."""

    def sdpa(key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **keywords)[0]
        return output

    return sdpa


def over_whole_blocks(sdpa: Sdpa, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """sdpa; on a CPU, where its sums depend on the number of keys, over whole blocks, as the ragged cache has."""
    missing = -key.shape[2] % KEY_BLOCK
    if key.device.type != "cpu" or not missing or mask is None:
        return sdpa(key, value, mask)
    return sdpa(F.pad(key, (0, 0, 0, missing)), F.pad(value, (0, 0, 0, missing)), F.pad(mask, (0, missing)))
