"""What a training reads of its texts, and what every kind of drafter gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.training.texts import Text


@dataclass(frozen=True)
class Batch:
    """Texts, padded on the right, and what the target made of them.

    ids: [B, L] int64. is_answer: [B, L] bool, the ids that the target wrote. features: [B, L, n, H] float32, its hidden
    states; n = 0 where none are read. logits: [B, L, V] float32; those at a position are of the id behind it.
    """

    ids: Tensor
    is_answer: Tensor
    features: Tensor
    logits: Tensor


class Trainee(Protocol):
    """A drafter in training.

    module: a Batch -> the loss, and [K, 2] float32: of each position of a draft, how many ids were drafted behind ids
    that are the target's choice, and how many of them are its choice too. feature_layers: the target's hidden states
    that it reads.
    """

    module: nn.Module
    feature_layers: tuple[int, ...]

    def save(self, folder: Path) -> None:
        """Write what enable() loads."""


@torch.no_grad()
def batch_of(rows: Sequence[Text], target: PreTrainedModel, feature_layers: Sequence[int]) -> Batch:
    """Texts with what the target makes of them."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], device=target.device)
    columns = torch.arange(width, device=target.device)
    first = torch.tensor([row.num_prompt_ids for row in rows], device=target.device)[:, None]
    end = torch.tensor([len(row.ids) for row in rows], device=target.device)[:, None]
    reads = {"output_hidden_states": True} if feature_layers else {}
    output = target(input_ids=ids, attention_mask=(columns < end).long(), use_cache=False, **reads)
    states = [output.hidden_states[layer] for layer in feature_layers]
    features = torch.stack(states, dim=2).float() if states else torch.empty(*ids.shape, 0, 0, device=ids.device)
    return Batch(ids, (columns >= first) & (columns < end), features, output.logits.float())


def add_counts(counts: list[Tensor], is_tried: Tensor, is_right: Tensor) -> None:
    """Append the counts of a position of a draft."""
    counts.append(torch.stack([is_tried.sum(), is_right.sum()]).float())
