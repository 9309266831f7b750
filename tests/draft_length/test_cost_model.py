"""The cost model: how the step times follow the steps that run."""

from __future__ import annotations

import pytest

from specdec.core.timing import StepTimes
from specdec.draft_length.cost_model import (
    PLAIN,
    AcceptanceEstimator,
    DraftSizeEstimator,
    Profile,
    StepTimeEstimator,
)
from specdec.draft_length.settings import ADAPTIVE_K, MAX_DRAFT_TOKENS
from tests.helpers.draft_length import profile_of

STEP_S = [1.0 + 0.15 * k for k in range(MAX_DRAFT_TOKENS + 1)]  # seconds of a step by K
PLAIN_RUN, DRAFT_RUN = ADAPTIVE_K.plain_run_steps, ADAPTIVE_K.draft_run_steps


def test_one_slow_step_changes_little_and_a_lasting_change_is_followed() -> None:
    step_times = StepTimeEstimator(profile_of(STEP_S))
    before = list(step_times.draft_step_s)
    for index in range(3 * PLAIN_RUN):
        k = 0 if index // PLAIN_RUN % 2 else 2
        step_times.observe(k or PLAIN, 50.0 if index == DRAFT_RUN else STEP_S[k])
    assert all(0.8 < now / then < 1.2 for now, then in zip(step_times.draft_step_s, before, strict=True))
    for index in range(100 * PLAIN_RUN):
        k = 2 if index // PLAIN_RUN % 2 else 0
        step_times.observe(k or PLAIN, 3.0 if k else STEP_S[0])
    assert step_times.draft_step_s[2] / step_times.plain_step_s == pytest.approx(3.0, rel=0.05)


def test_a_machine_that_slows_down_changes_no_comparison() -> None:
    step_times = StepTimeEstimator(profile_of(STEP_S))
    before = list(step_times.draft_step_s)
    for index in range(300):
        k = 0 if index % 30 < PLAIN_RUN else 3
        step_times.observe(k or PLAIN, STEP_S[k] * (1 + index / 100))
    assert step_times.draft_step_s == pytest.approx(before, rel=0.05)
    assert step_times.plain_s == pytest.approx(4.0, rel=0.05)


def test_steps_that_draft_do_not_change_the_time_of_plain_steps() -> None:
    """The first step after another K is always slow; the mean of both K stays the same relative to plain steps."""
    step_times = StepTimeEstimator(profile_of(STEP_S))
    for index in range(5000):
        k = (3, 8)[index // 4 % 2]
        step_times.observe(k or PLAIN, STEP_S[k] * (1.3 if index % 4 == 0 else 1.0))
    assert step_times.plain_s == pytest.approx(STEP_S[0], rel=0.15)
    assert step_times.draft_step_s[8] / step_times.draft_step_s[3] == pytest.approx(STEP_S[8] / STEP_S[3], rel=0.15)


def test_a_step_takes_as_long_as_what_the_drafter_proposes_of_k() -> None:
    """Half of the proposals are empty, the others have two ids, whatever K is."""
    zeros, step_s = [0.0] * 4, [1.0, 2.0, 3.0, 9.0]
    num_drafted = 200 * [(3, 0), (3, 2), (1, 1), (1, 0)]
    profile = Profile(StepTimes(zeros, step_s, zeros), 1.2, 0.0, num_drafted, [], 0.0)
    times = StepTimeEstimator(profile)
    sizes = DraftSizeEstimator(profile)
    assert sizes.expected_step_s(times) == pytest.approx([1.0, 1.6, 2.1, 2.1], rel=0.02)
    for _ in range(500):
        sizes.observe(3, 3)
    assert sizes.expected_step_s(times) == pytest.approx([1.0, 2.0, 3.0, 9.0], rel=0.02)


def test_the_time_of_an_empty_proposal_changes_that_of_no_other() -> None:
    step_times = StepTimeEstimator(profile_of(STEP_S))
    before = list(step_times.draft_step_s)
    for index in range(40 * PLAIN_RUN):
        is_plain = index // PLAIN_RUN % 2
        step_times.observe(PLAIN if is_plain else 0, 1.0 if is_plain else 1.5)
    assert step_times.draft_step_s[0] == pytest.approx(1.5, rel=0.05)
    assert step_times.draft_step_s[1:] == pytest.approx(before[1:])


def test_acceptance_by_position_follows_what_was_accepted_there() -> None:
    acceptance = AcceptanceEstimator([], 3)
    assert acceptance.by_position(0.6) == [0.6, 0.6, 0.6]
    for _ in range(300):
        acceptance.observe_realized([0.45, 0.8], 0.6)
    assert acceptance.by_position(0.6) == pytest.approx([0.45, 0.8, 0.8], rel=0.1), "the third as the second"
    assert acceptance.by_position(0.9)[1] == 1.0


def test_what_long_drafts_take_is_learned_where_short_ones_lie_between() -> None:
    """The step after a long draft is slow too, and the profile was 1.5 times wrong."""
    step_times = StepTimeEstimator(profile_of([1.0, 1.2, *[1.4] * (MAX_DRAFT_TOKENS - 1)]))
    for index in range(2000):
        drafted = 6 if index % 5 == 0 else 1
        step_times.observe(drafted, 2.1 if drafted == 6 else 1.4 if index % 5 == 1 else 1.2)
    assert step_times.draft_step_s[6] / step_times.draft_step_s[1] == pytest.approx(2.1 / 1.25, rel=0.05)
