"""Drawing inverts the distribution function; each position of a window is processed as in plain decoding."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    MinNewTokensLengthLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.core.sampling import Processor, Sampling, draw, uniforms
from specdec.core.sequences import Sequences
from specdec.core.steps import Draft
from specdec.core.verification import verify_draft

V = 7
PROMPT_WIDTH = 9
LAST = 1 - 2**-53  # the largest float64 below 1

weights = st.lists(st.integers(0, 16), min_size=1, max_size=8).filter(sum)


def batch_with_draft(seed: int, num_ids: int) -> tuple[Sequences, list[list[int]]]:
    """Four uneven rows, some ids committed, num_ids drafted ones staged; and each row as a plain loop would hold it.

    The padding is random: a processor that reads it must see what the caller passed.
    """
    generator = torch.Generator().manual_seed(seed)
    prompt, committed, draft = (
        torch.randint(V, (4, width), generator=generator) for width in (PROMPT_WIDTH, 4, num_ids)
    )
    counts = torch.randint(5, (4,), generator=generator)
    sequences = Sequences(
        prompt, torch.tensor([PROMPT_WIDTH, 1, 4, 6]), max_length=PROMPT_WIDTH + 9, num_draft_tokens=num_ids
    )
    sequences.stage(committed)
    sequences.lengths += counts
    sequences.stage(draft)
    return sequences, [
        [*prompt[row].tolist(), *committed[row, :count].tolist(), *draft[row].tolist()]
        for row, count in enumerate(counts)
    ]


def processors_of_a_call() -> list[Processor]:
    """In the order in which generate() applies them."""
    return [
        Processor(RepetitionPenaltyLogitsProcessor(1.7)),
        Processor(NoRepeatNGramLogitsProcessor(2)),
        Processor(MinNewTokensLengthLogitsProcessor(PROMPT_WIDTH, 3, 2, device="cpu")),
        Processor(TemperatureLogitsWarper(0.6), needs_prefix=False),
        Processor(TopKLogitsWarper(5), needs_prefix=False),
        Processor(TopPLogitsWarper(0.8), needs_prefix=False),
    ]


def allowed(row: int, text: Tensor) -> list[int]:
    return [row, int(text[-1]), (int(text.sum()) + row) % V]


def assert_scores(
    processors: list[Processor], seed: int, width: int, skip: int = 0, used: Tensor | None = None
) -> None:
    """The window's scores equal those of each row on its own, one position after the other."""
    num_ids = skip + width - 1
    sequences, texts = batch_with_draft(seed, num_ids)
    logits = torch.randn(4, width, V, generator=torch.Generator().manual_seed(seed))
    raw = logits.clone()
    got = Sampling(processors).scores(logits, sequences, skip=skip, used=used)
    assert logits.equal(raw)  # the caller hands them out as well
    for row, text in enumerate(texts):
        for column in range(width if used is None else int(used[row])):
            prefix = torch.tensor(text[: len(text) - num_ids + skip + column])
            want = logits[row, column][None]
            for processor in processors:
                if isinstance(
                    processor.function, PrefixConstrainedLogitsProcessor
                ):  # row 0 of a batch of one is not this row
                    banned = [x for x in range(V) if x not in allowed(row, prefix)]
                    want = want.index_fill(1, torch.tensor(banned), -math.inf)
                else:
                    want = processor.function(prefix[None], want)
            torch.testing.assert_close(got[row, column], want[0])


@given(weights, st.floats(0, LAST))
@settings(deadline=None)
def test_draw_inverts_the_distribution_function(counts: list[int], u: float) -> None:
    total = sum(counts)
    probs = torch.tensor(counts, dtype=torch.float32) / 128  # no sum of 1 needed
    drawn = int(draw(probs, torch.tensor(u, dtype=torch.float64)))
    assert counts[drawn] > 0
    slack = 1e-12
    assert sum(counts[:drawn]) / total <= u + slack
    assert u - slack <= sum(counts[: drawn + 1]) / total


@given(st.lists(st.integers(0, 16), min_size=2, max_size=8))
@settings(deadline=None)
def test_a_cell_holds_its_lower_boundary_and_not_its_upper_one(counts: list[int]) -> None:
    counts.append(256 - sum(counts))  # a power of two: boundaries are exact
    probs = torch.tensor(counts, dtype=torch.float32) / 256
    boundaries = [sum(counts[:i]) / 256 for i in range(len(counts) + 1)]
    for i, (low, high) in enumerate(pairwise(boundaries)):
        if low < high:
            ends = torch.tensor([low, math.nextafter(high, 0)], dtype=torch.float64)
            assert draw(probs.expand(2, -1), ends).tolist() == [i, i]


@pytest.mark.parametrize("u", [0.0, LAST])
@pytest.mark.parametrize(
    "probs", [[0, 0, 1, 0, 0], [0, 0.5, 0, 0.5, 0], [0, 1e-38, 1, 1e-38, 0], [0, 1e-7, 1e-7, 0, 0], [1.0]]
)
def test_the_ends_of_the_unit_interval_draw_an_id_with_probability(probs: list[float], u: float) -> None:
    drawn = int(draw(torch.tensor(probs), torch.tensor(u, dtype=torch.float64)))
    assert probs[drawn] > 0


def test_rare_ids_of_a_large_vocabulary_keep_their_chance() -> None:
    probs = torch.full((200_000,), 1e-9)
    probs[0] = 1 - 200_000 * 1e-9
    middles = probs[0].double() + (torch.arange(5, dtype=torch.float64) + 0.5) * 1e-9  # all the same in float32
    assert draw(probs.expand(5, -1), middles / probs.double().sum()).tolist() == [1, 2, 3, 4, 5]


