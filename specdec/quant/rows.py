"""Row-invariant computing on a CPU: a position's result must not depend on how many positions a forward holds.

Verification runs K+1 positions at once, plain decoding one. A matmul library sums in another order for another number of rows, so
the last bits differ, and where 4-bit layers round their inputs to bfloat16 a last bit now and then becomes a visible one: texts
part at near ties. With a 4-bit model on a CPU every room of a decoding forward therefore does the same work for a row, whatever
is beside it: the int4 op by itself, other linear layers and attention in blocks of 8 rows and 128 keys. Plain generate(), our
plain loop and speculation then write the same text, bit for bit.

A window of more than 64 positions is prefill and runs at full speed; but its last position, the one that the first id is sampled
from, is computed the decoding way, since that is how it is computed again when the first draft is verified.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

MAX_WINDOW = 64  # positions of one row of a batch; a wider window is prefill
BLOCK = 8  # rows of one matmul
KEYS = 128  # keys of one matmul
ATTENTION = "specdec_rows"


def by_phase(x: Tensor, decode: Callable[[Tensor], Tensor], prefill: Callable[[Tensor], Tensor]) -> Tensor:
    """decode(x) for a window x [..., W, K] of up to 64 positions; else prefill(x), with decode() of the last position."""
    if x.shape[-2] <= MAX_WINDOW:
        return decode(x)
    y = prefill(x)
    if x.ndim > 2:
        y[..., -1:, :] = decode(x[..., -1:, :])
    return y


class RowLinear(nn.Linear):
    """nn.Linear in blocks of 8 rows on a CPU; the same weights and the same values otherwise."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.ndim < 2:
            return super().forward(x)
        return by_phase(x, self._decode, super().forward)

    def _decode(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        count = len(rows)
        rows = F.pad(rows, (0, 0, 0, -count % BLOCK))
        blocks = [F.linear(block, self.weight, self.bias) for block in rows.split(BLOCK)]
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return y[:count].view(*x.shape[:-1], self.out_features)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: query [B, H, W, D], key, value [B, H', S, D], bool mask [B, 1, W, S] -> [B, W, H, D]."""
    if query.device.type != "cpu" or (attention_mask is not None and attention_mask.dtype != torch.bool):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    length, width = key.shape[2], query.shape[2]
    if attention_mask is None:
        attention_mask = torch.ones(width, length, dtype=torch.bool).tril(length - width)[None, None]
    missing = -length % KEYS
    if missing:  # a cache that hands over whole blocks of keys is spared the copy
        key, value = F.pad(key, (0, 0, 0, missing)), F.pad(value, (0, 0, 0, missing))
        attention_mask = F.pad(attention_mask, (0, missing))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    if width <= MAX_WINDOW:
        blocks = [
            _attend(query[:, :, at : at + BLOCK], key, value, attention_mask[:, :, at : at + BLOCK], scale)
            for at in range(0, width, BLOCK)
        ]
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
        return y.transpose(1, 2).contiguous(), None
    y, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    y[:, -1:] = _attend(query[:, :, -1:], key, value, attention_mask[:, :, -1:], scale).transpose(1, 2)
    return y, None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Up to 8 queries against whole blocks of 128 keys: a matmul's shape depends on neither their number nor the length."""
    batch, heads, width, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads  # query heads that share a key head stand as rows of one matmul
    rows = F.pad(query * scale, (0, 0, 0, BLOCK - width)).reshape(batch, kv_heads, group * BLOCK, dim)
    scores = torch.matmul(rows, key.transpose(2, 3)).view(batch, kv_heads, group, BLOCK, length)[:, :, :, :width]
    probs = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32).to(value.dtype)
    probs = F.pad(probs, (0, 0, 0, BLOCK - width)).reshape(batch, kv_heads, group * BLOCK, length)
    y = torch.matmul(probs[..., :KEYS], value[:, :, :KEYS])
    for at in range(KEYS, length, KEYS):  # summed in the keys' order: blocks that are not seen yet add exact zeros
        y = y + torch.matmul(probs[..., at : at + KEYS], value[:, :, at : at + KEYS])
    return y.view(batch, heads, BLOCK, -1)[:, :, :width]


AttentionInterface.register(ATTENTION, row_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def make_row_invariant(model: Any) -> None:
    """Replace a model's remaining linear layers and its sdpa attention by row-invariant ones, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear
    if model.config.get_text_config(decoder=True)._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
