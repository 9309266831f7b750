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

from specdec.quant.checkpoints import config_folder, load_checkpoint, read_config
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

    def check_target(self, config: TrainConfig, target: PreTrainedModel) -> None:
        """Raise ValueError where no draft model can be made of the target's checkpoint."""
        num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
        if self.num_layers >= num_layers:
            raise ValueError(f"train.num_layers={self.num_layers} must be less than the target's {num_layers} layers")
        new_draft_model(config.target.path, self.num_layers)

    def start(self, config: TrainConfig, target: PreTrainedModel, texts: Sequence[Text]) -> TrainedDraftModel:
        """A new draft model for a target."""
        draft: Any = new_draft_model(config.target.path, self.num_layers)
        return TrainedDraftModel(draft.to(target.device), config)


class TrainedDraftModel:
    """A draft model in training, see `Trainee`."""

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

    Raises ValueError where the checkpoint is quantized, its layers have no numbers in their tensors' names, or a layer
    is of another kind than the one whose place it takes.
    """
    folder = config_folder(path)
    if read_config(folder)[1] is not None:
        raise ValueError(
            f"{path} is quantized, and a draft model begins with layers in full precision; name the original"
        )
    whole = load_checkpoint(path, dtype=torch.float32)
    config: Any = copy.deepcopy(whole.config)
    text = config.get_text_config(decoder=True)
    count = int(text.num_hidden_layers)
    tensors = whole.state_dict()
    if {int(match[1]) for name in tensors if (match := LAYER.search(name))} != set(range(count)):
        raise ValueError(
            f"the layers of {type(whole).__name__} have no numbers in their tensors' names, so none can be left out"
        )
    chosen = [round(index * (count - 1) / max(num_layers - 1, 1)) for index in range(num_layers)]
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == count:  # of a value for each layer
            setattr(text, name, [value[layer] for layer in chosen])
    text.num_hidden_layers = num_layers
    draft = type(whole)(config)
    own: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for name, value in draft.state_dict().items():
        match = LAYER.search(name)
        source = name
        if match is not None:
            before, layer = name[: match.start(1)], chosen[int(match[1])]
            source = f"{before}{layer}{name[match.end(1) :]}"
            sources[f"{before}{match[1]}"] = f"{before}{layer}"
        own[name] = tensors.get(source, torch.empty(0))
        if own[name].shape != value.shape:
            raise ValueError(_other_kind(whole, source))
    for name, source in sources.items():
        if _settings_of(draft.get_submodule(name)) != _settings_of(whole.get_submodule(source)):
            raise ValueError(_other_kind(whole, source))
    draft.load_state_dict(own)
    for name, parameter in draft.named_parameters():
        parameter.requires_grad_(LAYER.search(name) is not None or parameter.ndim == 1)
    draft.generation_config = whole.generation_config
    return draft


def _other_kind(whole: PreTrainedModel, source: str) -> str:
    return (
        f"the layers of {type(whole).__name__} are of several kinds, and {source} cannot take the place that it would"
        " have; choose another train.num_layers"
    )


def _settings_of(layer: nn.Module) -> dict[str, Any]:
    """The plain attributes of a layer's modules (numbers, flags, names), without the layer's index."""
    return {
        f"{path}.{name}": value
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str | None) and name not in ("layer_idx", "layer_id", "training")
    }
