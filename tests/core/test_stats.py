"""The counters: recounted by hand from what each step did to the texts, and tied to each other by identities."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import specdec
from specdec.core.interfaces import Drafter
from specdec.core.sampling import Sampling
from specdec.core.sequences import Sequences
from specdec.core.speculative import speculate
from specdec.core.stats import Stats, StatsCounter
from specdec.core.steps import Draft, RowStep, StepResult, TargetOutput
from specdec.draft_length.constant import ConstantK
from specdec.drafters.none import NoDrafter
from specdec.runtime.runner import ModelRunner
from tests.helpers.draft_length import erratic_k
from tests.helpers.drafters import AlwaysRight, AlwaysWrong, Empty, Random, Uneven
from tests.helpers.families import family, prompts
from tests.helpers.plain import WIDTH, continuation, drafter, stop_at, target

V = 4
K = 3


class Bigram:
    """A target that needs no cache: the next id depends on the last one alone."""

    vocab_size = V

    def __init__(self, seed: int) -> None:
        self.table = torch.randn(V, V, generator=torch.Generator().manual_seed(seed))

    def begin(self, batch_size: int, max_slots: int) -> None:
        pass

    def reserve(self, slots: int) -> None:
        pass

    def prefill(self, ids: Tensor, last: Tensor) -> None:
        pass

    def forward(self, ids: Tensor, positions: Tensor) -> TargetOutput:
        return TargetOutput(self.table[ids])


@dataclass
class SeenStep:
    """What one step did to one unfinished row, as seen from outside."""

    row: int
    result: StepResult
    emitted: int
    last: bool

    @property
    def num_drafted(self) -> int:
        return int(self.result.draft.lengths[self.row])

    @property
    def passed(self) -> int:
        return int(self.result.verdict.accepted[self.row])

    @property
    def drafted(self) -> int:
        return min(self.num_drafted, self.emitted) if self.last else self.num_drafted

    @property
    def accepted(self) -> int:
        return min(self.passed, self.emitted)


def run(
    seed: int, drafter: Drafter, do_sample: bool = True, stop_ids: Tensor | None = None
) -> tuple[Stats, list[SeenStep]]:
    """One call of three uneven rows."""
    torch.manual_seed(seed)
    lengths = torch.tensor([4, 1, 2])
    prompt = torch.randint(1, V, (3, 4), generator=torch.Generator().manual_seed(seed))
    sequences = Sequences(
        prompt,
        lengths,
        max_length=4 + 9,
        num_draft_tokens=K,
        stop_ids=stop_ids,
        stop=lambda text: text[0, -3:].tolist() == [1, 2, 1],
    )
    counter = StatsCounter(3, K)
    log: list[SeenStep] = []
    before, finished = sequences.lengths.clone(), sequences.finished.clone()
    for result in speculate(Bigram(seed), drafter, sequences, Sampling(do_sample=do_sample), ConstantK(K)):
        counter.add(result)
        log += [
            SeenStep(row, result, int(sequences.lengths[row] - before[row]), bool(sequences.finished[row]))
            for row in range(3)
            if not finished[row]
        ]
        before, finished = sequences.lengths.clone(), sequences.finished.clone()
    return counter.stats(), log


def recount(log: list[SeenStep], num_forwards: int) -> Stats:
    """The definitions of Stats, written as they are said."""
    drafting = [step for step in log if step.drafted]
    drafted, accepted = sum(step.drafted for step in log), sum(step.accepted for step in log)
    tried = [[step for step in log if step.drafted > i and step.accepted >= i] for i in range(K)]
    num_accepted_at = [sum(step.accepted > i for step in log) for i in range(K)]
    overlaps = [float(step.result.overlap[step.row, i]) for i in range(K) for step in tried[i]]
    return Stats(
        num_steps=len(log),
        num_spec_steps=len(drafting),
        num_draft_tokens=drafted,
        num_accepted_draft_tokens=accepted,
        num_emitted_tokens=sum(step.emitted for step in log),
        num_target_forwards=num_forwards,
        acceptance_histogram=[sum(step.accepted == i for step in drafting) for i in range(K + 1)],
        mean_acceptance_length=sum(step.emitted for step in drafting) / len(drafting) if drafting else None,
        tokens_per_step=sum(step.emitted for step in log) / len(log),
        draft_acceptance_rate=accepted / drafted if drafted else None,
        acceptance_per_position=[num_accepted_at[i] / len(drafting) if drafting else None for i in range(K)],
        conditional_acceptance_per_position=[
            num_accepted_at[i] / len(tried[i]) if tried[i] else None for i in range(K)
        ],
        expected_acceptance=sum(overlaps) / len(overlaps) if overlaps else None,
    )


def origins(step: SeenStep) -> list[str]:
    """From what was drafted and accepted, before any stop."""
    own = "plain" if not step.num_drafted else "bonus" if step.passed == step.num_drafted else "recovered"
    return ([*["accepted"] * step.passed, own])[: step.emitted]


def results(log: list[SeenStep]) -> list[StepResult]:
    return list({id(step.result): step.result for step in log}.values())


def assert_equal(got: Stats, want: Stats) -> None:
    for name in (field.name for field in fields(Stats) if field.name not in ("per_row", "steps")):
        assert getattr(got, name) == pytest.approx(getattr(want, name), abs=1e-6), name


drafters = st.sampled_from([Uneven(1, V), Random(2, V), Empty(K), NoDrafter()])
calls = st.tuples(st.integers(0, 2**32), drafters, st.booleans(), st.sampled_from([None, torch.tensor([0])]))


@given(calls)
@settings(deadline=None)
def test_stats_are_what_the_steps_did(call: tuple) -> None:
    stats, log = run(*call)
    assert_equal(stats, recount(log, len(results(log))))
    assert len(stats.per_row) == 3
    for row, of_row in enumerate(stats.per_row):
        steps = [step for step in log if step.row == row]
        assert_equal(of_row, recount(steps, len(steps)))
        assert of_row.per_row == []
        assert [(step.drafted, step.accepted, step.emitted) for step in of_row.steps] == [
            (step.drafted, step.accepted, step.emitted) for step in steps
        ]
        for noted, step in zip(of_row.steps, steps, strict=True):
            tried = [i for i in range(step.drafted) if step.accepted >= i]
            assert noted.overlap == step.result.overlap[row, tried].tolist()
            assert noted.origins() == origins(step)
            assert noted.requested == int(step.result.requested[row])
    assert stats.steps == []


@given(calls)
@settings(deadline=None)
def test_counters_hold_together(call: tuple) -> None:
    stats, log = run(*call)
    stopped_on_a_draft = sum(step.last and step.emitted <= step.passed for step in log)
    histogram = stats.acceptance_histogram
    assert sum(histogram) == stats.num_spec_steps
    assert sum(i * count for i, count in enumerate(histogram)) == stats.num_accepted_draft_tokens
    assert stats.num_emitted_tokens == stats.num_accepted_draft_tokens + stats.num_steps - stopped_on_a_draft
    without_draft = stats.num_steps - stats.num_spec_steps
    if stats.mean_acceptance_length is not None:
        assert stats.mean_acceptance_length * stats.num_spec_steps == pytest.approx(
            stats.num_emitted_tokens - without_draft
        )
        assert stats.mean_acceptance_length >= (stats.tokens_per_step or 0) - 1e-9
    assert stats.num_accepted_draft_tokens <= stats.num_draft_tokens <= K * stats.num_spec_steps
    assert stats.num_target_forwards == max(row.num_steps for row in stats.per_row)
    summed = ("num_steps", "num_spec_steps", "num_draft_tokens", "num_accepted_draft_tokens", "num_emitted_tokens")
    for name in summed:
        assert getattr(stats, name) == sum(getattr(row, name) for row in stats.per_row), name
    assert histogram == [sum(row.acceptance_histogram[i] for row in stats.per_row) for i in range(K + 1)]


@given(calls)
@settings(deadline=None)
def test_the_result_of_a_finished_row_is_all_zeros(call: tuple) -> None:
    _, log = run(*call)
    for step in results(log):
        for counts in (step.emitted, step.drafted, step.accepted, step.draft.lengths):
            assert (counts[~step.live] == 0).all()


def make_result(drafted: list[int], accepted: list[int], emitted: list[int], overlap: list[list[float]]) -> StepResult:
    """A result with only what is counted."""
    counts = [torch.tensor(values) for values in (emitted, drafted, accepted)]
    requested, shared, zeros = torch.tensor(drafted), torch.tensor(overlap), torch.zeros(len(drafted))
    host_summary = torch.cat(
        [torch.stack([requested, counts[1], counts[2], counts[0], zeros, zeros], dim=1), shared], dim=1
    )
    return StepResult("", None, None, None, None, host_summary)  # type: ignore[arg-type]


def test_an_example_by_hand() -> None:
    counter = StatsCounter(2, 2)
    counter.add(make_result([2, 1], [2, 0], [3, 1], [[0.5, 0.25], [0.125, 9.0]]))
    counter.add(make_result([2, 0], [0, 0], [1, 1], [[0.0, 9.0], [9.0, 9.0]]))
    counter.add(make_result([0, 1], [0, 1], [0, 1], [[9.0, 9.0], [1.0, 9.0]]))  # row 1 stops on its draft id
    stats = counter.stats()
    assert stats.num_steps == 5
    assert stats.num_spec_steps == 4  # one had nothing to offer
    assert stats.num_target_forwards == 3
    assert stats.num_draft_tokens == 6
    assert stats.num_accepted_draft_tokens == 3
    assert stats.num_emitted_tokens == 7
    assert stats.acceptance_histogram == [2, 1, 1]
    assert stats.mean_acceptance_length == 6 / 4
    assert stats.tokens_per_step == 7 / 5
    assert stats.draft_acceptance_rate == 3 / 6
    assert stats.acceptance_per_position == [2 / 4, 1 / 4]
    assert stats.conditional_acceptance_per_position == [2 / 4, 1 / 1]
    assert stats.expected_acceptance == (0.5 + 0.25 + 0.125 + 0.0 + 1.0) / 5
    assert [(row.num_steps, row.num_spec_steps) for row in stats.per_row] == [(2, 2), (3, 2)]
    assert [row.mean_acceptance_length for row in stats.per_row] == [4 / 2, 2 / 2]


def test_rates_are_none_where_nothing_was_drafted() -> None:
    stats, _ = run(0, Empty(K))
    assert stats.num_draft_tokens == stats.num_spec_steps == 0
    assert stats.acceptance_histogram == [0] * (K + 1)
    assert stats.mean_acceptance_length is None
    assert stats.tokens_per_step == 1
    assert stats.draft_acceptance_rate is None
    assert stats.expected_acceptance is None
    assert stats.acceptance_per_position == [None] * K
    assert stats.conditional_acceptance_per_position == [None] * K


def test_everything_is_none_or_zero_before_the_first_step() -> None:
    stats = StatsCounter(2, 1).stats()
    assert stats.mean_acceptance_length is None
    assert stats.tokens_per_step is None
    assert stats.acceptance_histogram == [0, 0]
    assert stats.num_steps == stats.num_spec_steps == stats.num_emitted_tokens == stats.num_target_forwards == 0


def test_expected_acceptance_does_not_depend_on_the_coin_flips() -> None:
    """Where each step drafts one id from the same q against the same p, it is 1 - TV(p, q), whatever was accepted."""
    counter = StatsCounter(1, 1)
    for accepted in (0, 1, 1, 0, 0):
        counter.add(make_result([1], [accepted], [accepted + 1], [[0.3]]))
    assert counter.stats().expected_acceptance == pytest.approx(0.3)
    assert counter.stats().draft_acceptance_rate == 2 / 5


def stop_on_a_draft_id(_: pytest.MonkeyPatch) -> tuple[Any, int | str, int, dict[str, Any]]:
    """The draft is right, so the stop of the first row, its sixth id, falls inside the draft."""
    return drafter("itself"), 4, 1, {"eos_token_id": continuation("llama", 1)[0][5]}


def k_that_jumps(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, int | str, int, dict[str, Any]]:
    erratic_k(monkeypatch, 0)
    return drafter("model"), "auto", 1, {"max_new_tokens": 50}


def lookup_without_a_match(_: pytest.MonkeyPatch) -> tuple[Any, int | str, int, dict[str, Any]]:
    return "prompt_lookup", 4, 4, {}


def rows_that_end_early(_: pytest.MonkeyPatch) -> tuple[Any, int | str, int, dict[str, Any]]:
    text = continuation("llama", 4)
    return drafter("itself"), 5, 4, {"eos_token_id": [text[0][2], text[1][8], text[2][4]], "pad_token_id": 0}


def sampled_rows_that_stop(_: pytest.MonkeyPatch) -> tuple[Any, int | str, int, dict[str, Any]]:
    return drafter("model"), 4, 4, {"do_sample": True, "eos_token_id": list(range(3, 20)), "pad_token_id": 0}


def rows_in_lockstep(_: pytest.MonkeyPatch) -> tuple[Any, int | str, int, dict[str, Any]]:
    """A step goes no further than its shortest row, so other rows' steps end on accepted draft ids in mid-text."""
    return drafter("model"), 4, 4, stop_at(lambda ids: False)


