"""Where the time of a call goes. A mark costs about 1 µs: time.perf_counter on a CPU, a CUDA event on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

STEP_PARTS = ("draft", "target", "verification", "other")


@dataclass(frozen=True, slots=True)
class StepTiming:
    """Seconds of one step: drafting, the target's forward, verification with processors and sampling, all else."""

    draft_s: float
    target_s: float
    verification_s: float
    other_s: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call's decoding loop, by part. What generate() prepares before the loop is not in it.

    prefill_s: the target's prefill. draft_s: drafting; the draft model's prefill is in the first step.
    target_s: forwards over verification windows. verification_s: processors, rejection sampling, commit.
    other_s: all else, on the host. first_token_s: from the start of the loop until the first step is verified.
    steps: the parts of each step; their sums are the totals, but for the `other_s` before the first step.
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


Mark = Callable[[str], None]  # mark(part) ends the part of a step with this name


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of the parts of a step, each indexed by its number of draft ids 0 … K; index 0 is the plain step."""

    draft_s: Sequence[float]
    target_s: Sequence[float]
    rest_s: Sequence[float]

    @property
    def step_s(self) -> list[float]:
        return [sum(parts) for parts in zip(self.draft_s, self.target_s, self.rest_s, strict=True)]


def no_mark(part: str) -> None:
    """The `Mark` of a call that is not timed."""


class StepTimer:
    """Measures the parts of a call: mark(part) ends a part, which began at the previous mark."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.device = device
        self.parts: list[str] = []
        self.marks = [self._mark()]

    def mark(self, part: str) -> None:
        """End a part: "prefill", or one of STEP_PARTS in their order; an "other" may come before the first step."""
        self.parts.append(part)
        self.marks.append(self._mark())

    def timing(self) -> Timing:
        """The parts marked so far; waits for the GPU once."""
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
