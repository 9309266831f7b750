"""AdaptiveK: each step drafts the number of ids that is expected to give the most tokens a second.

    tokens a second at K = acceptance length(K) / expected seconds of a step(K)

of the row that ends last, since a batch is done when it is. Acceptance, step times by the number of draft ids, and how
many ids the drafter proposes of those asked for come from the pair's cost model (cost_model.py), acceptance also from
each row of the call. K = 0 is plain decoding: the drafter then shows no acceptance, so it is probed from time to time
(probes.py). K depends on earlier steps alone, so sampled text keeps its distribution.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import NamedTuple

from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.draft_length import settings
from specdec.draft_length.cost_model import PLAIN, DecayingMean, PairCostModel
from specdec.draft_length.speedup import batch_acceptance_lengths, expected_acceptance_lengths, fastest_k


class _PlannedStep(NamedTuple):
    """A step in flight.

    expected_tokens: ids that a row emits on average. is_idle: a plain step since drafting does not pay. planned_at:
    perf_counter() of the decision.
    """

    k: int
    expected_tokens: float
    is_probe: bool
    is_idle: bool
    planned_at: float


_IDLE_STEP = _PlannedStep(0, 1.0, False, True, 0.0)


class AdaptiveK:
    """The K that is expected to be fastest, for one call.

    While drafting does not pay, the policy is idle: K is 0 and is not computed again until a probe is due or a row
    ends.
    """

    def __init__(
        self,
        cost_model: PairCostModel,
        remaining_draft_tokens: Sequence[int],
        unread_tokens: int,
        is_new: bool = False,
        candidates: Sequence[int] | None = None,
    ) -> None:
        """remaining_draft_tokens: for each row, the number of ids that may be drafted before it reaches its limit.

        unread_tokens: ids of each row that the drafter has not read. is_new: the cost model's profile was made for this
        call. candidates: the K to choose from, including 0; None for all up to the largest.
        """
        self.cost_model = cost_model
        self.step_times, self.probes = cost_model.step_times, cost_model.probes
        self.step_times.start_run()
        self.max_draft_tokens = len(self.step_times.draft_step_s) - 1
        self.limits = tuple(remaining_draft_tokens)
        self.remaining_draft_tokens = list(remaining_draft_tokens)
        self.unread_tokens = unread_tokens
        self.is_new = is_new
        self.candidates = range(self.max_draft_tokens + 1) if candidates is None else candidates
        self.active_rows = list(range(len(self.limits)))
        self.row_acceptance = [DecayingMean(0.0, 0.0) for _ in self.limits]
        self.ids_to_share = settings.ADAPTIVE_K.shared_ids_per_row * len(self.limits)  # of the call, for the cost model
        self.in_flight: deque[_PlannedStep] = deque()
        self.last_observed_at = 0.0  # perf_counter() when the latest step was observed
        self.num_unobserved = 0  # of the steps that ran together, of which some are observed
        self.is_drafting = False  # as last computed
        self.is_idle = False
        self.idle_steps, self.idle_s = 0, 0.0  # plain steps that the cost model has not received yet
        self.steps_by_k = [0] * (self.max_draft_tokens + 1)
        self.predicted_s = self.predicted_plain_s = self.spent_s = self.plain_s = 0.0  # of all steps of the call

    def acceptance(self, row: int) -> float:
        """The expected acceptance of a row's next draft ids."""
        return self.cost_model.acceptance.of_row(self.row_acceptance[row])

    def next(self) -> int:
        """K of the step that begins now: the fastest one, or another where a probe or a plain step is due."""
        if self.is_idle and not self.probes.is_probe_due(self.idle_steps):
            self.in_flight.append(_IDLE_STEP)
            return 0
        self._flush_idle_steps()
        lengths_by_row = [self._expected_lengths(row, self.acceptance(row)) for row in self.active_rows]
        k = self._fastest_k(lengths_by_row)
        self.is_drafting, self.is_idle = k > 0, k == 0
        is_probe = k == 0 and not any(step.is_probe for step in self.in_flight) and self._should_probe(lengths_by_row)
        is_idle = self.is_idle and not is_probe
        if is_probe:
            k = 1
        elif k and self.probes.is_plain_run_due:
            k = 0
        expected_tokens = sum(lengths[k] for lengths in lengths_by_row) / len(lengths_by_row)
        self.in_flight.append(_PlannedStep(k, expected_tokens, is_probe, is_idle, perf_counter()))
        return k

    def extend_plain(self, limit: int) -> int:
        """How many of the plain steps that follow run together: up to the next probe, while drafting does not pay.

        First those that are not measured, then at least as many that are, since few steps take longer together.
        """
        num_steps = settings.ADAPTIVE_K.plain_run_steps
        unmeasured = self.step_times.num_unmeasured_plain_steps - 1
        if unmeasured > 0:
            num_steps = unmeasured
        elif self.in_flight[-1].is_idle:
            num_steps = max(num_steps, self.probes.steps_until_probe(self.idle_steps))
        return min(limit, num_steps)

    def observe(self, steps: Sequence[RowStep | None], num_together: int = 1) -> None:
        """Update the estimates from the oldest step in flight; None for a row that had finished before it."""
        now = perf_counter()
        planned = self.in_flight[0]
        self.num_unobserved = self.num_unobserved or num_together
        seconds = now - max(planned.planned_at, self.last_observed_at)  # a step begins when the one before has ended
        seconds /= self.num_unobserved  # steps that ran together take equal parts of their time
        self.num_unobserved -= 1
        if not self.num_unobserved:
            self.in_flight.popleft()
        self.last_observed_at = now - self.num_unobserved * seconds
        active_rows = self.active_rows
        if None in steps:
            active_rows = [row for row in active_rows if steps[row] is not None]
        has_ended_rows = len(active_rows) < len(self.active_rows)
        if planned.is_idle and not has_ended_rows and self.step_times.is_plain_run_measured:
            # the cost model receives many idle steps at once, since each update takes time from plain decoding
            self.idle_steps += 1
            self.idle_s += seconds
            return
        self._flush_idle_steps()
        if has_ended_rows:
            self._observe_texts([row for row in self.active_rows if steps[row] is None])
            self.active_rows, self.is_idle = active_rows, False
        if planned.k:
            self._observe_draft(planned, seconds, steps)
        else:
            self._observe_plain(1, seconds)

    def end(self) -> Choice:
        """The call has ended: its figures, for the statistics."""
        self._flush_idle_steps()
        self._observe_texts(self.active_rows)
        acceptance = [self.acceptance(row) for row in self.active_rows]
        profile = self.cost_model.profile
        return Choice(
            steps_by_k=list(self.steps_by_k),
            times=profile.times,
            acceptance=sum(acceptance) / len(acceptance),
            predicted_speedup=self.predicted_plain_s / self.predicted_s if self.predicted_s else None,
            measured_speedup=self.plain_s / self.spent_s if self.spent_s else None,
            profile_s=profile.duration_s if self.is_new else None,
        )

    def _observe_draft(self, planned: _PlannedStep, seconds: float, steps: Sequence[RowStep | None]) -> None:
        acceptance, step_times = self.cost_model.acceptance, self.step_times
        rows = [step for step in steps if step is not None]
        requested, drafted = max(step.requested for step in rows), max(step.drafted for step in rows)
        num_emitted, num_observed, total_acceptance = self._observe_rows(planned, steps)
        tokens = num_emitted / len(self.active_rows)
        plain_s = step_times.plain_s
        expected_s = step_times.of(drafted) * step_times.slowdown
        catch_up_s = self.unread_tokens * step_times.catch_up_s.value
        self._count(planned.k, expected_s + catch_up_s, planned.expected_tokens * plain_s, seconds, tokens * plain_s)

        self.is_idle = False
        if self.ids_to_share > 0:
            self.ids_to_share -= num_observed
            acceptance.observe(total_acceptance, num_observed)
        self.cost_model.draft_sizes.observe(requested, drafted)
        if self.unread_tokens > settings.ADAPTIVE_K.max_unread_tokens:
            step_times.observe_catch_up(seconds - expected_s, self.unread_tokens)
        else:
            step_times.observe(drafted, seconds - catch_up_s)
        self.unread_tokens = 0
        if planned.is_probe:
            pays = self._fastest_k_at(total_acceptance / num_observed if num_observed else 0.0) > 0
            self.probes.observe_probe(seconds, tokens * plain_s, pays)
        else:
            self.probes.observe_draft()

    def _observe_rows(self, planned: _PlannedStep, steps: Sequence[RowStep | None]) -> tuple[int, int, float]:
        """Update each active row from a step that drafted.

        -> over all rows, the number of emitted ids, of draft ids whose acceptance was observed, and the sum of it.
        """
        constants = settings.ADAPTIVE_K
        num_emitted = num_observed = 0
        total_acceptance = 0.0
        for row in self.active_rows:
            step = steps[row]
            assert step is not None
            self.remaining_draft_tokens[row] -= step.emitted
            num_emitted += step.emitted
            acceptance = [chance for chance in step.chances() if chance is not None]
            self.cost_model.acceptance.observe_realized(acceptance, self.acceptance(row))
            total = sum(acceptance)
            decay = constants.probe_decay if planned.is_probe else constants.row_decay ** len(acceptance)
            self.row_acceptance[row].add(total, len(acceptance), decay)
            num_observed += len(acceptance)
            total_acceptance += total
        return num_emitted, num_observed, total_acceptance

    def _observe_plain(self, num_steps: int, seconds: float) -> None:
        """num_steps plain steps took `seconds` together."""
        step_times = self.step_times
        expected_s = num_steps * step_times.plain_s
        self._count(0, expected_s, expected_s, seconds, seconds, num_steps)
        for row in self.active_rows:
            self.remaining_draft_tokens[row] -= num_steps
        self.unread_tokens += num_steps
        step_times.observe(PLAIN, seconds / num_steps, num_steps)
        self.probes.observe_plain(num_steps, step_times.is_plain_run_measured)

    def _flush_idle_steps(self) -> None:
        if self.idle_steps:
            self._observe_plain(self.idle_steps, self.idle_s)
            self.idle_steps, self.idle_s = 0, 0.0

    def _observe_texts(self, ended_rows: Sequence[int]) -> None:
        for row in ended_rows:
            remaining = self.remaining_draft_tokens[row]
            self.cost_model.observe_text(self.limits[row] - remaining, at_limit=remaining < 0)

    def _count(
        self, k: int, predicted_s: float, predicted_plain_s: float, spent_s: float, plain_s: float, num_steps: int = 1
    ) -> None:
        """Add to the call's totals. predicted: for the tokens that were expected; the others: for those emitted."""
        self.steps_by_k[k] += num_steps
        self.predicted_s += predicted_s
        self.predicted_plain_s += predicted_plain_s
        self.spent_s += spent_s
        self.plain_s += plain_s
        self.probes.spent_s += spent_s

    def _expected_lengths(self, row: int, acceptance: float) -> list[float]:
        """The expected acceptance length of a row's next step, by K."""
        by_position = self.cost_model.acceptance.by_position(acceptance)
        return expected_acceptance_lengths(by_position, self.remaining_draft_tokens[row])

    def _fastest_k_at(self, acceptance: float) -> int:
        """The K that is fastest where all rows have this acceptance."""
        return self._fastest_k([self._expected_lengths(row, acceptance) for row in self.active_rows])

    def _fastest_k(self, lengths_by_row: Sequence[Sequence[float]]) -> int:
        """The K that ends the call soonest, for these acceptance lengths by K of each active row.

        0 where drafting does not pay, the ids that the drafter has to read first included.
        """
        step_times, step_s = self.step_times, self.cost_model.draft_sizes.expected_step_s(self.step_times)
        remaining = [max(self.remaining_draft_tokens[row], 0) + 1 for row in self.active_rows]
        lengths = batch_acceptance_lengths(list(zip(remaining, lengths_by_row, strict=True)))
        k = fastest_k(lengths, step_s, self.candidates)
        tokens = min(max(remaining), self.cost_model.expected_length(len(remaining)))
        catch_up_s = self.unread_tokens * step_times.catch_up_s.value / step_times.slowdown
        draft_s = tokens * step_s[k] / lengths[k] + catch_up_s
        margin = 1.0 if self.is_drafting else settings.ADAPTIVE_K.start_margin
        return k if tokens * step_s[0] >= margin * draft_s else 0

    def _should_probe(self, lengths_by_row: Sequence[Sequence[float]]) -> bool:
        """Whether a probe is due, within its budget, and worth it if every draft id were accepted; else postpone it."""
        probes, step_times = self.probes, self.step_times
        if not probes.is_probe_due():
            return False
        tokens = sum(lengths[1] for lengths in lengths_by_row) / len(lengths_by_row)
        step_s = self.cost_model.draft_sizes.expected_step_s(step_times)
        steps_s = (step_s[1] - tokens * step_s[0]) * step_times.slowdown
        if probes.affords(steps_s + self.unread_tokens * step_times.catch_up_s.value) and self._fastest_k_at(1.0):
            probes.begin_probe()
            return True
        probes.postpone_probe()
        return False
