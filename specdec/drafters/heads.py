"""What draft heads have in common: they read hidden states of the target and draft some of its ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from specdec.core.sequences import Sequences
from specdec.drafters.model import ModelDrafter
from specdec.quant.config import Int4Config
from specdec.quant.heads import TiedEmbedding
from specdec.quant.int8 import Int8Linear
from specdec.quant.linear import Int4Linear
from specdec.quant.quantizer import quantize
from specdec.runtime.runner import PREFILL_CHUNK, ModelRunner


@dataclass(frozen=True)
class HeadSettings:
    """What a checkpoint says about its head apart from its layers.

    feature_layers: the target's hidden states that it reads, as transformers counts them (0: the embeddings).
    draft_vocab_size: Vd, the ids that it can draft. target_hidden_size: width of the target's hidden states.
    """

    feature_layers: tuple[int, ...]
    draft_vocab_size: int
    target_hidden_size: int


class DraftHead(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A head as a causal language model over the target's vocabulary: ids [B, W], positions -> logits [B, W, V].

    Ids that it cannot draft have the logit -inf. owns_embedding, owns_output: otherwise embed_tokens and lm_head are
    the target's. d2t: [Vd] int64, what is added to a drafted id to get the target's. keeps_states: whether its forwards
    write states of its own to its cache's features.
    """

    kind = "a draft head"  # in words
    keeps_states = False
    _supports_sdpa = _supports_attention_backend = True
    settings: HeadSettings
    d2t: Tensor
    is_reduced: bool
    fc: nn.Linear
    rotary_emb: Any

    def __init__(
        self, config: PreTrainedConfig, settings: HeadSettings, owns_embedding: bool = True, owns_output: bool = True
    ) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.settings, self.owns_embedding, self.owns_output = settings, owns_embedding, owns_output
        self.embed_tokens = nn.Embedding(config.vocab_size, width) if owns_embedding else nn.Module()
        self.lm_head = nn.Linear(width, settings.draft_vocab_size, bias=False) if owns_output else nn.Module()
        self.is_reduced = settings.draft_vocab_size != config.vocab_size
        self.register_buffer("d2t", torch.zeros(settings.draft_vocab_size, dtype=torch.int64))

    def description(self) -> str:
        """What it is, in a few words for a person."""
        settings, vocab_size = self.settings, self.config.vocab_size
        layers, count = settings.feature_layers, self.config.num_hidden_layers
        states = f"state{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
        drafted = f"{settings.draft_vocab_size:,} of the target's {vocab_size:,}" if self.is_reduced else "all"
        return (
            f"{self.kind} with {count} layer{'s' * (count > 1)}, which reads the target's hidden {states} and drafts"
            f" {drafted} ids"
        )

    def share(self, target: PreTrainedModel) -> None:
        """Read the target's embedding and output layer where the head has none of its own.

        All tensors of a forward are registered, since a compiled one is given them.
        """
        if not self.owns_embedding:
            self.embed_tokens = target.get_input_embeddings()
            if isinstance(self.embed_tokens, TiedEmbedding):
                self.embedding_rows = self.embed_tokens.head
        if not self.owns_output:
            self.lm_head = target.get_output_embeddings()  # type: ignore[no-untyped-call]

    def follow(self, target: PreTrainedModel) -> None:
        """Move to the device and the dtype of a target that was moved; 4-bit layers to the device alone."""
        norm = self.norm_of_its_own()
        if (norm.device, norm.dtype) == (target.device, target.dtype):
            return
        for module in (self, *(part for child in self._own_children() for part in child.modules())):
            in_four_bits = isinstance(module, Int4Linear | Int8Linear)
            for value in module.parameters(recurse=False):
                dtype = target.dtype if value.is_floating_point() and not in_four_bits else value.dtype
                value.data = value.data.to(device=target.device, dtype=dtype)
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(target.device))
        self.reset_rotary()

    def norm_of_its_own(self) -> Tensor:
        """The weight of a norm, which is in the head's dtype even where its layers are in 4 bits."""
        return next(value for child in self._own_children() for value in child.parameters() if value.ndim == 1)

    def _own_children(self) -> list[nn.Module]:
        return [child for name, child in self.named_children() if name not in self.shared]

    @property
    def shared(self) -> list[str]:
        """The modules that are the target's."""
        return ["embed_tokens", "embedding_rows"] * (not self.owns_embedding) + ["lm_head"] * (not self.owns_output)

    def reset_rotary(self) -> None:
        """Compute the frequencies of the rotary embedding anew, which no checkpoint holds and which stay in float32."""
        self.rotary_emb = type(self.rotary_emb)(self.config).to(self.fc.weight.device)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        """None: the head's own output layer may have fewer ids than its logits."""
        return

    def reduce(self, states: Tensor) -> Tensor:
        """The target's hidden states [B, W, n, H'] as one state [B, W, H]."""
        raise NotImplementedError

    def logits_of(self, states: Tensor, columns: int | Tensor) -> Tensor:
        """Logits [B, C, V] of normed states [B, W, H]. columns: the last so many, 0 for all; or their indices."""
        chosen = columns if isinstance(columns, Tensor) else slice(-columns, None)
        return self.over_vocabulary(self.lm_head(states[:, chosen]), -torch.inf)

    def over_vocabulary(self, values: Tensor, others: float) -> Tensor:
        """Values [B, C, Vd] of the ids that it can draft as those of all ids, [B, C, V]: `others` for the rest."""
        if not self.is_reduced:
            return values
        ids = torch.arange(self.d2t.shape[0], device=values.device) + self.d2t
        full = values.new_full((*values.shape[:2], self.config.vocab_size), others)
        return full.index_copy(-1, ids, values)


