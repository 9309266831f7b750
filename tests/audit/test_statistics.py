"""The statistics of the certificate against scipy, and on laws where the answer is known."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from scipy import stats

from specdec.audit.statistics import (
    STAKES,
    TwoSamples,
    bets_on_feature,
    binomial_cdf,
    clopper_pearson,
    mean_log_wealth,
    power,
    repetition_p_value,
    smallest_shift,
    squared_differences,
)

ALPHA = 0.01


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 30), (17, 17), (3, 40), (199, 200), (512, 1000)])
@pytest.mark.parametrize("error", [0.05, 0.001])
def test_intervals_are_scipys(successes: int, trials: int, error: float) -> None:
    expected = stats.binomtest(successes, trials).proportion_ci(1 - error, method="exact")
    assert clopper_pearson(successes, trials, error) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_no_trials_tell_nothing() -> None:
    assert clopper_pearson(0, 0) == (0, 1)


@pytest.mark.parametrize("successes", [0, 7, 50])
def test_the_binomial_distribution_is_scipys(successes: int) -> None:
    assert binomial_cdf(successes, 50, 0.2) == pytest.approx(stats.binom.cdf(successes, 50, 0.2), abs=1e-12)


def test_each_bet_is_fair() -> None:
    """The expectation of every wealth factor is 1 under the hypothesis, and no factor is negative."""
    mean = torch.tensor([0.03, 0.5, 0.97], dtype=torch.float64)
    ones, zeros = (bets_on_feature(torch.full_like(mean, z), mean, torch.zeros_like(mean)).exp() for z in (1.0, 0.0))
    torch.testing.assert_close(mean * ones + (1 - mean) * zeros, torch.ones(len(STAKES), 3, dtype=torch.float64))
    assert (ones > 0).all()
    assert (zeros > 0).all()


@pytest.mark.parametrize("shift", [-0.02, 0.02])
def test_a_bet_with_a_tolerance_loses_under_every_law_within_it(shift: float) -> None:
    mean = torch.tensor([0.3], dtype=torch.float64)
    tolerance = torch.tensor([0.02], dtype=torch.float64)
    ones, zeros = (bets_on_feature(torch.full_like(mean, z), mean, tolerance).exp() for z in (1.0, 0.0))
    assert ((mean + shift) * ones + (1 - mean - shift) * zeros <= 1 + 1e-12).all()


def wealth(shift: float, num_runs: int, num_draws: int = 500, tolerance: float = 0.0) -> torch.Tensor:
    """The mean wealth of all bettors after each draw [R, N], where the indicator's probability is off by `shift`."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.rand(num_runs, num_draws, generator=generator, dtype=torch.float64) * 0.8
    z = (torch.rand(mean.shape, generator=generator, dtype=torch.float64) < mean + shift).double()
    tolerances = torch.full((mean.numel(),), tolerance, dtype=torch.float64)
    factors = bets_on_feature(z.flatten(), mean.flatten(), tolerances)
    return mean_log_wealth(factors.unflatten(1, mean.shape).cumsum(-1)).exp()


def test_false_alarms_are_at_most_as_frequent_as_stated_whenever_one_reads() -> None:
    alarms = int((wealth(0.0, num_runs=2000) >= 1 / ALPHA).any(1).sum())
    assert stats.binomtest(alarms, 2000, ALPHA, alternative="greater").pvalue > 1e-3


def test_a_shift_is_found() -> None:
    assert (wealth(0.15, num_runs=200) >= 1 / ALPHA).any(1).double().mean() > 0.95


@pytest.mark.parametrize(("shift", "tolerance"), [(0.09, 0.0), (0.12, 0.03)])
def test_the_predicted_power_is_the_simulated_one(shift: float, tolerance: float) -> None:
    """power() draws from bins, 50 reads a run; the simulation draws each id and reads after each."""
    num_draws = 500
    histogram = [0] * 20
    for index in range(16):
        histogram[index] = num_draws // 16
    predicted = power(histogram, shift, ALPHA, len(STAKES), tolerance)
    simulated = (wealth(shift, num_runs=400, tolerance=tolerance) >= 1 / ALPHA).any(1).double().mean().item()
    assert 0.2 < simulated < 0.98
    assert predicted == pytest.approx(simulated, abs=4 * math.sqrt(0.25 / 400 * 2) + 0.03)


