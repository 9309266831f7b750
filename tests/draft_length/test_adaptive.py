"""AdaptiveK and ConstantK: the K that they choose in simulated calls, and that texts of real calls stay the same."""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import Any

import pytest

import specdec
from specdec.core.stats import Choice
from specdec.core.steps import RowStep
from specdec.core.timing import StepTimes
from specdec.draft_length import adaptive
from specdec.draft_length.adaptive import AdaptiveK
from specdec.draft_length.constant import ConstantK
from specdec.draft_length.cost_model import PairCostModel, StepTimeEstimator
from specdec.draft_length.settings import ADAPTIVE_K, MAX_DRAFT_TOKENS
from specdec.draft_length.speedup import expected_acceptance_lengths, fastest_k
from tests.helpers.draft_length import Simulation, erratic_k, profile_of
from tests.helpers.drafters import AlwaysRight, Empty
from tests.helpers.families import CONTEXT, family, prompts
from tests.helpers.plain import drafter, target

CHEAP = [1.0 + 0.15 * k for k in range(MAX_DRAFT_TOKENS + 1)]  # seconds of a step by K
EXPENSIVE = [1.0 + 1.1 * k for k in range(MAX_DRAFT_TOKENS + 1)]  # a draft id costs more than a plain step


def always(chance: float) -> Any:
    return lambda position: chance


def test_constant_k_is_the_same_in_every_step() -> None:
    assert [ConstantK(3).next() for _ in range(4)] == [3] * 4


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("draft_id_s", [0.05, 0.15, 0.4])
def test_it_is_as_fast_as_the_best_constant_k(
    chance: float, draft_id_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_s = [1.0 + draft_id_s * k for k in range(MAX_DRAFT_TOKENS + 1)]
    simulation = Simulation(monkeypatch, step_s)
    simulation.call(PairCostModel(profile_of(step_s)), [always(chance)], 5000)
    rate = 5000 / simulation.now_s
    lengths = expected_acceptance_lengths([chance] * MAX_DRAFT_TOKENS, 9)
    best = fastest_k(lengths, step_s, range(MAX_DRAFT_TOKENS + 1))
    assert rate > 0.97 * lengths[best] / step_s[best]


def test_times_are_followed_where_the_profile_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the profile drafts are cheap, and they are expensive; then the other way round."""
    cheap = PairCostModel(profile_of([1.0 + 0.3 * k for k in range(MAX_DRAFT_TOKENS + 1)]))
    simulation = Simulation(monkeypatch, EXPENSIVE)
    simulation.call(cheap, [always(0.5)], 1000)
    assert simulation.chosen_k[-200:].count(0) > 150
    assert simulation.now_s < 1.1 * 1000
    expensive = PairCostModel(profile_of([1.0 + 0.4 * k for k in range(MAX_DRAFT_TOKENS + 1)]))
    simulation = Simulation(monkeypatch, CHEAP)
    simulation.call(expensive, [always(0.9)], 1000)
    assert sum(simulation.chosen_k[-50:]) / 50 > 3


def test_a_drafter_that_is_always_wrong_is_switched_off_and_probed_at_growing_intervals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulation = Simulation(monkeypatch, CHEAP, catch_up_s=0.002)
    cost_model = PairCostModel(profile_of(CHEAP, catch_up_s=0.002))
    choice = simulation.call(cost_model, [always(0.0)], 20_000, prompt=50)
    probes = [index for index, k in enumerate(simulation.chosen_k) if k and index > 20]
    gaps = [right - left for left, right in pairwise(probes)]
    assert len(probes) > 5
    assert all(right >= 1.9 * left or left >= ADAPTIVE_K.last_probe_interval for left, right in pairwise(gaps))
    lost_s = sum(spent - 1.0 for spent, k in zip(simulation.seconds[21:], simulation.chosen_k[21:], strict=True) if k)
    assert lost_s <= ADAPTIVE_K.probe_budget * simulation.now_s
    assert simulation.now_s < 1.01 * 20_000
    assert choice.steps_by_k == [simulation.chosen_k.count(k) for k in range(MAX_DRAFT_TOKENS + 1)]
    assert choice.predicted_speedup == pytest.approx(1.0, abs=0.01)
    assert choice.measured_speedup == pytest.approx(20_000 / simulation.now_s, rel=0.001)


def test_probes_stay_within_their_budget_where_each_is_expensive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter has to read all ids that were generated since the last probe."""
    simulation = Simulation(monkeypatch, CHEAP, catch_up_s=0.5)
    cost_model = PairCostModel(profile_of(CHEAP, catch_up_s=0.5))
    simulation.call(cost_model, [always(0.0)], 4000, prompt=20)
    probes = [index for index, k in enumerate(simulation.chosen_k) if k and index > 20]
    lost_s = sum(spent - 1.0 for spent, k in zip(simulation.seconds[21:], simulation.chosen_k[21:], strict=True) if k)
    assert lost_s <= ADAPTIVE_K.probe_budget * simulation.now_s
    assert len(probes) <= 1


def test_many_short_calls_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, CHEAP, catch_up_s=0.02)
    cost_model = PairCostModel(profile_of(CHEAP, catch_up_s=0.02))
    for _ in range(200):
        simulation.call(cost_model, [always(0.0)], 20, prompt=30)
    assert 200 * 20 < simulation.now_s < 1.015 * 200 * 20


