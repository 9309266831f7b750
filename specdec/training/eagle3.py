"""Training-time test of an EAGLE-3 head: it is trained on what it will read, its own output included.

Li and others, EAGLE-3 (2025, arXiv 2503.01840). Step 1 reads the target's hidden states at every position of a text;
step t + 1 reads, at the same positions, the output of step t and the id behind. A position attends to the states of
step 1 up to itself and to its own of the steps between, which is what drafting from there would leave in the KV cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from specdec.drafters.eagle3 import Eagle3Head


@dataclass(frozen=True)
class Batch:
    """Texts, padded on the right, and what the target made of them.

    ids: [B, L] int64. is_answer: [B, L] bool, the ids that the target wrote. features: [B, L, n, H], its hidden
    states. logits: [B, L, V] float32; those at a position are of the id behind it.
    """

    ids: Tensor
    is_answer: Tensor
    features: Tensor
    logits: Tensor


class TrainingTimeTest(nn.Module):
    """The losses of a head over a batch, as a module, so that accelerate can wrap it."""

    def __init__(self, head: Eagle3Head, num_steps: int, step_decay: float) -> None:
        super().__init__()
        self.head, self.num_steps, self.step_decay = head, num_steps, step_decay

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> the loss, and [T, 2] float32, of each step: the ids drafted, and those that are the target's choice.

        The loss is the cross entropy with the target's distribution over the ids that the head can draft, where its
        likeliest id is one of them. A step's drafts are counted where those of all steps before are the target's.
        """
        head, steps = self.head, self.num_steps
        num_positions = batch.ids.shape[1] - 1
        drafted_ids = torch.arange(len(head.d2t), device=batch.ids.device) + head.d2t
        is_draftable = torch.zeros(batch.logits.shape[-1], dtype=torch.bool, device=batch.ids.device)
        is_draftable[drafted_ids] = True
        targets, is_answer = F.pad(batch.logits, (0, 0, 0, steps)), F.pad(batch.is_answer, (0, steps + 1))
        losses, counts = [], []
        is_right = torch.ones_like(batch.is_answer[:, 1:])
        for step, logits in enumerate(self.logits(batch.ids, batch.features)):
            wanted = targets[:, 1 + step :][:, :num_positions]  # position p drafts the id at p + 2 + step
            is_counted = is_answer[:, 2 + step :][:, :num_positions]
            choice = wanted.argmax(-1)
            is_trained = is_counted & is_draftable[choice]
            entropy = -(wanted[..., drafted_ids].softmax(-1) * logits.float().log_softmax(-1)).sum(-1)
            losses.append(self.step_decay**step * (entropy * is_trained).sum() / is_trained.sum().clamp(min=1))
            is_tried = is_right & is_counted
            is_right = is_tried & (drafted_ids[logits.argmax(-1)] == choice)
            counts.append(torch.stack([is_tried.sum(), is_right.sum()]).float())
        return torch.stack(losses).sum(), torch.stack(counts).detach()

    def logits(self, ids: Tensor, features: Tensor) -> list[Tensor]:
        """Of each step the head's logits [B, L - 1, Vd] over the ids that it can draft."""
        head = self.head
        layer: Any = head.layers[0]
        attention, config = layer.self_attn, head.config
        num_positions = ids.shape[1] - 1
        positions = torch.arange(num_positions, device=ids.device)[None]
        states, padded = head.reduce(features[:, :-1]), F.pad(ids, (0, self.num_steps))
        later = torch.ones(num_positions, num_positions, dtype=torch.bool, device=ids.device).triu(1)
        keys: list[Tensor] = []
        values: list[Tensor] = []
        found = []
        for step in range(self.num_steps):
            read = padded[:, 1 + step :][:, :num_positions]
            normed = layer.hidden_norm(states)
            residual = normed if layer.norm_before_residual else states
            x = torch.cat([layer.input_layernorm(head.embed_tokens(read)), normed], dim=-1)
            query, key, value = (
                projection(x).unflatten(-1, (-1, config.head_dim))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            cos, sin = head.rotary_emb(states, positions + step)
            query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
            groups = query.shape[1] // key.shape[1]
            keys.append(key.repeat_interleave(groups, dim=1))
            values.append(value.transpose(1, 2).repeat_interleave(groups, dim=1))
            scores = (query @ keys[0].transpose(2, 3)).masked_fill(later, -torch.inf)
            own = [(query * one).sum(-1, keepdim=True) for one in keys[1:]]
            weights = (torch.cat([scores, *own], dim=-1) * attention.scaling).float().softmax(-1).to(query.dtype)
            mixed = weights[..., :num_positions] @ values[0]
            for index, one in enumerate(values[1:]):
                mixed = mixed + weights[..., num_positions + index, None] * one
            states = residual + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            states = states + layer.mlp(layer.post_attention_layernorm(states))
            normed = head.norm(states)
            found.append(head.lm_head(normed))
            states = normed if head.settings.norm_output else states
        return found
