"""A draft model of a few of the target's layers, distilled from the whole target.

Hinton and others, Distilling the Knowledge in a Neural Network (2015, arXiv 1503.02531), on texts that the target
itself writes, as Zhou and others, DistillSpec (2024, arXiv 2310.08461), do for drafters. Embedding and output layer
stay those of the target.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from specdec.quant.checkpoints import load_checkpoint, take_settings
from specdec.quant.layers import is_4bit
from specdec.runtime.loading import load_tokenizer
from specdec.training.batch import Batch, add_counts
from specdec.training.config import TrainConfig, check_learning_rate
from specdec.training.texts import Text

LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


@dataclass
class DraftModelTraining:
    """A draft model to be trained.

    num_layers: layers of the target that it begins with, evenly spread from the first to the last.
    hard_labels: share of the loss that wants the text's id; the rest wants the target's distribution.
    learning_rate: the largest.
    """

    num_layers: int
    hard_labels: float
    learning_rate: float

    def __post_init__(self) -> None:
        check_learning_rate(self.learning_rate)
        if self.num_layers < 1:
            raise ValueError(f"train.num_layers={self.num_layers} must be 1 or more")
        if not 0 <= self.hard_labels <= 1:
            raise ValueError(f"train.hard_labels={self.hard_labels} must be from 0 to 1")

    def check_target(self, target: PreTrainedModel) -> None:
        """Raise ValueError where the target has too few layers."""
        num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
        if self.num_layers >= num_layers:
            raise ValueError(f"train.num_layers={self.num_layers} must be less than the target's {num_layers} layers")

    def start(self, config: TrainConfig, target: PreTrainedModel, texts: Sequence[Text]) -> TrainedDraftModel:
        """A new draft model for a target."""
        draft: Any = new_draft_model(config.target.path, self.num_layers)
        return TrainedDraftModel(draft.to(target.device), config)


class TrainedDraftModel:
    """A draft model in training, see `Trainee`."""

    what = "draft model"
    feature_layers: tuple[int, ...] = ()

    def __init__(self, draft: PreTrainedModel, config: TrainConfig) -> None:
        self.draft, self.path = draft, config.target.path
        self.module = Distillation(draft, config.num_draft_tokens, config.train.hard_labels)

    def save(self, folder: Path) -> None:
        draft: Any = copy.deepcopy(self.draft)
        draft.to(torch.bfloat16).save_pretrained(folder)
        load_tokenizer(self.path).save_pretrained(folder)


class Distillation(nn.Module):
    """The loss of a draft model over a batch, as a module, so that accelerate can wrap it."""

    def __init__(self, draft: PreTrainedModel, num_draft_tokens: int, hard_labels: float) -> None:
        super().__init__()
        self.draft, self.num_draft_tokens, self.hard_labels = draft, num_draft_tokens, hard_labels

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """-> the loss, a cross entropy over the ids of the answers, and the counts, see `Trainee`."""
        at = batch.is_answer[:, 1:]
        logits = self.draft(input_ids=batch.ids, use_cache=False).logits[:, :-1][at].float()  # [N, V]
        wanted = batch.logits[:, :-1][at]
        log_probs = logits.log_softmax(-1)
        soft = -(wanted.softmax(-1) * log_probs).sum(-1).mean()
        hard = F.nll_loss(log_probs, batch.ids[:, 1:][at])
        agrees = torch.zeros_like(at)
        agrees[at] = logits.argmax(-1) == wanted.argmax(-1)
        counts: list[Tensor] = []
        is_right = torch.ones_like(at)
        for index in range(self.num_draft_tokens):
            count = max(at.shape[1] - index, 0)  # position p drafts the id at p + 1 + index
            is_tried = is_right[:, :count] & at[:, index:]
            is_right = is_tried & agrees[:, index:]
            add_counts(counts, is_tried, is_right)
        return (1 - self.hard_labels) * soft + self.hard_labels * hard, torch.stack(counts).detach()


def new_draft_model(path: str, num_layers: int) -> PreTrainedModel:
    """A model of evenly spread layers of a checkpoint, in float32; all but the layers is not trained.

    Raises ValueError where the checkpoint is in 4 bits, or its layers cannot be told apart by name.
    """
    whole = load_checkpoint(path, dtype=torch.float32)
    if is_4bit(whole):
        raise ValueError(
            f"{path} is in 4 bits, and a draft model begins with layers in full precision; name the original"
        )
    config: Any = copy.deepcopy(whole.config)
    take_settings(config)
    text = config.get_text_config(decoder=True)
    last = text.num_hidden_layers - 1
    chosen = [round(index * last / max(num_layers - 1, 1)) for index in range(num_layers)]
    text.num_hidden_layers = num_layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(text, name, None) is not None:
            setattr(text, name, [getattr(text, name)[layer] for layer in chosen])
    draft = type(whole)(config)
    tensors, own = whole.state_dict(), {}
    for name in draft.state_dict():
        match = LAYER.search(name)
        source = name if match is None else f"{name[: match.start(1)]}{chosen[int(match[1])]}{name[match.end(1) :]}"
        if source not in tensors:
            raise ValueError(f"{type(whole).__name__} has no {source}; its layers cannot be told apart by name")
        own[name] = tensors[source]
    draft.load_state_dict(own)
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(LAYER.search(name) is not None or parameter.ndim == 1)
    draft.generation_config = whole.generation_config
    return draft