def test_a_drafter_that_would_not_pay_if_it_were_always_right_is_never_called(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, EXPENSIVE)
    simulation.call(PairCostModel(profile_of(EXPENSIVE)), [always(1.0)], 3000)
    assert set(simulation.chosen_k) == {0}


def test_drafting_starts_again_when_drafts_become_good(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, CHEAP, catch_up_s=0.001)
    cost_model = PairCostModel(profile_of(CHEAP, catch_up_s=0.001))
    simulation.call(cost_model, [always(0.0)], 800)
    before = len(simulation.chosen_k)
    assert simulation.chosen_k[-50:].count(0) >= 48
    simulation.call(cost_model, [always(0.95)], 4000)
    first = next(index for index, k in enumerate(simulation.chosen_k[before:]) if k > 2)
    assert first < 600
    later = simulation.chosen_k[before + first + 50 :]
    assert sum(k > 2 for k in later) > 0.9 * len(later)


def test_a_part_of_a_text_with_low_acceptance_is_not_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, [1.0 + 0.3 * k for k in range(MAX_DRAFT_TOKENS + 1)])
    cost_model = PairCostModel(profile_of(simulation.step_s))
    simulation.call(cost_model, [lambda position: 0.95 if position % 1000 < 500 else 0.02], 10_000)
    best = 5000 * 1.0 + 5000 / max(
        length / seconds
        for length, seconds in zip(expected_acceptance_lengths([0.95] * 8, 9), simulation.step_s, strict=True)
    )
    assert simulation.now_s < 1.15 * best


def test_acceptance_is_estimated_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = [1.0 + 0.4 * k for k in range(MAX_DRAFT_TOKENS + 1)]
    simulation = Simulation(monkeypatch, step_s)
    cost_model = PairCostModel(profile_of(step_s))
    policy = AdaptiveK(cost_model, [1000, 1000], 0)

    def one_step(both: bool) -> int:
        k = policy.next()
        simulation.now_s += step_s[k]
        policy.observe([RowStep(k, k, k, k + 1, [1.0] * k), RowStep(k, k, 0, 1, [0.0] * min(k, 1)) if both else None])
        return k

    together = [one_step(both=True) for _ in range(30)]
    assert policy.acceptance(0) > 0.75
    assert policy.acceptance(1) < 0.5
    assert together[0] > 0
    assert together[-1] == 0, "the batch is done when its last row is"
    one_step(both=False)  # the row that accepts nothing has ended
    assert one_step(both=False) > 0
    policy = AdaptiveK(cost_model, [1000, 1000], 0)
    assert policy.acceptance(0) == policy.acceptance(1), "the rows of another call have estimates of their own"


