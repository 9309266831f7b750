"""Estimates with 95 % bootstrap intervals over prompts: percentile intervals (Efron and Tibshirani, 1993).

Prompts are resampled, not records: repetitions and turns of one prompt are not independent evidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_RESAMPLES = 2000
CONFIDENCE = 0.95
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval. value: None where nothing was counted. low, high: None for a single prompt."""

    value: float | None
    low: float | None = None
    high: float | None = None


NO_ESTIMATE = Estimate(None)


def ratio(numerators: Array, denominators: Array) -> Estimate:
    """Sum of numerators / sum of denominators over prompts, each [n]."""
    resampled = resample_sums(np.stack([numerators, denominators], axis=1))
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.divide(numerators.sum(), denominators.sum())
        return with_bootstrap(value, resampled[:, 0] / resampled[:, 1])


def resample_sums(tallies: Array) -> Array:
    """Column sums over prompts drawn with replacement: [n, c] -> [NUM_RESAMPLES, c], [0, c] for a single prompt.

    The draws depend on n alone, so figures of the same prompts, of one run or of two, are compared on the same draws.
    """
    n = len(tallies)
    if n == 1:
        return tallies[:0]
    return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES) @ tallies


def with_bootstrap(value: Any, resampled: Array) -> Estimate:
    """The value with the interval of its resampled values; no interval where more than half of those are not finite."""
    number = finite(value)
    resampled = resampled[np.isfinite(resampled)]
    if number is None or len(resampled) < NUM_RESAMPLES / 2:
        return Estimate(number)
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(number, float(low), float(high))


def finite(value: Any) -> float | None:
    """The value as a float, None for NaN and infinity."""
    return float(value) if np.isfinite(value) else None
