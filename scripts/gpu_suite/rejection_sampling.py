"""Rejection sampling: verdicts against PyTorch's, then times against it, in a CUDA graph and launched one by one."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import torch
from specdec_kernels import rejection
from torch import Tensor

from gpu_suite.checking import check_case, share_of_differences
from gpu_suite.rows import timing_row
from gpu_suite.suite import Row, Section, Suite
from gpu_suite.timing import Call
from specdec.core import verification
from specdec.core.steps import Draft


def verify(p: Tensor, ids: Tensor, q: Tensor | None, lengths: Tensor, uniforms: Tensor) -> Tensor:
    """[B, 2]: the number of accepted ids, and the id after them."""
    return torch.stack(rejection.verify(p, ids, q, lengths, uniforms), 1)


def verify_in_torch(p: Tensor, ids: Tensor, q: Tensor | None, lengths: Tensor, uniforms: Tensor) -> Tensor:
    """The same in PyTorch operators; call it under `without_kernel`."""
    verdict = verification.verify(Draft(ids, q, lengths), p, uniforms)
    return torch.stack((verdict.accepted, verdict.next_ids), 1)


def without_kernel() -> Any:
    return mock.patch.object(verification, "_has_kernel", return_value=False)


def random_draft(suite: Suite, batch: int, one_hot: bool) -> tuple:
    """Arguments of verify. Half of the ids are drawn from q, which is near p; the others are p's most likely ids."""
    k, vocab = suite.sizes.num_draft_tokens, suite.sizes.vocab_size
    logits = 6 * torch.randn(batch, k + 1, vocab, device=suite.device)
    p = logits.softmax(-1)
    q = (logits[:, :k] + 0.5 * torch.randn(batch, k, vocab, device=suite.device)).softmax(-1)
    drawn = q.flatten(0, 1).multinomial(1).view(batch, k)
    ids = torch.where(torch.rand(batch, k, device=suite.device) < 0.5, p[:, :k].argmax(-1), drawn)
    lengths = torch.randint(k - 1, k + 1, (batch,), device=suite.device)
    return p, ids, None if one_hot else q, lengths, torch.rand(batch, k + 1, dtype=torch.float64, device=suite.device)


def draft_cases(suite: Suite) -> list[tuple[int, bool]]:
    return [(batch, one_hot) for batch in suite.sizes.rejection_batches for one_hot in (False, True)]


def check(suite: Suite) -> list[Row]:
    """Against specdec.core.verification, which sums in float64; a single row gets its verdict of the batch."""

    def same_bits(result: Tensor, *inputs: Tensor | None) -> bool:
        rows = range(len(result))
        alone = [verify(*(x if x is None else x[row : row + 1] for x in inputs)) for row in rows]
        return torch.cat(alone).equal(result)

    def check_draft(batch: int, one_hot: bool) -> Row:
        return check_case(
            suite,
            "rejection",
            f"batch {batch}, {'one-hot' if one_hot else 'sampled'}",
            partial(random_draft, suite, batch, one_hot),
            verify,
            verify_in_torch,
            same_bits,
            share_of_differences,
            0.0,
        )

    with without_kernel():
        return [check_draft(*case) for case in draft_cases(suite)]


def count_launches(call: Call) -> int | None:
    """Kernels that a call launches; None where the profiler sees none."""
    has_cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + has_cuda]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    names = ("cudaLaunchKernel", "cuLaunchKernel")
    return sum(event.count for event in profile.key_averages() if event.key.startswith(names)) or None


@torch.inference_mode()
def run(suite: Suite) -> Row:
    """In a CUDA graph, and launched one by one, as an eager generate() loop does."""
    results = []
    for batch, one_hot in draft_cases(suite):
        num_bytes = (1 if one_hot else 2) * batch * suite.sizes.vocab_size * 4  # one p and one q of each row
        copies = [random_draft(suite, batch, one_hot) for _ in range(suite.num_copies(num_bytes))]
        functions = {"kernel": rejection.verify, "torch": verify_in_torch}
        candidates = {name: [partial(f, *inputs) for inputs in copies] for name, f in functions.items()}
        with without_kernel():
            times, eager = suite.timer.measure(candidates), suite.timer.measure(candidates, graph=False)
            launches = {name: count_launches(calls[0]) for name, calls in candidates.items()}
        row = timing_row(suite, times, num_bytes, batch=batch, draft="one-hot" if one_hot else "sampled")
        row |= {"eager_us": eager["kernel"].us, "torch_eager_us": eager["torch"].us}
        row |= {"ratio_to_torch_eager": eager["torch"].us / eager["kernel"].us}
        results.append(row | {"launches": launches["kernel"], "launches_torch": launches["torch"]})
        suite.empty_cache()
    return {"bandwidth": suite.bandwidth, "results": results}


SECTION = Section("rejection", run, check)
