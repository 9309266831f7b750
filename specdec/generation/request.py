"""One generate() call, as routing.py's checks see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.stopping_criteria import MaxLengthCriteria

from specdec.core.interfaces import Drafter
from specdec.generation.trials import Trial
from specdec.runtime.runner import ModelRunner


@dataclass
class Request:
    """One generate() call, as the checks see it.

    runner: of the enabled model. num_draft_tokens: K, or "auto". max_draft_tokens: the largest K of a step.
    arguments: of generate(), by name.
    mode_kwargs: what generate() keeps for the decoding loop (streamer, tokenizer, …).
    input_ids: int64 [B, L]. target_trial: of the target in its current state. Both are set for Stage.INPUTS.
    drafter: the one the call requests. draft_trial: of its model, None where it has none. acquired_drafter: the drafter
    that serves the call, None where all are in use. They are set for Stage.DRAFTER.
    """

    model: Any
    runner: ModelRunner
    config: GenerationConfig
    mode: GenerationMode
    arguments: dict[str, Any]
    mode_kwargs: dict[str, Any]
    model_kwargs: dict[str, Any]
    num_draft_tokens: int | str
    max_draft_tokens: int
    input_ids: Tensor | None = None
    target_trial: Trial | None = None
    drafter: Drafter | None = None
    draft_trial: Trial | None = None
    acquired_drafter: Drafter | None = None

    @cached_property
    def mask(self) -> Tensor | None:
        """int64 or bool [B, L]; None where no position is masked. Read when input_ids is set."""
        assert self.input_ids is not None
        mask: Tensor | None = self.model_kwargs.get("attention_mask")
        return None if mask is not None and mask.shape == self.input_ids.shape and mask.all() else mask

    @property
    def max_length(self) -> int:
        """Positions that the call may read, drafts included."""
        criteria = self.arguments.get("stopping_criteria") or ()
        lengths = [self.config.max_length, *(c.max_length for c in criteria if type(c) is MaxLengthCriteria)]
        return int(max(lengths)) + self.max_draft_tokens
