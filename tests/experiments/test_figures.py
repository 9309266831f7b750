"""Figures are what the records say, intervals hold the truth as often as they claim, replay() is the mean over all coins."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specdec.core.steps import RowStep
from specdec.draft_length.speedup import replay
from specdec.experiments.records import PLAIN, SPECULATIVE, Run, read_run
from specdec.experiments.report.figures import Estimate, compare, figures, metrics, tally
from tests.helpers.synthetic_runs import DRAFT_S, OTHER_S, PREFILL_S, STEP_S, VERIFY_S, synthetic_run

RUNS, PROMPTS = 200, 30
COVERED = (
    "mean_acceptance_length", "tokens_per_step", "draft_acceptance_rate", "expected_acceptance", "realized_acceptance", "speedup",
)  # fmt: skip


def holds(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


@pytest.fixture(scope="module")
def simulated() -> list[tuple[Run, Run]]:
    """Runs of the same prompts, drawn anew for each pair: K=4 and an easy drafter, K=3 and one that is worse."""
    common = {"prompts": PROMPTS, "extras": False, "sampling__temperature": 1.0, "sampling__max_new_tokens": 24}
    return [
        (
            synthetic_run(seed=2 * number, prompts_seed=number, **common),
            synthetic_run(seed=2 * number + 1, prompts_seed=number, k=3, chances=(0.85, 0.6), **common),
        )
        for number in range(RUNS)
    ]


def test_intervals_hold_the_truth_19_times_in_20(simulated: list[tuple[Run, Run]]) -> None:
    tallies = [np.array(list(tally(run).values())) for run, _ in simulated]
    truth = metrics(sum(tallies).sum(0)[None])  # type: ignore[union-attr]
    told = [metrics(values) for values in tallies]
    for name in COVERED:
        value = truth[name].value
        assert value is not None
        share = sum(holds(one[name], value) for one in told) / RUNS
        assert 0.90 <= share <= 0.99, (name, share)


def test_intervals_of_differences_do_too(simulated: list[tuple[Run, Run]]) -> None:
    truths = [
        metrics(sum(np.array(list(tally(pair[side]).values())) for pair in simulated).sum(0)[None])  # type: ignore[union-attr]
        for side in (0, 1)
    ]
    differences = [compare(a, b) for a, b in simulated]
    for name in COVERED:
        before, after = (truth[name].value for truth in truths)
        assert before is not None
        assert after is not None
        for kind, truth in (("change", after - before), ("relative", 100 * (after / before - 1))):
            share = sum(holds(getattr(one[name], kind), truth) for one in differences) / RUNS
            assert 0.90 <= share <= 0.99, (name, kind, share)


def test_prompts_are_drawn_and_not_their_repetitions() -> None:
    once = synthetic_run(prompts=12)
    again = replace(once, records=[replace(record, repetition=n) for n in range(5) for record in once.records])
    ours, theirs = figures(once), figures(again)
    pairs = [(ours.metrics[name], theirs.metrics[name]) for name in COVERED]
    pairs += [(a.conditional, b.conditional) for a, b in zip(ours.positions, theirs.positions, strict=True)]
    pairs += [(a.expected, b.expected) for a, b in zip(ours.along, theirs.along, strict=True)]
    pairs += [(a.speedup, b.speedup) for a, b in zip(ours.what_if, theirs.what_if, strict=True)]
    for one, other in pairs:
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high))


def test_one_prompt_has_no_interval_and_what_was_not_counted_no_value() -> None:
    told = figures(synthetic_run(prompts=1, repetitions=3, baseline=False)).metrics
    assert told["speedup"] == told["plain_tokens_per_s"] == told["identical"] == Estimate(None)
    for name in ("tokens_per_s", "mean_acceptance_length"):
        assert told[name].value is not None
        assert told[name].low is told[name].high is None


def test_figures_are_counted_from_the_steps() -> None:
    run = synthetic_run(prompts=2, k=2, tasks=2)
    ours = [
        [RowStep(2, 2, 2, 3, [0.9, 0.8]), RowStep(2, 2, 0, 1, [0.3]), RowStep(2, 1, 1, 2, [0.6])],
        [RowStep(2, 2, 1, 2, [0.7, 0.5]), RowStep(2, 2, 2, 3, [1.0, 1.0]), RowStep(2, 0, 0, 1, [])],
    ]
    records = iter(ours)
    run.records = [
        record
        if record.engine == PLAIN
        else replace(
            record,
            ids=record.ids[:6],
            steps=next(records),
        )
        for record in run.records
    ]
    found = figures(run)
    assert found.metrics["mean_acceptance_length"].value == pytest.approx(11 / 5)
    assert found.metrics["tokens_per_step"].value == pytest.approx(12 / 6)
    assert found.metrics["draft_acceptance_rate"].value == pytest.approx(6 / 9)
    assert found.metrics["expected_acceptance"].value == pytest.approx((0.9 + 0.8 + 0.3 + 0.6 + 0.7 + 0.5 + 2) / 8)
    assert found.metrics["identical"].value == 0  # plain's texts are longer
    assert found.histogram == [1, 2, 2]
    first, second = found.positions
    assert (first.unconditional.value, first.conditional.value) == (pytest.approx(4 / 5), pytest.approx(4 / 5))
    assert (second.unconditional.value, second.conditional.value) == (pytest.approx(2 / 5), pytest.approx(2 / 3))
    assert second.expected.value == pytest.approx((0.8 + 0.5 + 1.0) / 3)
    assert [(at.start, at.stop) for at in found.along] == [(n, n + 1) for n in range(6)]
    assert [at.expected.value for at in found.along] == [
        pytest.approx(value) if value else None for value in (0.8, (0.8 + 0.5) / 2, 1.0, (0.3 + 1) / 2, 0.6, None)
    ]
    assert list(found.tasks) == ["task a", "task b"]
    assert found.tasks["task b"][1]["mean_acceptance_length"].value == pytest.approx(5 / 2)


def enumerated(chances: list[float], k: int) -> tuple[float, float]:
    """Expected steps with and without a draft, over every way that the coins may fall."""
    drafting = plain = 0.0
    for coins in itertools.product((False, True), repeat=len(chances)):
        weight = math.prod(chance if coin else 1 - chance for chance, coin in zip(chances, coins, strict=True))
        position = 0
        while position < len(chances):
            kept = 0
            while kept < min(k, len(chances) - position - 1) and coins[position + kept]:
                kept += 1
            is_last = position == len(chances) - 1  # which the limit leaves to the target
            drafting, plain, position = drafting + weight * (not is_last), plain + weight * is_last, position + kept + 1
    return drafting, plain


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_replay_is_the_mean_over_every_way_that_the_coins_may_fall(k: int, length: int) -> None:
    rng = random.Random(length)
    chances = [rng.choice([0.0, 1.0, rng.random()]) for _ in range(length)]
    assert replay([RowStep(1, 1, 0, 1, [chance]) for chance in chances], k, 0.5) == pytest.approx(
        enumerated(chances, k)
    )


def test_replay_of_a_greedy_text_with_its_own_k_is_the_text() -> None:
    for record in synthetic_run(prompts=8).of(SPECULATIVE):
        drafting = sum(step.drafted > 0 for step in record.steps)
        assert replay(record.steps, 4, 0.123) == (drafting, len(record.steps) - drafting)


FORMAT_1 = (
    Path(__file__).parents[1] / "data" / "run-format-1"
)  # stops on a draft id, and a step whose drafter offered nothing


@pytest.mark.parametrize("run", [synthetic_run(prompts=8), read_run(FORMAT_1)], ids=["to the limit", "stopped"])
def test_a_greedy_run_tells_its_own_k_exactly(run: Run) -> None:
    told = figures(run)
    own = told.what_if[-1]
    assert own.num_draft_tokens == 4
    assert own.mean_acceptance_length.value == pytest.approx(told.metrics["mean_acceptance_length"].value)
    assert own.mean_acceptance_length.low == pytest.approx(told.metrics["mean_acceptance_length"].low)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_sampled_run_tells_another_run_s_k(k: int) -> None:
    common = {"prompts": 80, "sampling__temperature": 1.0, "chances": (0.9, 0.6), "extras": False}
    guess = figures(synthetic_run(k=5, seed=1, **common)).what_if[k - 1].mean_acceptance_length
    measured = figures(synthetic_run(k=k, seed=2, **common)).metrics["mean_acceptance_length"]
    assert guess.value is not None
    assert guess.low is not None
    assert measured.low is not None
    width = math.hypot(guess.value - guess.low, (measured.value or 0) - measured.low)
    assert abs(guess.value - (measured.value or 0)) < 1.3 * width


def test_predicted_speed_is_made_of_the_step_times_and_the_prompt() -> None:
    run = synthetic_run(prompts=6)
    told, tokens, rest = figures(run), 6 * 64, VERIFY_S + OTHER_S
    steps = [step for record in run.of(SPECULATIVE) for step in record.steps]
    last = [
        step.overlap[-1] for step in steps if len(step.overlap) == step.requested > 0
    ]  # stands in behind a draft kept whole
    for guess in told.what_if:
        k, length = guess.num_draft_tokens, guess.mean_acceptance_length.value
        step = k * DRAFT_S + STEP_S * (1 + 0.03 * k) + rest
        assert guess.step_ms == pytest.approx(1000 * step)
        assert length is not None
        plain = sum(
            replay(record.steps, k, sum(last) / len(last))[1] for record in run.of(SPECULATIVE)
        )  # at the limit, one id
        seconds = 6 * PREFILL_S + (tokens - plain) / length * step + plain * (STEP_S + rest)
        assert plain > 0
        assert guess.speedup.value == pytest.approx((6 * PREFILL_S + tokens * (STEP_S + rest)) / seconds)
    best = max(told.what_if, key=lambda guess: guess.speedup.value or 0)
    assert (best.to_best.value, best.to_best.low, best.to_best.high) == (1, 1, 1)
    assert all((guess.to_best.value or 0) < 1 for guess in told.what_if if guess is not best)
    without = figures(synthetic_run(prompts=6, extras=False)).what_if
    assert all(guess.speedup == Estimate(None) and guess.step_ms is None for guess in without)


def test_what_two_runs_share_is_no_difference() -> None:
    run = synthetic_run(prompts=10)
    for name, difference in compare(run, run).items():
        assert difference.change.value == 0, name
        assert not difference.is_clear
    slower = compare(run, synthetic_run(prompts=10, speed=0.5))["tokens_per_s"]
    assert slower.is_clear
    assert slower.relative.value is not None
    assert slower.relative.value < -20


def other_hash(run: Run) -> Run:
    return replace(run, records=[replace(record, prompt_hash="another") for record in run.records])


def fewer(run: Run) -> Run:
    return replace(run, records=run.records[2:])


def longer(_: Run) -> Run:
    return synthetic_run(prompts=4, sampling__max_new_tokens=65)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_hash, "'prompt-000' has other tokens"),
        (fewer, "4 against 3 prompts"),
        (longer, "max_new_tokens is 64 in one and 65"),
    ],
)
def test_other_prompts_counts_or_lengths_are_not_compared(change: Callable[[Run], Run], said: str) -> None:
    run = synthetic_run(prompts=4)
    with pytest.raises(ValueError, match=said):
        compare(run, change(run))


def test_a_run_without_a_record_has_no_figures() -> None:
    with pytest.raises(ValueError, match="no finished prompt"):
        figures(replace(synthetic_run(prompts=1), records=[]))
