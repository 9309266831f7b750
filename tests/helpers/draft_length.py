"""Simulated step times and acceptance for AdaptiveK, and a K that changes at random in real calls."""

from __future__ import annotations

import dataclasses
import random
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.core.timing import StepTimes
from specdec.draft_length import adaptive, settings
from specdec.draft_length.adaptive import AdaptiveK
from specdec.draft_length.cost_model import PairCostModel, Profile, StepTimeEstimator
from specdec.draft_length.settings import MAX_DRAFT_TOKENS


def profile_of(step_s: Sequence[float], catch_up_s: float = 0.0) -> Profile:
    """A profile with these seconds by K and without drafts whose acceptance was observed."""
    zeros = [0.0] * len(step_s)
    return Profile(StepTimes(zeros, list(step_s), zeros), None, catch_up_s, [], [], 0.0)


def patch_settings(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Replace constants of AdaptiveK."""
    monkeypatch.setattr(settings, "ADAPTIVE_K", dataclasses.replace(settings.ADAPTIVE_K, **changes))


class Simulation:
    """Calls whose steps take step_s[K] and catch_up_s for each id that the drafter has not read, by a clock of its own.

    now_s: the clock. chosen_k: K of each step so far. seconds: of each step.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, step_s: Sequence[float], catch_up_s: float = 0.0, seed: int = 0
    ) -> None:
        self.step_s, self.catch_up_s = list(step_s), catch_up_s
        self.rng = random.Random(seed)
        self.now_s = 0.0
        self.chosen_k: list[int] = []
        self.seconds: list[float] = []
        monkeypatch.setattr(adaptive, "perf_counter", lambda: self.now_s)

    def call(
        self,
        cost_model: PairCostModel,
        acceptance: Sequence[Callable[[int], float]],
        tokens: int,
        prompt: int = 0,
        limit: int | None = None,
    ) -> Choice:
        """One call that generates `tokens` ids a row after `prompt` ids; limit: of generated ids, `tokens` by default.

        acceptance: for each row, the probability that a draft id is accepted, from the number of ids generated so far.
        """
        policy = AdaptiveK(cost_model, [(limit or tokens) - 1] * len(acceptance), prompt)
        remaining, unread = [tokens] * len(acceptance), prompt
        while any(remaining):
            k = policy.next()
            steps: list[RowStep | None] = []
            for row, acceptance_at in enumerate(acceptance):
                if not remaining[row]:
                    steps.append(None)
                    continue
                requested = min(k, remaining[row] - 1)
                accepted, chance = 0, acceptance_at(tokens - remaining[row])
                while accepted < requested and self.rng.random() < chance:
                    accepted += 1
                overlap = [chance] * min(requested, accepted + 1)
                steps.append(RowStep(requested, requested, accepted, accepted + 1, overlap))
                remaining[row] -= accepted + 1
            spent_s = self.step_s[k] + (self.catch_up_s * unread if k else 0.0)
            unread = 0 if k else unread + 1
            self.now_s += spent_s
            self.chosen_k.append(k)
            self.seconds.append(spent_s)
            policy.observe(steps)
        return policy.end()


def erratic_k(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Make K change from step to step, 0 included: step times and clocks are random, the same in each run of a seed."""
    rng = random.Random(seed)
    monkeypatch.setattr("specdec.generation.call.COST_MODELS", weakref.WeakKeyDictionary())
    times = iter(lambda: rng.uniform(0, 1e3), None)
    monkeypatch.setattr(adaptive, "perf_counter", lambda: next(times))
    monkeypatch.setattr(
        StepTimeEstimator,
        "observe",
        lambda self, *step: vars(self).update(
            draft_step_s=random_step_s(rng), run_steps=settings.ADAPTIVE_K.plain_run_steps
        ),
    )
    monkeypatch.setattr("specdec.generation.call.profile", lambda *args: profile_of(random_step_s(rng)[: args[4] + 1]))
    patch_settings(
        monkeypatch,
        first_plain_interval=2,
        last_plain_interval=2,
        first_probe_interval=1,
        last_probe_interval=1,
        probe_budget=1e9,
    )


def random_step_s(rng: random.Random) -> list[float]:
    """Seconds by K of which any may be the best."""
    return [rng.uniform(0.5, 1.5) * (k + 1) ** rng.uniform(0, 1.2) for k in range(MAX_DRAFT_TOKENS + 1)]
