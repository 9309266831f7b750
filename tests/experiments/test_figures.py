"""Figures are computed from the steps, intervals have their coverage, replay() equals the mean over all outcomes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specdec.core.steps import RowStep
from specdec.draft_length.speedup import replay
from specdec.experiments.records import PLAIN, SPECULATIVE, Run, read_run
from specdec.experiments.report.compare import compare_runs
from specdec.experiments.report.estimates import MIN_UNITS, Estimate, ratio
from specdec.experiments.report.figures import figures, metrics, tally
from specdec.experiments.report.what_if import predict_other_k, steps_that_get_faster
from tests.helpers.synthetic_runs import (
    COST_PARTS,
    DRAFT_S,
    OTHER_S,
    PREFILL_S,
    STEP_S,
    VERIFY_S,
    synthetic_costs,
    synthetic_run,
)

RUNS, PROMPTS, LENGTH, SPREAD, NOISE = 400, 30, 16, 0.15, 0.1
SEED = 20_000  # a share of 400 has a standard error of 1.1 points: with other seeds one of 20 shares is up to 97.5 %
BEFORE, AFTER = (3, 0.75), (2, 0.6)  # K and acceptance of the two runs that are compared
COVERED = (
    "mean_acceptance_length", "tokens_per_step", "draft_acceptance_rate", "expected_acceptance", "realized_acceptance",
    "speedup",
)  # fmt: skip


def contains(estimate: Estimate, truth: float) -> bool:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def expected_counts(acceptance: float, k: int) -> dict[str, float]:
    """Means over prompts whose acceptance is uniform within SPREAD, of texts of LENGTH ids: a sum over all outcomes."""
    chance = acceptance + SPREAD * ((np.arange(200) + 0.5) / 100 - 1)
    counts = {name: np.zeros_like(chance) for name in ("spec", "plain", "drafted", "tried", "accepted")}
    starts = [np.ones_like(chance), *(np.zeros_like(chance) for _ in range(LENGTH))]
    for position in range(LENGTH):
        reached, limit = starts[position], min(k, LENGTH - position - 1)
        counts["spec" if limit else "plain"] += reached
        counts["drafted"] += limit * reached
        for draft_position in range(limit):
            counts["tried"] += reached
            counts["accepted"] += reached * chance
            starts[position + draft_position + 1] = starts[position + draft_position + 1] + reached * (1 - chance)
            reached = reached * chance
        starts[position + limit + 1] = starts[position + limit + 1] + reached
    return {name: float(values.mean()) for name, values in counts.items()}


def truths(k: int, acceptance: float) -> dict[str, float]:
    """The true values of COVERED for synthetic_run() with this K and acceptance."""
    counts, rest = expected_counts(acceptance, k), VERIFY_S + OTHER_S
    steps = counts["spec"] + counts["plain"]
    target_s = STEP_S * math.log(1.05 / 0.95) / 0.1  # the mean of STEP_S / speed, speed uniform in 0.95 … 1.05
    plain_s = PREFILL_S + LENGTH * (target_s + rest)
    return {
        "mean_acceptance_length": (LENGTH - counts["plain"]) / counts["spec"],
        "tokens_per_step": LENGTH / steps,
        "draft_acceptance_rate": counts["accepted"] / counts["drafted"],
        "expected_acceptance": counts["accepted"] / counts["tried"],
        "realized_acceptance": counts["accepted"] / counts["tried"],
        "speedup": plain_s / (PREFILL_S + DRAFT_S * counts["drafted"] + steps * (target_s * (1 + 0.03 * k) + rest)),
    }


def true_speedup_by_k(acceptance: float, k: int) -> float:
    """Of whole calls with this K, at the step times without their noise."""
    counts, plain_s = expected_counts(acceptance, k), STEP_S + VERIFY_S + OTHER_S
    spec_s = k * DRAFT_S + STEP_S * (1 + 0.03 * k) + VERIFY_S + OTHER_S
    return (PREFILL_S + LENGTH * plain_s) / (PREFILL_S + counts["spec"] * spec_s + counts["plain"] * plain_s)


@pytest.fixture(scope="module")
def simulated() -> list[tuple[Run, Run]]:
    """Pairs of runs of the same prompts, other prompts for each pair; step times have a normal error of NOISE."""
    common = {"prompts": PROMPTS, "spread": SPREAD, "sampling__temperature": 1.0, "sampling__max_new_tokens": LENGTH}
    return [
        tuple(
            synthetic_run(
                seed=SEED + 2 * number + side,
                prompts_seed=SEED + number,
                k=k,
                chances=(chance,),
                noise=0 if side else NOISE,
                **common,
            )
            for side, (k, chance) in enumerate((BEFORE, AFTER))
        )
        for number in range(RUNS)
    ]  # type: ignore[misc]


def shares_that_contain(found: Sequence[dict[str, Estimate]], truth: dict[str, float]) -> dict[str, float]:
    return {name: sum(contains(one[name], value) for one in found) / RUNS for name, value in truth.items()}


def test_intervals_contain_the_true_value_19_times_in_20(simulated: list[tuple[Run, Run]]) -> None:
    truth = truths(*BEFORE)
    found = [metrics(np.array(list(tally(run).values()))) for run, _ in simulated]
    shares = shares_that_contain(found, truth)
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


def test_intervals_of_predicted_speedups_cover_the_noise_of_texts_and_of_step_times(
    simulated: list[tuple[Run, Run]],
) -> None:
    k, acceptance = BEFORE
    truth = {str(other): true_speedup_by_k(acceptance, other) for other in range(1, k + 1)}
    predictions = [predict_other_k(run) for run, _ in simulated]
    found = [{str(one.num_draft_tokens): one.speedup for one in of_run} for of_run in predictions]
    shares = shares_that_contain(found, truth)
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


def test_intervals_of_differences_contain_the_true_value_too(simulated: list[tuple[Run, Run]]) -> None:
    before, after = truths(*BEFORE), truths(*AFTER)
    differences = [compare_runs(a, b) for a, b in simulated]
    for attribute, truth in (
        ("change", {name: after[name] - value for name, value in before.items()}),
        ("relative", {name: 100 * (after[name] / value - 1) for name, value in before.items()}),
    ):
        found = [{name: getattr(one[name], attribute) for name in COVERED} for one in differences]
        shares = shares_that_contain(found, truth)
        assert all(0.93 <= share <= 0.97 for share in shares.values()), (attribute, shares)


def test_there_is_no_interval_where_it_would_say_nothing() -> None:
    """Of few prompts, and where all resamples agree: two steps that are both accepted are no proof of 100 %."""
    for count in (1, 2, MIN_UNITS - 1):
        few = ratio(np.arange(count) + 1.0, np.full(count, 9.0))
        assert few == Estimate(few.value, prompts=count)
        assert few.value is not None
    assert ratio(np.ones(50), np.ones(50)) == Estimate(1.0, prompts=50)
    of_two_prompts = ratio(np.array([1.0, 1.0] + [0.0] * 48), np.array([1.0, 1.0] + [0.0] * 48))
    assert of_two_prompts == Estimate(1.0, prompts=2)
    enough = ratio(np.arange(MIN_UNITS) + 1.0, np.full(MIN_UNITS, 9.0))
    assert enough.prompts == MIN_UNITS
    assert enough.low is not None


def test_a_prediction_has_an_interval_only_where_step_times_have_repetitions() -> None:
    run = synthetic_run(noise=0.1)
    assert run.costs is not None
    once = {part: [by_k[:1] for by_k in getattr(run.costs, part)] for part in COST_PARTS}
    without_repetitions = replace(run, costs=replace(run.costs, **once))
    for prediction in predict_other_k(without_repetitions):
        assert prediction.speedup.value is not None
        assert prediction.speedup.low is prediction.speedup.high is None
    exact, noisy = predict_other_k(synthetic_run()), predict_other_k(run)
    for one, other in zip(exact, noisy, strict=True):
        assert width(other.speedup) > 1.5 * width(one.speedup), "the noise of the step times is not in the interval"


def test_step_times_that_fall_with_k_are_found() -> None:
    costs = synthetic_costs(4, noise=0.001)
    assert steps_that_get_faster(costs) == []
    clear = replace(
        costs, target_s=[*costs.target_s[:2], [seconds / 2 for seconds in costs.target_s[2]], *costs.target_s[3:]]
    )
    assert steps_that_get_faster(clear) == [(2, True)]
    # a fall of 5 %, with an error of 30 % in each repetition
    noisy = synthetic_costs(1, noise=0.3)
    noisy = replace(
        noisy,
        draft_s=[noisy.draft_s[0], noisy.draft_s[0]],
        target_s=[noisy.target_s[1], [0.95 * s for s in reversed(noisy.target_s[1])]],
    )
    found = steps_that_get_faster(noisy)
    assert found == [(1, False)]


def width(estimate: Estimate) -> float:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.high - estimate.low


def test_prompts_are_resampled_and_not_their_repetitions() -> None:
    once = synthetic_run(prompts=12)
    repeated = replace(once, records=[replace(record, repetition=n) for n in range(5) for record in once.records])
    first, second = figures(once), figures(repeated)
    pairs = [(first.metrics[name], second.metrics[name]) for name in COVERED]
    pairs += [(a.conditional, b.conditional) for a, b in zip(first.positions, second.positions, strict=True)]
    pairs += [(a.expected, b.expected) for a, b in zip(first.along, second.along, strict=True)]
    pairs += [(a.speedup, b.speedup) for a, b in zip(first.what_if, second.what_if, strict=True)]
    for one, other in pairs:
        assert other.prompts == one.prompts
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
    assert [(steps, share.value) for steps, share in found.step_lengths] == [
        (2, pytest.approx(2 / 6)), (2, pytest.approx(2 / 6)), (2, pytest.approx(2 / 6)),
    ]  # fmt: skip
    first, second = found.positions
    assert (first.drafts, second.drafts) == (5, 3)
    assert [at.conditional.value for at in found.positions_by_task["task b"]] == [1.0, 0.5]
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
    assert (best.to_best.value, best.to_best.low, best.to_best.high) == (1, None, None)
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