def test_texts_that_are_drafted_to_their_end_do_not_outweigh_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other text has low acceptance, so it is soon generated without drafts."""
    step_s = [1.0 + 0.35 * k for k in range(MAX_DRAFT_TOKENS + 1)]
    simulation = Simulation(monkeypatch, step_s)
    cost_model = PairCostModel(profile_of(step_s))
    for call in range(31):
        simulation.call(cost_model, [always(0.2 if call % 2 else 0.95)], 2000)
    assert 0.45 < cost_model.acceptance.mean.value < 0.75, "the last text had high acceptance"


def test_draft_ids_that_were_requested_and_not_proposed_count_as_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, CHEAP)
    policy = AdaptiveK(PairCostModel(profile_of(CHEAP)), [1000], 0)
    for _ in range(16):
        k = policy.next()
        simulation.now_s += CHEAP[k]
        policy.observe([RowStep(k, 0, 0, 1, [])])
    assert policy.acceptance(0) < 0.3
    assert k == 0


def test_a_drafter_that_often_proposes_nothing_drafts_as_many_ids_as_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth proposal has K ids, all of them accepted; the others are empty."""
    step_s = [1.0 + 0.3 * k for k in range(MAX_DRAFT_TOKENS + 1)]
    cost_model = PairCostModel(profile_of(step_s))
    policy = AdaptiveK(cost_model, [10_000], 0)
    now_s, tokens, chosen_k = 0.0, 0, []
    monkeypatch.setattr(adaptive, "perf_counter", lambda: now_s)
    for index in range(2000):
        k = policy.next()
        drafted = 0 if index % 4 else k
        now_s += step_s[drafted] if drafted else 1.05
        tokens += drafted + 1
        policy.observe([RowStep(k, drafted, drafted, drafted + 1, [1.0] * drafted)])
        chosen_k.append(k)
    assert chosen_k[-500:].count(MAX_DRAFT_TOKENS) > 400
    assert tokens / now_s > 1.5


def test_plain_steps_that_run_together_are_not_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps take longer together than many, and would be taken for slow ones."""
    policy = AdaptiveK(PairCostModel(profile_of(EXPENSIVE)), [10_000], 0)
    counts = []
    for limit in [*[16] * 20, 3]:
        assert policy.next() == 0
        counts.append(policy.extend_plain(limit))
        for _ in range(counts[-1]):
            policy.observe([RowStep(0, 0, 0, 1, [])], counts[-1])
    assert counts[0] == ADAPTIVE_K.plain_run_steps - 1
    assert min(counts[1:-1]) >= ADAPTIVE_K.plain_run_steps
    assert counts[-1] == 3


def test_plain_steps_that_run_together_are_measured_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft that never pays: probes come after as many plain steps, and each of these takes its part of the time."""
    step_s = [1.0 + 0.3 * k for k in range(MAX_DRAFT_TOKENS + 1)]
    now_s = 0.0
    monkeypatch.setattr(adaptive, "perf_counter", lambda: now_s)

    def call(limit: int) -> tuple[list[int], AdaptiveK, int]:
        nonlocal now_s
        now_s = 0.0
        policy = AdaptiveK(PairCostModel(profile_of(step_s)), [10_000], 0)
        chosen_k: list[int] = []
        most = 1
        while len(chosen_k) < 2000:
            k = policy.next()
            count = policy.extend_plain(min(limit, 2000 - len(chosen_k))) if k == 0 else 1
            now_s += count * step_s[k]
            chosen_k += count * [k]
            most = max(most, count)
            for _ in range(count):
                policy.observe([RowStep(k, k, 0, 1, [0.0] * min(k, 1))], count)
        return chosen_k, policy, most

    alone, one_by_one, _ = call(1)
    chosen_k, together, most = call(16)
    assert most == 16
    assert set(chosen_k) > {0}
    assert chosen_k.count(0) == pytest.approx(alone.count(0), rel=0.01), "a probe may be late by a few steps"
    for policy in (one_by_one, together):
        policy.end()
    assert together.spent_s == pytest.approx(one_by_one.spent_s, rel=0.01)
    assert together.step_times.slowdown == pytest.approx(one_by_one.step_times.slowdown, rel=0.05)
    assert together.step_times.plain_s == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("first_step_factor", [1.0, 1.6])
