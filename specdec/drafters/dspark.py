"""DSpark: a DFlash head that chooses the ids of a block in order, each with a bias from the id before it.

DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation (2026),
https://github.com/deepseek-ai/DeepSpec. The block is DFlash's, one forward. Its Markov head adds to the logits of a
position W2 f(W1[id before it]), of a low rank; its confidence head estimates the chance that a position's id is
accepted, and ends a draft where the product of these chances is small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from specdec.core.sequences import Sequences
from specdec.drafters.dflash import DFlashDrafter, DFlashHead, DFlashSettings
from specdec.runtime.kv_cache.ragged import RaggedCache

VANILLA, GATED, RNN = MARKOV_HEADS = ("vanilla", "gated", "rnn")
MIN_CHANCE = 0.1  # of an id that is drafted: that it and all before it are accepted, as in suffix decoding


@dataclass(frozen=True, kw_only=True)
class DSparkSettings(DFlashSettings):
    """Those of a DFlash head, and what follows its block.

    markov_rank: r, 0 without a Markov head. markov_head_type: see `MarkovHead`. enable_confidence_head,
    confidence_head_with_markov: whether there is one, and whether it reads the id before a position.
    """

    markov_rank: int = 256
    markov_head_type: str = VANILLA
    enable_confidence_head: bool = True
    confidence_head_with_markov: bool = True


class MarkovHead(nn.Module):
    """What the id before a position adds to its logits.

    head_type: vanilla, W2 W1[id]; gated, W2 (g * W1[id]), where g depends on the position's state; rnn, W2 of a
    recurrent unit that reads W1[id] and the state of each position of the block in order.
    """

    def __init__(self, config: PreTrainedConfig, settings: DSparkSettings) -> None:
        super().__init__()
        rank, width, self.head_type = settings.markov_rank, config.hidden_size, settings.markov_head_type
        self.markov_w1 = nn.Embedding(config.vocab_size, rank)
        self.markov_w2 = nn.Linear(rank, settings.draft_vocab_size, bias=False)
        if self.head_type == GATED:
            self.gate_proj = nn.Linear(width + rank, rank)
        elif self.head_type == RNN:
            self.joint_proj = nn.Linear(2 * rank + width, 3 * rank)

    def forward(self, embeds: Tensor, states: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """embeds: [B, r] of the ids before; states [B, H]; memory [B, r], zeros first -> bias [B, Vd], memory."""
        if self.head_type == GATED:
            embeds = self.gate_proj(torch.cat([states, embeds], dim=-1)).sigmoid() * embeds
        elif self.head_type == RNN:
            gate, candidate, output = self.joint_proj(torch.cat([memory, embeds, states], dim=-1)).chunk(3, dim=-1)
            gate = gate.sigmoid()
            memory, embeds = gate * memory + (1 - gate) * candidate.tanh(), output.tanh()
        return self.markov_w2(embeds), memory


class ConfidenceHead(nn.Module):
    """The chance that the id of a position is accepted, where all before it are: a linear layer and a sigmoid."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B, H] or, with the Markov head's embedding of the id before, [B, H + r] -> [B] float32."""
        chances: Tensor = self.proj(inputs).float().sigmoid()[:, 0]
        return chances


class DSparkHead(DFlashHead):  # type: ignore[no-untyped-call]
    """The head; a forward leaves the states of its block in its cache's features."""

    kind = "a DSpark head"
    keeps_states = True
    settings: DSparkSettings

    def __init__(
        self, config: PreTrainedConfig, settings: DSparkSettings, owns_embedding: bool = True, owns_output: bool = True
    ) -> None:
        super().__init__(config, settings, owns_embedding, owns_output)
        rank = settings.markov_rank
        self.markov_head = MarkovHead(config, settings) if rank else None
        width = config.hidden_size + (rank if settings.confidence_head_with_markov else 0)
        self.confidence_head = ConfidenceHead(width) if settings.enable_confidence_head else None

    def write_context(self, states: Tensor, positions: Tensor, cache: RaggedCache) -> None:
        super().write_context(states, positions, cache)
        cache.features.allocate(states[:, :, None])

    def keep_states(self, states: Tensor, positions: Tensor, cache: RaggedCache) -> None:
        cache.features.write(positions, states[:, :, None])

    def read_before(
        self, before: Tensor, states: Tensor, memory: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """before: [B], the ids before a position; states [B, H] of it; memory [B, r].

        -> bias [B, 1, V] float32 of its logits, chance [B] that its id is accepted, None where the head has no such
        part; memory for the next position.
        """
        bias, inputs = None, states
        if self.markov_head is not None:
            embeds = self.markov_head.markov_w1(before)
            own, memory = self.markov_head(embeds, states, memory)
            bias = self.over_vocabulary(own[:, None].float(), 0.0)
            if self.settings.confidence_head_with_markov:
                inputs = torch.cat([states, embeds], dim=-1)
        return bias, None if self.confidence_head is None else self.confidence_head(inputs), memory


class DSparkDrafter(DFlashDrafter):
    """Drafts a block in one forward, and chooses its ids in order."""

    def _choose_block(
        self, logits: Tensor, block: Tensor, positions: Tensor, sequences: Sequences, num_ids: int, limit: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        head, first = self.head, self.settings.first_drafting
        assert isinstance(head, DSparkHead)
        ids: list[Tensor] = []
        probs: list[Tensor] = []
        with torch.inference_mode():
            states = self.runner.cache.features.read(positions)[:, :, 0]
            memory = states.new_zeros(len(states), head.settings.markov_rank)
        before, reached = block[:, 0], torch.ones(len(states), device=states.device)
        for column in range(first + num_ids):
            with torch.inference_mode():
                bias, chance, memory = head.read_before(before, states[:, column], memory)
            if column < first:
                continue
            if chance is not None:
                reached = reached * chance
                limit = torch.where(reached < MIN_CHANCE, limit.clamp(max=column - first), limit)
            scores = logits[:, column : column + 1]
            scores = scores if bias is None else scores + bias
            limit = self._choose_next(scores, sequences, column - first, limit, ids, probs)
            before = self._within_vocabulary(ids[-1])[:, 0]
        return torch.cat(ids, dim=1), torch.cat(probs, dim=1) if probs else None, limit
