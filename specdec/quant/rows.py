"""Row-invariant computing on a CPU: a position's result must not depend on how many positions a forward holds.

Verification runs K+1 positions at once, plain decoding one. A matmul library sums in another order for another number of rows, so
the last bits differ, and where 4-bit layers round their inputs to bfloat16 a last bit now and then becomes a visible one: texts
part at near ties. With a 4-bit model on a CPU every room of a decoding forward therefore does the same work for a row, whatever
is beside it: the int4 op by itself, other linear layers and attention in blocks of 8 rows and 128 keys. Plain generate(), our
plain loop and speculation then write the same text, bit for bit.

A window of more than 64 positions is prefill and runs at full speed; but its last position, the one that the first id is sampled
from, is computed the decoding way, since that is how it is computed again when the first draft is verified.

Element-wise functions are left alone. PyTorch computes the rest of a tensor that no vector fills in another way, so widths should
be multiples of 32, as real models' are; three threads and more may cut even those unevenly, which has not been seen to reach a
text.
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
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention call: query [B, H, W, D], key, value [B, H', S, D], bool mask [B, 1, W, S] -> [B, W, H, D]."""
    width, length = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if query.device.type != "cpu" or (attention_mask is not None and attention_mask.dtype != torch.bool) or not causal:
        stock = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal} | kwargs
        return sdpa_attention_forward(module, query, key, value, attention_mask, **stock)
    if attention_mask is None:
        attention_mask = torch.ones(width, length, dtype=torch.bool).tril(length - width)[None, None]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if width > MAX_WINDOW:
        missing = -length % KEYS  # sdpa sums otherwise over another number of keys; a cache of ours hands over whole blocks
        whole = (F.pad(key, (0, 0, 0, missing)), F.pad(value, (0, 0, 0, missing))) if missing else (key, value)
        mask = F.pad(attention_mask, (0, missing))
        y, _ = sdpa_attention_forward(module, query, *whole, mask, dropout=dropout, scaling=scaling, **kwargs)
        query, attention_mask = query[:, :, -1:], attention_mask[:, :, -1:]
    # Blocks of keys begin at multiples of 128 of their positions, also where a sliding cache hands over the last ones alone.
    first = max(int(position_ids[0, -1]) + 1 - length, 0) if position_ids is not None and position_ids.ndim == 2 else 0
    blocks = _blocks(key, value, first % KEYS)
    attention_mask = F.pad(attention_mask, (first % KEYS, -(first + length) % KEYS))
    parts = [
        _attend(query[:, :, at : at + BLOCK], blocks, attention_mask[:, :, at : at + BLOCK], scale)
        for at in range(0, query.shape[2], BLOCK)
    ]
    decoded = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2)
    if width <= MAX_WINDOW:
        return decoded.contiguous(), None
    y[:, -1:] = decoded
    return y, None


def _blocks(key: Tensor, value: Tensor, missing: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, H', S, D] in pieces of whole blocks of 128; only those at the ends are filled up, with a copy.

    missing: how many slots the first block lacks before the first key.
    """
    head = min(KEYS - missing, key.shape[2]) if missing else 0
    tail = (key.shape[2] - head) % KEYS
    pieces = []
    if head:
        behind = KEYS - missing - head
        pieces.append((F.pad(key[:, :, :head], (0, 0, missing, behind)), F.pad(value[:, :, :head], (0, 0, missing, behind))))
    if key.shape[2] - head - tail:
        middle = slice(head, key.shape[2] - tail)
        pieces.append((key[:, :, middle], value[:, :, middle]))
    if tail:
        last = slice(key.shape[2] - tail, None)
        pieces.append((F.pad(key[:, :, last], (0, 0, 0, KEYS - tail)), F.pad(value[:, :, last], (0, 0, 0, KEYS - tail))))
    return pieces


def _attend(query: Tensor, blocks: list[tuple[Tensor, Tensor]], mask: Tensor, scale: float) -> Tensor:
    """Up to 8 queries against whole blocks of 128 keys: a matmul's shape depends on neither their number nor the length."""
    batch, heads, width, dim = query.shape
    kv_heads = blocks[0][0].shape[1]
    group = heads // kv_heads  # query heads that share a key head stand as rows of one matmul
    rows = F.pad(query * scale, (0, 0, 0, BLOCK - width)).reshape(batch, kv_heads, group * BLOCK, dim)
    scores = torch.cat([torch.matmul(rows, key.transpose(2, 3)) for key, _ in blocks], dim=-1)
    scores = scores.view(batch, kv_heads, group, BLOCK, -1)[:, :, :, :width]
    probs = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32).to(query.dtype)
    probs = F.pad(probs, (0, 0, 0, BLOCK - width)).reshape(batch, kv_heads, group * BLOCK, -1)
    values = [value for _, piece in blocks for value in piece.split(KEYS, dim=2)]
    y = torch.matmul(probs[..., :KEYS], values[0])
    for index, value in enumerate(values[1:], start=1):  # summed in the keys' order: blocks not seen yet add exact zeros
        y = y + torch.matmul(probs[..., index * KEYS : (index + 1) * KEYS], value)
    return y.view(batch, heads, BLOCK, -1)[:, :, :width]


AttentionInterface.register(ATTENTION, row_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def make_row_invariant(model: Any) -> None:
    """Replace a model's remaining linear layers and its sdpa attention by row-invariant ones, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = RowLinear
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation == "sdpa":
        below = [name for name in model.config.sub_configs if getattr(model.config, name, None) is config]
        model.set_attn_implementation({below[0]: ATTENTION} if below else ATTENTION)  # a vision tower keeps its own
