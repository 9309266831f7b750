"""A step's operators on a CPU do exactly what the functions that define them do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from specdec_kernels import cpu
from torch import Tensor

from specdec.core.commit import commit_verdict
from specdec.core.sampling import Sampling, draw, greedy_ids
from specdec.core.sequences import Sequences
from specdec.core.speculative import verify_and_commit
from specdec.core.steps import BROKEN_DRAFT, NAN_DRAFT, NAN_TARGET, Draft
from specdec.core.verification import verify_draft

pytestmark = pytest.mark.usefixtures("cpu_kernels")
OPS = torch.ops.specdec
V, K = 5, 3


@contextmanager
def without_kernels() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_IS_LOADED", False)
        yield


def integers(generator: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)


def chance(generator: torch.Generator, probability: float, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator) < probability


def random_sequences(seed: int) -> Sequences:
    """Rows of different lengths, some with a stop id, a context or a buffer wider than needed."""
    generator = torch.Generator().manual_seed(seed)
    batch, width = 1 + seed % 4, 6
    return Sequences(
        integers(generator, 0, V, batch, width),
        integers(generator, 1, width + 1, batch),
        max_length=width + 1 + seed % 11,
        context=9 if seed % 3 == 0 else None,
        num_draft_tokens=K,
        stop_ids=torch.tensor([V - 1, 1]) if seed % 2 else None,
    )


def random_draft(generator: torch.Generator, limit: Tensor, is_sampled: bool) -> Draft:
    """Now and then with ids, lengths or probs that break the protocol, or with columns that are no ids in memory."""
    num_ids = int(integers(generator, 0, K + 1))
    ids = integers(generator, 0, V, num_ids, len(limit)).t() * chance(generator, 0.5, len(limit), num_ids)
    lengths = torch.minimum(limit, integers(generator, 0, num_ids + 1, len(limit)))
    ids = torch.where(chance(generator, 0.02, *ids.shape), integers(generator, -V, 2 * V, *ids.shape), ids)
    is_broken = chance(generator, 0.05, len(limit))
    lengths = torch.where(is_broken, integers(generator, -2, K + 3, len(limit)), lengths)
    if not is_sampled:
        return Draft(ids, None, lengths)
    probs = torch.rand(len(limit), num_ids, V, generator=generator).softmax(-1)
    probs[chance(generator, 0.05, len(limit), num_ids)] = torch.nan
    return Draft(ids, probs, lengths)


def random_scores(generator: torch.Generator, *shape: int) -> Tensor:
    """Scores with many ties, infinities and now and then NaN."""
    scores = integers(generator, 0, 3, *shape).float()
    scores[chance(generator, 0.2, *shape)] = -torch.inf
    scores[chance(generator, 0.005, *shape)] = torch.nan
    return scores


def run_steps(seed: int, is_sampled: bool) -> list[Tensor]:
    """Every tensor that four steps compute, and what they leave in `sequences`."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    sequences, sampling = random_sequences(seed), Sampling(do_sample=is_sampled)
    seen: list[Tensor] = []
    for _ in range(4):
        limit = sequences.begin_step(K)
        draft = random_draft(generator, limit, is_sampled)
        ids, lengths, is_broken, *window = sequences.stage_window(draft.ids, draft.lengths, limit, V)
        draft = Draft(ids, draft.probs, lengths)
        scores = random_scores(generator, *window[0].shape, V)
        staged = sequences.ids.clone()
        verdict, overlap, is_nan = verify_draft(draft, scores, sampling)
        committed = verify_and_commit(sequences, sampling, limit, draft.probs, ids, lengths, is_broken, scores)
        state = [x.clone() for x in (sequences.ids, sequences.lengths, sequences.finished)]
        seen += [limit, draft.ids, draft.lengths, is_broken, *window, staged]
        seen += [verdict.accepted, verdict.next_ids, overlap, is_nan, *committed, *state]
    return seen


@pytest.mark.parametrize("is_sampled", [False, True])
def test_steps_are_those_of_the_functions_in_core(is_sampled: bool) -> None:
    summaries = []
    for seed in range(300):
        got = run_steps(seed, is_sampled)
        with without_kernels():
            want = run_steps(seed, is_sampled)
        assert len(got) == len(want)
        for index, (one, other) in enumerate(zip(got, want, strict=True)):
            assert one.dtype == other.dtype, f"tensor {index} of seed {seed}"
            assert one.shape == other.shape, f"tensor {index} of seed {seed}"
            tolerance = 1e-6 if is_sampled and one.dtype == torch.float32 else 0  # sums of probabilities, in any order
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        summaries += [row for x in want if x.dtype == torch.float32 and x.shape[1] >= 6 for row in x.tolist()]
    columns = zip(*(row[:6] for row in summaries), strict=True)
    requested, drafted, accepted, emitted, ends, faults = map(set, columns)
    assert requested == drafted == accepted == {0, 1, 2, 3}
    assert emitted == {0, 1, 2, 3, 4}
    assert ends == {0, 1}
    assert {BROKEN_DRAFT, NAN_TARGET, *([NAN_DRAFT] if is_sampled else [])} <= faults