class HeadDrafter(ModelDrafter):
    """Drafts with a head, which reads what the target computed for committed ids.

    After a step it reads again what followed the last ids that it had read, since it drafted on without the target: one
    id more than it drafted.
    """

    target: ModelRunner

    def __init__(self, head: DraftHead, vocab_size: int) -> None:
        super().__init__(head, vocab_size)
        self.feature_layers = head.settings.feature_layers

    @property
    def head(self) -> DraftHead:
        head = self.runner.model
        assert isinstance(head, DraftHead)
        return head

    def match_target(self, target: ModelRunner) -> None:
        super().match_target(target)
        self.target = target
        self.head.follow(target.model)

    def quantize(self, group_size: int = 128) -> None:
        """Store the head's own linear layers in 4 bits, by groups of so many columns."""
        keeps = ["lm_head"] * ("lm_head" in self.head.shared and isinstance(self.head.lm_head, nn.Linear))
        quantize(self.head, Int4Config(group_size, skip_modules=keeps))

    def num_kept(self, drafted: int, accepted: int) -> int:
        return 0

    def _catch_up_after(self, num_ids: int) -> int:
        return num_ids + 1

    def _feed_states(self, sequences: Sequences, width: int) -> None:
        """Give the head the target's states at the `width` positions of each row before the last committed id."""
        last = (sequences.lengths - 2).clamp(min=0)
        positions = (last[:, None] - torch.arange(width - 1, -1, -1, device=last.device)).clamp(min=0)
        with torch.inference_mode():
            for chunk in torch.split(positions, PREFILL_CHUNK, dim=1):
                self._write_states(self.head.reduce(self.target.read_features(chunk)), chunk)

    def _write_states(self, states: Tensor, positions: Tensor) -> None:
        """Keep states [B, W, H] at positions [B, W] for the head's forwards."""
        raise NotImplementedError

    def _choose_each(self, logits: Tensor, sequences: Sequences, limit: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """The ids of all columns of logits [B, K, V], in order: -> ids, probs and lengths of a Draft."""
        ids: list[Tensor] = []
        probs: list[Tensor] = []
        for index in range(logits.shape[1]):
            limit = self._choose_next(logits[:, index : index + 1], sequences, index, limit, ids, probs)
        return torch.cat(ids, dim=1), torch.cat(probs, dim=1) if probs else None, limit

    @property
    def _lacks_ids(self) -> bool:
        return self.head.is_reduced
