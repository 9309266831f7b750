"""Arithmetic of speculation: speedup from acceptance and step times, and the replay of a text with another K.

    time per token / plain = (T_draft(K) + T_target(K + 1) + T_rest) / (mean acceptance length * plain step)

for steps that draft, as SpecMQuant (2025) has it; a step that does not draft costs one plain step and emits one token.
A longer draft pays while it adds relatively more to the acceptance length than to the step.
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
    """Speed relative to plain decoding.

    tokens, spec_steps, plain_steps: of a text, or arrays of many: generated tokens, steps that draft, steps that do
    not. step_s: seconds of a step, by K. prompt_s: seconds that reading the prompt adds to each generated token, with
    and without drafts.
    """
    return (prompt_s + step_s[0]) / (
        prompt_s + (spec_steps * step_s[num_draft_tokens] + plain_steps * step_s[0]) / tokens
    )


def expected_acceptance_lengths(acceptance: Sequence[float], remaining_draft_tokens: int) -> list[float]:
    """The expected acceptance length of a row's step, by K = 0 … len(acceptance): 1 + a1 + a1·a2 + … + a1 ⋯ aK.

    acceptance: of a draft id after those before it were accepted, by its position. remaining_draft_tokens: the number
    of ids that the row may still draft; a larger K adds nothing.
    """
    lengths = [1.0] * (len(acceptance) + 1)
    probability = 1.0  # that the first k draft ids are all accepted
    for k, chance in enumerate(acceptance, 1):
        if k <= remaining_draft_tokens:
            probability *= chance
            lengths[k] = lengths[k - 1] + probability
        else:
            lengths[k] = lengths[k - 1]
    return lengths


def batch_acceptance_lengths(rows: Sequence[tuple[int, Sequence[float]]]) -> list[float]:
    """The acceptance length of a batch, by K: the tokens of its longest row over the steps of the row that ends last.

    rows: for each row, the number of tokens that it still generates and its acceptance lengths by K.
    """
    longest = max(remaining for remaining, _ in rows)
    return [longest / max(remaining / lengths[k] for remaining, lengths in rows) for k in range(len(rows[0][1]))]


def fastest_k(lengths: Sequence[float], step_s: Sequence[float], candidates: Sequence[int]) -> int:
    """The candidate K with the most tokens a second, from acceptance lengths and seconds by K; the first of equals."""
    return max(candidates, key=lambda k: lengths[k] / step_s[k])


def interpolate(values: dict[int, float]) -> list[float]:
    """Values at 0 … the largest key, linear between neighbouring keys; 0 is one of the keys."""
    result = [values[0]]
    for left, right in pairwise(sorted(values)):
        slope = (values[right] - values[left]) / (right - left)
        result += [values[left] + slope * offset for offset in range(1, right - left + 1)]
    return result


def acceptance_by_position(steps: Sequence[RowStep]) -> list[float | None]:
    """The probability that a draft id is accepted, at each generated position of a text; see RowStep.chances()."""
    return [chance for step in steps for chance in step.chances()]


def replay(
    steps: Sequence[RowStep], num_draft_tokens: int, bonus_acceptance: float, *, stopped: bool = False
) -> tuple[float, float]:
    """Generate a text again with another K: -> the expected numbers of steps that draft and of steps that do not.

    steps: those that generated the text. Acceptance at each position is that of acceptance_by_position(),
    bonus_acceptance where that is None. stopped: the text ended before its limit, so its last id may be a draft id; at
    the limit it is the target's own.

    The distribution of the text does not depend on K, so only the boundaries of the steps move: the weight of the steps
    that start at a position is passed on to the positions where they may end. Averages by position would be biased,
    since steps of another K start at other positions, after other rejections. A step does not draft where the limit
    leaves no draft id or where the drafter proposed none.
    """
    acceptance = [bonus_acceptance if chance is None else chance for chance in acceptance_by_position(steps)]
    positions = accumulate((step.emitted for step in steps), initial=0)
    without_draft = {
        position for position, step in zip(positions, steps, strict=False) if step.requested and not step.drafted
    }
    length = len(acceptance)
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
        for draft_position in range(position, position + limit):
            starts[draft_position + 1] += weight * (1 - acceptance[draft_position])
            weight *= acceptance[draft_position]
        starts[min(position + limit + 1, length)] += weight
    return spec_steps, plain_steps