def test_the_first_steps_of_a_run_are_not_measured(first_step_factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than others, since they find other data in the caches."""
    cost_model = PairCostModel(profile_of(CHEAP))
    policy = AdaptiveK(cost_model, [10_000], 0)
    now_s, run, chosen_k = 0.0, 0, []
    monkeypatch.setattr(adaptive, "perf_counter", lambda: now_s)
    for _ in range(1000):
        k = policy.next()
        run = run + 1 if chosen_k and (k > 0) == (chosen_k[-1] > 0) else 1
        is_measured = run >= (ADAPTIVE_K.draft_run_steps if k else ADAPTIVE_K.plain_run_steps)
        now_s += CHEAP[k] * (1.0 if is_measured else 1 + (first_step_factor - 1) / run)
        policy.observe([RowStep(requested=k, drafted=k, accepted=k, emitted=k + 1, overlap=[1.0] * k)])
        chosen_k.append(k)
    assert chosen_k.count(0) > 10
    step_times = cost_model.step_times
    for k, seconds in enumerate(CHEAP[1:], 1):
        assert step_times.draft_step_s[k] / step_times.plain_step_s == pytest.approx(seconds / CHEAP[0], rel=0.02)


def test_k_is_at_most_the_number_of_ids_that_the_row_may_still_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, CHEAP)
    simulation.call(PairCostModel(profile_of(CHEAP)), [always(1.0)], 12)
    remaining = 12
    for k in simulation.chosen_k:
        assert k <= remaining - 1
        remaining -= k + 1
    assert remaining == 0


def test_runs_of_plain_steps_measure_their_time_at_growing_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, CHEAP)
    choice = simulation.call(PairCostModel(profile_of(CHEAP)), [always(0.9)], 12_000)
    drafted = [len(list(steps)) for k, steps in groupby(simulation.chosen_k, key=bool) if k]
    plain = [len(list(steps)) for k, steps in groupby(simulation.chosen_k, key=bool) if not k]
    assert drafted[:6] == [ADAPTIVE_K.first_plain_interval, 32, 64, 128, 256, ADAPTIVE_K.last_plain_interval]
    assert set(drafted[5:-1]) == {ADAPTIVE_K.last_plain_interval}
    assert set(plain[:-1]) == {ADAPTIVE_K.plain_run_steps}
    assert choice.steps_by_k[0] == simulation.chosen_k.count(0)
    assert sum(choice.steps_by_k) == len(simulation.chosen_k)
    assert choice.predicted_speedup == pytest.approx(12_000 / simulation.now_s, rel=0.03)
    assert choice.measured_speedup == pytest.approx(12_000 / simulation.now_s, rel=0.01)
    assert choice.profile_s is None


def test_k_is_not_computed_again_while_drafting_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(monkeypatch, EXPENSIVE)
    computed = []
    stock = adaptive.expected_acceptance_lengths
    monkeypatch.setattr(adaptive, "expected_acceptance_lengths", lambda *args: computed.append(1) or stock(*args))
    simulation.call(PairCostModel(profile_of(EXPENSIVE)), [always(0.0)], 3000)
    assert sum(simulation.chosen_k) <= 0.01 * 3000
    assert len(computed) < 0.3 * 3000


def test_drafting_does_not_pay_for_a_short_text_after_a_long_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    cost_model = PairCostModel(profile_of(CHEAP, catch_up_s=0.1))
    simulation = Simulation(monkeypatch, CHEAP, catch_up_s=0.1)
    simulation.call(cost_model, [always(0.9)], 10, prompt=1000)
    assert set(simulation.chosen_k) == {0}
    simulation.call(cost_model, [always(0.9)], 2000, prompt=1000)
    assert max(simulation.chosen_k) > 0


def set_acceptance(cost_model: PairCostModel, acceptance: float) -> None:
    """Make the estimate so certain that the optimistic acceptance is the mean."""
    cost_model.acceptance.mean.add(1e9 * acceptance, 1e9, 0.0)


def test_an_estimate_from_few_texts_is_raised_by_its_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = [1.0, 1.7, *[100.0] * (MAX_DRAFT_TOKENS - 1)]
    monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)

    def drafts(num_ids: int) -> bool:
        cost_model = PairCostModel(profile_of(step_s))
        cost_model.acceptance.mean.add(0.72 * num_ids, num_ids, 0.0)
        assert 0.72 < cost_model.acceptance.optimistic_acceptance < 0.9
        return AdaptiveK(cost_model, [1000], 0).next() > 0

    assert drafts(64)
    assert not drafts(6400)
    cost_model = PairCostModel(profile_of(step_s))
    for certain in (0.0, 1.0):
        cost_model.acceptance.mean.add(certain * 64, 64, 0.0)
        assert cost_model.acceptance.optimistic_acceptance == certain


def test_drafting_needs_a_larger_speedup_to_start_than_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = [1.0, 1.3, *[100.0] * (MAX_DRAFT_TOKENS - 1)]
    monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(StepTimeEstimator, "observe", lambda *step: None)
    cost_model = PairCostModel(profile_of(step_s))
    set_acceptance(cost_model, 0.5)
    policy = AdaptiveK(cost_model, [1000], 0)
    assert policy.next() == 1
    set_acceptance(cost_model, 0.33)
    policy.observe([RowStep(1, 1, 0, 1, [0.33])])
    assert policy.next() == 1
    policy.observe([RowStep(1, 1, 0, 1, [0.33])])
    assert AdaptiveK(cost_model, [1000], 0).next() == 0
    set_acceptance(cost_model, 0.28)
    assert policy.next() == 0


@pytest.mark.parametrize(("acceptance", "is_probed"), [(0.45, True), (0.1, False)])
def test_a_probe_runs_if_its_expected_loss_is_within_the_budget(
    acceptance: float, is_probed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is 0.1 s; the probe takes 0.5 s more than a plain step and emits `acceptance` ids more on average."""
    monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)
    cost_model = PairCostModel(profile_of([1.0, 1.5, *[100.0] * (MAX_DRAFT_TOKENS - 1)]))
    set_acceptance(cost_model, acceptance)
    cost_model.probes.spent_s, cost_model.probes.plain_steps = 10.0, cost_model.probes.probe_interval
    assert AdaptiveK(cost_model, [1000], 0).next() == is_probed


