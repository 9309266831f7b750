"""The rejection kernel against its definition, specdec.core.verification on the CPU: the same verdicts, id for id.

Inputs are random, outputs are poisoned before each launch, and the counters must be zeros after each launch.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from specdec_kernels import rejection
from specdec_kernels.configuration import interpreting
from specdec_kernels.rejection import kernel

from specdec.core import verification
from specdec.core.steps import Draft, Verdict

LAST = 1 - 2**-53  # the largest uniform
SIZES = [1, 5, 33, 4096, 5000, 9001]
Verify = Callable[[Draft, Tensor, Tensor], Verdict]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == "cpu" and not interpreting():
        pytest.skip("the interpreter is off where there is a CUDA device")
    return torch.device(request.param)


@pytest.fixture
def fused(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Verify:
    counters = torch.zeros(4096, dtype=torch.int32, device=device)
    monkeypatch.setattr(kernel, "counters", lambda count, device: counters)
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else -12345)

    def run(draft: Draft, target_probs: Tensor, uniforms: Tensor) -> Verdict:
        tensors = (target_probs, draft.ids, draft.probs, draft.lengths, uniforms)
        tensors = [x if x is None else x.to(device) for x in tensors]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", poisoned)
            verdict = rejection.verify(*tensors)
        assert not counters.any()
        assert all(x.dtype == torch.int64 and x.shape == draft.lengths.shape for x in verdict)
        return Verdict(*(x.cpu() for x in verdict))

    return run


def dense(*shape: int) -> Tensor:
    return (3 * torch.randn(shape)).softmax(-1)


def sparse(*shape: int) -> Tensor:
    """Like the result of top-k: almost all probabilities are exactly 0."""
    weights = torch.rand(shape) * (torch.rand(shape) < 20 / shape[-1])
    weights.scatter_(-1, torch.randint(shape[-1], (*shape[:-1], 1)), 1.0)
    return weights / weights.sum(-1, keepdim=True)


def unrelated(rows: int, num_ids: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    return dense(rows, num_ids + 1, vocab_size), dense(rows, num_ids, vocab_size)


def cut(rows: int, num_ids: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    return sparse(rows, num_ids + 1, vocab_size), sparse(rows, num_ids, vocab_size)


def close(rows: int, num_ids: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The residual after a rejection is as small as float32's rounding errors."""
    p = dense(rows, num_ids + 1, vocab_size)
    return p, p[:, :num_ids] * (1 + 1e-6 * torch.randn(rows, num_ids, vocab_size))


