"""What speculation comes to: tokens a step and speed, from acceptance and the times of a step's parts. Arithmetic only.

    time per token / plain = (T_draft(K) + T_target(K + 1) + rest) / (mean acceptance length * plain step)

as SpecMQuant (2025) puts it. A draft pays while what it adds to the acceptance length is more than what it adds to the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from specdec.stats import Step


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of a step's parts, each a list indexed by the number of drafted ids, 0 … K; the step without a draft is plain."""

    draft_s: Sequence[float]
    target_s: Sequence[float]
    rest_s: Sequence[float]

    def step_s(self, num_draft_tokens: int) -> float:
        k = num_draft_tokens
        return self.draft_s[k] + self.target_s[k] + self.rest_s[k]


def speedup(num_draft_tokens: int, mean_acceptance_length: Any, times: StepTimes, prompt_s: float = 0.0) -> Any:
    """Over plain decoding, the step that drafts nothing and emits one token; of one acceptance length or of an array of them.

    prompt_s: seconds that reading the prompt adds to each generated token, with a draft or without.
    """
    return (prompt_s + times.step_s(0)) / (prompt_s + times.step_s(num_draft_tokens) / mean_acceptance_length)


def acceptance_along(steps: Sequence[Step], num_draft_tokens: int) -> list[float | None]:
    """The chance that a draft id would be accepted at each generated position of a text, from the steps that wrote it.

    Where ids were drafted it is their sum(min(p, q)). None at a bonus id, which follows num_draft_tokens accepted ones and had no
    draft to compare with. 0 where the drafter offered less than it was asked for.
    """
    along: list[float | None] = []
    for step in steps:
        own = None if step.drafted == num_draft_tokens else 0.0
        along += [*step.overlap, own][: step.emitted]
    return along


def replay(
    along: Sequence[float | None], num_draft_tokens: int, at_bonus: float, *, stopped: bool = False
) -> tuple[float, float]:
    """Write a text again with another K: -> the expected numbers of steps and of accepted ids.

    along: acceptance at each position, as acceptance_along() gives it; at_bonus stands in where it is None. stopped: the text
    ended by itself, maybe on a draft id; one that came to its limit ends on an id of the target's own. The text's law is
    the target's whatever K is, so only the steps' borders move: from each step that may start at a position, weight passes on
    to where it may end. Averages by position would mislead: steps of another K start elsewhere, after other failures.
    """
    length = len(along)
    chances = [at_bonus if chance is None else chance for chance in along]
    starts = [0.0] * (length + 1)  # expected number of steps that start at a position
    starts[0] = 1.0
    steps = accepted = 0.0
    for position in range(length):
        weight = starts[position]
        steps += weight
        limit = min(num_draft_tokens, length - position - (not stopped))
        for behind in range(position, position + limit):
            starts[behind + 1] += weight * (1 - chances[behind])
            weight *= chances[behind]
            accepted += weight
        starts[min(position + limit + 1, length)] += weight
    return steps, accepted
