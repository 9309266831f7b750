"""Figures are computed from the steps, intervals have their coverage, replay() equals the mean over all outcomes."""

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
from specdec.experiments.report.compare import compare_runs
from specdec.experiments.report.estimates import Estimate
from specdec.experiments.report.figures import figures, metrics, tally
from tests.helpers.synthetic_runs import DRAFT_S, OTHER_S, PREFILL_S, STEP_S, VERIFY_S, synthetic_run

RUNS, PROMPTS = 200, 30
COVERED = (
    "mean_acceptance_length", "tokens_per_step", "draft_acceptance_rate", "expected_acceptance", "realized_acceptance",
    "speedup",
)  # fmt: skip


def contains(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


@pytest.fixture(scope="module")
def simulated() -> list[tuple[Run, Run]]:
    """Pairs of runs of the same prompts, other prompts for each pair: K=4 with a good drafter, K=3 with a worse one."""
    common = {"prompts": PROMPTS, "extras": False, "sampling__temperature": 1.0, "sampling__max_new_tokens": 24}
    return [
        (
            synthetic_run(seed=2 * number, prompts_seed=number, **common),
            synthetic_run(seed=2 * number + 1, prompts_seed=number, k=3, chances=(0.85, 0.6), **common),
        )
        for number in range(RUNS)
    ]


def test_intervals_contain_the_true_value_19_times_in_20(simulated: list[tuple[Run, Run]]) -> None:
    tallies = [np.array(list(tally(run).values())) for run, _ in simulated]
    truth = metrics(sum(tallies).sum(0)[None])  # type: ignore[union-attr]
    by_run = [metrics(values) for values in tallies]
    for name in COVERED:
        value = truth[name].value
        assert value is not None
        share = sum(contains(one[name], value) for one in by_run) / RUNS
        assert 0.90 <= share <= 0.99, (name, share)


def test_intervals_of_differences_contain_the_true_value_too(simulated: list[tuple[Run, Run]]) -> None:
    truths = [
        metrics(sum(np.array(list(tally(pair[side]).values())) for pair in simulated).sum(0)[None])  # type: ignore[union-attr]
        for side in (0, 1)
    ]
    differences = [compare_runs(a, b) for a, b in simulated]
    for name in COVERED:
        before, after = (truth[name].value for truth in truths)
        assert before is not None
        assert after is not None
        for attribute, truth in (("change", after - before), ("relative", 100 * (after / before - 1))):
            share = sum(contains(getattr(one[name], attribute), truth) for one in differences) / RUNS
            assert 0.90 <= share <= 0.99, (name, attribute, share)


def test_prompts_are_resampled_and_not_their_repetitions() -> None:
    once = synthetic_run(prompts=12)
    repeated = replace(once, records=[replace(record, repetition=n) for n in range(5) for record in once.records])
    first, second = figures(once), figures(repeated)
    pairs = [(first.metrics[name], second.metrics[name]) for name in COVERED]
    pairs += [(a.conditional, b.conditional) for a, b in zip(first.positions, second.positions, strict=True)]
    pairs += [(a.expected, b.expected) for a, b in zip(first.along, second.along, strict=True)]
    pairs += [(a.speedup, b.speedup) for a, b in zip(first.what_if, second.what_if, strict=True)]
    for one, other in pairs:
        assert (other.value, other.low, other.high) == pytest.approx((one.value, one.low, one.high))


def test_one_prompt_has_no_interval_and_a_metric_that_was_not_counted_no_value() -> None:
    values = figures(synthetic_run(prompts=1, repetitions=3, baseline=False)).metrics
    assert values["speedup"] == values["plain_tokens_per_s"] == values["identical"] == Estimate(None)
    for name in ("tokens_per_s", "mean_acceptance_length"):
        assert values[name].value is not None
        assert values[name].low is values[name].high is None


def test_figures_are_counted_from_the_steps() -> None:
    run = synthetic_run(prompts=2, k=2, tasks=2)
    steps = [
        [RowStep(2, 2, 2, 3, [0.9, 0.8]), RowStep(2, 2, 0, 1, [0.3]), RowStep(2, 1, 1, 2, [0.6])],
        [RowStep(2, 2, 1, 2, [0.7, 0.5]), RowStep(2, 2, 2, 3, [1.0, 1.0]), RowStep(2, 0, 0, 1, [])],
    ]
    steps_of_record = iter(steps)
    run.records = [
        record
        if record.engine == PLAIN
        else replace(
            record,
            ids=record.ids[:6],
            steps=next(steps_of_record),
        )
        for record in run.records
    ]
    found = figures(run)
    assert found.metrics["mean_acceptance_length"].value == pytest.approx(11 / 5)
    assert found.metrics["tokens_per_step"].value == pytest.approx(12 / 6)
    assert found.metrics["draft_acceptance_rate"].value == pytest.approx(6 / 9)
    assert found.metrics["expected_acceptance"].value == pytest.approx((0.9 + 0.8 + 0.3 + 0.6 + 0.7 + 0.5 + 2) / 8)
    assert found.metrics["identical"].value == 0  # the plain texts are longer
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
    """Expected steps with and without a draft, over all outcomes of acceptance at the positions."""
    drafting = plain = 0.0
    for accepts in itertools.product((False, True), repeat=len(chances)):
        weight = math.prod(chance if accept else 1 - chance for chance, accept in zip(chances, accepts, strict=True))
        position = 0
        while position < len(chances):
            accepted = 0
            while accepted < min(k, len(chances) - position - 1) and accepts[position + accepted]:
                accepted += 1
            is_last = position == len(chances) - 1  # the limit leaves no draft token there
            drafting, plain = drafting + weight * (not is_last), plain + weight * is_last
            position += accepted + 1
    return drafting, plain


@pytest.mark.parametrize("k", [1, 2, 3, 9])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_replay_is_the_mean_over_all_outcomes(k: int, length: int) -> None:
    rng = random.Random(length)
    chances = [rng.choice([0.0, 1.0, rng.random()]) for _ in range(length)]
    assert replay([RowStep(1, 1, 0, 1, [chance]) for chance in chances], k, 0.5) == pytest.approx(
        enumerated(chances, k)
    )


def test_replay_of_a_greedy_text_with_its_own_k_gives_its_steps() -> None:
    for record in synthetic_run(prompts=8).of(SPECULATIVE):
        drafting = sum(step.drafted > 0 for step in record.steps)
        assert replay(record.steps, 4, 0.123) == (drafting, len(record.steps) - drafting)


# with stops on a draft token, and a step in which the drafter proposed nothing
FORMAT_1 = Path(__file__).parents[1] / "data" / "run-format-1"


@pytest.mark.parametrize("run", [synthetic_run(prompts=8), read_run(FORMAT_1)], ids=["to the limit", "stopped"])
def test_a_greedy_run_predicts_its_own_k_exactly(run: Run) -> None:
    found = figures(run)
    own = found.what_if[-1]
    assert own.num_draft_tokens == 4
    assert own.mean_acceptance_length.value == pytest.approx(found.metrics["mean_acceptance_length"].value)
    assert own.mean_acceptance_length.low == pytest.approx(found.metrics["mean_acceptance_length"].low)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_a_sampled_run_predicts_another_run_s_k(k: int) -> None:
    common = {"prompts": 80, "sampling__temperature": 1.0, "chances": (0.9, 0.6), "extras": False}
    predicted = figures(synthetic_run(k=5, seed=1, **common)).what_if[k - 1].mean_acceptance_length
    measured = figures(synthetic_run(k=k, seed=2, **common)).metrics["mean_acceptance_length"]
    assert predicted.value is not None
    assert predicted.low is not None
    assert measured.low is not None
    width = math.hypot(predicted.value - predicted.low, (measured.value or 0) - measured.low)
    assert abs(predicted.value - (measured.value or 0)) < 1.3 * width


def test_predicted_speedups_follow_from_step_times_and_prefill() -> None:
    run = synthetic_run(prompts=6)
    predictions, tokens, rest = figures(run).what_if, 6 * 64, VERIFY_S + OTHER_S
    steps = [step for record in run.of(SPECULATIVE) for step in record.steps]
    # the acceptance assumed at the position after a draft that was accepted entirely
    last = [step.overlap[-1] for step in steps if len(step.overlap) == step.requested > 0]
    for prediction in predictions:
        k, length = prediction.num_draft_tokens, prediction.mean_acceptance_length.value
        step = k * DRAFT_S + STEP_S * (1 + 0.03 * k) + rest
        assert prediction.step_ms == pytest.approx(1000 * step)
        assert length is not None
        # steps that emit one id at the limit
        plain = sum(replay(record.steps, k, sum(last) / len(last))[1] for record in run.of(SPECULATIVE))
        seconds = 6 * PREFILL_S + (tokens - plain) / length * step + plain * (STEP_S + rest)
        assert plain > 0
        assert prediction.speedup.value == pytest.approx((6 * PREFILL_S + tokens * (STEP_S + rest)) / seconds)
    best = max(predictions, key=lambda prediction: prediction.speedup.value or 0)
    assert (best.to_best.value, best.to_best.low, best.to_best.high) == (1, 1, 1)
    assert all((prediction.to_best.value or 0) < 1 for prediction in predictions if prediction is not best)
    without_costs = figures(synthetic_run(prompts=6, extras=False)).what_if
    assert all(p.speedup == Estimate(None) and p.step_ms is None for p in without_costs)


def test_a_run_does_not_differ_from_itself() -> None:
    run = synthetic_run(prompts=10)
    for name, difference in compare_runs(run, run).items():
        assert difference.change.value == 0, name
        assert not difference.is_clear
    slower = compare_runs(run, synthetic_run(prompts=10, speed=0.5))["tokens_per_s"]
    assert slower.is_clear
    assert slower.relative.value is not None
    assert slower.relative.value < -20


def with_other_hashes(run: Run) -> Run:
    return replace(run, records=[replace(record, prompt_hash="other") for record in run.records])


def with_fewer_prompts(run: Run) -> Run:
    return replace(run, records=run.records[2:])


def with_a_longer_limit(_: Run) -> Run:
    return synthetic_run(prompts=4, sampling__max_new_tokens=65)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_other_hashes, "'prompt-000' has different tokens in the second run"),
        (with_fewer_prompts, "they have 4 and 3 prompts"),
        (with_a_longer_limit, "max_new_tokens is 64 in the first run and 65"),
    ],
)
def test_runs_of_other_prompts_or_limits_cannot_be_compared(change: Callable[[Run], Run], message: str) -> None:
    run = synthetic_run(prompts=4)
    with pytest.raises(ValueError, match=message):
        compare_runs(run, change(run))


def test_a_run_without_a_record_has_no_figures() -> None:
    with pytest.raises(ValueError, match="contains no finished prompt"):
        figures(replace(synthetic_run(prompts=1), records=[]))
