"""Measures the seconds of a step of a target and a drafter by K, for the batch of a call that has not begun."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from specdec.core.interfaces import Drafter, Target, run_eager
from specdec.core.plain import plain_steps
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.speculative import step
from specdec.core.steps import Draft, StepResult
from specdec.core.timing import StepTimer, StepTimes, StepTiming
from specdec.draft_length import settings
from specdec.draft_length.cost_model import Profile
from specdec.draft_length.speedup import interpolate
from specdec.runtime.cuda_graphs import Graphs


def profiled_draft_lengths(max_draft_tokens: int) -> list[int]:
    """K of the steps that a profile times, besides plain ones."""
    return sorted({*(k for k in settings.ADAPTIVE_K.profile_grid if k < max_draft_tokens), max_draft_tokens})


def profile(
    target: Target,
    drafter: Drafter,
    sequences: Sequences,
    sampling: Sampling,
    max_draft_tokens: int,
    graphs: Graphs | None = None,
    agree: Callable[[bool], bool] = bool,
    was_alone: Callable[[], bool] = lambda: True,
    max_plain_steps: int = 1,
) -> Profile:
    """Time steps with K = 0 … max_draft_tokens on the last columns of a call's prompts, before the call begins.

    `sequences` stays as it is, the generated ids are dropped, and target and drafter must begin() again. Of the call's
    processors only those run that depend on the scores alone.

    graphs: records the steps, as the call does. agree: takes a decision that depends on this process' clock, and
    returns the one that all ranks of a tensor-parallel model follow. was_alone: whether no other thread can have drawn
    random numbers since the profile began; torch's generators are then restored. max_plain_steps: see `speculate`.
    """
    started = time.perf_counter()
    steps = _TimedSteps(target, drafter, sequences, sampling, max_draft_tokens, graphs, max_plain_steps)
    with _restored_generators(sequences.device, was_alone):
        steps.begin()
        num_warm_up = 1 if graphs is None else 3  # with graphs a part runs eagerly, is recorded, is replayed
        draft_lengths = _warm_up(steps, max_draft_tokens, num_warm_up, agree)
        _run_rounds(steps, draft_lengths, max_draft_tokens, agree)
        _fill_in(steps, draft_lengths)
        first_draft_s, num_unread = steps.run_first_draft()
    times = _step_times(steps.timings, max_draft_tokens)
    empty_s = min(map(_total_s, steps.timings_of_empty), default=None)
    catch_up_s = max(first_draft_s - times.draft_s[1], 0.0) / num_unread
    return Profile(times, empty_s, catch_up_s, steps.num_drafted, steps.acceptance, time.perf_counter() - started)


class _TimedSteps:
    """Steps of a target and a drafter on the last columns of a call's prompts.

    timings: of the steps that were timed, by the number of draft ids of the row that has most, 0 for K = 0.
    timings_of_empty: where the drafter proposed nothing. num_drafted, acceptance: see Profile.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        call_sequences: Sequences,
        sampling: Sampling,
        max_draft_tokens: int,
        graphs: Graphs | None,
        max_plain_steps: int,
    ) -> None:
        self.target, self.drafter, self.max_plain_steps = target, drafter, max_plain_steps
        self.sequences = _last_columns(call_sequences, max_draft_tokens)
        if graphs is not None:
            self.sequences.pin_buffers(graphs.static_buffer)
        pointwise = [processor for processor in sampling.processors if not processor.needs_prefix]
        self.sampling = Sampling(pointwise, do_sample=sampling.do_sample, verification=sampling.verification)
        self.run_part = run_eager if graphs is None else graphs.run
        self.timings: dict[int, list[StepTiming]] = {}
        self.timings_of_empty: list[StepTiming] = []
        self.num_drafted: list[tuple[int, int]] = []
        self.acceptance: list[float] = []

    def begin(self) -> None:
        self.target.begin(self.sequences.batch_size, self.sequences.length_limit)
        self.drafter.begin(self.sequences, self.sampling)
        self.target.prefill(self.sequences.ids, self.sequences.lengths - 1)

    def run(self, k: int, count: int = 1, is_timed: bool = True) -> None:
        """Run `count` steps of this K, plain ones together where the call does."""
        run_together = k == 0 and self.max_plain_steps > 1 and self.target.has_plain_steps
        while count > 0:
            num_steps = min(count, self.max_plain_steps) if run_together else 1
            timing, requested, drafted = self._run_plain_steps(num_steps) if run_together else self._run_step(k)
            if is_timed and (requested or k == 0):  # at the end of the context nothing can be requested
                is_empty = requested > 0 and drafted == 0
                (self.timings_of_empty if is_empty else self.timings.setdefault(drafted, [])).append(timing)
            count -= num_steps

    def run_first_draft(self) -> tuple[float, int]:
        """Begin the drafter again and draft one id: -> seconds of the draft, number of ids that the drafter read."""
        self.drafter.begin(self.sequences, self.sampling)
        num_unread = self.sequences.longest
        return self._run_step(1)[0].draft_s, num_unread

    def can_draft(self, num_ids: int) -> bool:
        """Whether each row can still draft this many ids."""
        return bool((self.sequences.limit(num_ids) == num_ids).all())

    def _run_plain_steps(self, count: int) -> tuple[StepTiming, int, int]:
        """-> the timing of one of the steps, and no draft ids, as of _run_step()."""
        started = time.perf_counter()
        self.sequences.retire(*plain_steps(self.target, self.drafter, self.sequences, count))
        return StepTiming(0.0, (time.perf_counter() - started) / count, 0.0, 0.0), 0, 0

    def run_other_ids(self, k: int, draft_s: float) -> None:
        """Time a step with k draft ids that are not the drafter's; draft_s: the time that those would take."""
        timing, *_ = self._run_step(k, RepeatLastId())
        self.timings.setdefault(k, []).append(replace(timing, draft_s=draft_s))

    def _run_step(self, k: int, other: Drafter | None = None) -> tuple[StepTiming, int, int]:
        """-> the step's timing, and how many draft ids the row that has most requested and had."""
        timer = StepTimer(self.sequences.device)
        drafter = self.drafter if other is None else other
        result = step(self.target, drafter, self.sequences, self.sampling, k, self.run_part, timer.mark)
        self.sequences.retire(result)
        rows = [row for row in result.steps if row is not None]
        requested = max((row.requested for row in rows), default=0)
        drafted = max((row.drafted for row in rows), default=0)
        if k and other is None:
            self.num_drafted.append((requested, drafted))
            self.acceptance += [chance for row in rows for chance in row.chances() if chance is not None]
        timer.mark("other")
        (timing,) = timer.timing().steps
        return timing, requested, drafted


