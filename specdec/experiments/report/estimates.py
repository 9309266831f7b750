"""Estimates with 95 % bootstrap intervals over prompts, and over repetitions of what is timed.

Prompts are resampled, not records: repetitions and turns of one prompt are not independent evidence. A resample draws
n - 1 of n units, so that its variance is not too small, and its quantiles are those of Student's t distribution instead
of the normal one (Hesterberg, The American Statistician 69, 2015): percentile intervals of 8 units contain the truth in
88 % of cases, these in 94 %.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
MIN_UNITS = 8  # prompts or repetitions; an interval of fewer would be too narrow
Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval. value: None where nothing was counted.

    low, high: None where fewer than MIN_UNITS prompts count, and where all resamples have the same value: neither says
    how the value varies. prompts: how many prompts count, those in which the value is defined.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    prompts: int = 0


NO_ESTIMATE = Estimate(None)


def ratio(numerators: Array, denominators: Array) -> Estimate:
    """Sum of numerators / sum of denominators over prompts, each [n]."""
    tallies = np.stack([numerators, denominators], axis=1)
    totals, resampled = tallies.sum(0), resample_sums(tallies)
    return with_bootstrap(apply(_ratio, totals), apply(_ratio, resampled), count_prompts(_ratio, tallies))


def apply(statistic: Statistic, sums: Array) -> Array:
    """A statistic of column sums [..., c] -> [...]; NaN or infinite where nothing was counted."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return statistic(sums)


def _ratio(sums: Array) -> Array:
    return np.divide(sums[..., 0], sums[..., 1])


def count_prompts(statistic: Statistic, tallies: Array) -> int:
    """The prompts in whose own tallies [n, c] the statistic is defined."""
    return int(np.isfinite(apply(statistic, tallies)).sum())


def resample_sums(tallies: Array) -> Array:
    """Column sums over n - 1 of n prompts, drawn with replacement: [n, c] -> [NUM_RESAMPLES, c], [0, c] for one prompt.

    The draws depend on n alone, so figures of the same prompts, of one run or of two, are compared on the same draws.
    """
    n = len(tallies)
    if n == 1:
        return tallies[:0]
    return _draws(n) @ tallies


@lru_cache(maxsize=4)
def _draws(n: int) -> Array:
    """How often each of n units is drawn: [NUM_RESAMPLES, n]."""
    return np.random.default_rng(0).multinomial(n - 1, np.full(n, 1 / n), size=NUM_RESAMPLES).astype(np.float64)


def trimmed_mean(repetitions: Array) -> Array:
    """Mean without the smallest and the largest of n repetitions, of all where n < 3: [..., n, c] -> [..., c]."""
    n = repetitions.shape[-2]
    kept = np.sort(repetitions, axis=-2)[..., 1 : n - 1, :] if n > 2 else repetitions
    return np.asarray(kept.mean(axis=-2))


def resample_trimmed_means(repetitions: Array) -> Array:
    """Trimmed means over n of n repetitions, drawn with replacement: [n, c] -> [NUM_RESAMPLES, c].

    The columns are resampled together, since what slows a repetition down slows all of its columns down. Intervals of
    medians would contain the truth in 98 % of cases or more; these, like those of prompts, in 95 %.
    """
    n = len(repetitions)
    draws = np.random.default_rng(1).integers(n, size=(NUM_RESAMPLES, n))
    return trimmed_mean(repetitions[draws])


def with_bootstrap(value: Any, resampled: Array, prompts: int, degrees_of_freedom: float | None = None) -> Estimate:
    """The value with the interval of its resampled values; see Estimate for where there is none.

    degrees_of_freedom: of the resampled values' variance, prompts - 1 by default.
    """
    number = finite(value)
    degrees = prompts - 1 if degrees_of_freedom is None else degrees_of_freedom
    resampled = resampled[np.isfinite(resampled)]
    if number is None or degrees < MIN_UNITS - 1 or len(resampled) < NUM_RESAMPLES / 2:
        return Estimate(number, prompts=prompts)
    from scipy.special import ndtr, stdtrit  # here, since `specdec demo` has ranges alone and runs without

    tail = float(ndtr(stdtrit(degrees, (1 - CONFIDENCE) / 2)))
    low, high = np.quantile(resampled, [tail, 1 - tail])
    if np.isclose(low, high, rtol=1e-9, atol=0):
        return Estimate(number, prompts=prompts)
    return Estimate(number, float(low), float(high), prompts)


def combined_degrees_of_freedom(variances: list[float], degrees_of_freedom: list[float]) -> float:
    """Of a sum of independent parts, by Welch and Satterthwaite; the smallest where nothing varies."""
    if not sum(variances):
        return min(degrees_of_freedom)
    parts = zip(variances, degrees_of_freedom, strict=True)
    return sum(variances) ** 2 / sum(variance**2 / degrees for variance, degrees in parts)


def finite(value: Any) -> float | None:
    """The value as a float, None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None
