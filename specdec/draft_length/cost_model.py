"""The cost model of a target and a drafter: step times and acceptance, estimated over all calls with one batch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from specdec.core.timing import StepTimes
from specdec.draft_length import settings
from specdec.draft_length.probes import ProbeScheduler

PLAIN = -1  # in place of a number of draft ids: a step with K = 0, which asks the drafter for nothing


@dataclass(frozen=True, slots=True)
class Profile:
    """The cost of a pair's steps and the acceptance of its drafts, measured before its first call.

    times: by the number of draft ids of the row that has most, 0 … the largest K; 0 is a plain step. empty_s: of a step
    in which the drafter was asked and proposed nothing; None where that did not happen. catch_up_s: seconds for each id
    of a row that the drafter has not read yet. num_drafted: of each step that drafted, the ids that were requested and
    proposed for the row that has most. acceptance: sum(min(p, q)) at each position that was drafted meanwhile.
    duration_s: of the profile itself.
    """

    times: StepTimes
    empty_s: float | None
    catch_up_s: float
    num_drafted: list[tuple[int, int]]
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
        self.draft_sizes = DraftSizeEstimator(profile)
        self.acceptance = AcceptanceEstimator(profile.acceptance, len(profile.times.step_s) - 1)
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
    """Seconds of a step by what it drafts: from the profile at first, then from the steps that run.

    plain_step_s: of a step with K = 0. draft_step_s: of a step with K > 0, by the number of draft ids of the row that
    has most; 0 where the drafter proposed nothing. Both at the speed of the profile; a step that drafts takes at least
    as long as a plain one. slowdown: the factor on all of them at the current speed. catch_up_s: seconds that a step
    takes longer for each id that the drafter has not read.
    """

    def __init__(self, profile: Profile) -> None:
        self.plain_step_s, *draft_step_s = profile.times.step_s
        empty_s = draft_step_s[0] if profile.empty_s is None else profile.empty_s
        self.draft_step_s = [max(seconds, self.plain_step_s) for seconds in (empty_s, *draft_step_s)]
        self.draft_counts = [0.0] * len(self.draft_step_s)  # of late steps, by number of draft ids
        self.slowdown = 1.0
        self.catch_up_s = DecayingMean(profile.catch_up_s, settings.ADAPTIVE_K.catch_up_weight)
        self.is_draft_run, self.run_steps = False, 0  # whether the latest steps drafted, and how many there were
        self.last_drafted: int | None = None  # draft ids of the last step that was measured; PLAIN for K = 0

    @property
    def plain_s(self) -> float:
        """Seconds of a step without a draft, now."""
        return self.plain_step_s * self.slowdown

    @property
    def is_plain_run_measured(self) -> bool:
        """Whether the latest steps were plain, and enough of them for the time of the next one to count."""
        return self.num_unmeasured_plain_steps <= 0

    @property
    def num_unmeasured_plain_steps(self) -> int:
        """How many more plain steps must run before the time of one counts."""
        return settings.ADAPTIVE_K.plain_run_steps - (0 if self.is_draft_run else self.run_steps)

    def start_run(self) -> None:
        """The next step is the first of a run, not compared with earlier ones: it finds other data in the caches."""
        self.run_steps, self.last_drafted = 0, None

    def of(self, num_drafted: int) -> float:
        """Seconds of a step with so many draft ids, or PLAIN, at the speed of the profile."""
        return self.plain_step_s if num_drafted == PLAIN else self.draft_step_s[num_drafted]

    def observe(self, num_drafted: int, seconds: float, num_steps: int = 1) -> None:
        """num_steps steps with so many draft ids, or PLAIN, took `seconds` each, without what catching up takes.

        A deviation changes `slowdown`, since the machine's speed changes for all steps alike. What is left of it on
        average, where the number of draft ids varies, changes how long steps with so many take compared with others.
        How drafting compares with plain steps changes only where one follows the other.
        """
        constants = settings.ADAPTIVE_K
        if self.is_draft_run != (num_drafted != PLAIN):
            self.is_draft_run, self.run_steps = num_drafted != PLAIN, 0
        self.run_steps += num_steps
        if self.run_steps < (constants.draft_run_steps if self.is_draft_run else constants.plain_run_steps):
            return
        limit = constants.max_step_deviation
        deviation = min(max(seconds / (self.of(num_drafted) * self.slowdown) - 1, -limit), limit)
        self.slowdown *= 1 + constants.slowdown_rate * deviation
        if num_drafted != PLAIN:
            self._compare_drafting(num_drafted, deviation)
        last_drafted, self.last_drafted = self.last_drafted, num_drafted
        if last_drafted is not None and (last_drafted == PLAIN) != (num_drafted == PLAIN):
            self._compare_with_plain(max(last_drafted, num_drafted), -deviation if num_drafted == PLAIN else deviation)

    def observe_catch_up(self, seconds: float, num_unread: int) -> None:
        """A step took so much longer than expected, with num_unread ids that the drafter had to read."""
        self.catch_up_s.add(max(seconds, 0.0), num_unread, settings.ADAPTIVE_K.catch_up_decay)
        self.start_run()

    def _compare_drafting(self, num_drafted: int, deviation: float) -> None:
        """A step against late ones that drafted, whose mean stays, weighted by how often they draft so many ids.

        Where each changed by itself, plain steps appeared to take 3 times as long within 60 calls, since the first step
        of a run is always slow (benchmarks/LOG.md).
        """
        self.draft_counts = [settings.ADAPTIVE_K.shared_decay * count for count in self.draft_counts]
        self.draft_counts[num_drafted] += 1
        factor = 1 + settings.ADAPTIVE_K.draft_rate * deviation
        share = self.draft_counts[num_drafted] / sum(self.draft_counts)
        for other, seconds in enumerate(self.draft_step_s):
            exponent = 1 - share if other == num_drafted else -share * min(self.draft_counts[other], 1.0)
            self._change(other, seconds * factor**exponent)

    def _compare_with_plain(self, num_drafted: int, deviation: float) -> None:
        """One that drafts and a plain one: the change goes to the former, and in part to others that draft."""
        change_s = settings.ADAPTIVE_K.step_rate * deviation * self.draft_step_s[num_drafted]
        for other in range(len(self.draft_step_s)):
            share = other / num_drafted if num_drafted else 0.0
            share = 1.0 if other == num_drafted else settings.ADAPTIVE_K.other_k_share * share
            self._change(other, self.draft_step_s[other] + share * change_s)

    def _change(self, num_drafted: int, seconds: float) -> None:
        self.draft_step_s[num_drafted] = max(seconds, self.plain_step_s)


class DraftSizeEstimator:
    """How many draft ids a step has, of those that it asks for: prompt lookup and others often propose fewer.

    continued[i]: the fraction of steps with i - 1 draft ids that have another one where they ask for it; those of the
    row that has most.
    """

    def __init__(self, profile: Profile) -> None:
        self.continued = [DecayingMean(1.0, 1.0) for _ in profile.times.step_s]
        for requested, drafted in profile.num_drafted:
            self.observe(requested, drafted)

    def observe(self, requested: int, drafted: int) -> None:
        """A step asked for `requested` ids and has `drafted`."""
        for num_ids in range(1, min(requested, drafted + 1) + 1):
            self.continued[num_ids].add(num_ids <= drafted, 1.0, settings.ADAPTIVE_K.shared_decay)

    def expected_step_s(self, times: StepTimeEstimator) -> list[float]:
        """Seconds of a step by K, at the speed of the profile; 0 is a plain step."""
        step_s, expected_s, reached = times.draft_step_s, times.draft_step_s[0], 1.0
        by_k = [times.plain_step_s]
        for k in range(1, len(step_s)):
            reached *= self.continued[k].value
            expected_s += reached * (step_s[k] - step_s[k - 1])
            by_k.append(max(expected_s, times.plain_step_s))
        return by_k


class AcceptanceEstimator:
    """Acceptance of a drafter's ids over all rows and calls, and how it changes with the position in a draft."""

    def __init__(self, profiled: list[float], max_draft_tokens: int) -> None:
        """profiled: sum(min(p, q)) at the positions that the profile drafted."""
        self.mean = DecayingMean(settings.ADAPTIVE_K.prior_acceptance, settings.ADAPTIVE_K.prior_weight)
        self.mean.add(sum(profiled), len(profiled), 1.0)
        # by position: the sum of the acceptance that was realized, over that of what was expected of the row
        self._realized = [DecayingMean(0.0, 0.0) for _ in range(max_draft_tokens)]

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

    def by_position(self, acceptance: float) -> list[float]:
        """The acceptance of a row's draft ids by position, after those before were accepted; `acceptance`: over all.

        An id after accepted ones is accepted more often where easy parts of a text follow hard ones, and where a
        drafter mostly proposes nothing or many ids. Each position from the second on starts as the one before it.
        """
        constants, ratio = settings.ADAPTIVE_K, 1.0
        by_position = []
        for index, realized in enumerate(self._realized):
            prior = ratio if index > 1 else 1.0
            total, weight = constants.realized_weight * prior + realized.total, constants.realized_weight
            ratio = total / (weight + realized.weight)
            by_position.append(min(acceptance * ratio, 1.0))
        return by_position

    def observe(self, total: float, num_ids: int) -> None:
        """total: sum of the acceptance at num_ids draft ids."""
        self.mean.add(total, num_ids, settings.ADAPTIVE_K.shared_decay)

    def observe_realized(self, chances: Sequence[float], expected: float) -> None:
        """chances: the acceptance at the positions of a row's draft; expected: for this row, over all positions."""
        for realized, chance in zip(self._realized, chances, strict=False):
            realized.add(chance, expected, settings.ADAPTIVE_K.shared_decay)
