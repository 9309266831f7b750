"""What a step of this target and this drafter costs with this batch, by K, before the first call that wants to know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from specdec.core.interfaces import Drafter, Target, run_eager
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.speculative import step
from specdec.core.timing import StepTimer, StepTimes, StepTiming
from specdec.draft_length.adaptive import DRAFT_RUN, PLAIN_RUN, Profile
from specdec.draft_length.speedup import interpolated
from specdec.runtime.cuda_graphs import Graphs

DRAFTED = (1, 2, 3, 5, 8)  # forwards of the target at widths 2, 3, 4, 6, 9; the plain step's is 1
COLUMNS = 128  # of the prompts
ROUNDS = 3
SECONDS = 1.5  # of all, about, where no model compiles
PASSES = DRAFT_RUN * ROUNDS + 4  # steps of each K at most, to warm up and to be timed
ROOM = PASSES * (sum(DRAFTED) + len(DRAFTED)) + PLAIN_RUN * ROUNDS + 6  # ids that all steps emit at most


def drafted_ids(most: int) -> list[int]:
    """K of the steps that are timed, but for the plain one."""
    return sorted({*(k for k in DRAFTED if k < most), most})


def profile(
    target: Target,
    drafter: Drafter,
    asked: Sequences,
    sampling: Sampling,
    most: int,
    graphs: Graphs | None = None,
    agree: Callable[[bool], bool] = bool,
    was_alone: Callable[[], bool] = lambda: True,
) -> Profile:
    """Time steps with 0 … most drafted ids, behind the last columns of the prompts of `asked`, a call that has not begun.

    What is written is thrown away, and both models must begin again. Of the call's processors those take part that
    depend on the scores alone. agree: takes a decision that depends on this process' clock, and returns the one that all
    ranks of a tensor-parallel model follow. was_alone: whether no other thread may have drawn random numbers since the
    profile began; then seeds are as they were.
    """
    started = time.perf_counter()
    device, context = asked.device, asked.context
    columns = min(COLUMNS, asked.prompt.shape[1])
    max_length = columns + ROOM
    if context is not None:
        columns = min(columns, max(context // 2, 1))
        max_length = max(min(max_length, context), columns + 1)
    prompt, lengths = asked.prompt[:, -columns:], asked.lengths.clamp(max=columns)
    sequences = Sequences(prompt, lengths, max_length=max_length, context=context, num_draft_tokens=most)
    if graphs is not None:
        sequences.pin_buffers(graphs.static_buffer)
    sampling = Sampling([p for p in sampling.processors if not p.needs_prefix], do_sample=sampling.do_sample)
    first_runs = 1 if graphs is None else 3  # they warm up, and may compile, or record
    chances: list[float] = []
    timed: dict[int, list[StepTiming]] = {}

    def run(k: int, is_timed: bool = True) -> StepTiming:
        clock = StepTimer(device)
        outcome = step(target, drafter, sequences, sampling, k, run_eager if graphs is None else graphs.run, clock.mark)
        sequences.retire(outcome)
        for row in outcome.steps:
            chances.extend(chance for chance in (row.chances() if row and k else ()) if chance is not None)
        clock.mark("other")
        (timing,) = clock.timing().steps
        if is_timed:
            timed.setdefault(k, []).append(timing)
        return timing

    with _restored_seeds(device, was_alone):
        target.begin(len(prompt), sequences.length_limit)
        drafter.begin(sequences, sampling)
        target.prefill(sequences.ids, sequences.lengths - 1)
        drafted = drafted_ids(most)
        for k in (0, most):
            for _ in range(first_runs):
                run(k, is_timed=False)
            run(k)
        slowest_s = _seconds(timed[most][0])
        if agree(2 * slowest_s * len(drafted) < SECONDS):
            for k in first_runs * drafted[:-1]:
                run(k, is_timed=False)
        else:
            drafted = [most]
        box = time.perf_counter() + SECONDS / 3  # first runs, and reading the prompts, take most of the rest
        for _ in range(ROUNDS):
            for k in (*drafted, 0):
                if agree(time.perf_counter() < box) and _has_room(sequences, DRAFT_RUN * (most + 1) + PLAIN_RUN):
                    for _ in range(DRAFT_RUN if k else PLAIN_RUN):  # as calls make them; the first find the caches cold
                        run(k)
        drafter.begin(sequences, sampling)
        unread = sequences.longest
        reading_s = run(1, is_timed=False).draft_s

    def least(part: str) -> list[float]:
        """What else a machine does only adds."""
        return interpolated({k: min(getattr(timing, part) for timing in timings) for k, timings in timed.items()})

    verification_s, other_s = least("verification_s"), least("other_s")
    times = StepTimes(
        draft_s=[0.0, *least("draft_s")[1:]],
        target_s=least("target_s"),
        rest_s=[a + b for a, b in zip(verification_s, other_s, strict=True)],
    )
    catch_up_s = max(reading_s - times.draft_s[1], 0.0) / unread
    return Profile(times, catch_up_s, chances, time.perf_counter() - started)


@contextmanager
def _restored_seeds(device: torch.device, was_alone: Callable[[], bool]) -> Iterator[None]:
    """Set torch's generators back behind the block, unless another thread drew from them: it would draw the same again."""
    on_gpu = device.type == "cuda"
    state, gpu_state = torch.get_rng_state(), torch.cuda.get_rng_state(device) if on_gpu else None
    try:
        yield
    finally:
        if was_alone():
            torch.set_rng_state(state)
            if gpu_state is not None:
                torch.cuda.set_rng_state(gpu_state, device)


def _seconds(timing: StepTiming) -> float:
    return timing.draft_s + timing.target_s + timing.verification_s + timing.other_s


def _has_room(sequences: Sequences, most: int) -> bool:
    """Whether each row can draft as many ids as are asked for."""
    return bool((sequences.limit(most) == most).all())
