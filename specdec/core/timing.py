"""Where a call's time goes. A mark costs a microsecond: the host's clock on a CPU, an event on a GPU, read at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

STEP_PARTS = ("draft", "target", "verification", "other")


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Seconds of one step: proposing, the target's forward, verifying with all sampling from the target, the host's rest."""

    draft_s: float
    target_s: float
    verification_s: float
    other_s: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call's loop, by part; generate()'s own preparation comes before it.

    prefill_s: the target reads the prompt. draft_s: proposing; the draft model reads the prompt in the first step.
    target_s: verifying forwards. verification_s: processors, rejection sampling, drawing, committing. other_s: the host's own.
    first_token_s: from the loop's start until the first step is verified.
    steps: the parts of each step; they sum up to the totals, but for what `other_s` holds before the first one.
    """

    prefill_s: float
    draft_s: float
    target_s: float
    verification_s: float
    other_s: float
    first_token_s: float
    steps: list[StepTiming] = field(default_factory=list)

    @property
    def total_s(self) -> float:
        return self.prefill_s + self.draft_s + self.target_s + self.verification_s + self.other_s


Mark = Callable[[str], None]  # told the name of each part of a step when it ends


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step's parts, each a list indexed by the number of drafted ids, 0 … K; the step without a draft is plain."""

    draft_s: Sequence[float]
    target_s: Sequence[float]
    rest_s: Sequence[float]

    @property
    def step_s(self) -> list[float]:
        return [sum(parts) for parts in zip(self.draft_s, self.target_s, self.rest_s, strict=True)]


def no_mark(part: str) -> None:
    """What an untimed call does at the end of a part."""


class StepTimer:
    """Each lap(part) ends a part, which began where the one before ended; the first begins here."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.device = device
        self.parts: list[str] = []
        self.marks = [self._mark()]

    def mark(self, part: str) -> None:
        """part: "prefill" or one of STEP_PARTS, which come in their order, but for an "other" before the first step."""
        self.parts.append(part)
        self.marks.append(self._mark())

    def timing(self) -> Timing:
        """All laps so far; waits for the GPU, once."""
        seconds = self._seconds()
        totals = dict.fromkeys(("prefill", *STEP_PARTS), 0.0)
        for part, spent in zip(self.parts, seconds, strict=True):
            totals[part] += spent
        drafts = [index for index, part in enumerate(self.parts) if part == "draft"]
        first = self.parts.index("verification") + 1 if "verification" in self.parts else len(self.parts)
        return Timing(
            **{f"{part}_s": spent for part, spent in totals.items()},
            first_token_s=sum(seconds[:first]),
            steps=[StepTiming(*seconds[index : index + len(STEP_PARTS)]) for index in drafts],
        )

    def _mark(self) -> float | torch.cuda.Event:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _seconds(self) -> list[float]:
        seconds = []
        for before, after in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
                after.synchronize()
                seconds.append(before.elapsed_time(after) / 1000)
            elif isinstance(before, float) and isinstance(after, float):
                seconds.append(after - before)
        return seconds