CASES = (
    stop_on_a_draft_id,
    k_that_jumps,
    lookup_without_a_match,
    rows_that_end_early,
    sampled_rows_that_stop,
    rows_in_lockstep,
)


@pytest.mark.parametrize("case", CASES)
def test_figures_of_a_call_are_those_of_its_texts(case: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emitted ids are counted in the texts, steps in the results; 1 + accepted / steps is another number here."""
    draft, k, batch, arguments = case(monkeypatch)
    seen: list[StepResult] = []
    add = StatsCounter.add
    monkeypatch.setattr(StatsCounter, "add", lambda counter, result: (seen.append(result), add(counter, result)))
    model = specdec.enable(target(), draft, num_draft_tokens=k)
    torch.manual_seed(0)
    texts = model.generate(**prompts(batch), **{"max_new_tokens": 18} | arguments)[:, WIDTH:].tolist()
    stats = specdec.last_stats(model)
    stops = arguments.get("eos_token_id", [])
    stops = stops if isinstance(stops, list) else [stops]
    written = [next((at + 1 for at, token in enumerate(text) if token in stops), len(text)) for text in texts]
    assert [row.num_emitted_tokens for row in stats.per_row] == written

    num_drafted = [result.draft.lengths[row].item() for result in seen for row in range(batch) if result.live[row]]
    drafting = sum(count > 0 for count in num_drafted)
    assert (stats.num_steps, stats.num_spec_steps) == (len(num_drafted), drafting)
    assert stats.tokens_per_step == sum(written) / len(num_drafted)
    assert stats.mean_acceptance_length == (sum(written) - (len(num_drafted) - drafting)) / drafting
    assert stats.mean_acceptance_length != 1 + stats.num_accepted_draft_tokens / stats.num_steps, "nothing is shown"
    assert sum(stats.acceptance_histogram) == drafting
    assert stats.acceptance_per_position[0] == (drafting - stats.acceptance_histogram[0]) / drafting


class Coins:
    """A target and a drafter whose ids depend on nothing: p and q, [V] each; they end at id 0."""

    vocab_size = V
    p, q = torch.tensor([0.15, 0.5, 0.25, 0.1]), torch.tensor([0.25, 0.35, 0.1, 0.3])

    def begin(self, *_: object) -> None:
        pass

    reserve = prefill = observe = begin

    def forward(self, ids: Tensor, positions: Tensor) -> TargetOutput:
        return TargetOutput(self.p.log().expand(*ids.shape, V))

    def propose(self, sequences: Sequences, limit: Tensor) -> Draft:
        shape = len(limit), int(limit.max())
        ids = torch.multinomial(self.q, shape[0] * shape[1], replacement=True).view(shape)
        return Draft(ids, self.q.expand(*shape, V).contiguous(), limit)


def test_mean_acceptance_length_is_the_expected_number_of_ids_that_a_drafting_step_emits() -> None:
    """By token, a draft id is accepted and no stop with probability b, so a step emits 1 + b + b^2 + ... + b^K ids."""
    torch.manual_seed(0)
    rows = 3000
    sequences = Sequences(
        torch.ones(rows, 1, dtype=torch.int64), torch.ones(rows, dtype=torch.int64), max_length=200, num_draft_tokens=K,
        stop_ids=torch.tensor([0]),
    )  # fmt: skip
    counter, coins = StatsCounter(rows, K), Coins()
    for result in speculate(coins, coins, sequences, Sampling(do_sample=True, verification="token"), ConstantK(K)):
        counter.add(result)
    stats = counter.stats()
    both = torch.minimum(coins.p, coins.q)
    going_on = both[1:].sum().item()
    expected = sum(going_on**position for position in range(K + 1))
    emitted = torch.tensor([step.emitted for row in stats.per_row for step in row.steps], dtype=torch.float64)
    error = emitted.std().item() / len(emitted) ** 0.5
    assert stats.num_steps == stats.num_spec_steps == len(emitted) > 8000
    assert abs(stats.mean_acceptance_length - expected) < 4 * error
    assert stats.mean_acceptance_length == stats.tokens_per_step == emitted.mean().item()
    assert 1 + stats.num_accepted_draft_tokens / stats.num_steps > expected + 8 * error, (
        "a stop in a draft leaves no further id"
    )
    assert stats.expected_acceptance == pytest.approx(both.sum().item(), abs=1e-6)


PAGE = (Path(__file__).parents[2] / "docs" / "figures.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The cells of the first tables after a heading of docs/figures.md, header rows left out."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"^\|.*\n\|[-:| ]+\n((?:\|.*\n)+)", section, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for rows in tables for line in rows.splitlines()]


def test_the_page_of_figures_defines_what_the_code_counts() -> None:
    """Its formulas, evaluated on its example, are the values that it states and those of Stats."""
    rows = table("Example")
    steps = [
        RowStep(*map(int, row[1:5]), [float(value) for value in row[5].split(",") if value.strip()])
        for row in rows
        if len(row) == 6
    ]
    stated = {
        name.strip("`"): [float(value) for value in values.split(",")]
        for name, values in (r for r in rows if len(r) == 2)
    }
    stats = Stats.of(steps, K, len(steps))
    names = {field.name for field in fields(Stats)} - {
        "num_target_forwards", "chance_acceptance", "timing", "choice", "steps", "per_row",
    }  # fmt: skip
    assert stated.keys() == names
    known: dict[str, Any] = {"steps": steps}
    for name, formula, *_ in table("Definitions"):
        figure, is_list, _ = name.strip("`").partition("[i]")
        got = getattr(stats, figure)
        count = len(got) if is_list else 1
        known[figure] = [eval(formula.strip("`"), known | {"i": position}) for position in range(count)]
        assert known[figure] == pytest.approx(got if is_list else [got]), figure
        assert known[figure] == pytest.approx(stated.pop(figure), abs=1e-4), figure
        known[figure] = known[figure] if is_list else known[figure][0]
    assert not stated
    assert "`num_target_forwards`" in PAGE


@pytest.mark.parametrize("right", [True, False])
def test_a_drafter_that_is_always_right_or_wrong_is_always_or_never_accepted(right: bool) -> None:
    model = family("llama")
    batch = prompts(3)
    sequences = Sequences(batch["input_ids"], batch["attention_mask"].sum(1), max_length=11 + 8, num_draft_tokens=K)
    counter = StatsCounter(3, K)
    drafter = AlwaysRight(model) if right else AlwaysWrong(model)
    with torch.no_grad():
        for step in speculate(ModelRunner(model), drafter, sequences, Sampling(), ConstantK(K)):
            counter.add(step)
    stats = counter.stats()
    assert stats.draft_acceptance_rate == stats.expected_acceptance == right
    assert stats.num_target_forwards == (2 if right else 8)
    assert stats.acceptance_histogram == ([0, 0, 0, 6] if right else [21, 0, 0, 0]), (
        "each row's last step may not draft"
    )