class RepeatLastId:
    """Drafts the last id of each row again and again, to time how long it takes to verify so many ids."""

    def begin(self, sequences: Sequences, sampling: Sampling) -> None:
        pass

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        last_ids = sequences.ids.gather(1, (sequences.lengths - 1)[:, None])
        return Draft(last_ids.repeat(1, sequences.num_requested), None, limit)

    def observe(self, result: StepResult) -> None:
        pass


def _last_columns(sequences: Sequences, max_draft_tokens: int) -> Sequences:
    """New sequences of the prompts' last columns; where the context allows it, all steps of a profile fit in."""
    columns = min(settings.ADAPTIVE_K.profile_columns, sequences.prompt.shape[1])
    max_length = columns + _max_emitted_tokens()
    if sequences.context is not None:
        columns = min(columns, max(sequences.context // 2, 1))
        max_length = max(min(max_length, sequences.context), columns + 1)
    return Sequences(
        sequences.prompt[:, -columns:],
        sequences.lengths.clamp(max=columns),
        max_length=max_length,
        context=sequences.context,
        num_draft_tokens=max_draft_tokens,
    )


def _max_emitted_tokens() -> int:
    """The largest number of ids that all steps of a profile emit for a row."""
    constants = settings.ADAPTIVE_K
    steps_per_k = constants.draft_run_steps * constants.profile_rounds + 4  # up to 3 to warm up, and 1 timed
    tokens_per_turn = sum(constants.profile_grid) + len(constants.profile_grid)
    return steps_per_k * tokens_per_turn + constants.plain_run_steps * constants.profile_rounds + 6  # 4 plain, 1 draft


def _warm_up(steps: _TimedSteps, max_draft_tokens: int, num_steps: int, agree: Callable[[bool], bool]) -> list[int]:
    """Run the first steps of each K, which may compile or record: -> the K to time, fewer where steps are slow."""
    draft_lengths = profiled_draft_lengths(max_draft_tokens)
    for k in (0, max_draft_tokens):
        steps.run(k, num_steps, is_timed=False)
        steps.run(k)
    slowest_s = max(_total_s(timing) for timings in steps.timings.values() for timing in timings)
    if not agree(2 * slowest_s * len(draft_lengths) < settings.ADAPTIVE_K.profile_s):
        return [max_draft_tokens]
    for k in num_steps * draft_lengths[:-1]:
        steps.run(k, is_timed=False)
    return draft_lengths


def _run_rounds(
    steps: _TimedSteps, draft_lengths: list[int], max_draft_tokens: int, agree: Callable[[bool], bool]
) -> None:
    """Time steps of each K in runs, as calls make them, in interleaved rounds while time and length suffice."""
    constants = settings.ADAPTIVE_K
    deadline = time.perf_counter() + constants.profile_s / 3  # warming up and reading the prompts take most of the rest
    max_run_tokens = constants.draft_run_steps * (max_draft_tokens + 1) + constants.plain_run_steps
    for _ in range(constants.profile_rounds):
        for k in (*draft_lengths, 0):
            if agree(time.perf_counter() < deadline) and steps.can_draft(max_run_tokens):
                steps.run(k, constants.draft_run_steps if k else constants.plain_run_steps)


def _fill_in(steps: _TimedSteps, draft_lengths: list[int]) -> None:
    """Time steps with so many draft ids where the drafter never proposed as many, while the length suffices."""
    missing = [k for k in draft_lengths if k not in steps.timings]
    drafting = [timing for num_drafted, timings in steps.timings.items() if num_drafted for timing in timings]
    draft_s = min((timing.draft_s for timing in drafting + steps.timings_of_empty), default=0.0)
    for k in 2 * missing:
        if steps.can_draft(k):
            steps.run_other_ids(k, draft_s)


def _step_times(timings: dict[int, list[StepTiming]], max_draft_tokens: int) -> StepTimes:
    """The least seconds of each part by the number of draft ids, interpolated between those that were timed.

    The least, since other work on the machine only adds: by the median a plain step was 1.3 times too slow on a busy
    machine, and K=7 was chosen at 0.80 of plain (benchmarks/LOG.md).
    """

    def least_s(part: str) -> list[float]:
        least = {num_drafted: min(getattr(step, part) for step in steps) for num_drafted, steps in timings.items()}
        least.setdefault(max_draft_tokens, least[max(least)])
        return interpolate(least)

    return StepTimes(
        draft_s=[0.0, *least_s("draft_s")[1:]],
        target_s=least_s("target_s"),
        rest_s=[a + b for a, b in zip(least_s("verification_s"), least_s("other_s"), strict=True)],
    )


def _total_s(timing: StepTiming) -> float:
    return timing.draft_s + timing.target_s + timing.verification_s + timing.other_s


@contextmanager
def _restored_generators(device: torch.device, was_alone: Callable[[], bool]) -> Iterator[None]:
    """Restore torch's generators after the block, unless another thread drew from them and would repeat its numbers."""
    on_gpu = device.type == "cuda"
    state, gpu_state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    try:
        yield
    finally:
        if was_alone():
            torch.set_rng_state(state)
            if gpu_state is not None:
                torch.cuda.set_rng_state(gpu_state, device)