def test_texts_are_expected_to_be_as_long_as_earlier_ones_whatever_their_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter does not read a long prompt where texts end far below a large limit."""
    cost_model = PairCostModel(profile_of(CHEAP, catch_up_s=0.1))
    simulation = Simulation(monkeypatch, CHEAP, catch_up_s=0.1)

    def drafts(tokens: int, limit: int) -> bool:
        before = len(simulation.chosen_k)
        simulation.call(cost_model, [always(0.9)], tokens, prompt=1000, limit=limit)
        return any(simulation.chosen_k[before:])

    assert drafts(30, 5000), "no text has ended yet"
    assert [drafts(30, 5000) for _ in range(5)] == 5 * [False]
    assert not drafts(100, 100), "the limit is small"
    for _ in range(40):
        simulation.call(cost_model, [always(0.9)], 2000, prompt=1000, limit=5000)
    assert drafts(2000, 5000)
    cost_model = PairCostModel(profile_of(CHEAP, catch_up_s=0.1))
    for _ in range(5):
        assert not drafts(30, 30)
    assert drafts(2000, 5000), "texts that reached their limit do not make later ones short"


def test_the_expected_length_of_the_longest_text(monkeypatch: pytest.MonkeyPatch) -> None:
    cost_model = PairCostModel(profile_of(EXPENSIVE))
    assert cost_model.expected_length(1) == float("inf")
    policy = AdaptiveK(cost_model, [99, 99, 19], 0)
    monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)
    plain_step = RowStep(0, 0, 0, 1, [])
    for index in range(60):
        policy.next()
        policy.observe([plain_step if index < length else None for length in (60, 40, 20)])
    policy.end()
    assert cost_model.expected_length(1) == pytest.approx((60 + 40 + 20) / 2, rel=0.05), "two ended before their limit"
    assert cost_model.expected_length(2) == pytest.approx(1.5 * cost_model.expected_length(1))


def test_the_margin_is_over_steps_and_catching_up_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are expected to be 1.55 times as fast as plain ones; reading the prompt takes most of what they save."""
    step_s = [1.0, 1.2, *[100.0] * (MAX_DRAFT_TOKENS - 1)]

    def drafts(catch_up_s: float) -> bool:
        cost_model = PairCostModel(profile_of(step_s, catch_up_s=catch_up_s))
        set_acceptance(cost_model, 0.86)
        monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)
        return AdaptiveK(cost_model, [199], 100).next() > 0

    saved_s = 200 - 200 * 1.2 / 1.86
    assert drafts(0.85 * saved_s / 100)
    assert not drafts(0.91 * saved_s / 100)
    plain_s, drafting_s, catch_up_s = 200, 200 - saved_s, 0.91 * saved_s
    assert ADAPTIVE_K.start_margin * drafting_s + catch_up_s < plain_s, "a margin over the steps alone is reached"


