"""K chooses itself: what is asked for in worlds whose times and chances are known, what that costs, and what is remembered."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from itertools import groupby, pairwise
from typing import Any

import pytest
import torch

import specdec
from specdec.core.sampling import Processor, Sampling
from specdec.core.sequences import Sequences
from specdec.core.stats import Choice
from specdec.core.steps import RowStep, TargetOutput
from specdec.core.timing import StepTimes
from specdec.draft_length import adaptive
from specdec.draft_length import profiler as profiling
from specdec.draft_length.adaptive import (
    BUDGET,
    DRAFT_RUN,
    FIRST_PLAIN,
    LAST_PLAIN,
    LAST_PROBE,
    MAX_DRAFT_TOKENS,
    PLAIN_RUN,
    AdaptiveK,
    ConstantK,
    PairCostModel,
)
from specdec.draft_length.profiler import DRAFTED, profile
from specdec.draft_length.speedup import acceptance_lengths, fastest
from specdec.drafters.model import ModelDrafter
from specdec.generation import call as served
from specdec.runtime.runner import ModelRunner
from tests.helpers.draft_length import World, erratic_k, profile_of
from tests.helpers.drafters import AlwaysRight, Empty, Random
from tests.helpers.families import CONTEXT, FAMILIES, VOCAB_SIZE, family, make_model, prompts
from tests.helpers.plain import drafter, pair, target

CHEAP = [1.0 + 0.15 * k for k in range(MAX_DRAFT_TOKENS + 1)]  # seconds of a step by K
DEAR = [1.0 + 1.1 * k for k in range(MAX_DRAFT_TOKENS + 1)]  # a draft id costs more than a plain step


def always(chance: float) -> Any:
    return lambda position: chance


def test_a_constant_is_the_same_in_every_step() -> None:
    assert [ConstantK(3).next() for _ in range(4)] == [3] * 4


@pytest.mark.parametrize("chance", [0.3, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("dear", [0.05, 0.15, 0.4])
def test_it_is_as_fast_as_the_best_constant_k(chance: float, dear: float, monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = [1.0 + dear * k for k in range(MAX_DRAFT_TOKENS + 1)]
    world = World(monkeypatch, step_s)
    world.call(PairCostModel(profile_of(step_s)), [always(chance)], 5000)
    rate = 5000 / world.time
    lengths = acceptance_lengths(chance, 9, MAX_DRAFT_TOKENS)
    best = fastest(lengths, step_s, range(MAX_DRAFT_TOKENS + 1))
    assert rate > 0.97 * lengths[best] / step_s[best]


def test_times_are_followed_where_the_profile_was_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The profile promised that drafts are dear; they are cheap, and the other way round."""
    cheap = PairCostModel(profile_of([1.0 + 0.3 * k for k in range(MAX_DRAFT_TOKENS + 1)]))
    world = World(monkeypatch, DEAR)
    world.call(cheap, [always(0.5)], 1000)
    assert world.asked[-200:].count(0) > 150
    assert world.time < 1.08 * 1000
    dear = PairCostModel(profile_of([1.0 + 0.4 * k for k in range(MAX_DRAFT_TOKENS + 1)]))
    world = World(monkeypatch, CHEAP)
    world.call(dear, [always(0.9)], 1000)
    assert sum(world.asked[-50:]) / 50 > 3


