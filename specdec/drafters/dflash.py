"""DFlash: a draft head that drafts a whole block of ids in one forward.

DFlash: Block Diffusion for Flash Speculative Decoding, https://github.com/z-lab/dflash. The target's hidden states at
committed positions, reduced to one state, give the keys and values of every layer. The block is the last committed id
followed by mask ids; its positions see all of these and each other. Keys and values of the block are not kept: the
target's states of the same positions overwrite them once ids are committed there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from specdec.core.sequences import Sequences
from specdec.drafters.heads import DraftHead, HeadDrafter, HeadSettings
from specdec.runtime.kv_cache.ragged import RaggedCache
from specdec.runtime.model_forward import cache_argument


@dataclass(frozen=True)
class DFlashSettings(HeadSettings):
    """What a DFlash checkpoint says about its head.

    block_size: positions of a block. mask_token_id: the id at all but the first. sample_from_anchor: whether the first
    position drafts an id too, each one then the id behind it; otherwise each mask drafts its own position's.
    """

    block_size: int
    mask_token_id: int
    sample_from_anchor: bool = False

    @property
    def max_draft_tokens(self) -> int:
        """How many ids a block drafts."""
        return self.block_size - self.first_drafting

    @property
    def first_drafting(self) -> int:
        """The first position of a block that drafts an id."""
        return 0 if self.sample_from_anchor else 1


class DFlashHead(DraftHead):  # type: ignore[no-untyped-call]
    """The head; `write_context` has written the keys and values of committed positions to its cache."""

    kind = "a DFlash head"
    settings: DFlashSettings

    def __init__(
        self, config: PreTrainedConfig, settings: DFlashSettings, owns_embedding: bool = True, owns_output: bool = True
    ) -> None:
        super().__init__(config, settings, owns_embedding, owns_output)
        width, eps = config.hidden_size, config.rms_norm_eps
        layer_config: Any = config
        self.fc = nn.Linear(len(settings.feature_layers) * settings.target_hidden_size, width, bias=False)
        self.hidden_norm = Qwen3RMSNorm(width, eps=eps)
        layers = [Qwen3DecoderLayer(layer_config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = Qwen3RMSNorm(width, eps=eps)
        self.rotary_emb = Qwen3RotaryEmbedding(layer_config)
        self.cache_name = cache_argument(inspect.signature(layers[0].forward).parameters)

    def reduce(self, states: Tensor) -> Tensor:
        reduced: Tensor = self.hidden_norm(self.fc(states.flatten(2)))
        return reduced

    def write_context(self, states: Tensor, positions: Tensor, cache: RaggedCache) -> None:
        """Write keys and values of states [B, W, H] at positions [B, W], where the cache's window is."""
        cos, sin = self.rotary_emb(states, positions)
        for index, layer in enumerate(self.layers):
            attention: Any = layer.self_attn
            shape = *states.shape[:2], -1, attention.head_dim
            key = attention.k_norm(attention.k_proj(states).view(shape)).transpose(1, 2)
            value = attention.v_proj(states).view(shape).transpose(1, 2)
            cache.update(apply_rotary_pos_emb(key, key, cos, sin)[1], value, index)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor,
        past_key_values: RaggedCache,
        logits_to_keep: int | Tensor = 0,
        use_cache: bool = True,
        return_dict: bool = True,
    ) -> CausalLMOutput:
        """Run a block; every position of it sees what its last position sees."""
        mask = attention_mask[:, :, -1:].expand_as(attention_mask).contiguous()
        states = self.embed_tokens(input_ids)
        inputs: dict[str, Any] = {
            "attention_mask": mask,
            "position_ids": position_ids,
            "position_embeddings": self.rotary_emb(states, position_ids),
            self.cache_name: past_key_values,
        }
        for layer in self.layers:
            states = layer(states, **inputs)
        states = self.norm(states)
        self.keep_states(states, position_ids, past_key_values)
        return CausalLMOutput(logits=self.logits_of(states, logits_to_keep))

    def keep_states(self, states: Tensor, positions: Tensor, cache: RaggedCache) -> None:
        """Keep the normed states [B, W, H] of a block, for a drafter that needs more than its logits."""


class DFlashDrafter(HeadDrafter):
    """Drafts a block in one forward. In sampled calls its ids are drawn independently of each other."""

    def __init__(self, head: DFlashHead, vocab_size: int) -> None:
        super().__init__(head, vocab_size)
        self.settings = head.settings
        self.num_extra_slots = head.settings.block_size

    def _draft(
        self, sequences: Sequences, width: int, num_ids: int, limit: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        settings = self.settings
        num_ids = min(num_ids, settings.max_draft_tokens)
        self._feed_states(sequences, width)
        last = sequences.lengths[:, None] - 1
        block = torch.full(
            (len(last), settings.block_size), settings.mask_token_id, dtype=torch.int64, device=last.device
        )
        block[:, :1] = self._within_vocabulary(sequences.ids.gather(1, last))
        positions = last + torch.arange(settings.block_size, device=last.device)
        logits = self.runner.forward(block, positions).logits
        return self._choose_block(logits, block, positions, sequences, num_ids, limit.clamp(max=num_ids))

    def _choose_block(
        self, logits: Tensor, block: Tensor, positions: Tensor, sequences: Sequences, num_ids: int, limit: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Choose num_ids ids from the logits [B, block, V] of a block at positions: -> ids, probs and lengths."""
        first = self.settings.first_drafting
        return self._choose_each(logits[:, first : first + num_ids], sequences, limit)

    def _write_states(self, states: Tensor, positions: Tensor) -> None:
        head = self.head
        assert isinstance(head, DFlashHead)
        head.write_context(states, positions, self.runner.cache_at(positions))
