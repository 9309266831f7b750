"""The cost model of a target and a drafter: step times and acceptance, estimated over all calls with one batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass

from specdec.core.timing import StepTimes
from specdec.draft_length import settings
from specdec.draft_length.probes import ProbeScheduler


@dataclass(frozen=True, slots=True)
class Profile:
    """The cost of a pair's steps and the acceptance of its drafts, measured before its first call.

    times: by K = 0 … the largest K. catch_up_s: seconds for each id of a row that the drafter has not read yet.
    acceptance: sum(min(p, q)) at each position that was drafted meanwhile. duration_s: of the profile itself.
    """

    times: StepTimes
    catch_up_s: float
    acceptance: list[float]
    duration_s: float


class DecayingMean:
    """A weighted mean in which earlier values count less."""

    def __init__(self, value: float, weight: float) -> None:
        self.total, self.weight = value * weight, weight

    def add(self, total: float, weight: float, decay: float) -> None:
        """Add values of this total and weight; decay: the factor on the total and weight of all before."""
        self.total = decay * self.total + total
        self.weight = decay * self.weight + weight

    @property
    def value(self) -> float:
        return self.total / self.weight


class PairCostModel:
    """Everything that AdaptiveK keeps from call to call, for one pair and one batch size."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.step_times = StepTimeEstimator(profile)
        self.acceptance = AcceptanceEstimator(profile.acceptance)
        self.probes = ProbeScheduler()
        # generated ids of all texts, over the number of texts that ended before their limit
        self.text_lengths = DecayingMean(0.0, 0.0)

    def observe_text(self, num_ids: int, at_limit: bool) -> None:
        """A text has ended with num_ids generated ids."""
        self.text_lengths.add(num_ids, not at_limit, settings.ADAPTIVE_K.text_decay)

    def expected_length(self, num_texts: int) -> float:
        """The expected number of ids of the longest of num_texts texts if nothing limits them.

        Each id is as likely as any other to be the last, so the mean is the number of all ids over the number of texts
        that ended by themselves: texts that reached their limit count in the first alone. The longest of n is 1 + 1/2 +
        … + 1/n times as long.
        """
        if not self.text_lengths.weight:
            return math.inf
        return self.text_lengths.value * sum(1 / text for text in range(1, num_texts + 1))


class StepTimeEstimator:
    """Seconds of a step by K: from the profile at first, then from the steps that run.

    step_s: seconds by K at the speed of the profile, at least those of a plain step. slowdown: the factor on all of
    them at the current speed. catch_up_s: seconds that a step takes longer for each id that the drafter has not read.
    """

    def __init__(self, profile: Profile) -> None:
        plain_s = profile.times.step_s[0]
        self.step_s = [max(seconds, plain_s) for seconds in profile.times.step_s]
        self.slowdown = 1.0
        self.catch_up_s = DecayingMean(profile.catch_up_s, settings.ADAPTIVE_K.catch_up_weight)
        self.is_draft_run, self.run_steps = False, 0  # whether the latest steps drafted, and how many there were
        self.last_k: int | None = None  # K of the last step that was measured

    @property
    def plain_s(self) -> float:
        """Seconds of a step without a draft, now."""
        return self.step_s[0] * self.slowdown

    @property
    def is_plain_run_measured(self) -> bool:
        """Whether the latest steps were plain, and enough of them for the time of the next one to count."""
        return not self.is_draft_run and self.run_steps >= settings.ADAPTIVE_K.plain_run_steps

    def start_run(self) -> None:
        """The next step is the first of a run, not compared with earlier ones: it finds other data in the caches."""
        self.run_steps, self.last_k = 0, None

    def observe(self, k: int, seconds: float, num_steps: int = 1) -> None:
        """num_steps steps of this K took `seconds` each, once what catching up takes is subtracted.

        A deviation changes `slowdown`, since the machine's speed changes for all K alike. It changes how the K compare
        only where a step of one K follows a step of another.
        """
        constants = settings.ADAPTIVE_K
        if self.is_draft_run != (k > 0):
            self.is_draft_run, self.run_steps = k > 0, 0
        self.run_steps += num_steps
        if self.run_steps < (constants.draft_run_steps if k else constants.plain_run_steps):
            return
        limit = constants.max_step_deviation
        deviation = min(max(seconds / (self.step_s[k] * self.slowdown) - 1, -limit), limit)
        self.slowdown *= 1 + constants.slowdown_rate * deviation
        last_k, self.last_k = self.last_k, k
        if last_k is None or last_k == k:
            return
        if last_k and k:
            self._compare_drafting(last_k, k, deviation)
        else:
            self._compare_with_plain(last_k or k, deviation if k else -deviation)

    def observe_catch_up(self, seconds: float, num_unread: int) -> None:
        """A step took so much longer than expected, with num_unread ids that the drafter had to read."""
        self.catch_up_s.add(max(seconds, 0.0), num_unread, settings.ADAPTIVE_K.catch_up_decay)
        self.start_run()

    def _compare_drafting(self, last_k: int, k: int, deviation: float) -> None:
        """Two K > 0: half of the change goes to each, so their mean relative to plain steps stays.

        Where both moved relative to plain steps, those appeared to take 3 times as long within 60 calls, since the
        first step after another K is always slow (benchmarks/LOG.md).
        """
        factor = 1 + settings.ADAPTIVE_K.step_rate / 2 * deviation
        self.step_s[k] = max(self.step_s[k] * factor, self.step_s[0])
        self.step_s[last_k] = max(self.step_s[last_k] / factor, self.step_s[0])

    def _compare_with_plain(self, draft_k: int, deviation: float) -> None:
        """K > 0 and plain: the change goes to draft_k, and in part to all other K > 0."""
        change_s = settings.ADAPTIVE_K.step_rate * deviation * self.step_s[draft_k]
        for k in range(1, len(self.step_s)):
            share = 1.0 if k == draft_k else settings.ADAPTIVE_K.other_k_share * k / draft_k
            self.step_s[k] = max(self.step_s[k] + share * change_s, self.step_s[0])