def above(rows: int, num_ids: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """No residual: q >= p everywhere, which rounding can cause."""
    p = sparse(rows, num_ids + 1, vocab_size)
    return p, p[:, :num_ids] + 1e-6


def tiny(rows: int, num_ids: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Down to subnormal numbers, with a sum far from 1."""
    p, q = (10.0 ** -(30 + 14 * torch.rand(rows, n, vocab_size)) for n in (num_ids + 1, num_ids))
    return p, q


KINDS = [unrelated, cut, close, above, tiny]


def case(num_ids: int, vocab_size: int, rows: int = 3) -> tuple[Draft, Tensor, Tensor]:
    """Rows of each kind; in a third of them the draft ids are the target's likeliest, so that some are all accepted."""
    pairs = [kind(rows, num_ids, vocab_size) for kind in KINDS]
    p, q = (torch.cat(probs) for probs in zip(*pairs, strict=True))
    batch = len(p)
    ids = torch.randint(vocab_size, (batch, num_ids))
    drawn = q.flatten(0, 1).multinomial(1).view(batch, num_ids) if num_ids else ids
    which = torch.arange(batch)[:, None] % 3
    ids = torch.where(which == 0, p[:, :num_ids].argmax(-1), torch.where(which == 1, drawn, ids))
    lengths = torch.randint(num_ids + 1, (batch,)).where(torch.rand(batch) < 0.5, num_ids)
    return Draft(ids, q, lengths), p, torch.rand(batch, num_ids + 1, dtype=torch.float64)


def with_uniform(uniforms: Tensor, last: float) -> Tensor:
    return torch.cat([uniforms[:, :-1], torch.full_like(uniforms[:, -1:], last)], 1)


def assert_same(one: Verdict, other: Verdict) -> None:
    assert one.accepted.tolist() == other.accepted.tolist()
    assert one.next_ids.tolist() == other.next_ids.tolist()


def next_weights(draft: Draft, p: Tensor, accepted: Tensor) -> Tensor:
    """The weights that the next ids are drawn from: [B, V] float64."""
    rows = torch.arange(len(accepted))
    weights = p[rows, accepted]
    for row, at in enumerate(accepted.tolist()):
        if at < draft.lengths[row]:
            q = verification.one_hot(draft.ids[row, at], p.shape[-1]) if draft.probs is None else draft.probs[row, at]
            weights[row] = verification.residual(weights[row], q)
    return weights.double()


@pytest.mark.parametrize("one_hot", [False, True], ids=["probs", "one-hot"])
@pytest.mark.parametrize("num_ids", [0, 1, 3, 5])
@pytest.mark.parametrize("vocab_size", SIZES)
def test_the_same_verdicts(fused: Verify, vocab_size: int, num_ids: int, one_hot: bool) -> None:
    torch.manual_seed(1000 * vocab_size + 10 * num_ids + one_hot)
    draft, p, uniforms = case(num_ids, vocab_size, rows=3 if vocab_size < 4096 else 2)
    draft = Draft(draft.ids, None, draft.lengths) if one_hot else draft
    assert_same(fused(draft, p, uniforms), verification.verify(draft, p, uniforms))


@pytest.mark.parametrize("last", [0.0, LAST])
@pytest.mark.parametrize("vocab_size", [5, 5000])
def test_the_smallest_and_largest_uniforms(fused: Verify, vocab_size: int, last: float) -> None:
    """They draw the first or last id with a weight; an earlier id where rounding hides the last weight in the sum."""
    torch.manual_seed(vocab_size)
    draft, p, uniforms = case(2, vocab_size)
    verdict = fused(draft, p, with_uniform(uniforms, last))
    assert verdict.accepted.tolist() == verification.verify(draft, p, uniforms).accepted.tolist()
    weights = next_weights(draft, p, verdict.accepted)
    for row, x in zip(weights, verdict.next_ids.tolist(), strict=True):
        assert row[x] > 0
        missed = row[:x] if last == 0 else row[x + 1 :]
        assert missed.sum() <= last * 1e-12 * row.sum()


def test_all_or_none_are_accepted_at_the_smallest_and_largest_uniforms(fused: Verify) -> None:
    p = torch.tensor([0.5, 0.0, 0.5]).expand(2, 3, 3).contiguous()
    draft = Draft(torch.tensor([[0, 2], [2, 1]]), p[:, :2].clone(), torch.tensor([2, 2]))
    for u in (0.0, LAST):
        verdict = fused(draft, p, torch.full((2, 3), u, dtype=torch.float64))
        assert verdict.accepted.tolist() == [2, 1]  # p == q: all accepted; p == 0: none, not even at u = 0
        assert verdict.next_ids.tolist() == ([0, 0] if u == 0 else [2, 2])


@pytest.mark.parametrize("one_hot", [False, True], ids=["probs", "one-hot"])
def test_recovered_ids_have_the_residual_distribution_exactly(fused: Verify, one_hot: bool) -> None:
    """Multiples of 1/64 sum without rounding: over an even grid of uniforms each id is drawn by its exact weight."""
    vocab_size, edge = 2 * kernel.CHUNK + 4, kernel.CHUNK
    places = torch.tensor([0, 1, 700, edge - 1, edge, edge + 1, 2 * edge - 1, 2 * edge, 2 * edge + 3])
    p = torch.zeros(vocab_size)
    p[places] = torch.tensor([4, 1, 9, 5, 11, 2, 16, 3, 13]) / 64
    q = torch.zeros(vocab_size)
    q[places] = torch.tensor([1, 4, 10, 1, 12, 1, 2, 3, 3]) / 64
    q[10] = 27 / 64  # the draft id, whose target probability is 0
    excess = (64 * (p if one_hot else (p - q).clamp(min=0))).long()
    grid = 2 * int(excess.sum())
    uniforms = torch.stack([torch.full((grid,), 0.5), torch.arange(grid) / grid], 1).double()
    draft = Draft(
        torch.full((grid, 1), 10),
        None if one_hot else q.expand(grid, 1, -1).contiguous(),
        torch.ones(grid, dtype=torch.int64),
    )
    verdict = fused(draft, p.expand(grid, 2, -1).contiguous(), uniforms)
    assert not verdict.accepted.any()
    assert verdict.next_ids.bincount(minlength=vocab_size).tolist() == (2 * excess).tolist()


def test_bonus_ids_have_the_targets_distribution_exactly(fused: Verify) -> None:
    p = torch.tensor([3, 0, 7, 1, 5]) / 16
    uniforms = torch.stack([torch.zeros(32), torch.arange(32) / 32], 1).double()
    draft = Draft(torch.full((32, 1), 2), None, torch.arange(32) % 2)  # one accepted draft id, or an empty draft
    verdict = fused(draft, p.expand(32, 2, -1).contiguous(), uniforms)
    assert verdict.accepted.tolist() == draft.lengths.tolist()
    assert verdict.next_ids.bincount(minlength=5).tolist() == [6, 0, 14, 2, 10]


@pytest.mark.parametrize("one_hot", [False, True], ids=["probs", "one-hot"])
def test_a_row_does_not_depend_on_its_batch(fused: Verify, one_hot: bool) -> None:
    torch.manual_seed(7)
    draft, p, uniforms = case(3, 5000, rows=1)
    probs = None if one_hot else draft.probs
    together = fused(Draft(draft.ids, probs, draft.lengths), p, uniforms)
    for row in range(len(p)):
        at = [row]
        alone = fused(
            Draft(draft.ids[at], None if probs is None else probs[at], draft.lengths[at]), p[at], uniforms[at]
        )
        assert_same(alone, Verdict(together.accepted[at], together.next_ids[at]))


@triton.jit
def _pick_kernel(weights_ptr, out_ptr, before, t, SIZE: tl.constexpr):
    weights = tl.load(weights_ptr + tl.arange(0, SIZE))
    tl.store(out_ptr, kernel._pick(weights, before, t, SIZE))


@pytest.mark.parametrize(
    ("weights", "before", "t", "picked"),
    [
        ([0, 2, 0, 1, 0, 0, 3, 0], 0.0, 2.0, 3),
        ([0, 2, 0, 1, 0, 0, 3, 0], 1.0, 0.5, 1),  # `before` exceeds t already
        ([0, 2, 0, 1, 0, 0, 3, 0], 0.0, 6.5, 6),  # the sum does not reach t
        ([0, 2, 0, 1, 0, 0, 3, 0], 0.0, float("nan"), 6),
        ([0, 0, 0, 0, 0, 0, 0, 0], 0.0, 0.0, 0),
    ],
)
def test_rounding_between_chunks_picks_no_weight_of_0(
    device: torch.device, weights: list[int], before: float, t: float, picked: int
) -> None:
    out = torch.full((1,), -1, device=device)
    _pick_kernel[(1,)](torch.tensor(weights, dtype=torch.float64, device=device), out, before, t, SIZE=8)
    assert out.item() == picked


def test_long_drafts(fused: Verify) -> None:
    """More draft ids than one block of them: all accepted, and rejected at either side of a block's end."""
    torch.manual_seed(8)
    num_ids = 2 * kernel.ID_BLOCK + 1
    stops = torch.tensor([0, kernel.ID_BLOCK - 1, kernel.ID_BLOCK, kernel.ID_BLOCK + 1, num_ids - 1, num_ids])
    p = dense(len(stops), num_ids + 1, 33)
    draft = Draft(p[:, :num_ids].argmax(-1), None, torch.full_like(stops, num_ids))
    uniforms = torch.rand(len(stops), num_ids + 1, dtype=torch.float64)
    uniforms[:, :num_ids] = torch.where(torch.arange(num_ids) == stops[:, None], LAST, 0.0)
    verdict = fused(draft, p, uniforms)
    assert verdict.accepted.tolist() == stops.tolist()
    assert_same(verdict, verification.verify(draft, p, uniforms))


def test_nan_neither_hangs_nor_spreads(fused: Verify) -> None:
    torch.manual_seed(9)
    draft, p, uniforms = case(3, 5000, rows=1)
    expected = verification.verify(draft, p, uniforms)
    p[1], p[2, :, 100:] = float("nan"), float("nan")
    draft.probs[3] = float("nan")
    p[4], draft.lengths[4] = 0.0, 0
    verdict = fused(draft, p, uniforms)
    assert verdict.accepted[[1, 3]].tolist() == [0, 0]
    assert verdict.next_ids[2] < 100
    assert ((verdict.next_ids >= 0) & (verdict.next_ids < 5000)).all()
    assert_same(
        Verdict(verdict.accepted[:1], verdict.next_ids[:1]), Verdict(expected.accepted[:1], expected.next_ids[:1])
    )


@pytest.mark.parametrize("one_hot", [False, True], ids=["probs", "one-hot"])
@pytest.mark.parametrize("wrong", [-1, 33, 2**40])
def test_an_id_outside_the_vocabulary_is_rejected(fused: Verify, wrong: int, one_hot: bool) -> None:
    torch.manual_seed(10)
    p, q = dense(1, 3, 33), dense(1, 2, 33)
    draft = Draft(torch.tensor([[5, wrong]]), None if one_hot else q, torch.tensor([2]))
    verdict = fused(draft, p, torch.tensor([[0.0, 0.0, 0.5]], dtype=torch.float64))
    assert verdict.accepted.tolist() == [1]
    assert 0 <= verdict.next_ids.item() < 33


@pytest.mark.parametrize(("length", "counts_as"), [(2**40, 3), (-(2**40), 0)])
def test_lengths_are_clamped(fused: Verify, length: int, counts_as: int) -> None:
    torch.manual_seed(11)
    draft, p, uniforms = case(3, 33)
    one, other = (Draft(draft.ids, draft.probs, torch.full_like(draft.lengths, n)) for n in (length, counts_as))
    assert_same(fused(one, p, uniforms), verification.verify(other, p, uniforms))


@pytest.mark.parametrize("num_ids", [0, 2])
def test_no_rows(fused: Verify, num_ids: int) -> None:
    draft = Draft(torch.zeros(0, num_ids, dtype=torch.int64), None, torch.zeros(0, dtype=torch.int64))
    verdict = fused(draft, torch.zeros(0, num_ids + 1, 5), torch.zeros(0, num_ids + 1, dtype=torch.float64))
    assert verdict.next_ids.shape == (0,)


def test_the_configurations_describe_a_launch() -> None:
    """Names and order of the arguments are the kernel's; its constants give the largest vocabulary."""
    for configuration in kernel.CONFIGURATIONS:
        assert [*configuration.signature, *configuration.constants] == configuration.kernel.arg_names
        assert set(configuration.divisible) <= set(configuration.signature)
    assert len({configuration.name for configuration in kernel.CONFIGURATIONS}) == 4
    assert kernel.CHUNK * kernel.MAX_CHUNKS == rejection.MAX_VOCAB_SIZE


@pytest.mark.gpu
def test_offsets_beyond_32_bits() -> None:
    if not torch.cuda.is_available() or torch.cuda.mem_get_info()[0] < 12e9:
        pytest.skip("no CUDA device with 12 GB to spare")
    torch.manual_seed(12)
    batch, vocab_size = 2**31 // (2 * 151936) + 2, 151936
    p = torch.zeros(batch, 2, vocab_size, device="cuda")
    p[-1] = dense(2, vocab_size).cuda()
    draft = Draft(torch.full((batch, 1), 77), None, torch.ones(batch, dtype=torch.int64))
    uniforms = torch.rand(batch, 2, dtype=torch.float64)
    _, next_ids = rejection.verify(p, draft.ids.cuda(), None, draft.lengths.cuda(), uniforms.cuda())
    expected = verification.verify(Draft(draft.ids[-1:], None, draft.lengths[-1:]), p[-1:].cpu(), uniforms[-1:])
    assert next_ids[-1].item() == expected.next_ids.item()


GOOD = {
    "target_probs": torch.full((2, 3, 5), 0.2),
    "draft_ids": torch.zeros(2, 2, dtype=torch.int64),
    "draft_probs": torch.full((2, 2, 5), 0.2),
    "lengths": torch.full((2,), 2),
    "uniforms": torch.full((2, 3), 0.5, dtype=torch.float64),
}
BAD = [
    (
        "target_probs",
        torch.full((3, 5), 0.2),
        r"target_probs is \[3, 5\] and draft_ids \[2, 2\]; pass \[B, K\+1, V\] and \[B, K\]",
    ),
    (
        "target_probs",
        GOOD["target_probs"].double(),
        r"target_probs is torch.float64 \[2, 3, 5\]; pass torch.float32 \[2, 3, 5\]",
    ),
    (
        "target_probs",
        torch.full((2, 4, 5), 0.2),
        r"target_probs is torch.float32 \[2, 4, 5\]; pass torch.float32 \[2, 3, 5\]",
    ),
    (
        "target_probs",
        torch.full((2, 5, 3), 0.2).transpose(1, 2),
        r"target_probs has strides .*; pass target_probs.contiguous\(\)",
    ),
    ("draft_ids", torch.zeros(2, dtype=torch.int64), r"draft_ids \[2\]; pass"),
    (
        "draft_ids",
        torch.zeros(2, 2, dtype=torch.int32),
        r"draft_ids is torch.int32 \[2, 2\]; pass torch.int64 \[2, 2\]",
    ),
    (
        "draft_ids",
        torch.zeros(2, 4, dtype=torch.int64)[:, ::2],
        r"draft_ids has strides \(4, 2\); pass draft_ids.contiguous\(\)",
    ),
    ("draft_probs", GOOD["draft_probs"].half(), r"draft_probs is torch.float16 .*; pass torch.float32 \[2, 2, 5\]"),
    (
        "draft_probs",
        torch.full((2, 2, 6), 0.2),
        r"draft_probs is torch.float32 \[2, 2, 6\]; pass torch.float32 \[2, 2, 5\]",
    ),
    ("lengths", torch.ones(2, dtype=torch.int32), r"lengths is torch.int32 \[2\]; pass torch.int64 \[2\]"),
    ("lengths", torch.ones(3, dtype=torch.int64), r"lengths is torch.int64 \[3\]; pass torch.int64 \[2\]"),
    ("uniforms", GOOD["uniforms"].float(), r"uniforms is torch.float32 \[2, 3\]; pass torch.float64 \[2, 3\]"),
    ("uniforms", GOOD["uniforms"][:, :2], r"uniforms is torch.float64 \[2, 2\]; pass torch.float64 \[2, 3\]"),
    ("uniforms", GOOD["uniforms"].to("meta"), r"uniforms is on meta, target_probs on cpu; move them to one device"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_wrong_arguments_are_refused(name: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rejection.verify(**GOOD | {name: value})


@pytest.mark.parametrize("vocab_size", [0, rejection.MAX_VOCAB_SIZE + 1])
def test_a_vocabulary_of_unsupported_size_is_refused(vocab_size: int) -> None:
    ids = torch.zeros(1, 0, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"target_probs has {vocab_size} ids; the kernel takes 1 to 1048576"):
        rejection.verify(
            torch.zeros(1, 1, vocab_size), ids, None, ids[:, :1].sum(1), torch.zeros(1, 1, dtype=torch.float64)
        )


def test_a_cpu_tensor_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "interpreting", lambda: False)
    with pytest.raises(ValueError, match="target_probs is on cpu; the kernel runs on CUDA devices"):
        rejection.verify(**GOOD)


def test_verify_uses_the_kernel_on_devices_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    takes = verification._has_kernel
    cuda = torch.device("cuda", 0)
    probs = SimpleNamespace(device=cuda, shape=GOOD["target_probs"].shape)
    monkeypatch.setattr(rejection, "runs_on", lambda device: device == cuda)
    monkeypatch.setattr(rejection.trial, "passes", lambda device, name, trial: True)
    assert takes(probs)
    assert not takes(GOOD["target_probs"])
    assert not takes(SimpleNamespace(device=cuda, shape=(1, 1, rejection.MAX_VOCAB_SIZE + 1)))
    monkeypatch.setattr(rejection.trial, "passes", lambda device, name, trial: False)
    assert not takes(probs)


@pytest.mark.parametrize("one_hot", [False, True], ids=["probs", "one-hot"])
def test_verify_in_the_kernel_accepts_any_strides(monkeypatch: pytest.MonkeyPatch, one_hot: bool) -> None:
    if not interpreting():
        pytest.skip("the interpreter is off where there is a CUDA device")
    torch.manual_seed(13)
    draft, p, uniforms = case(3, 33)
    probs = None if one_hot else draft.probs.transpose(0, 1).contiguous().transpose(0, 1)
    draft = Draft(draft.ids.T.contiguous().T, probs, draft.lengths[:1].expand(len(p)))
    p, uniforms = p.transpose(0, 1).contiguous().transpose(0, 1), uniforms.T.contiguous().T
    expected = verification.verify(draft, p, uniforms)
    launches = []
    stock = rejection.verify
    monkeypatch.setattr(rejection, "verify", lambda *args: launches.append(args) or stock(*args))
    assert_same(verification.verify(draft, p, uniforms), expected)
    assert not launches  # not for a CPU tensor
    monkeypatch.setattr(verification, "_has_kernel", lambda target_probs: True)
    assert_same(verification.verify(draft, p, uniforms), expected)
    assert len(launches) == 1
