"""The arithmetic of speculation, and replay() against texts that are generated again with another K."""

from __future__ import annotations

import random
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specdec.core.steps import RowStep
from specdec.core.timing import StepTimes
from specdec.draft_length.speedup import (
    acceptance_by_position,
    batch_acceptance_lengths,
    expected_acceptance_lengths,
    fastest_k,
    interpolate,
    replay,
    speedup,
)

TIMES = StepTimes(draft_s=[0.0, 1.0, 2.0], target_s=[4.0, 4.5, 5.0], rest_s=[1.0, 1.0, 1.5])
texts = st.lists(st.floats(0, 1), min_size=1, max_size=12)  # acceptance at each position


def generate(
    acceptance: list[float], k: int, rng: random.Random, stopped: bool = False, without_draft: Collection[int] = ()
) -> list[RowStep]:
    """The steps of one text, from the acceptance at each position; it reaches its limit, or is stopped before.

    without_draft: positions at which the drafter proposes nothing.
    """
    steps, position = [], 0
    while position < len(acceptance):
        requested = min(k, len(acceptance) - position - (not stopped))
        drafted = 0 if position in without_draft else requested
        accepted = 0
        while accepted < drafted and rng.random() < acceptance[position + accepted]:
            accepted += 1
        tried = acceptance[position : position + min(drafted, accepted + 1)]
        emitted = min(accepted + 1, len(acceptance) - position)
        steps.append(RowStep(requested, drafted, accepted, emitted, tried))
        position += emitted
    return steps


def single_id_steps(acceptance: list[float], without_draft: Collection[int] = ()) -> list[RowStep]:
    """Steps that emit one id each, with the acceptance at every position where the drafter proposes one."""
    return [
        RowStep(1, 0, 0, 1, []) if position in without_draft else RowStep(1, 1, 0, 1, [overlap])
        for position, overlap in enumerate(acceptance)
    ]


def count_steps(steps: list[RowStep]) -> tuple[int, int]:
    """Steps that drafted and steps that did not."""
    drafting = sum(step.drafted > 0 for step in steps)
    return drafting, len(steps) - drafting


def test_speedup_from_step_times_and_acceptance() -> None:
    step_s = TIMES.step_s
    assert step_s == [5.0, 6.5, 8.5]
    assert speedup(0, 7, 0, 7, step_s) == 1.0
    assert speedup(2, 2.55, 1, 0, step_s) == pytest.approx(5 / (8.5 / 2.55))
    assert speedup(2, 2.55, 1, 0, step_s, prompt_s=10.0) == pytest.approx(15 / (10 + 8.5 / 2.55))
    assert speedup(2, 9, 3, 2, step_s) == pytest.approx(5 * 9 / (3 * 8.5 + 2 * 5)), (
        "a step without a draft is a plain one"
    )
    assert speedup(1, np.array([1.0, 2.0]), 1, 0, step_s).tolist() == pytest.approx([5 / 6.5, 10 / 6.5])


def test_expected_lengths_are_limited_by_the_ids_that_a_row_may_still_draft() -> None:
    assert expected_acceptance_lengths([0.5] * 3, 9) == [1.0, 1.5, 1.75, 1.875]
    assert expected_acceptance_lengths([0.5, 0.2, 1.0], 9) == pytest.approx([1.0, 1.5, 1.6, 1.7])
    assert expected_acceptance_lengths([1.0] * 3, 1) == [1.0, 2.0, 2.0, 2.0]
    assert expected_acceptance_lengths([0.9, 0.8], 0) == [1.0, 1.0, 1.0]


def test_a_batch_ends_with_its_last_row() -> None:
    alone = [1.0, 1.5, 1.75]
    assert batch_acceptance_lengths([(7, alone)]) == alone
    assert batch_acceptance_lengths([(100, [1.0, 1.9, 2.7]), (100, alone)]) == alone, (
        "the row with the lowest acceptance"
    )
    assert batch_acceptance_lengths([(100, [1.0, 2.0, 3.0]), (10, [1.0, 1.0, 1.0])]) == [1.0, 2.0, 3.0], (
        "the row with the most ids to generate"
    )
    assert batch_acceptance_lengths([(100, [1.0, 2.0, 4.0]), (50, [1.0, 1.0, 1.0])]) == [1.0, 2.0, 2.0], (
        "the row that ends last depends on K"
    )


