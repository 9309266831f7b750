"""Interleaved benchmarks: candidates take turns, so that what slows the machine for a while slows all of them alike."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)
Result = TypeVar("Result")
BOOTSTRAP_DRAWS = 4000


def interleave(
    candidates: Mapping[Name, Callable[[int], Result]],
    rounds: int,
    *,
    warm_up: int = 0,
    rng: random.Random | None = None,
    on_call: Callable[[Name, int], None] | None = None,
) -> dict[Name, list[Result]]:
    """Call every candidate once a round; its results by name, one for each round.

    candidates: each is called with the round's index, 0 … rounds - 1. The warm_up rounds before them have negative
    indices, and their results are dropped. rng: draws the order of each round; by default every second round runs in
    reverse.
    on_call: called with the candidate's name and the round's index after each call.
    """
    results: dict[Name, list[Result]] = {name: [] for name in candidates}
    for index in range(-warm_up, rounds):
        order = list(candidates)
        if rng is not None:
            rng.shuffle(order)
        elif index % 2:
            order.reverse()
        for name in order:
            result = candidates[name](index)
            if index >= 0:
                results[name].append(result)
            if on_call is not None:
                on_call(name, index)
    return results


def median_with_interval(blocks: Sequence[Sequence[float]]) -> tuple[float, list[float]]:
    """The median of all values, and its 95 % interval [low, high] from a bootstrap over blocks.

    Values of one block, such as ratios measured by one process, are not independent: blocks are drawn, each as a whole.
    """
    values = [np.asarray(block, dtype=float) for block in blocks]
    draws = np.random.default_rng(0).integers(len(values), size=(BOOTSTRAP_DRAWS, len(values)))
    medians = [np.median(np.concatenate([values[index] for index in draw])) for draw in draws]
    return float(np.median(np.concatenate(values))), [float(v) for v in np.quantile(medians, [0.025, 0.975])]
