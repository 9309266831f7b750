"""The schema of a training, with the values of conf/train.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.experiments.config import QuantConfig, SamplingConfig, TargetConfig


@dataclass
class TrainConfig:
    """One training of an EAGLE-3 head for a target.

    workload: prompts, of which first turns are used; the target's answers are the texts that the head is trained on.
    sampling: how the target answers. answer_batch: prompts that are answered at a time. max_prompt_tokens: of a longer
        prompt the last ones. held_out: fraction of the prompts that the head is measured on and never trained on.
    feature_layers: hidden states of the target that the head reads; None: an early, a middle and a late one.
    draft_vocab_size: ids that it can draft, the most frequent ones of the texts; None: all, at most 32,000.
    intermediate_size: of its MLP; None: the target's. norm_output, fc_norm: see `Eagle3Settings`.
    ttt_steps: steps of training-time test, in which the head reads its own output. step_decay: weight of each further
        step's loss.
    epochs, batch_size, learning_rate, warmup: passes over the texts, texts of a step in each process, the largest
        learning rate, and the fraction of the steps until it is reached; it falls to a tenth as a cosine.
    folder: for texts, checkpoints and the head. The same training in the same folder goes on where it ended.
    """

    target: TargetConfig
    quant: QuantConfig
    workload: Any
    sampling: SamplingConfig
    folder: Path
    answer_batch: int
    max_prompt_tokens: int
    held_out: float
    feature_layers: list[int] | None
    draft_vocab_size: int | None
    intermediate_size: int | None
    norm_output: bool
    fc_norm: bool
    ttt_steps: int
    step_decay: float
    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("answer_batch", "max_prompt_tokens", "ttt_steps", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("held_out", "step_decay", "warmup"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0 and at most 1")
        for name in ("draft_vocab_size", "intermediate_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more, or null")
        if self.feature_layers is not None and not self.feature_layers:
            raise ValueError(
                "feature_layers=[] names no hidden state; leave it out for an early, a middle and a late one"
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
