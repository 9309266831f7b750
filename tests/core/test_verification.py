"""The verifier is lossless: proved in exact arithmetic on small vocabularies, without drawing a single sample.

verify() and verify_block() are step functions of their uniforms. Cut [0, 1) where a step may lie, evaluate both ends of
every cell, weigh by width: that integrates the randomness out, and what is left must equal the target's distribution as
fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import accumulate, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from specdec_kernels import cpu
from torch import Tensor

from specdec.core.steps import Draft, Verdict
from specdec.core.verification import (
    one_hot,
    overlap,
    overlap_greedy,
    residual,
    verify,
    verify_block,
    verify_greedy,
)

D = 16  # probabilities are multiples of 1 / D, which float32 holds exactly
EDGE = 1e-6  # less than half of any cell, more than any rounding
V = 5
Text = tuple[int, ...]
Distribution = tuple[Fraction, ...]
Chain = dict[Text, Distribution]  # the distribution of the next id after each text


Verify = Callable[[Draft, Tensor, Tensor], Verdict]
VERIFIERS: dict[str, Verify] = {"token": verify, "block": lambda *args: verify_block(*args)[0]}


@pytest.fixture(params=["tensors", "operators"], autouse=True)
def _either_way(request: pytest.FixtureRequest) -> None:
    """Run the test with PyTorch's operators, and with the CPU kernels'."""
    if request.param == "operators":
        request.getfixturevalue("cpu_kernels")


def distributions(vocab_size: int) -> st.SearchStrategy[Distribution]:
    """With zeros, and often with all mass on few ids."""
    cuts = st.lists(st.integers(0, D), min_size=vocab_size - 1, max_size=vocab_size - 1).map(sorted)
    return cuts.map(lambda cuts: tuple(Fraction(b - a, D) for a, b in pairwise([0, *cuts, D])))


def texts(vocab_size: int, length: int) -> list[Text]:
    return list(product(range(vocab_size), repeat=length))


@st.composite
def chains(draw: st.DrawFn, vocab_size: int, num_ids: int) -> tuple[Chain, Chain]:
    """Target and draft chains; the draft may agree with the target to the last digit."""
    p: Chain = {text: draw(distributions(vocab_size)) for i in range(num_ids + 1) for text in texts(vocab_size, i)}
    q: Chain = {
        text: p[text] if draw(st.booleans()) else draw(distributions(vocab_size)) for text in p if len(text) < num_ids
    }
    return p, q


def normalized(weights: Distribution, otherwise: Distribution) -> Distribution:
    return tuple(weight / sum(weights) for weight in weights) if sum(weights) else otherwise


class Block:
    """Block verification of one draft, written down once more, to know where its steps lie.

    w: the chance that at least i draft ids are kept. h: the chance that i are, once later ids are not.
    """

    def __init__(self, p: Chain, q: Chain, ids: Text) -> None:
        self.w = [Fraction(1)]
        for i, x in enumerate(ids):
            self.w.append(min(self.w[-1] * p[ids[:i]][x] / q[ids[:i]][x], Fraction(1)))
        self.rests: list[Distribution] = []
        for i in range(len(ids)):
            pairs = zip(p[ids[:i]], q[ids[:i]], strict=True)
            self.rests.append(tuple(max(self.w[i] * a - b, Fraction(0)) for a, b in pairs))
        self.h = [
            sum(rest) / (sum(rest) + 1 - w) if sum(rest) + 1 - w else Fraction(1)
            for w, rest in zip(self.w[1:], self.rests[1:], strict=False)
        ]


def excess(p: Distribution, q: Distribution) -> Distribution:
    return tuple(max(a - b, Fraction(0)) for a, b in zip(p, q, strict=True))


def cells(steps: list[Fraction]) -> list[tuple[float, float, Fraction]]:
    """Both ends and the width of each cell that the steps cut [0, 1) into."""
    cuts = sorted({Fraction(0), Fraction(1), *(step for step in steps if 0 < step < 1)})
    return [(float(a) + (EDGE if a else 0), float(b) - EDGE, b - a) for a, b in pairwise(cuts)]


def emissions(
    p: Chain, q: Chain, ids: Text, dense: bool, length: int, verifier: str
) -> Iterator[tuple[Text, Fraction]]:
    """What a verifier emits for one draft, with the exact weight of each cell of its uniforms."""
    before = [ids[:i] for i in range(len(ids) + 1)]
    next_probs = [p[text] for text in before]
    if verifier == "block":
        block = Block(p, q, ids)
        grid = [cells([w, h]) for w, h in zip(block.w[1:], [*block.h, Fraction(0)], strict=True)]
        next_probs += [normalized(rest, p[text]) for text, rest in zip(before, block.rests, strict=False)]
    else:
        grid = [cells([p[text][x] / q[text][x]]) for text, x in zip(before, ids, strict=False)]
        next_probs += [normalized(excess(p[text], q[text]), p[text]) for text in before[:-1]]
    grid.append(cells([step for distribution in next_probs for step in accumulate(distribution)]))
    uniforms, weights = [], []
    for corner in product(*grid):
        weight = Fraction(1)
        for *_, width in corner:
            weight *= width
        for ends in product((0, 1), repeat=len(corner)):
            uniforms.append([cell[end] for cell, end in zip(corner, ends, strict=True)])
            weights.append(weight / 2 ** len(corner))

    batch = len(uniforms)
    probs = torch.tensor([[float(x) for x in q[text]] for text in before[:-1]]).view(len(ids), len(p[()]))
    target_probs = torch.tensor([[float(x) for x in p[text]] for text in before])
    draft = Draft(
        torch.tensor(ids, dtype=torch.int64).expand(batch, -1),
        probs.expand(batch, -1, -1) if dense else None,
        torch.full((batch,), length),
    )
    verdict = VERIFIERS[verifier](
        draft, target_probs.expand(batch, -1, -1), torch.tensor(uniforms, dtype=torch.float64)
    )
    for accepted, next_id, weight in zip(verdict.accepted.tolist(), verdict.next_ids.tolist(), weights, strict=True):
        yield (*ids[:accepted], next_id), weight


def assert_lossless(
    p: Chain,
    q: Chain,
    num_ids: int,
    dense: bool = True,
    length_of: Callable[[Text], int] | None = None,
    verifier: str = "token",
) -> Fraction:
    """Emitted texts, continued by the target itself up to num_ids + 1 ids, have the target's distribution, exactly.

    length_of: how many ids of a draft count; None: all. -> how many are accepted on average.
    """
    mean = Fraction(0)
    vocab_size = len(p[()])
    total: dict[Text, Fraction] = dict.fromkeys(texts(vocab_size, num_ids + 1), Fraction(0))
    for ids in texts(vocab_size, num_ids):
        drafted = probability(q, ids)
        if not drafted:
            continue
        length = num_ids if length_of is None else length_of(ids)
        for text, weight in emissions(p, q, ids, dense, length, verifier):
            mean += drafted * weight * (len(text) - 1)
            for rest in texts(vocab_size, num_ids + 1 - len(text)):
                total[text + rest] += drafted * weight * probability(p, text + rest) / (probability(p, text) or 1)
            assert probability(p, text), f"{text} was emitted, which the target never writes"
    assert total == {text: probability(p, text) for text in total}
    return mean


def probability(chain: Chain, text: Text) -> Fraction:
    product_of = Fraction(1)
    for i, x in enumerate(text):
        product_of *= chain[text[:i]][x]
    return product_of


@given(st.integers(2, 6).flatmap(lambda v: st.tuples(distributions(v), distributions(v))))
@settings(deadline=None)
def test_accepted_and_residual_mass_make_the_target(pair: tuple[Distribution, Distribution]) -> None:
    p, q = (torch.tensor([float(x) for x in distribution], dtype=torch.float64) for distribution in pair)
    both, rest = torch.minimum(p, q), residual(p, q)
    torch.testing.assert_close(both + (1 - both.sum()) * rest / rest.sum(), p, rtol=0, atol=1e-15)


@given(st.integers(2, 6).flatmap(lambda v: chains(v, 1)))
@settings(max_examples=60, deadline=None)
def test_one_draft_id_is_lossless(pair: tuple[Chain, Chain]) -> None:
    assert assert_lossless(*pair, num_ids=1, verifier="token") == assert_lossless(*pair, num_ids=1, verifier="block")


@pytest.mark.parametrize("verifier", VERIFIERS)
@given(chains(3, 2), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_two_draft_ids_are_lossless_whatever_part_of_them_counts(
    verifier: str, pair: tuple[Chain, Chain], length: int
) -> None:
    assert_lossless(*pair, num_ids=2, length_of=lambda ids: length, verifier=verifier)


@pytest.mark.parametrize("verifier", VERIFIERS)
@given(chains(3, 2), st.sets(st.integers(0, 2)))
@settings(max_examples=25, deadline=None)
def test_a_draft_that_ends_after_some_ids_is_lossless(verifier: str, pair: tuple[Chain, Chain], last: set[int]) -> None:
    """A drafter stops drafting after an id that it has drawn, as after a stop id or an unlikely one."""
    assert_lossless(*pair, num_ids=2, length_of=lambda ids: 1 if ids[0] in last else 2, verifier=verifier)


@given(chains(2, 3))
@settings(max_examples=25, deadline=None)
def test_a_block_of_three_is_lossless_and_keeps_no_fewer_ids_than_its_tokens(pair: tuple[Chain, Chain]) -> None:
    by_token = assert_lossless(*pair, num_ids=3, verifier="token")
    assert assert_lossless(*pair, num_ids=3, verifier="block") >= by_token


def test_a_block_keeps_more_ids_where_an_earlier_id_was_too_rare_in_the_draft() -> None:
    """The example of the paper: p = (1/3, 2/3), q = (2/3, 1/3); 10/9 against 11/9 of two draft ids."""
    p, q = ({text: law for i in range(3) for text in texts(2, i)} for law in (third(1), third(2)))
    assert assert_lossless(p, q, num_ids=2, verifier="token") == Fraction(10, 9)
    assert assert_lossless(p, q, num_ids=2, verifier="block") == Fraction(11, 9)


def third(count: int) -> Distribution:
    return Fraction(count, 3), Fraction(3 - count, 3)


@given(chains(3, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)))
@settings(max_examples=25, deadline=None)
def test_a_one_hot_draft_is_lossless(pair: tuple[Chain, Chain], ids: Text) -> None:
    p, q = pair
    q = {text: tuple(Fraction(x == ids[len(text)]) for x in range(3)) for text in q}
    assert_lossless(p, q, num_ids=2, dense=False)


@given(st.integers(2, 6).flatmap(lambda v: chains(v, 0)))
@settings(deadline=None)
def test_no_draft_draws_from_the_target(pair: tuple[Chain, Chain]) -> None:
    assert_lossless(*pair, num_ids=0)


def sparse(generator: torch.Generator, *shape: int) -> Tensor:
    """Distributions with many zeros."""
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.6)
    weights[..., 0] += weights.sum(-1) == 0
    return weights / weights.sum(-1, keepdim=True)


def random_case(seed: int, batch: int = 8, num_ids: int = 3) -> tuple[Draft, Tensor, Tensor]:
    """A draft with probs, target probs and uniforms, all unrelated."""
    generator = torch.Generator().manual_seed(seed)
    p, q = (sparse(generator, batch, num_ids + 1, V) for _ in range(2))
    q = q[:, :num_ids]
    ids = q.flatten(0, 1).multinomial(1, generator=generator).view(batch, num_ids)
    lengths = torch.randint(num_ids + 1, (batch,), generator=generator)
    return Draft(ids, q, lengths), p, torch.rand(batch, num_ids + 1, generator=generator, dtype=torch.float64)


@given(st.integers(0, 2**32))
@settings(deadline=None)
def test_an_id_the_target_gives_no_probability_is_never_emitted(seed: int) -> None:
    draft, p, uniforms = random_case(seed)
    held = Draft(draft.ids, None, draft.lengths)
    for u in (uniforms, torch.zeros_like(uniforms), torch.full_like(uniforms, 1 - 2**-53)):
        for verdict in (verify(draft, p, u), verify(held, p, u), verify_block(draft, p, u)[0]):
            for row, (count, next_id) in enumerate(
                zip(verdict.accepted.tolist(), verdict.next_ids.tolist(), strict=True)
            ):
                emitted = [*draft.ids[row, :count].tolist(), next_id]
                assert all(p[row, i, x] > 0 for i, x in enumerate(emitted))


@given(st.integers(0, 2**32))
@settings(deadline=None)
def test_a_one_hot_draft_held_as_ids_equals_its_dense_form(seed: int) -> None:
    draft, p, uniforms = random_case(seed)
    dense, held = (Draft(draft.ids, probs, draft.lengths) for probs in (one_hot(draft.ids, V), None))
    assert_same(verify(dense, p, uniforms), verify(held, p, uniforms))
    torch.testing.assert_close(overlap(dense, p), overlap(held, p))


@given(st.integers(0, 2**32), st.booleans())
@settings(deadline=None)
def test_a_greedy_target_held_as_ids_equals_its_dense_form(seed: int, dense: bool) -> None:
    draft, p, uniforms = random_case(seed)
    draft = draft if dense else Draft(draft.ids, None, draft.lengths)
    target_ids = p.argmax(-1)
    assert_same(verify(draft, one_hot(target_ids, V), uniforms), verify_greedy(draft, target_ids))
    torch.testing.assert_close(overlap(draft, one_hot(target_ids, V)), overlap_greedy(draft, target_ids))


def assert_same(one: Verdict, other: Verdict) -> None:
    assert one.accepted.tolist() == other.accepted.tolist()
    assert one.next_ids.tolist() == other.next_ids.tolist()


@given(st.integers(0, 2**32))
@settings(deadline=None)
def test_overlap_is_one_minus_the_total_variation_distance(seed: int) -> None:
    draft, p, _ = random_case(seed)
    torch.testing.assert_close(overlap(draft, p), 1 - (p[:, :3] - draft.probs).abs().sum(-1) / 2)


@given(chains(3, 2), st.tuples(st.integers(0, 2), st.integers(0, 2)))
@settings(max_examples=25, deadline=None)
def test_the_chances_of_a_block_are_those_of_its_ids_after_each_other(pair: tuple[Chain, Chain], ids: Text) -> None:
    p, q = pair
    if not probability(q, ids):
        return
    block = Block(p, q, ids)
    draft = Draft(
        torch.tensor([ids]), torch.tensor([[[float(x) for x in q[ids[:i]]] for i in range(2)]]), torch.tensor([2])
    )
    target_probs = torch.tensor([[[float(x) for x in p[ids[:i]]] for i in range(3)]])
    chances = verify_block(draft, target_probs, torch.zeros(1, 3, dtype=torch.float64))[1]
    expected = [float(1 - sum(rest) / w) if w else 0.0 for rest, w in zip(block.rests, block.w, strict=False)]
    torch.testing.assert_close(chances, torch.tensor([expected]))
    torch.testing.assert_close(chances[:, 0], overlap(draft, target_probs)[:, 0])


def test_the_operator_of_a_block_is_its_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(50):
        draft, p, uniforms = random_case(seed)
        verdict, chances = verify_block(draft, p, uniforms)
        with monkeypatch.context() as patch:
            patch.setattr(cpu, "works_on", lambda device: False)
            defined, expected = verify_block(draft, p, uniforms)
        assert_same(verdict, defined)
        is_drafted = torch.arange(3) < draft.lengths[:, None]
        torch.testing.assert_close(chances[is_drafted], expected[is_drafted])


@pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)
@given(st.integers(0, 2**32))
@settings(deadline=None)
def test_nothing_beyond_a_rows_length_counts(verify: Verify, seed: int) -> None:
    draft, p, uniforms = random_case(seed)
    verdict = verify(draft, p, uniforms)
    for row, length in enumerate(draft.lengths.tolist()):
        alone = Draft(draft.ids[[row], :length], draft.probs[[row], :length], draft.lengths[[row]])
        u = uniforms[row, [*range(length), 3]][None]
        assert_same(verify(alone, p[[row], : length + 1], u), Verdict(verdict.accepted[[row]], verdict.next_ids[[row]]))


@pytest.mark.parametrize("verify", VERIFIERS.values(), ids=VERIFIERS)
@given(st.integers(0, 2**32))
@settings(deadline=None)
def test_every_draft_id_is_accepted_where_draft_and_target_agree(verify: Verify, seed: int) -> None:
    draft, p, uniforms = random_case(seed)
    for u in (uniforms, torch.full_like(uniforms, 1 - 2**-53)):
        ids = p[:, :3].argmax(-1)
        assert verify(Draft(ids, p[:, :3], draft.lengths), p, u).accepted.tolist() == draft.lengths.tolist()


def test_residual_is_the_target_where_no_mass_is_left() -> None:
    p = torch.tensor([0.2, 0.3, 0.5])
    torch.testing.assert_close(residual(p, p), p)
    torch.testing.assert_close(residual(p, p + 1e-6), p)  # float32 sums of q may lie above p everywhere


@pytest.mark.parametrize(
    ("verify", "dense"), [(verify, True), (verify, False), (VERIFIERS["block"], True)], ids=["dense", "held", "block"]
)
def test_rows_do_not_see_each_other(verify: Verify, dense: bool) -> None:
    draft, p, uniforms = random_case(0)
    draft = draft if dense else Draft(draft.ids, None, draft.lengths)
    order = torch.tensor([3, 1, 7, 0, 6, 2, 5, 4])
    shuffled = Draft(draft.ids[order], draft.probs[order] if draft.probs is not None else None, draft.lengths[order])
    verdict = verify(draft, p, uniforms)
    moved = verify(shuffled, p[order], uniforms[order])
    assert_same(moved, Verdict(verdict.accepted[order], verdict.next_ids[order]))
