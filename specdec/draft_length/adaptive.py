"""How many ids each step drafts: always the same number, or the one that is expected to give the most tokens a second.

    tokens a second at K = acceptance length(K) / (T_draft(K) + T_target(K + 1) + rest)

of the row that ends last, since a batch is done when it is. Auto takes the times from a profile (profiling.py) and follows the
steps that run; acceptance it tracks for each row, leaning on what all rows showed. K = 0 is plain decoding. There the drafter
shows nothing, so it is probed, at growing intervals and for no more than a share of the time spent; between probes a step is
counted, no more. K depends on the past alone, so sampled text keeps its distribution.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.core.timing import StepTimes
from specdec.draft_length.speedup import acceptance_lengths, fastest, to_the_end

MAX_DRAFT_TOKENS = 8  # K; beyond it a step gains little where acceptance is not near 1

PRIOR, PRIOR_WEIGHT = 0.7, 4.0  # acceptance of a drafter that was never seen, as so many observations of it
ROW_WEIGHT = 12.0  # what all rows showed, as so many observations of each one: texts differ
SHOWN = 64  # first draft ids of a row that speak for all rows; more, and texts that are drafted to their end outvote the others
KEPT_WEIGHT = 128.0  # accepted ids expected, until what came of them counts
KEEP_ROW, KEEP_ALL = (
    0.97,
    0.99,
)  # of what was counted: of a row after each draft id, of all rows and calls after each step
KEEP_TEXTS = 0.98  # of how long texts were, after each
KEEP_IN_PROBE = 0.7  # of a row's counts: a probe comes after a pause, and should tell
MARGIN = 1.04  # times are noisy: drafting must promise more than this over plain decoding, what it has to read included
FOLLOW, FOLLOW_BY_ID, FOLLOW_ALL = 0.3, 0.75, 0.3  # how far a step moves its K against the others, these with it, all K
SPIKE = 0.25  # a step that differs from its estimate by more moves it by as much as this
SHORT_GAP = 2  # ids that a drafter has not read: more are timed as such
FIRST_PLAIN, LAST_PLAIN = (
    16,
    512,
)  # steps that draft, until some do not: the plain step's time stays known. At first, at most
PLAIN_RUN, DRAFT_RUN = (
    8,
    3,
)  # steps of a kind in a row, until they tell: the first ones find other weights in the caches
BUDGET = 0.01  # of the time spent, that probes may lose
FIRST_PROBE, LAST_PROBE = 8, 256  # plain steps between probes: at first, and where intervals stop growing


@dataclass(frozen=True, slots=True)
class ConstantK:
    """The same K in every step."""

    max_draft_tokens: int

    def next(self) -> int:
        return self.max_draft_tokens

    def observe(self, steps: Sequence[RowStep | None]) -> None:
        pass

    def end(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Profile:
    """What steps of a pair cost before a call has run, and how its first drafts fared.

    times: by K = 0 … the largest that Auto may ask for. catch_up_s: the drafter reads one id of each row that it has not seen.
    chances: acceptance at the positions that were drafted meanwhile. seconds: what the profile took.
    """

    times: StepTimes
    catch_up_s: float
    chances: list[float]
    seconds: float


class _Mean:
    """A mean of weighted values that forgets."""

    def __init__(self, value: float, weight: float) -> None:
        self.sum, self.weight = value * weight, weight

    def add(self, total: float, weight: float, keep: float) -> None:
        self.sum = keep * self.sum + total
        self.weight = keep * self.weight + weight

    @property
    def value(self) -> float:
        return self.sum / self.weight


class PairCostModel:
    """What is known of a drafter with batches of one size, from its profile and all calls since."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        plain_s = profile.times.step_s[0]
        self.step_s = [max(seconds, plain_s) for seconds in profile.times.step_s]  # by K, as they compare to each other
        self.slow = 1.0  # how much longer they take now
        self.run_drafts, self.run = False, 0  # whether the last steps drafted, and how many there were
        self.last: int | None = None  # K of the last step that told
        self.catch_up_s = _Mean(profile.catch_up_s, 128.0)
        self.acceptance = _Mean(PRIOR, PRIOR_WEIGHT)
        self.acceptance.add(sum(profile.chances), len(profile.chances), 1.0)
        self.kept = _Mean(
            1.0, KEPT_WEIGHT
        )  # accepted ids over expected ones: acceptance comes in stretches, so not all come
        self.texts = _Mean(0.0, 0.0)  # ids written, over texts that ended by themselves
        self.since_plain = 0  # steps that drafted
        self.plain_every = FIRST_PLAIN  # of them, until plain ones come
        self.since_probe = 0  # plain steps, since the last probe or since one was put off
        self.interval = FIRST_PROBE
        self.spent_s = self.lost_s = 0.0  # by all steps; by probes, against the plain steps that they stood in for

    @property
    def plain_s(self) -> float:
        """Of a step without a draft, now."""
        return self.step_s[0] * self.slow

    @property
    def optimistic_acceptance(self) -> float:
        """The acceptance to begin a text with: what texts showed, and one standard error more.

        For a text that is not drafted shows nothing, so too low an estimate would stay, and too high a one does not. Texts differ
        from each other as if each were ROW_WEIGHT draft ids.
        """
        mean, texts = self.acceptance.value, max(self.acceptance.weight / SHOWN, 1.0)
        return min(mean + math.sqrt(max(mean * (1 - mean), 0.0) / (ROW_WEIGHT * texts)), 1.0)

    def expected_length(self, rows: int) -> float:
        """Ids that the longest of so many texts will have, however long they may be.

        Each id is as likely to be the last as any other. So the mean is what was written over what ended by itself, texts that
        came to their limit included in the first alone, and the longest of n is 1 + 1/2 + … + 1/n times as long.
        """
        if not self.texts.weight:
            return math.inf
        return self.texts.value * sum(1 / row for row in range(1, rows + 1))

    def start(self) -> None:
        """A call begins: its first steps find the caches full of other things."""
        self.run, self.last = 0, None

    def follow(self, k: int, seconds: float, steps: int = 1) -> None:
        """Steps of this K took so long each.

        A machine's mood meets all K alike, so it changes nothing but `slow`. How the K compare is learned where one follows
        another: between drafting and plain steps the surprise is laid to those that draft, to this K and by the id, for the most
        part, to the others; between two that draft it is shared, so that plain ones stay where they are to all of them.
        """
        if self.run_drafts != (k > 0):
            self.run_drafts, self.run = k > 0, 0
        self.run += steps
        if self.run < (DRAFT_RUN if k else PLAIN_RUN):
            return
        off = min(max(seconds / (self.step_s[k] * self.slow) - 1, -SPIKE), SPIKE)
        self.slow *= 1 + FOLLOW_ALL * off
        last, self.last = self.last, k
        if last is None or last == k:
            return
        if last and k:
            dearer = 1 + FOLLOW / 2 * off
            self.step_s[k] = max(self.step_s[k] * dearer, self.step_s[0])
            self.step_s[last] = max(self.step_s[last] / dearer, self.step_s[0])
            return
        drafted = last or k
        moved_s = FOLLOW * (off if k else -off) * self.step_s[drafted]
        for at in range(1, len(self.step_s)):
            share = 1.0 if at == drafted else FOLLOW_BY_ID * at / drafted
            self.step_s[at] = max(self.step_s[at] + share * moved_s, self.step_s[0])