def test_one_slow_step_changes_little_and_a_lasting_change_is_seen() -> None:
    known = PairCostModel(profile_of(CHEAP))
    before = list(known.step_s)
    for at in range(3 * PLAIN_RUN):
        known.follow(
            0 if at // PLAIN_RUN % 2 else 2, 50.0 if at == DRAFT_RUN else CHEAP[0 if at // PLAIN_RUN % 2 else 2]
        )
    assert all(0.8 < now / then < 1.2 for now, then in zip(known.step_s, before, strict=True))
    for at in range(100 * PLAIN_RUN):
        known.follow(2 * (at // PLAIN_RUN % 2), 3.0 if at // PLAIN_RUN % 2 else CHEAP[0])
    assert known.step_s[2] / known.step_s[0] == pytest.approx(3.0, rel=0.05)


def test_a_machine_that_slows_down_changes_no_comparison() -> None:
    known = PairCostModel(profile_of(CHEAP))
    before = list(known.step_s)
    for at in range(300):
        k = 0 if at % 30 < PLAIN_RUN else 3
        known.follow(k, CHEAP[k] * (1 + at / 100))
    assert known.step_s == pytest.approx(before, rel=0.05)
    assert known.plain_s == pytest.approx(4.0, rel=0.05)


def test_steps_that_draft_say_nothing_of_plain_ones() -> None:
    """Where a K follows another the first step is always dear; plain steps stay where they are to all of them."""
    known = PairCostModel(profile_of(CHEAP))
    for at in range(5000):
        k = (3, 8)[at // 4 % 2]
        known.follow(k, CHEAP[k] * (1.3 if at % 4 == 0 else 1.0))
    assert known.plain_s == pytest.approx(CHEAP[0], rel=0.15)
    assert known.step_s[8] / known.step_s[3] == pytest.approx(CHEAP[8] / CHEAP[3], rel=0.15)


def test_a_drafter_that_is_always_wrong_is_switched_off_and_probed_ever_more_rarely(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(monkeypatch, CHEAP, catch_up_s=0.002)
    known = PairCostModel(profile_of(CHEAP, catch_up_s=0.002))
    choice = world.call(known, [always(0.0)], 20_000, prompt=50)
    probes = [at for at, k in enumerate(world.asked) if k and at > 20]
    gaps = [right - left for left, right in pairwise(probes)]
    assert len(probes) > 5
    assert all(right >= 1.9 * left or left >= LAST_PROBE for left, right in pairwise(gaps))
    lost = sum(spent - 1.0 for spent, k in zip(world.seconds[21:], world.asked[21:], strict=True) if k)
    assert lost <= BUDGET * world.time
    assert world.time < 1.01 * 20_000
    assert [count for count in choice.steps_by_k if count] == [world.asked.count(k) for k in sorted(set(world.asked))]
    assert choice.predicted_speedup == pytest.approx(1.0, abs=0.01)
    assert choice.measured_speedup == pytest.approx(20_000 / world.time, rel=0.001)


def test_probes_keep_to_their_budget_where_each_is_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter has to read all that was written meanwhile, which costs more the longer it waited."""
    world = World(monkeypatch, CHEAP, catch_up_s=0.5)
    known = PairCostModel(profile_of(CHEAP, catch_up_s=0.5))
    world.call(known, [always(0.0)], 4000, prompt=20)
    probes = [at for at, k in enumerate(world.asked) if k and at > 20]
    lost = sum(spent - 1.0 for spent, k in zip(world.seconds[21:], world.asked[21:], strict=True) if k)
    assert lost <= BUDGET * world.time
    assert len(probes) <= 1


def test_many_short_calls_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, CHEAP, catch_up_s=0.02)
    known = PairCostModel(profile_of(CHEAP, catch_up_s=0.02))
    for _ in range(200):
        world.call(known, [always(0.0)], 20, prompt=30)
    assert 200 * 20 < world.time < 1.015 * 200 * 20


def test_a_drafter_that_could_not_pay_were_it_always_right_is_never_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, DEAR)
    world.call(PairCostModel(profile_of(DEAR)), [always(1.0)], 3000)
    assert set(world.asked) == {0}


def test_drafts_that_become_good_are_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, CHEAP, catch_up_s=0.001)
    known = PairCostModel(profile_of(CHEAP, catch_up_s=0.001))
    world.call(known, [always(0.0)], 800)
    there = len(world.asked)
    assert world.asked[-50:].count(0) >= 48
    world.call(known, [always(0.95)], 4000)
    first = next(at for at, k in enumerate(world.asked[there:]) if k > 2)
    assert first < 600
    later = world.asked[there + first + 50 :]
    assert sum(k > 2 for k in later) > 0.9 * len(later)


def test_a_bad_stretch_in_a_text_is_not_drafted(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, [1.0 + 0.3 * k for k in range(MAX_DRAFT_TOKENS + 1)])
    known = PairCostModel(profile_of(world.step_s))
    world.call(known, [lambda position: 0.95 if position % 1000 < 500 else 0.02], 10_000)
    best = 5000 * 1.0 + 5000 / max(
        length / s for length, s in zip(acceptance_lengths(0.95, 9, 8), world.step_s, strict=True)
    )
    assert world.time < 1.15 * best


def test_acceptance_is_known_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = [1.0 + 0.3 * k for k in range(MAX_DRAFT_TOKENS + 1)]
    world = World(monkeypatch, step_s)
    known = PairCostModel(profile_of(step_s))
    auto = AdaptiveK(known, [1000, 1000], 0)

    def one_step(both: bool) -> int:
        k = auto.next()
        world.time += step_s[k]
        auto.observe([RowStep(k, k, k, k + 1, [1.0] * k), RowStep(k, k, 0, 1, [0.0] * min(k, 1)) if both else None])
        return k

    together = [one_step(both=True) for _ in range(30)]
    assert auto.acceptance(0) > 0.75
    assert auto.acceptance(1) < 0.45
    assert together[0] > 0
    assert together[-1] == 0, "the batch is done when its last row is"
    one_step(both=False)  # the row that accepts nothing has ended
    assert one_step(both=False) > 0
    auto = AdaptiveK(known, [1000, 1000], 0)
    assert auto.acceptance(0) == auto.acceptance(1), "another call's rows are not these"


def test_texts_that_are_drafted_to_their_end_do_not_outvote_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other text is hopeless, and soon written without drafts; the next one may be of either kind."""
    step_s = [1.0 + 0.35 * k for k in range(MAX_DRAFT_TOKENS + 1)]
    world = World(monkeypatch, step_s)
    known = PairCostModel(profile_of(step_s))
    for call in range(31):
        world.call(known, [always(0.2 if call % 2 else 0.95)], 2000)
    assert 0.45 < known.acceptance.value < 0.75, "the last text was a good one"


def test_what_was_asked_for_and_not_offered_counts_as_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, CHEAP)
    auto = AdaptiveK(PairCostModel(profile_of(CHEAP)), [1000], 0)
    for _ in range(16):
        k = auto.next()
        world.time += CHEAP[k]
        auto.observe([RowStep(k, 0, 0, 1, [])])
    assert auto.acceptance(0) < 0.3
    assert k == 0


@pytest.mark.parametrize("cold", [1.0, 1.6])
def test_steps_that_find_the_caches_cold_are_not_taken_for_the_rule(
    cold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first plain steps behind drafts, and the first drafts behind plain steps, take longer than others of their kind."""
    known = PairCostModel(profile_of(CHEAP))
    auto = AdaptiveK(known, [10_000], 0)
    now, run, asked = 0.0, 0, []
    monkeypatch.setattr(adaptive, "perf_counter", lambda: now)
    for _ in range(1000):
        k = auto.next()
        run = run + 1 if asked and (k > 0) == (asked[-1] > 0) else 1
        now += CHEAP[k] * (1 + (cold - 1) / run if run < (DRAFT_RUN if k else PLAIN_RUN) else 1.0)
        auto.observe([RowStep(requested=k, drafted=k, accepted=k, emitted=k + 1, overlap=[1.0] * k)])
        asked.append(k)
    assert asked.count(0) > 10
    for k, seconds in enumerate(CHEAP):
        assert known.step_s[k] / known.step_s[0] == pytest.approx(seconds / CHEAP[0], rel=0.02)


def test_no_more_is_asked_for_than_a_row_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, CHEAP)
    world.call(PairCostModel(profile_of(CHEAP)), [always(1.0)], 12)
    left = 12
    for k in world.asked:
        assert k <= left - 1
        left -= k + 1
    assert left == 0


def test_a_plain_step_now_and_then_keeps_its_time_known(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(monkeypatch, CHEAP)
    choice = world.call(PairCostModel(profile_of(CHEAP)), [always(0.9)], 12_000)
    drafted = [len(list(steps)) for k, steps in groupby(world.asked, key=bool) if k]
    plain = [len(list(steps)) for k, steps in groupby(world.asked, key=bool) if not k]
    assert drafted[:6] == [FIRST_PLAIN, 32, 64, 128, 256, LAST_PLAIN], "seldom, once it is known"
    assert set(drafted[5:-1]) == {LAST_PLAIN}
    assert set(plain[:-1]) == {PLAIN_RUN}
    assert choice.steps_by_k[0] == world.asked.count(0)
    assert sum(choice.steps_by_k) == len(world.asked)
    assert choice.predicted_speedup == pytest.approx(12_000 / world.time, rel=0.03)
    assert choice.measured_speedup == pytest.approx(12_000 / world.time, rel=0.01)
    assert choice.profile_s is None


def test_a_drafter_that_does_not_pay_costs_no_thought(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between probes nothing is weighed anew."""
    world = World(monkeypatch, DEAR)
    weighed = []
    stock = adaptive.acceptance_lengths
    monkeypatch.setattr(adaptive, "acceptance_lengths", lambda *args: weighed.append(1) or stock(*args))
    world.call(PairCostModel(profile_of(DEAR)), [always(0.0)], 3000)
    assert sum(world.asked) <= 0.01 * 3000
    assert len(weighed) < 0.3 * 3000


def test_reading_a_long_prompt_for_a_short_text_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    known = PairCostModel(profile_of(CHEAP, catch_up_s=0.1))
    world = World(monkeypatch, CHEAP, catch_up_s=0.1)
    world.call(known, [always(0.9)], 10, prompt=1000)
    assert set(world.asked) == {0}
    world.call(known, [always(0.9)], 2000, prompt=1000)
    assert max(world.asked) > 0


def be_sure(known: PairCostModel, acceptance: float) -> None:
    """So many texts showed it that no more is to be hoped for."""
    known.acceptance.add(1e9 * acceptance, 1e9, 0.0)


def test_what_few_texts_showed_is_hoped_to_be_better(monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = [1.0, 1.7, *[100.0] * (MAX_DRAFT_TOKENS - 1)]
    monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)

    def begins(ids: int) -> bool:
        known = PairCostModel(profile_of(step_s))
        known.acceptance.add(0.72 * ids, ids, 0.0)
        assert 0.72 < known.optimistic_acceptance < 0.9
        return AdaptiveK(known, [1000], 0).next() > 0

    assert begins(64)
    assert not begins(6400)
    known = PairCostModel(profile_of(step_s))
    for certain in (0.0, 1.0):
        known.acceptance.add(certain * 64, 64, 0.0)
        assert known.optimistic_acceptance == certain


def test_more_is_asked_of_drafting_to_begin_than_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    step_s = [1.0, 1.3, *[100.0] * (MAX_DRAFT_TOKENS - 1)]
    monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)
    monkeypatch.setattr(PairCostModel, "follow", lambda *step: None)
    known = PairCostModel(profile_of(step_s))
    be_sure(known, 0.5)
    auto = AdaptiveK(known, [1000], 0)
    assert auto.next() == 1
    be_sure(known, 0.33)
    auto.observe([RowStep(1, 1, 0, 1, [0.33])])
    assert auto.next() == 1
    auto.observe([RowStep(1, 1, 0, 1, [0.33])])
    assert AdaptiveK(known, [1000], 0).next() == 0
    be_sure(known, 0.28)
    assert auto.next() == 0


@pytest.mark.parametrize(("acceptance", "is_probed"), [(0.45, True), (0.1, False)])
def test_a_probe_is_weighed_by_what_it_is_expected_to_lose(
    acceptance: float, is_probed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs half a plain step, most of which a draft id that is likely to pass makes up for; one hundredth of ten may go."""
    monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)
    known = PairCostModel(profile_of([1.0, 1.5, *[100.0] * (MAX_DRAFT_TOKENS - 1)]))
    be_sure(known, acceptance)
    known.spent_s, known.since_probe = 10.0, known.interval
    assert AdaptiveK(known, [1000], 0).next() == is_probed


def test_texts_are_expected_to_be_as_long_as_others_were_whatever_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is not read for the sake of a limit that no text comes near."""
    known = PairCostModel(profile_of(CHEAP, catch_up_s=0.1))
    world = World(monkeypatch, CHEAP, catch_up_s=0.1)

    def drafts(tokens: int, limit: int) -> bool:
        before = len(world.asked)
        world.call(known, [always(0.9)], tokens, prompt=1000, limit=limit)
        return any(world.asked[before:])

    assert drafts(30, 5000), "nothing is known"
    assert [drafts(30, 5000) for _ in range(5)] == 5 * [False]
    assert not drafts(100, 100), "and here it may not be longer"
    for _ in range(40):
        world.call(known, [always(0.9)], 2000, prompt=1000, limit=5000)
    assert drafts(2000, 5000)
    known = PairCostModel(profile_of(CHEAP, catch_up_s=0.1))
    for _ in range(5):
        assert not drafts(30, 30)
    assert drafts(2000, 5000), "texts that came to their limit do not say how long they would have been"


def test_how_long_the_longest_text_is_expected_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    known = PairCostModel(profile_of(DEAR))
    assert known.expected_length(1) == float("inf")
    auto = AdaptiveK(known, [99, 99, 19], 0)
    monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)
    written = RowStep(0, 0, 0, 1, [])
    for at in range(60):
        auto.next()
        auto.observe([written, written if at < 40 else None, written if at < 20 else None])
    auto.end()
    assert known.expected_length(1) == pytest.approx((60 + 40 + 20) / 2, rel=0.05), "two ended by themselves"
    assert known.expected_length(2) == pytest.approx(1.5 * known.expected_length(1))


def test_the_margin_is_over_steps_and_reading_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps promise 1.55 times plain decoding; what that saves in 200 tokens, reading the prompt takes away but for a little."""
    step_s = [1.0, 1.2, *[100.0] * (MAX_DRAFT_TOKENS - 1)]

    def drafts(catch_up_s: float) -> bool:
        known = PairCostModel(profile_of(step_s, catch_up_s=catch_up_s))
        be_sure(known, 0.86)
        monkeypatch.setattr(adaptive, "perf_counter", lambda: 0.0)
        return AdaptiveK(known, [199], 100).next() > 0

    saved_s = 200 - 200 * 1.2 / 1.86
    assert drafts(0.85 * saved_s / 100)
    assert not drafts(0.91 * saved_s / 100)
    assert adaptive.MARGIN * (200 - saved_s) + 0.91 * saved_s < 200, (
        "a margin over the steps alone would not have said so"
    )


def test_the_line_of_a_choice() -> None:
    times = StepTimes([0.0], [1.0], [0.0])
    assert str(Choice([2, 0, 0, 84, 14], times, 0.8, 1.84, 1.789, None)) == (
        "K=3 in 84 % of steps, 4 in 14 %, 0 in 2 %; predicted 1.84×, measured 1.79×"
    )
    assert str(Choice([0, 0], times, 0.7, None, None, None)) == "no step"


class Counting:
    """profile() with a count of its runs."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def __call__(self, target: Any, drafter: Any, asked: Sequences, *args: Any) -> adaptive.Profile:
        self.rows.append(asked.batch_size)
        return profile(target, drafter, asked, *args)


def test_a_profile_is_made_once_for_each_kind_of_batch_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting()
    monkeypatch.setattr(served, "profile", counting)
    model, draft = copy.deepcopy(family("llama")), copy.deepcopy(family("llama"))
    specdec.enable(model, draft)

    def made(batch_size: int, **call: Any) -> bool:
        before = len(counting.rows)
        model.generate(**prompts(batch_size), max_new_tokens=6, **call)
        is_new = len(counting.rows) > before
        choice = specdec.last_stats(model).choice
        assert (choice.profile_s is not None) == is_new
        return is_new

    assert [made(rows) for rows in (1, 1, 4, 1, 4)] == [True, False, True, False, False]
    assert counting.rows == [1, 4]
    assert made(1, do_sample=True)
    assert not made(1, do_sample=True)
    specdec.enable(model, "none")
    model.generate(**prompts(1), max_new_tokens=6)
    assert specdec.last_stats(model).choice is None, "there is nothing to choose"
    specdec.enable(model)
    assert not made(1, assistant_model=draft), "the pair is known from before"
    assert made(1, assistant_model=copy.deepcopy(draft))
    specdec.disable(model)
    assert not made_anew(model, draft, counting), "what was learned outlives disable()"
    other, its_draft = copy.deepcopy(pair("llama")[0]), copy.deepcopy(draft)
    assert made_anew(other, its_draft, counting)


def made_anew(model: Any, draft: Any, counting: Counting) -> bool:
    before = len(counting.rows)
    specdec.enable(model, draft).generate(**prompts(1), max_new_tokens=6)
    return len(counting.rows) > before


def test_what_is_known_of_a_pair_does_not_keep_its_draft_model() -> None:
    model, draft = copy.deepcopy(family("llama")), copy.deepcopy(family("llama"))
    specdec.enable(model)
    model.generate(**prompts(1), max_new_tokens=6, assistant_model=draft)
    gone = weakref.ref(draft)
    del draft
    gc.collect()
    assert gone() is None


def test_a_drafter_that_cannot_be_hashed_is_known_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unhashable(Random):
        __hash__ = None  # type: ignore[assignment]

    counting = Counting()
    monkeypatch.setattr(served, "profile", counting)
    model = specdec.enable(copy.deepcopy(family("llama")), Unhashable(1))
    for _ in range(2):
        model.generate(**prompts(1), max_new_tokens=6)
    assert counting.rows == [1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_profile_leaves_seeds_and_texts_alone(do_sample: bool) -> None:
    model, draft = family("llama"), make_model("llama", 1, **FAMILIES["llama"])
    batch = prompts(4)
    sequences = Sequences(
        batch["input_ids"], batch["attention_mask"].sum(1), max_length=40, num_draft_tokens=MAX_DRAFT_TOKENS
    )
    ids, lengths = sequences.ids.clone(), sequences.lengths.clone()
    state = torch.get_rng_state()
    with torch.no_grad():
        found = profile(
            ModelRunner(model),
            ModelDrafter(draft, VOCAB_SIZE),
            sequences,
            Sampling(do_sample=do_sample),
            MAX_DRAFT_TOKENS,
        )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(ids, sequences.ids)
    assert torch.equal(lengths, sequences.lengths)
    for part in (found.times.draft_s, found.times.target_s, found.times.rest_s):
        assert len(part) == MAX_DRAFT_TOKENS + 1
    assert found.times.draft_s[0] == 0
    assert min(found.times.step_s) > 0
    assert found.chances
    assert all(0 <= chance <= 1.000001 for chance in found.chances)


class Watched:
    """A target of one vocabulary row for each id, and the widths that it was run at."""

    vocab_size = VOCAB_SIZE

    def __init__(self, seconds: float = 0.0) -> None:
        self.widths: list[int] = []
        self.seconds = seconds

    def begin(self, batch_size: int, max_slots: int) -> None:
        self.max_slots = max_slots

    def reserve(self, slots: int) -> None:
        pass

    def prefill(self, ids: torch.Tensor, last: torch.Tensor) -> None:
        pass

    def forward(self, ids: torch.Tensor, positions: torch.Tensor) -> TargetOutput:
        assert int(positions.max()) < self.max_slots
        self.widths.append(ids.shape[1])
        time.sleep(self.seconds)
        return TargetOutput(torch.zeros(*ids.shape, VOCAB_SIZE))


@pytest.mark.parametrize(
    ("context", "prompt", "most"), [(None, 300, 8), (64, 40, 8), (9, 5, 8), (6, 5, 5), (2, 1, 1), (None, 4, 3)]
)
def test_a_profile_runs_the_widths_that_fit(context: int | None, prompt: int, most: int) -> None:
    target = Watched()
    asked = Sequences(
        torch.ones(2, prompt, dtype=torch.int64), torch.tensor([prompt, 1]), max_length=prompt + 1, context=context
    )
    found = profile(target, Random(0), asked, Sampling(), most)
    assert len(found.times.target_s) == most + 1
    assert target.max_slots <= (context or 1000)
    if context is None:
        assert set(target.widths) == {1, most + 1, *(k + 1 for k in DRAFTED if k < most)}


def test_a_slow_pair_is_not_profiled_at_every_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "SECONDS", 0.0)
    target = Watched()
    asked = Sequences(torch.ones(1, 5, dtype=torch.int64), torch.tensor([5]), max_length=9)
    found = profile(target, Random(0), asked, Sampling(), MAX_DRAFT_TOKENS)
    assert sorted(target.widths) == [1, 1, 2, 9, 9], (
        "a warm-up and one run of the least and the largest, and reading the prompt"
    )
    first, *_, last = found.times.target_s
    assert found.times.target_s[4] == pytest.approx((first + last) / 2)


def test_a_profile_asks_no_processor_that_reads_the_text() -> None:
    def refuse(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    seen: list[int] = []

    def alone(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(len(scores))
        return scores

    asked = Sequences(torch.ones(1, 5, dtype=torch.int64), torch.tensor([5]), max_length=9)
    profile(
        Watched(),
        Random(0),
        asked,
        Sampling([Processor(refuse), Processor(alone, needs_prefix=False)]),
        MAX_DRAFT_TOKENS,
    )
    assert seen


@pytest.mark.parametrize("kind", ["right", "model"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_greedy_text_is_plain_however_k_jumps(
    seed: int, batch_size: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = target()
    specdec.disable(model)
    call = {**prompts(batch_size), "max_new_tokens": 50, "do_sample": False}
    want = model.generate(**call)
    erratic_k(monkeypatch, seed)
    draft = {"right": AlwaysRight(model), "model": drafter()}[kind]
    specdec.enable(model, draft)
    try:
        got = model.generate(**call)
        stats = specdec.last_stats(model)
    finally:
        specdec.disable(model)
    assert got.tolist() == want.tolist()
    asked = [k for k, count in enumerate(stats.choice.steps_by_k) if count]
    assert 0 in asked
    assert len(asked) > 2
    assert max(asked) <= MAX_DRAFT_TOKENS == len(stats.acceptance_histogram) - 1
    assert sum(stats.choice.steps_by_k) == stats.num_target_forwards
    assert sum(stats.acceptance_histogram) == stats.num_spec_steps


def test_a_text_may_go_on_behind_the_context() -> None:
    """Where no row has room for a draft any more, and none has ended."""
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


def test_a_draft_may_be_wider_than_what_was_asked_for_as_long_as_it_offers_no_more(
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
