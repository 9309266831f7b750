"""The bytes of one model's weights, cache and forwards, by batch, window and slots.

The fields of `ModelFootprint` hold what a forward on the meta device shows. Its methods are formulas for the rest:
attention, whose memory depends on the backend, and logits. Where attention is neither sdpa's nor the fused kernel's,
and for MLA on a CPU, attention may hold two or three times the stated bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

import torch
from specdec_kernels.attention import MAX_DIM

from specdec.quant.batch_invariant import BLOCK, CUDA_BLOCK, MAX_WINDOW
from specdec.runtime.attention.blocks import KEY_BLOCK
from specdec.runtime.runner import prefill_chunk

TILE_BYTES = 5.5  # of a weight in a tile: its code, packed and unpacked, and its value in float32


class AttentionBackend(Enum):
    """What runs attention: the model's own operators, the fused kernel, blocks of queries on a CPU, or sdpa."""

    EAGER = auto()
    FUSED = auto()
    BLOCKS = auto()
    SDPA = auto()


@dataclass(frozen=True)
class ModelFootprint:
    """What one model holds in memory, and the formulas of its forwards.

    plain_bytes: all weights in `dtype`. int4_bytes: with its linear layers in four bits, in the layout of the device's
    kernel; None where no layer can be. checkpoint_method: the quantization of its checkpoint, None where it has none.
    context: positions that the model supports, None where its config names no limit.
    layers: (heads, key width, value width) of each layer's cache. slot == position, so sliding layers keep all
    positions too. feature_width: values of hidden states that a draft head adds for each position, in the target's
    cache and in its own.
    heads, kv_heads, key_width, value_width: of the attention call; a latent cache (MLA) is expanded before it.
    position_bytes, slot_bytes: the peak of a forward outside of attention, by position of its window and by slot of the
    cache.
    attention_position_bytes, attention_slot_bytes: what it holds when attention is called. Neither counts cache or
    masks.
    is_eager: attention holds its scores [B, H, W, S]. score_bytes: for each of them at its peak.
    num_masks: one for each kind of layer.
    has_kernels: attention of a decoding window holds nothing but its result; on a CPU only in models with 4-bit layers,
    where prompts are read by decoding windows too.
    tile_weights: the largest number of a 4-bit layer's weights that prefill holds in full precision at a time.
    head_tile_weights: the largest number of an 8-bit head's weights that a forward holds in full precision at a time.
    keeps_last_logits: prefill makes logits of the last position alone.
    expert_bytes: of experts in one tensor, which stay in `dtype` where the other layers are in four bits.
    """

    name: str
    dtype: torch.dtype
    device: str
    plain_bytes: int
    int4_bytes: int | None
    checkpoint_method: str | None
    vocab_size: int
    context: int | None
    layers: tuple[tuple[int, int, int], ...]
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    position_bytes: float
    slot_bytes: float
    attention_position_bytes: float
    attention_slot_bytes: float
    is_eager: bool
    score_bytes: int
    has_kernels: bool
    num_masks: int
    tile_weights: int
    head_tile_weights: int
    keeps_last_logits: bool
    feature_width: int = 0
    expert_bytes: int = 0

    @property
    def token_bytes(self) -> int:
        """Of the cache, for one position of one row."""
        values = sum(heads * (key + value) for heads, key, value in self.layers) + self.feature_width
        return values * self.dtype.itemsize

    def weights_bytes(self, int4: bool) -> int:
        if not int4:
            return self.plain_bytes
        if self.int4_bytes is None:
            raise ValueError(
                f"no linear layer of {self.name} can be in four bits with this group size; try 32, or plan without"
                " 4 bits"
            )
        return self.int4_bytes

    def growth_bytes(self, batch: int, slots: int) -> int:
        """The old buffer of so many slots while one layer's keys, or values, are copied to a larger one."""
        return max(heads * max(key, value) for heads, key, value in self.layers) * batch * slots * self.dtype.itemsize

    def forward_bytes(self, batch: int, width: int, slots: int, int4: bool, growth_bytes: int = 0) -> int:
        """The peak of a forward over [B, W] positions and S slots, without weights, cache and logits."""
        if int4 and self.device == "cpu":
            slots = -(-slots // KEY_BLOCK) * KEY_BLOCK  # in whole blocks, see specdec/runtime/attention/select.py
        positions, all_slots = batch * width, batch * slots
        mask, attention = self._attention_bytes(batch, width, slots, int4)
        attention += positions * self.heads * self.value_width * self.dtype.itemsize  # its result
        outside = self.position_bytes * positions + self.slot_bytes * all_slots + self._tile_bytes(width, int4)
        inside = self.attention_position_bytes * positions + self.attention_slot_bytes * all_slots
        return int(mask + max(outside, inside + max(attention, growth_bytes)))

    def logits_bytes(self, batch: int, width: int, int4: bool) -> int:
        """Logits [B, W, V] in the model's dtype and in float32; with 4-bit layers the head works in blocks of rows."""
        size, rows = self.dtype.itemsize, batch * width
        if not int4:
            return rows * self.vocab_size * (size + 4)
        # the CPU kernel does not pad its last block: up to 7 rows less
        block = BLOCK if self.device == "cpu" else CUDA_BLOCK
        padded = -(-rows // block) * block
        product = padded * size * (2 if padded > block else 1)
        tile = self._head_tile_bytes(int4)
        return max(self.vocab_size * product + tile, self.vocab_size * (padded * size + rows * 4))

    def prefill_bytes(self, batch: int, prompt: int, int4: bool) -> int:
        """The peak of prefill without weights and cache; only the last logits are copied to float32."""
        width = prefill_chunk(batch, prompt, self.heads if self.is_eager else 0)
        logits = batch * self.vocab_size * self.dtype.itemsize * (1 if self.keeps_last_logits else width)
        copies = max(batch * self.vocab_size * 4, self._head_tile_bytes(int4))
        return max(self.forward_bytes(batch, width, prompt, int4), logits + copies)

    def _is_decoding(self, width: int, int4: bool) -> bool:
        """Whether a window runs on the batch-invariant path."""
        return width <= MAX_WINDOW or (self.device == "cpu" and int4 and self.has_kernels)

    def _attention_backend(self, width: int, int4: bool) -> AttentionBackend:
        on_cpu = self.device == "cpu"
        if self.is_eager:
            return AttentionBackend.EAGER
        if not self._is_decoding(width, int4):
            return AttentionBackend.SDPA
        if self.has_kernels and (int4 or not on_cpu) and max(self.key_width, self.value_width) <= MAX_DIM:
            return AttentionBackend.FUSED
        return AttentionBackend.BLOCKS if on_cpu and int4 else AttentionBackend.SDPA

    def _attention_bytes(self, batch: int, width: int, slots: int, int4: bool) -> tuple[int, float]:
        """The masks of a forward, and what one attention call holds in addition to its inputs and its result."""
        size, pairs = self.dtype.itemsize, batch * width * slots
        mask = self.num_masks * pairs
        repeated = batch * slots * self.heads * (self.key_width + self.value_width) * size
        repeated = repeated if 1 < self.kv_heads < self.heads else 0  # a single head is expanded without a copy
        match self._attention_backend(width, int4):
            case AttentionBackend.EAGER:
                return mask * size, repeated + self.heads * pairs * self.score_bytes
            case AttentionBackend.FUSED:  # it reads the cache itself, and bounds instead of a mask
                return 0, 0
            case AttentionBackend.BLOCKS:  # scores of 8 queries in blocks and joined, then their softmax
                return mask, batch * self.heads * BLOCK * slots * size * (2 + min(width, BLOCK) / BLOCK)
            case (
                AttentionBackend.SDPA
            ):  # keys and values for each query head (but for a window of one), a floating mask
                return mask, (repeated if width > 1 else 0) + pairs * size

    def _tile_bytes(self, width: int, int4: bool) -> float:
        """A tile of a 4-bit layer's weights in full precision, which prefill multiplies by."""
        if not int4 or self._is_decoding(width, int4):
            return 0
        size = self.dtype.itemsize
        return self.tile_weights * (TILE_BYTES if size == 4 else TILE_BYTES + size)

    def _head_tile_bytes(self, int4: bool) -> int:
        """A tile of an 8-bit head's weights in float32 and, where that is another one, in the model's dtype."""
        size = self.dtype.itemsize
        return self.head_tile_weights * (4 if size == 4 else 4 + size) if int4 else 0
