"""The schema of a training, with the values of conf/train.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specdec.experiments.config import QuantConfig, SamplingConfig, TargetConfig


@dataclass
class TrainConfig:
    """One training of a drafter for a target.

    train: what is trained, an Eagle3Training or a DraftModelTraining.
    workload: prompts, of which first turns are used; the target's answers are the texts that the drafter is trained on.
    sampling: how the target answers. answer_batch: prompts that are answered at a time. max_prompt_tokens: of a longer
        prompt the last ones. held_out: fraction of the prompts, evenly spread, that the drafter is measured on alone.
    num_draft_tokens: ids of a draft; acceptance is measured for each, and training-time test has as many steps.
    report_prompts: held-out prompts of the run at the end, which has a report; 0: no run.
    epochs, batch_size, warmup: passes over the texts, texts of a step in each process, and the fraction of the steps
        until the learning rate is the largest; it falls to a tenth as a cosine.
    folder: for texts, checkpoints and the drafter. The same training in the same folder goes on where it ended.
    """

    target: TargetConfig
    quant: QuantConfig
    train: Any
    workload: Any
    sampling: SamplingConfig
    folder: Path
    answer_batch: int
    max_prompt_tokens: int
    held_out: float
    num_draft_tokens: int
    report_prompts: int
    epochs: int
    batch_size: int
    warmup: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("answer_batch", "max_prompt_tokens", "num_draft_tokens", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        for name in ("held_out", "warmup"):
            check_fraction(name, getattr(self, name))
        if self.report_prompts < 0:
            raise ValueError(f"report_prompts={self.report_prompts} must be 1 or more, or 0 for no run at the end")


def check_fraction(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name}={value} must be more than 0 and at most 1")


def check_learning_rate(value: float) -> None:
    if value <= 0:
        raise ValueError(f"train.learning_rate={value} must be positive")