def test_a_stop_id_among_accepted_ids_ends_the_row() -> None:
    """Rare in random steps, so once by hand: of three accepted ids the second one is a stop id."""
    sequences = Sequences(
        torch.tensor([[1, 2]]), torch.tensor([2]), max_length=20, num_draft_tokens=K, stop_ids=torch.tensor([4])
    )
    limit = sequences.begin_step(K)
    ids, lengths, is_broken, *_ = sequences.stage_window(torch.tensor([[3, 4, 1]]), limit, limit, V)
    draft = Draft(ids, None, lengths)
    scores = torch.nn.functional.one_hot(torch.tensor([[3, 4, 1, 2]]), V).float()
    verdict, overlap, is_nan = verify_draft(draft, scores, Sampling())
    summary = commit_verdict(sequences, draft, verdict, overlap, limit, is_broken, is_nan)
    assert summary.tolist() == [[3, 2, 2, 2, 1, 0, 1, 1, 1]]
    assert sequences.ids[0, : int(sequences.lengths)].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("vocab_size", [1, 15, 16, 17, 1023, 1024, 1025, 2047, 5000])
@pytest.mark.parametrize("values", ["distinct", "ties", "negative", "infinite", "zeros", "nan"])
def test_greedy_ids_are_the_first_largest(values: str, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    scores = torch.randn(4, 3, vocab_size, generator=generator)
    if values == "ties":
        scores = scores.round()
    elif values == "negative":
        scores -= 100
    elif values == "infinite":
        scores = torch.where(scores > 0, -torch.inf, scores.sign() * torch.inf)
        scores[0] = torch.inf
    elif values == "zeros":
        scores = torch.where(scores > 0, 0.0, -0.0)
    elif values == "nan":
        scores[chance(generator, 0.3, 4, 3), integers(generator, 0, vocab_size, 1)] = torch.nan
    assert greedy_ids(scores).equal(scores.max(-1).indices)
    turned = scores.transpose(0, 1)
    assert greedy_ids(turned).equal(turned.max(-1).indices)


@pytest.mark.parametrize("vocab_size", [1, 2, 5, 1000])
def test_draw_inverts_the_distribution_function_to_the_last_bit(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    weights = torch.rand(200, 2, vocab_size, generator=generator)
    weights *= chance(generator, 0.5, *weights.shape)  # rows of zeros too
    weights[::7, 0, vocab_size // 2] = torch.nan
    weights[1::7] /= weights[1::7].sum(-1, keepdim=True)
    edges = torch.tensor([0.0, 2**-53, 0.5, 1 - 2**-53], dtype=torch.float64)
    uniforms = torch.rand(200, 2, generator=generator, dtype=torch.float64)
    uniforms[::2] = edges[integers(generator, 0, 4, 100, 2)]
    got = draw(weights, uniforms)
    turned = draw(weights.transpose(0, 1), uniforms.t())
    with without_kernels():
        assert got.equal(draw(weights, uniforms))
    assert turned.equal(got.t())
    with pytest.raises(RuntimeError, match="for 2 uniforms"):
        OPS.draw(weights, uniforms[0])


def test_nothing_is_written_beyond_a_row() -> None:
    ids, lengths, limit = torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 1]), torch.tensor([1, 1])
    draft_ids, flags = torch.ones(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="row 0 has 4 of 4 ids"):
        OPS.stage_window(ids, lengths, draft_ids, limit, limit, V)
    overlap = torch.zeros(2, 1)
    for accepted, lengths in ((1, torch.tensor([3, 1])), (2, torch.tensor([1, 1])), (-1, torch.tensor([1, 1]))):
        with pytest.raises(RuntimeError, match=f"{accepted} of 1 draft ids are accepted"):
            OPS.commit(
                ids, lengths, lengths + 9, flags, None, limit, draft_ids, None, limit,
                torch.tensor([accepted, 0]), limit, overlap, flags, flags,
            )  # fmt: skip
    with pytest.raises(RuntimeError, match="row 0 has 5 of 4 ids"):
        OPS.prompt_lookup(ids, torch.tensor([5, 1]), limit, 3, 1)
    with pytest.raises(RuntimeError, match="for 2 drafts of 1 ids"):
        OPS.verify_greedy(torch.zeros(2, 3, V), draft_ids, limit)
    probs = torch.full((2, 2, V), 1 / V)
    for broken in (-1, V):
        with pytest.raises(RuntimeError, match=f"draft id {broken} of a vocabulary of {V}"):
            OPS.verify(probs, draft_ids * broken, None, limit, torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="for 2 drafts of 1 ids"):
        OPS.verify(probs[:, :1], draft_ids, None, limit, torch.zeros(2, 2, dtype=torch.float64))
    assert not ids.any()