def test_uniforms_are_float64_below_one_and_follow_the_seed() -> None:
    torch.manual_seed(3)
    first = uniforms(4, 5, device=torch.device("cpu"))
    torch.manual_seed(3)
    assert first.dtype == torch.float64
    assert first.shape == (4, 5)
    assert ((first >= 0) & (first < 1)).all()
    assert first.equal(uniforms(4, 5, device=torch.device("cpu")))


@given(st.integers(0, 2**32), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_window_is_processed_like_each_position_of_each_row_alone(seed: int, width: int) -> None:
    assert_scores(processors_of_a_call(), seed, width)


@given(st.integers(0, 2**32), st.integers(0, 4))
@settings(max_examples=30, deadline=None)
def test_skipped_draft_ids_are_part_of_the_prefix(seed: int, skip: int) -> None:
    assert_scores(processors_of_a_call(), seed, width=1, skip=skip)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 4), min_size=4, max_size=4))
@settings(max_examples=30, deadline=None)
def test_columns_that_count_do_not_depend_on_those_that_do_not(seed: int, used: list[int]) -> None:
    assert_scores(processors_of_a_call(), seed, width=4, used=torch.tensor(used))


@pytest.mark.parametrize("end", ["rejected when greedy", "excluded when sampling", "a stop id", "none"])
def test_no_processor_is_called_beyond_an_id_that_plain_decoding_cannot_pass(end: str) -> None:
    """It may raise or count there. Three draft ids, of which the second ends the row or has no probability."""
    prompt, draft = torch.tensor([[1, 2]]), torch.tensor([[3, 4, 5]])
    stop_ids = torch.tensor([4]) if end == "a stop id" else None
    sequences = Sequences(prompt, torch.tensor([2]), max_length=9, num_draft_tokens=3, stop_ids=stop_ids)
    sequences.stage(draft)
    logits = torch.zeros(1, 4, V)
    logits[0, range(3), draft[0]] = 1.0  # the target chooses every draft id
    if end == "rejected when greedy":
        logits[0, 1, 6] = 2.0
    if end == "excluded when sampling":
        logits[0, 1, 4] = -torch.inf
    seen: list[list[int]] = []

    def record(input_ids: Tensor, scores: Tensor) -> Tensor:
        seen.append(input_ids[0].tolist())
        return scores

    sampling = Sampling([Processor(record)], do_sample=end == "excluded when sampling")
    sampling.scores(logits, sequences, draft_ids=draft)
    prefixes = [[1, 2], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert seen == (prefixes if end == "none" else prefixes[:2])


def test_the_order_of_the_call_stays_whatever_needs_a_prefix() -> None:
    first, *_, last = processors = processors_of_a_call()
    assert_scores([last, first, *processors[3:5], processors[1]], seed=5, width=3)


def test_a_processor_sees_each_row_under_its_own_number() -> None:
    constrained = PrefixConstrainedLogitsProcessor(allowed, num_beams=1)
    assert_scores([Processor(constrained), *processors_of_a_call()[3:]], seed=6, width=4)


def test_a_pointwise_processor_gives_the_same_when_called_with_prefixes() -> None:
    sequences, _ = batch_with_draft(7, 3)
    logits = torch.randn(4, 4, V)
    pointwise = processors_of_a_call()[3:]
    prefixed = [Processor(processor.function) for processor in pointwise]
    at_once = Sampling(pointwise).scores(logits, sequences)
    torch.testing.assert_close(Sampling(prefixed).scores(logits, sequences), at_once)


def test_without_processors_scores_are_the_logits() -> None:
    logits = torch.randn(4, 2, V)
    assert Sampling().scores(logits, batch_with_draft(8, 1)[0]).equal(logits)


def test_probs_are_softmax_when_sampling_and_one_hot_when_greedy() -> None:
    scores = torch.randn(3, 2, V, dtype=torch.float64)
    sampled, greedy = Sampling(do_sample=True).probs(scores), Sampling().probs(scores)
    torch.testing.assert_close(sampled, (scores.exp() / scores.exp().sum(-1, keepdim=True)).float())
    assert sampled.dtype == greedy.dtype == torch.float32
    assert greedy.argmax(-1).equal(scores.argmax(-1))
    assert (greedy.sort(-1).values == torch.tensor([0.0] * (V - 1) + [1.0])).all()


def test_equal_scores_are_won_by_the_first_as_in_stock_decoding() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 0.0]).view(1, 1, 4)
    verdict, _, _ = verify_draft(Draft.empty(1, scores.device), scores, Sampling())
    assert Sampling().probs(scores).tolist() == [[[0, 1, 0, 0]]]
    assert verdict.next_ids.tolist() == [1]


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_with_nan_logits_are_reported(do_sample: bool) -> None:
    scores = torch.randn(2, 3, V)
    scores[1, 2, 3] = math.nan
    draft = Draft(torch.zeros(2, 2, dtype=torch.int64), None, torch.tensor([2, 2]))
    verdict, _, is_nan = verify_draft(draft, scores, Sampling(do_sample=do_sample))
    assert is_nan.tolist() == [False, True]
    assert 0 <= verdict.next_ids.min() <= verdict.next_ids.max() < V


def test_excluding_every_token_is_reported_when_sampling() -> None:
    _, _, is_nan = verify_draft(
        Draft.empty(1, torch.device("cpu")), torch.full((1, 1, V), -math.inf), Sampling(do_sample=True)
    )
    assert is_nan.tolist() == [True]