def test_the_fastest_k_gives_the_most_tokens_a_second() -> None:
    lengths = expected_acceptance_lengths([0.8] * 3, 9)
    for step_s in ([1.0, 1.1, 1.2, 9.0], [1.0, 1.5, 1.6, 1.7], [1.0, 2.0, 3.0, 4.0], [1.0, 1.8, 3.0, 4.0]):
        rates = [length / seconds for length, seconds in zip(lengths, step_s, strict=True)]
        assert rates[fastest_k(lengths, step_s, range(len(lengths)))] == max(rates)
    assert fastest_k([1.0, 2.0, 2.0], [1.0, 1.0, 1.0], range(3)) == 1
    assert fastest_k([1.0, 2.0, 2.0], [1.0, 1.0, 1.0], [0, 2]) == 2


def test_interpolation_is_linear_between_the_given_keys() -> None:
    assert interpolate({0: 1.0, 1: 2.0, 3: 6.0, 5: 4.0}) == [1.0, 2.0, 4.0, 6.0, 5.0, 4.0]
    assert interpolate({8: 9.0, 0: 1.0}) == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0]


@given(texts, st.integers(1, 5), st.booleans())
def test_replay_of_certain_acceptance_is_the_text_itself(acceptance: list[float], k: int, stopped: bool) -> None:
    certain = [float(overlap > 0.5) for overlap in acceptance]
    steps = generate(certain, k, random.Random(0), stopped)
    assert replay(single_id_steps(certain), k, 0.5, stopped=stopped) == count_steps(steps)
    assert replay(steps, k, 0.5, stopped=stopped) == count_steps(steps), "with the K of the text"


@pytest.mark.parametrize("without_draft", [(), (2, 3, 9)])
@pytest.mark.parametrize("stopped", [False, True])
def test_replay_is_the_mean_of_generated_texts(stopped: bool, without_draft: tuple[int, ...]) -> None:
    rng = random.Random(1)
    acceptance = [0.0 if position in without_draft else rng.random() for position in range(12)]
    counts = [count_steps(generate(acceptance, 4, rng, stopped, without_draft)) for _ in range(8000)]
    spec_steps, plain_steps = replay(single_id_steps(acceptance, without_draft), 4, 0.5, stopped=stopped)
    assert spec_steps == pytest.approx(sum(drafting for drafting, _ in counts) / 8000, rel=0.01)
    assert plain_steps == pytest.approx(sum(plain for _, plain in counts) / 8000, rel=0.05)
    assert bool(plain_steps) == (not stopped or bool(without_draft)), "at the limit, and where nothing is proposed"


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_replay_of_texts_of_the_largest_k_predicts_smaller_k(k: int) -> None:
    """Acceptance is correlated along the text, as in real ones, so averages by position would be biased."""
    rng = random.Random(2)
    source_steps = measured_steps = 0
    expected = 0.0
    for _ in range(300):
        is_easy, acceptance = True, []
        for _ in range(60):
            is_easy = is_easy if rng.random() < 0.85 else not is_easy
            acceptance.append(0.97 if is_easy else 0.3)
        source = generate(acceptance, 8, rng)
        source_steps += len(source)
        measured_steps += len(generate(acceptance, k, rng))
        expected += sum(replay(source, k, 0.9))
    assert source_steps > 2400
    assert expected == pytest.approx(measured_steps, rel=0.02)


def test_acceptance_by_position() -> None:
    steps = [
        RowStep(3, 3, 3, 4, [0.9, 0.8, 0.7]),  # a bonus id has no draft id to compare with
        RowStep(3, 3, 1, 2, [0.5, 0.25]),
        RowStep(3, 1, 1, 2, [0.6]),  # proposed less than requested
        RowStep(3, 0, 0, 1, []),
        RowStep(1, 1, 1, 2, [0.4]),  # another K
        RowStep(0, 0, 0, 1, []),
        RowStep(3, 2, 2, 2, [1.0, 0.5]),  # the text stops at a draft id
    ]
    assert acceptance_by_position(steps) == [0.9, 0.8, 0.7, None, 0.5, 0.25, 0.6, 0.0, 0.0, 0.4, None, None, 1.0, 0.5]
