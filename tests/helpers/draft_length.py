"""Ways to drive the K that chooses itself: a world with a clock of its own, and one whose times jump."""

from __future__ import annotations

import random
import weakref
from collections.abc import Callable, Sequence

import pytest

from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.core.timing import StepTimes
from specdec.draft_length import adaptive
from specdec.draft_length.adaptive import MAX_DRAFT_TOKENS, AdaptiveK, PairCostModel, Profile


def profile_of(step_s: Sequence[float], catch_up_s: float = 0.0) -> Profile:
    """Of steps that take so long, with nothing seen of the drafter."""
    zeros = [0.0] * len(step_s)
    return Profile(StepTimes(zeros, list(step_s), zeros), catch_up_s, [], 0.0)


class World:
    """Steps that take step_s[K] and catch_up_s for each id that the drafter lacks; drafts are accepted with chances of one's own.

    asked: K of each step so far. seconds: of each step.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, step_s: Sequence[float], catch_up_s: float = 0.0, seed: int = 0
    ) -> None:
        self.step_s, self.catch_up_s = list(step_s), catch_up_s
        self.coins = random.Random(seed)
        self.time = 0.0
        self.asked: list[int] = []
        self.seconds: list[float] = []
        monkeypatch.setattr(adaptive, "perf_counter", lambda: self.time)

    def call(
        self,
        known: PairCostModel,
        chances: Sequence[Callable[[int], float]],
        tokens: int,
        prompt: int = 0,
        limit: int | None = None,
    ) -> Choice:
        """One call that writes so many tokens a row, of as many as its limit; chances: by row, of the number of tokens it has."""
        auto = AdaptiveK(known, [(limit or tokens) - 1] * len(chances), prompt)
        left, lacking = [tokens] * len(chances), prompt
        while any(left):
            k = auto.next()
            steps: list[RowStep | None] = []
            for row, chance_at in enumerate(chances):
                if not left[row]:
                    steps.append(None)
                    continue
                asked = min(k, left[row] - 1)
                accepted, chance = 0, chance_at(tokens - left[row])
                while accepted < asked and self.coins.random() < chance:
                    accepted += 1
                steps.append(RowStep(asked, asked, accepted, accepted + 1, [chance] * min(asked, accepted + 1)))
                left[row] -= accepted + 1
            spent = self.step_s[k] + (self.catch_up_s * lacking if k else 0.0)
            lacking = 0 if k else lacking + 1
            self.time += spent
            self.asked.append(k)
            self.seconds.append(spent)
            auto.observe(steps)
        return auto.end()


def erratic_k(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Profiles and clocks of chance, believed at once: K changes from step to step, 0 included, in each run alike."""
    coins = random.Random(seed)
    monkeypatch.setattr("specdec.generation.call.COST_MODELS", weakref.WeakKeyDictionary())
    times = iter(lambda: coins.uniform(0, 1e3), None)
    monkeypatch.setattr(adaptive, "perf_counter", lambda: next(times))
    monkeypatch.setattr(
        PairCostModel, "follow", lambda self, *step: vars(self).update(step_s=jumped(coins), run=adaptive.PLAIN_RUN)
    )
    monkeypatch.setattr("specdec.generation.call.profile", lambda *args: profile_of(jumped(coins)[: args[4] + 1]))
    monkeypatch.setattr(adaptive, "FIRST_PLAIN", 2)
    monkeypatch.setattr(adaptive, "LAST_PLAIN", 2)
    monkeypatch.setattr(adaptive, "FIRST_PROBE", 1)
    monkeypatch.setattr(adaptive, "LAST_PROBE", 1)
    monkeypatch.setattr(adaptive, "BUDGET", 1e9)


def jumped(coins: random.Random) -> list[float]:
    """Seconds by K that any one may be best of."""
    return [coins.uniform(0.5, 1.5) * (k + 1) ** coins.uniform(0, 1.2) for k in range(MAX_DRAFT_TOKENS + 1)]
