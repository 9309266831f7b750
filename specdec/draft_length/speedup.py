"""What speculation comes to: tokens a step and speed, from acceptance and the times of a step's parts. Arithmetic only.

    time per token / plain = (T_draft(K) + T_target(K + 1) + rest) / (mean acceptance length * plain step)

of steps that draft, as SpecMQuant (2025) puts it; steps that do not draft cost a plain step a token. A draft pays while what it
adds to the acceptance length is more than what it adds to the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from specdec.core.steps import RowStep


def speedup(
    num_draft_tokens: int,
    tokens: Any,
    spec_steps: Any,
    plain_steps: Any,
    step_s: Sequence[float],
    prompt_s: float = 0.0,
) -> Any:
    """Over plain decoding, of texts or of arrays of them: tokens written in steps that draft and in steps that do not.

    step_s: seconds of a step, by K. prompt_s: seconds that reading the prompt adds to each generated token, draft or no draft.
    """
    return (prompt_s + step_s[0]) / (
        prompt_s + (spec_steps * step_s[num_draft_tokens] + plain_steps * step_s[0]) / tokens
    )


def acceptance_lengths(acceptance: float, room: int, most: int) -> list[float]:
    """The acceptance length to expect of a row at each K = 0 … most: 1 + a + a^2 + …, with room for so many drafted ids."""
    lengths = [1.0] * (most + 1)
    reached = 1.0
    for k in range(1, most + 1):
        if k <= room:
            reached *= acceptance
            lengths[k] = lengths[k - 1] + reached
        else:
            lengths[k] = lengths[k - 1]
    return lengths


def to_the_end(rows: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """Tokens a step, by K, that bring a batch to its end: those of the row that ends last, however many the others write.

    rows: of each the tokens that it has to write, and its acceptance lengths by K.
    """
    longest = max(left for left, _ in rows)
    return [longest / max(left / lengths[k] for left, lengths in rows) for k in range(len(rows[0][1]))]


def fastest(lengths: Sequence[float], step_s: Sequence[float], among: Sequence[int]) -> int:
    """The K among some that gives the most tokens a second; the first of equals."""
    return max(among, key=lambda k: lengths[k] / step_s[k])


def interpolated(known: dict[int, float]) -> list[float]:
    """Values at 0 … the largest key, straight lines between the known ones, 0 being one of them."""
    keys = sorted(known)
    values = [known[0]]
    for left, right in pairwise(keys):
        slope = (known[right] - known[left]) / (right - left)
        values += [known[left] + slope * step for step in range(1, right - left + 1)]
    return values


def acceptance_along(steps: Sequence[RowStep]) -> list[float | None]:
    """The chance that a draft id would be accepted at each generated position of a text, from the steps that wrote it."""
    return [chance for step in steps for chance in step.chances()]


def replay(
    steps: Sequence[RowStep], num_draft_tokens: int, at_bonus: float, *, stopped: bool = False
) -> tuple[float, float]:
    """Write a text again with another K: -> the expected numbers of steps that draft and of steps that do not.

    steps: those that wrote the text. Acceptance at each position is as acceptance_along() gives it; at_bonus stands in where it
    is None. stopped: the text ended by itself, maybe on a draft id; one that came to its limit ends on an id of the target's own.
    The text's law is the target's whatever K is, so only the steps' borders move: from each step that may start at a position,
    weight passes on to where it may end. Averages by position would mislead: steps of another K start elsewhere, after other
    failures. A step does not draft where the limit leaves no draft id, nor where the drafter had nothing to offer.
    """
    chances = [at_bonus if chance is None else chance for chance in acceptance_along(steps)]
    positions = accumulate((step.emitted for step in steps), initial=0)
    without_draft = {
        position for position, step in zip(positions, steps, strict=False) if step.requested and not step.drafted
    }
    length = len(chances)
    starts = [0.0] * (length + 1)  # expected number of steps that start at a position
    starts[0] = 1.0
    spec_steps = plain_steps = 0.0
    for position in range(length):
        weight = starts[position]
        limit = 0 if position in without_draft else min(num_draft_tokens, length - position - (not stopped))
        if limit:
            spec_steps += weight
        else:
            plain_steps += weight
        for behind in range(position, position + limit):
            starts[behind + 1] += weight * (1 - chances[behind])
            weight *= chances[behind]
        starts[min(position + limit + 1, length)] += weight
    return spec_steps, plain_steps
