"""The kernel tests can fail: each kernel with one error in its source differs from its reference."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from specdec_kernels.attention import kernel as attention_kernel
from specdec_kernels.attention import reference as attention_reference
from specdec_kernels.configuration import interpreting
from specdec_kernels.rejection import kernel as rejection_kernel
from specdec_kernels.w4a16 import kernel as w4a16_kernel
from specdec_kernels.w4a16 import reference as w4a16_reference
from specdec_kernels.w4a16.layout import prepack
from specdec_kernels.w8a16 import kernel as w8a16_kernel
from specdec_kernels.w8a16 import reference as w8a16_reference

from specdec.core import verification
from specdec.core.steps import Draft

pytestmark = pytest.mark.skipif(not interpreting(), reason="the interpreter is off where there is a CUDA device")


def w4a16(kernel: ModuleType) -> tuple[Tensor, Tensor]:
    codes = torch.randint(16, (130, 1024), dtype=torch.uint8)
    weight = prepack(codes, torch.rand(130, 16).half(), torch.randint(16, (130, 16), dtype=torch.uint8))
    assert weight is not None
    assert weight.splits > 1
    x, bias = torch.randn(18, 1024).half(), torch.randn(130).half()
    return kernel.launch(x, weight, bias), w4a16_reference.matmul(x, weight, bias)


def w8a16(kernel: ModuleType) -> tuple[Tensor, Tensor]:
    weight, scale = torch.randint(-128, 128, (71, 400), dtype=torch.int8)[:70], torch.rand(70) / 1000
    x = torch.full((19, 400), torch.nan).half()[:18].copy_(torch.randn(18, 400))  # NaN follows it
    return kernel.launch(x, weight, scale), w8a16_reference.matmul(x, weight, scale)


def attention(kernel: ModuleType) -> tuple[Tensor, Tensor]:
    query, key, value = (
        torch.randn(2, 4, 3, 32).half(),
        torch.randn(2, 2, 600, 32).half(),
        torch.randn(2, 2, 600, 32).half(),
    )
    last = torch.tensor([[500, 501, 502], [7, 8, 9]], dtype=torch.int32)
    inputs = (query, key, value, (last - 300).clamp(min=0), last, 0.2)
    return kernel.launch(*inputs), attention_reference.attention(*inputs)


def rejection(kernel: ModuleType) -> tuple[Tensor, Tensor]:
    logits = 3 * torch.randn(40, 4, 5000)
    p, q = logits.softmax(-1), (logits[:, :3] + torch.randn(40, 3, 5000)).softmax(-1)
    ids = q.flatten(0, 1).multinomial(1).view(40, 3)
    lengths, uniforms = torch.randint(4, (40,)), torch.rand(40, 4, dtype=torch.float64)
    verdict = verification.verify(Draft(ids, q, lengths), p, uniforms)
    got = torch.stack(kernel.launch(p, ids, q, lengths, uniforms))
    return got.double(), torch.stack([verdict.accepted, verdict.next_ids]).double()


OPS = {
    "w4a16": (w4a16, w4a16_kernel),
    "w8a16": (w8a16, w8a16_kernel),
    "attention": (attention, attention_kernel),
    "rejection": (rejection, rejection_kernel),
}
BREAKS = {
    ("w4a16", "wrong nibble"): (">> 4 * (i % 4) & 15", ">> 4 * ((i + 1) % 4) & 15"),
    ("w4a16", "wrong half of a word"): ("tl.join(by_c[c], by_c[c] >> 16)", "tl.join(by_c[c] >> 16, by_c[c])"),
    ("w4a16", "wrong group's zero"): ("_addend(words[i * STEP // GROUP]", "_addend(words[0]"),
    ("w4a16", "missing mask of the bias' columns"): ("n < N * has_bias", "n < 0"),
    ("w4a16", "no block is the last"): ("== splits - 1", "== splits"),
    ("w4a16", "a split too few"): ("tl.range(splits,", "tl.range(splits - 1,"),
    ("w8a16", "missing mask of the last columns"): ("inside = start + k < K", "inside = k >= 0"),
    ("w8a16", "a block of K too few"): ("tl.range(0, K, BK)", "tl.range(0, K - BK, BK)"),
    ("w8a16", "another row's scale"): ("tl.load(scale_ptr + n, n < N", "tl.load(scale_ptr + n // 2, n < N"),
    ("w8a16", "missing rows of W"): ("(n < N)[:, None]", "(n < N - 1)[:, None]"),
    ("attention", "missing mask"): (
        "(slot[None, :] >= first[:, None]) & (slot[None, :] <= last[:, None])",
        "slot[None, :] >= 0",
    ),
    ("attention", "no rescaling"): ("acc * rescale[:, None])", "acc)"),
    ("attention", "no block is the last"): ('sem="acq_rel") == count - 1', 'sem="acq_rel") == count'),
    ("rejection", "accepts what it should reject"): ("u * q.to(tl.float64) < p.to", "u * q.to(tl.float64) > p.to"),
    ("rejection", "draws from p alone"): ("has_residual = tl.max(sums) > 0", "has_residual = tl.max(sums) > 2"),
}
_NUMBER = itertools.count()


def with_source_changed(kernel: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    source = Path(kernel.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} is {source.count(old)} times in the kernel"
    path = folder / f"broken_kernel_{next(_NUMBER)}.py"
    path.write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def poisoned_empty(*args: object, **kwargs: object) -> Tensor:
        tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(torch.nan if tensor.is_floating_point() else 77)

    monkeypatch.setattr(torch, "empty", poisoned_empty)


@pytest.mark.parametrize("op", OPS)
def test_the_unchanged_kernel_agrees(op: str) -> None:
    compute, kernel = OPS[op]
    torch.testing.assert_close(*compute(kernel), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("op", "what"), [pytest.param(*names, id=": ".join(names)) for names in BREAKS])
def test_a_broken_kernel_does_not_agree(op: str, what: str, tmp_path: Path) -> None:
    compute, kernel = OPS[op]
    broken = with_source_changed(kernel, *BREAKS[op, what], tmp_path)
    got, expected = compute(broken)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