def test_a_choice_as_a_string() -> None:
    times = StepTimes([0.0], [1.0], [0.0])
    assert str(Choice([2, 0, 0, 84, 14], times, 0.8, 1.84, 1.789, None)) == (
        "K=3 in 84 % of steps, 4 in 14 %, 0 in 2 %; predicted 1.84×, measured 1.79×"
    )
    assert str(Choice([0, 0], times, 0.7, None, None, None)) == "no step"


@pytest.mark.parametrize("drafter_name", ["right", "model"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_text_is_that_of_plain_decoding_for_any_sequence_of_k(
    seed: int, batch_size: int, drafter_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = target()
    specdec.disable(model)
    call = {**prompts(batch_size), "max_new_tokens": 50, "do_sample": False}
    want = model.generate(**call)
    erratic_k(monkeypatch, seed)
    draft = {"right": AlwaysRight(model), "model": drafter()}[drafter_name]
    specdec.enable(model, draft)
    try:
        got = model.generate(**call)
        stats = specdec.last_stats(model)
    finally:
        specdec.disable(model)
    assert got.tolist() == want.tolist()
    chosen_k = [k for k, count in enumerate(stats.choice.steps_by_k) if count]
    assert 0 in chosen_k
    assert len(chosen_k) > 2
    assert max(chosen_k) <= MAX_DRAFT_TOKENS == len(stats.acceptance_histogram) - 1
    assert sum(stats.choice.steps_by_k) == stats.num_target_forwards
    assert sum(stats.acceptance_histogram) == stats.num_spec_steps


def test_a_text_may_go_on_beyond_the_context() -> None:
    """There no row can draft any more, and none has ended."""
    model = target()
    specdec.disable(model)
    call = {**prompts(2), "max_new_tokens": CONTEXT + 9, "do_sample": False}
    want = model.generate(**call)
    specdec.enable(model, AlwaysRight(model))
    try:
        assert model.generate(**call).tolist() == want.tolist()
        assert specdec.last_stats(model).choice.steps_by_k[0] >= 9
    finally:
        specdec.disable(model)


def test_a_draft_may_have_more_columns_than_requested_if_its_lengths_are_within_the_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    erratic_k(monkeypatch, 0)
    model = family("llama")
    want = model.generate(**prompts(2), max_new_tokens=20)
    specdec.enable(model, Empty(width=MAX_DRAFT_TOKENS))
    try:
        assert model.generate(**prompts(2), max_new_tokens=20).tolist() == want.tolist()
    finally:
        specdec.disable(model)
