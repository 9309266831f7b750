"""Schedules steps that use another K than the fastest one, so that plain and drafting steps both stay measured."""

from __future__ import annotations

from specdec.draft_length import settings


class ProbeScheduler:
    """The schedule of probes for all calls of a pair, so that many short calls share one budget.

    While drafting is off, a probe is one step with K = 1, at growing intervals and within a share of the time spent.
    While drafting is on, a run of plain steps follows at growing intervals.
    """

    def __init__(self) -> None:
        self.plain_steps = 0  # since the last probe, or since one was postponed
        self.probe_interval = settings.ADAPTIVE_K.first_probe_interval
        self.draft_steps = 0  # since the last run of plain steps
        self.plain_interval = settings.ADAPTIVE_K.first_plain_interval
        self.spent_s = 0.0  # by all steps
        self.lost_s = 0.0  # by probes, compared with the plain steps that they replaced

    def is_probe_due(self, uncounted_steps: int = 0) -> bool:
        """uncounted_steps: plain steps that observe_plain() has not received yet."""
        return self.steps_until_probe(uncounted_steps) <= 0

    def steps_until_probe(self, uncounted_steps: int = 0) -> int:
        """How many more plain steps until a probe is due; 0 or less where one is."""
        return self.probe_interval - self.plain_steps - uncounted_steps

    @property
    def is_plain_run_due(self) -> bool:
        return self.draft_steps >= self.plain_interval

    def affords(self, expected_loss_s: float) -> bool:
        """Whether a probe that is expected to lose so much time stays within the budget."""
        return self.lost_s + expected_loss_s <= settings.ADAPTIVE_K.probe_budget * self.spent_s

    def begin_probe(self) -> None:
        """The next step is a probe; observe_probe() follows once it has run."""
        self.plain_steps = 0

    def postpone_probe(self) -> None:
        """A probe was due, and is not run."""
        self.plain_steps = 0
        self._double_probe_interval()

    def observe_plain(self, num_steps: int, is_measured: bool) -> None:
        """is_measured: the run of plain steps is long enough for its time to count, so the next run may come later."""
        self.plain_steps += num_steps
        if is_measured and self.draft_steps:
            self.draft_steps = 0
            self.plain_interval = min(2 * self.plain_interval, settings.ADAPTIVE_K.last_plain_interval)

    def observe_draft(self) -> None:
        """A step drafted because drafting is on."""
        self.plain_steps = 0
        self.draft_steps += 1
        self.probe_interval = settings.ADAPTIVE_K.first_probe_interval

    def observe_probe(self, spent_s: float, plain_s: float, pays: bool) -> None:
        """A probe took spent_s, plain steps would have taken plain_s; pays: at its acceptance drafting would pay."""
        self.plain_steps = 0
        self.lost_s = max(self.lost_s + spent_s - plain_s, 0.0)
        if pays:
            self.probe_interval = 1
        else:
            self._double_probe_interval()

    def _double_probe_interval(self) -> None:
        self.probe_interval = min(2 * self.probe_interval, settings.ADAPTIVE_K.last_probe_interval)