class _Asked(NamedTuple):
    """A step that was asked for: its K, the tokens a row that it and its first ids promised, when it was."""

    k: int
    length: float
    expected: float
    is_probe: bool
    at: float


_AT_REST = _Asked(0, 1.0, 1.0, False, 0.0)


class AdaptiveK:
    """The K that is expected to be fastest, for one call.

    rooms, unread: for each row, how many ids may be drafted before it ends, and how many the drafter has not seen yet.
    is_new: the experience is this call's profile. among: the K there are, None: all.
    """

    def __init__(
        self,
        experience: PairCostModel,
        rooms: Sequence[int],
        unread: int,
        is_new: bool = False,
        among: Sequence[int] | None = None,
    ) -> None:
        self.known = experience
        self.known.start()
        self.rooms = list(rooms)
        self.all_rooms = tuple(rooms)
        self.unread = unread
        self.is_new = is_new
        self.among = range(self.max_draft_tokens + 1) if among is None else among
        self.live = list(range(len(self.rooms)))
        self.rows = [_Mean(0.0, 0.0) for _ in self.rooms]
        self.shown = SHOWN * len(self.rooms)  # draft ids that still speak for other calls
        self.steps_by_k = [0] * (self.max_draft_tokens + 1)
        self.asked: deque[_Asked] = deque()  # steps under way
        self.heard = 0.0  # when, of the last one
        self.is_drafting = False  # by the last decision
        self.is_resting = False  # drafting did not pay, and nothing has been seen since that would change it
        self.rested, self.rested_s = 0, 0.0  # plain steps at rest that are not yet accounted for
        self.predicted_s = self.predicted_plain_s = self.spent_s = self.plain_s = 0.0

    @property
    def max_draft_tokens(self) -> int:
        return len(self.known.step_s) - 1

    def acceptance(self, row: int) -> float:
        """What the row showed, leaning on what may be hoped for of any."""
        seen = self.rows[row]
        return (ROW_WEIGHT * self.known.optimistic_acceptance + seen.sum) / (ROW_WEIGHT + seen.weight)

    def next(self) -> int:
        known = self.known
        if self.is_resting and known.since_probe + self.rested < known.interval:
            self.asked.append(_AT_REST)
            return 0
        self._account_for_rest()
        rows = [acceptance_lengths(self.acceptance(row), self.rooms[row], self.max_draft_tokens) for row in self.live]
        kept = min(max(known.kept.value, 1 - SPIKE), 1 + SPIKE)
        k = self._fastest([[1 + (length - 1) * kept for length in lengths] for lengths in rows])
        self.is_drafting, self.is_resting = k > 0, k == 0
        is_probe = k == 0 and not any(asked.is_probe for asked in self.asked) and self._may_probe(rows)
        if is_probe:
            k = 1
        elif k and known.since_plain >= known.plain_every:
            k = 0
        expected = sum(lengths[k] for lengths in rows) / len(rows)
        self.asked.append(_Asked(k, 1 + (expected - 1) * kept, expected, is_probe, perf_counter()))
        return k

    def observe(self, steps: Sequence[RowStep | None]) -> None:
        asked, now = self.asked.popleft(), perf_counter()
        seconds = now - max(asked.at, self.heard)  # it began when the one before had ended
        self.heard = now
        known, k = self.known, asked.k
        live = self.live if None not in steps else [row for row in self.live if steps[row] is not None]
        if asked is _AT_REST and len(live) == len(self.live) and not known.run_drafts and known.run >= PLAIN_RUN:
            self.rested += 1  # nothing comes of one more, and what it takes here is taken from plain decoding
            self.rested_s += seconds
            return
        self._account_for_rest()
        if len(live) < len(self.live):
            self._see_ends([row for row in self.live if steps[row] is None])
            self.live, self.is_resting = live, False
        if k == 0:
            self._account_for_plain(1, seconds)
            return

        emitted = tried = 0
        accepted = 0.0
        for row in self.live:
            step = steps[row]
            assert step is not None
            self.rooms[row] -= step.emitted
            emitted += step.emitted
            chances = [chance for chance in step.chances() if chance is not None]
            total = sum(chances)
            self.rows[row].add(total, len(chances), KEEP_IN_PROBE if asked.is_probe else KEEP_ROW ** len(chances))
            tried += len(chances)
            accepted += total
        plain_s = known.plain_s
        tokens = emitted / len(self.live)
        expected_s = known.step_s[k] * known.slow
        self._account(
            k, expected_s + self.unread * known.catch_up_s.value, asked.length * plain_s, seconds, tokens * plain_s
        )

        self.is_resting = False
        if self.shown > 0:
            self.shown -= tried
            known.acceptance.add(accepted, tried, KEEP_ALL)
        known.kept.add(tokens - 1, asked.expected - 1, KEEP_ALL)
        if self.unread > SHORT_GAP:
            known.catch_up_s.add(max(seconds - expected_s, 0.0), self.unread, 0.9)
            known.start()
        else:
            known.follow(k, seconds - self.unread * known.catch_up_s.value)
        self.unread = 0
        known.since_probe = 0
        if asked.is_probe:
            known.lost_s = max(known.lost_s + seconds - tokens * plain_s, 0.0)
            shown = accepted / tried if tried else 0.0
            known.interval = 1 if self._fastest(self._lengths_at(shown)) else min(2 * known.interval, LAST_PROBE)
        else:
            known.since_plain += 1
            known.interval = FIRST_PROBE

    def _account(
        self, k: int, predicted_s: float, predicted_plain_s: float, spent_s: float, plain_s: float, steps: int = 1
    ) -> None:
        """predicted: for the tokens that were promised; spent, and plain ones' seconds: for those that were written."""
        self.steps_by_k[k] += steps
        self.predicted_s += predicted_s
        self.predicted_plain_s += predicted_plain_s
        self.spent_s += spent_s
        self.plain_s += plain_s
        self.known.spent_s += spent_s

    def _account_for_plain(self, steps: int, seconds: float) -> None:
        known = self.known
        plain_s = steps * known.plain_s
        self._account(0, plain_s, plain_s, seconds, seconds, steps)
        for row in self.live:
            self.rooms[row] -= steps
        self.unread += steps
        known.since_probe += steps
        known.follow(0, seconds / steps, steps)
        if known.run >= PLAIN_RUN and known.since_plain:
            known.since_plain, known.plain_every = 0, min(2 * known.plain_every, LAST_PLAIN)

    def _account_for_rest(self) -> None:
        if self.rested:
            self._account_for_plain(self.rested, self.rested_s)
            self.rested, self.rested_s = 0, 0.0

    def _see_ends(self, rows: Sequence[int]) -> None:
        for row in rows:
            self.known.texts.add(self.all_rooms[row] - self.rooms[row], self.rooms[row] >= 0, KEEP_TEXTS)

    def end(self) -> Choice:
        """The call has ended: what was decided, for the statistics."""
        self._account_for_rest()
        self._see_ends(self.live)
        rows = [self.acceptance(row) for row in self.live]
        return Choice(
            steps_by_k=list(self.steps_by_k),
            times=self.known.profile.times,
            acceptance=sum(rows) / len(rows),
            predicted_speedup=self.predicted_plain_s / self.predicted_s if self.predicted_s else None,
            measured_speedup=self.plain_s / self.spent_s if self.spent_s else None,
            profile_s=self.known.profile.seconds if self.is_new else None,
        )

    def _lengths_at(self, acceptance: float) -> list[list[float]]:
        return [acceptance_lengths(acceptance, self.rooms[row], self.max_draft_tokens) for row in self.live]

    def _fastest(self, rows: Sequence[Sequence[float]]) -> int:
        """The K that ends the call soonest, for these acceptance lengths of the rows at work.

        0 where it does not clearly pay, the ids that the drafter lacks included.
        """
        known = self.known
        left = [max(self.rooms[row], 0) + 1 for row in self.live]
        lengths = to_the_end(list(zip(left, rows, strict=True)))
        k = fastest(lengths, known.step_s, self.among)
        tokens = min(max(left), known.expected_length(len(left)))
        reading_s = self.unread * known.catch_up_s.value / known.slow
        drafting_s = tokens * known.step_s[k] / lengths[k] + reading_s
        margin = 1.0 if self.is_drafting else MARGIN
        return k if tokens * known.step_s[0] >= margin * drafting_s else 0

    def _may_probe(self, rows: Sequence[Sequence[float]]) -> bool:
        """Whether it is time for a probe, and there is a budget for it; else it is put off."""
        known = self.known
        if known.since_probe < known.interval:
            return False
        known.since_probe = 0
        tokens = sum(lengths[1] for lengths in rows) / len(rows)
        loss_s = (known.step_s[1] - tokens * known.step_s[0]) * known.slow + self.unread * known.catch_up_s.value
        if known.lost_s + loss_s <= BUDGET * known.spent_s and self._fastest(self._lengths_at(1.0)):
            return True
        known.interval = min(2 * known.interval, LAST_PROBE)
        return False