class AcceptanceEstimator:
    """Acceptance of a drafter's ids over all rows and calls, and the ratio of realized to expected accepted ids."""

    def __init__(self, profiled: list[float]) -> None:
        """profiled: sum(min(p, q)) at the positions that the profile drafted."""
        self.mean = DecayingMean(settings.ADAPTIVE_K.prior_acceptance, settings.ADAPTIVE_K.prior_weight)
        self.mean.add(sum(profiled), len(profiled), 1.0)
        self._realized = DecayingMean(1.0, settings.ADAPTIVE_K.realized_weight)

    @property
    def optimistic_acceptance(self) -> float:
        """The acceptance to begin a text with: the mean, plus one standard error.

        Without drafts there is no acceptance to observe, so an estimate that is too low would stay, while one that is
        too high is corrected. Each text counts as shared_weight independent draft ids. Over the first 8 calls the mean
        alone gave 0.86 to 0.96 of the best constant K, with one standard error more 0.92 to 1.00 (benchmarks/LOG.md).
        """
        constants, mean = settings.ADAPTIVE_K, self.mean.value
        num_texts = max(self.mean.weight / constants.shared_ids_per_row, 1.0)
        variance = max(mean * (1 - mean), 0.0)
        return min(mean + math.sqrt(variance / (constants.shared_weight * num_texts)), 1.0)

    def of_row(self, observed: DecayingMean) -> float:
        """Expected acceptance of a row: its own values, with the optimistic acceptance as the prior."""
        weight = settings.ADAPTIVE_K.shared_weight
        return (weight * self.optimistic_acceptance + observed.total) / (weight + observed.weight)

    @property
    def realized_ratio(self) -> float:
        """Accepted over expected draft ids. It is below 1 where acceptance varies along a text."""
        limit = settings.ADAPTIVE_K.max_realized_deviation
        return min(max(self._realized.value, 1 - limit), 1 + limit)

    def observe(self, total: float, num_ids: int) -> None:
        """total: sum of the acceptance at num_ids draft ids."""
        self.mean.add(total, num_ids, settings.ADAPTIVE_K.shared_decay)

    def observe_realized(self, accepted: float, expected: float) -> None:
        """accepted, expected: draft ids of one step, as means over its rows."""
        self._realized.add(accepted, expected, settings.ADAPTIVE_K.shared_decay)