def test_the_smallest_shift_is_found_with_the_wanted_power_and_half_of_it_is_not() -> None:
    histogram = [100] * 20
    shift = smallest_shift(histogram, ALPHA, len(STAKES))
    assert power(histogram, shift, ALPHA, len(STAKES), seed=1) == pytest.approx(0.95, abs=0.06)
    assert power(histogram, shift / 2, ALPHA, len(STAKES), seed=1) < 0.6
    assert smallest_shift([1] * 20, 1e-9, len(STAKES)) == 1  # nothing could have been found


def test_a_shift_within_the_tolerance_is_never_found() -> None:
    histogram = [100_000] * 20
    assert power(histogram, 0.02, ALPHA, len(STAKES), tolerance=0.02) <= ALPHA
    assert 0.02 < smallest_shift(histogram, ALPHA, len(STAKES), tolerance=0.02) < 0.03


def test_four_times_the_draws_find_half_the_shift() -> None:
    few, many = (smallest_shift([count] * 20, ALPHA, len(STAKES)) for count in (100, 400))
    assert few / many == pytest.approx(2, rel=0.15)


WEIGHTS = ([20, 10, *[1] * 20], [30, *[2] * 15])  # of the outcomes in two contexts


def samples(draws: random.Random, count: int, share: float = 0.0) -> list[list[int]]:
    """Of a loop that takes the most likely outcome for a share of its draws."""
    return [
        [0 if draws.random() < share else draws.choices(range(len(w)), w)[0] for _ in range(count)] for w in WEIGHTS
    ]


def test_the_statistic_is_zero_on_average_over_all_assignments() -> None:
    """And before that is subtracted, it is the sum of squared differences of counts."""
    pooled = [0, 0, 0, 1, 1, 2]
    totals = torch.tensor(pooled).bincount()
    found = []
    for chosen in itertools.combinations(range(6), 3):
        counts = torch.tensor([pooled[index] for index in chosen]).bincount(minlength=3)
        found.append(float(squared_differences(counts, totals)))
    assert math.fsum(found) == pytest.approx(0)
    assert max(found) - min(found) == (3**2 + 2**2 + 1) - (1 + 0 + 1)


def test_two_samples_of_one_law_are_rejected_as_often_as_stated() -> None:
    draws = random.Random(0)
    p_values = [TwoSamples(samples(draws, 40), samples(draws, 40), 199, seed).p_value for seed in range(200)]
    assert sum(p <= 0.05 for p in p_values) <= 20  # binomial, P(more than 20) < 1e-3
    assert 70 <= sum(p <= 0.5 for p in p_values) <= 130


def test_a_shift_of_the_stated_size_is_found_and_half_of_it_is_not() -> None:
    draws = random.Random(1)
    smallest = TwoSamples(samples(draws, 300), samples(draws, 300)).smallest_shift(ALPHA)
    share = smallest / (sum(1 - max(w) / sum(w) for w in WEIGHTS) / 2)
    assert 0.05 < smallest < 0.2

    def num_found(share: float) -> int:
        pairs = [TwoSamples(samples(draws, 300), samples(draws, 300, share), 399) for _ in range(40)]
        return sum(pair.p_value <= ALPHA for pair in pairs)

    assert num_found(share) >= 33
    assert num_found(share / 2) <= 25


def test_samples_that_cannot_tell_have_no_smallest_shift() -> None:
    few = TwoSamples([[0, 1]], [[1, 2]], 99)
    assert few.smallest_shift(ALPHA) == 1
    with pytest.raises(ValueError, match=r"equally many draws for each context, not \[2\] and \[1\]"):
        TwoSamples([[0, 1]], [[1]])


def test_draws_that_repeat_the_one_before_are_found() -> None:
    draws = random.Random(2)
    independent = samples(draws, 200)
    repeating = [[outcome for outcome in some[:100] for _ in range(2)] for some in independent]
    assert repetition_p_value(independent, 999) > ALPHA
    assert repetition_p_value(repeating, 999) == 1 / 1000
