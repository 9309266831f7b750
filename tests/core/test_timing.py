"""Where a call's time goes: the parts add up to the whole, and each is the time that its own work took."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

import specdec
from specdec.core.timing import StepTimer
from tests.helpers.drafters import Random
from tests.helpers.families import family, prompts


def generate(model: Any, **kwargs: Any) -> tuple[specdec.Stats, float]:
    started = time.perf_counter()
    model.generate(**prompts(2), max_new_tokens=12, do_sample=False, **kwargs)
    seconds = time.perf_counter() - started
    stats = specdec.last_stats(model)
    assert stats is not None
    return stats, seconds


def test_no_time_is_measured_by_default() -> None:
    model = specdec.enable(family("llama"), "prompt_lookup")
    try:
        stats, _ = generate(model)
    finally:
        specdec.disable(model)
    assert stats.timing is None


def test_parts_add_up_and_each_is_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drafter that sleeps, and verification that sleeps longer, are found where they slept."""
    nap = 0.01

    class Slow(Random):
        def propose(self, sequences: Any, limit: Any) -> Any:
            time.sleep(nap)
            return super().propose(sequences, limit)

    from specdec.core import verification

    real = verification.verify_greedy

    def slow_verify(*args: Any) -> Any:
        time.sleep(2 * nap)
        return real(*args)

    monkeypatch.setattr(verification, "verify_greedy", slow_verify)
    model = specdec.enable(
        family("llama"), Slow(1), num_draft_tokens=3, timing=True
    )  # auto would leave the slow drafter alone
    try:
        stats, seconds = generate(model)
    finally:
        specdec.disable(model)
    timing = stats.timing
    assert timing is not None
    steps = stats.num_target_forwards
    assert len(timing.steps) == steps
    drafting = timing.steps[:-1]  # the last step has no position left to draft
    assert timing.draft_s >= len(drafting) * nap
    assert timing.verification_s >= steps * 2 * nap
    assert min(step.draft_s for step in drafting) >= nap
    assert min(step.verification_s for step in timing.steps) >= 2 * nap
    assert 0 < timing.target_s < seconds - (3 * steps - 1) * nap
    for part in ("draft_s", "target_s", "verification_s"):
        assert sum(getattr(step, part) for step in timing.steps) == pytest.approx(getattr(timing, part))
    assert timing.prefill_s + 3 * nap <= timing.first_token_s < timing.total_s < seconds
    assert timing.total_s == pytest.approx(
        timing.prefill_s + timing.draft_s + timing.target_s + timing.verification_s + timing.other_s
    )


def test_a_call_that_ends_in_its_prompt_has_a_timing_too() -> None:
    timer = StepTimer(torch.device("cpu"))
    timer.mark("prefill")
    timing = timer.timing()
    assert timing.steps == []
    assert timing.first_token_s == timing.prefill_s == timing.total_s


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_agree_with_the_hosts_clock() -> None:
    device = torch.device("cuda")
    x = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    timer, started = StepTimer(device), time.perf_counter()
    for _ in range(20):
        x = x @ x * 1e-4
    timer.mark("prefill")
    timing = timer.timing()
    assert timing.prefill_s == pytest.approx(time.perf_counter() - started, rel=0.2)
