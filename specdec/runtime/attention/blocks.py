"""Attention in blocks of 8 queries and 128 keys by PyTorch's matmul, batch-invariant on a CPU without the fused kernel.

Every matmul has one shape, whatever the window and the number of keys, so a query's result is the same in all of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specdec.quant.batch_invariant import BLOCK

KEY_BLOCK = 128  # keys of one matmul


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, missing: int) -> Tensor:
    """Queries [B, H, W, D] with a bool mask [B or 1, 1, W, S]: -> [B, W, H, DV].

    missing: how many slots of the first block of keys precede the first key.
    """
    blocks = _key_blocks(key, value, missing)
    mask = F.pad(mask, (missing, -(missing + key.shape[2]) % KEY_BLOCK))
    starts = range(0, query.shape[2], BLOCK)
    parts = [_attend_block(query[:, :, at : at + BLOCK], blocks, mask[:, :, at : at + BLOCK], scale) for at in starts]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)).transpose(1, 2).contiguous()


def _key_blocks(key: Tensor, value: Tensor, missing: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [B, H', S, D] in pieces of whole blocks of 128; partial blocks at the ends are padded copies."""
    length = key.shape[2]
    head = min(KEY_BLOCK - missing, length) if missing else 0
    tail = (length - head) % KEY_BLOCK

    def piece(start: int, stop: int, before: int = 0, after: int = 0) -> tuple[Tensor, Tensor]:
        keys, values = key[:, :, start:stop], value[:, :, start:stop]
        if before or after:
            keys, values = F.pad(keys, (0, 0, before, after)), F.pad(values, (0, 0, before, after))
        return keys, values

    pieces = []
    if head:
        pieces.append(piece(0, head, before=missing, after=KEY_BLOCK - missing - head))
    if length - head - tail:
        pieces.append(piece(head, length - tail))
    if tail:
        pieces.append(piece(length - tail, length, after=KEY_BLOCK - tail))
    return pieces


def _attend_block(query: Tensor, blocks: list[tuple[Tensor, Tensor]], mask: Tensor, scale: float) -> Tensor:
    """Up to 8 queries against whole blocks of keys: -> [B, H, W, DV]."""
    batch, heads, width, dim = query.shape
    kv_heads = blocks[0][0].shape[1]
    group = heads // kv_heads  # query heads that share a key head are rows of one matmul
    rows = F.pad(query * scale, (0, 0, 0, BLOCK - width)).reshape(batch, kv_heads, group * BLOCK, dim)
    scores = torch.cat([torch.matmul(rows, key.transpose(2, 3)) for key, _ in blocks], dim=-1)
    scores = scores.view(batch, kv_heads, group, BLOCK, -1)[:, :, :, :width]
    scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    probs = F.pad(probs, (0, 0, 0, BLOCK - width)).reshape(batch, kv_heads, group * BLOCK, -1)
    values = [block for _, piece in blocks for block in piece.split(KEY_BLOCK, dim=2)]
    # Summed in the order of the keys: blocks that a query does not see add exact zeros.
    y = torch.matmul(probs[..., :KEY_BLOCK], values[0])
    for index, block in enumerate(values[1:], start=1):
        y = y + torch.matmul(probs[..., index * KEY_BLOCK : (index + 1) * KEY_BLOCK], block)
    return y.view(batch, heads, BLOCK, -1)[:, :, :width]
