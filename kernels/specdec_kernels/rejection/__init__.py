"""Rejection sampling of a batch in one launch without host synchronization; see specdec/core/verification.py."""

from __future__ import annotations

import torch
from torch import Tensor

from specdec_kernels import trial
from specdec_kernels.configuration import interpreting, runs_on

MAX_VOCAB_SIZE = 2**20  # CHUNK * MAX_CHUNKS of the kernel


def verify(
    target_probs: Tensor, draft_ids: Tensor, draft_probs: Tensor | None, lengths: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor]:
    """Accept or reject: -> accepted [B] int64, the number of accepted draft ids, next_ids [B] int64, the id after them.

    target_probs: [B, K+1, V] float32. draft_ids: [B, K] int64. draft_probs: [B, K, V] float32; None where each is
    one-hot.
    lengths: [B] int64, the number of draft ids of a row, clamped to 0 … K. uniforms: [B, K+1] float64 in [0, 1).
    All contiguous, on one CUDA device. A draft id outside the vocabulary is rejected. Where a row's p is NaN or 0
    everywhere, its next id is some id of the vocabulary.
    """
    _check(target_probs, draft_ids, draft_probs, lengths, uniforms)
    from specdec_kernels.rejection import kernel

    with torch.cuda.device_of(target_probs):
        return kernel.launch(target_probs, draft_ids, draft_probs, lengths, uniforms)


def works_on(device: torch.device) -> bool:
    """Whether the kernel can be launched on a device and passed its trial there."""
    return runs_on(device) and trial.passes(device, "rejection", lambda: _try(device))


def _try(device: torch.device) -> float:
    """The share of wrong results for a one-hot target: rows with an accepted, a rejected and an empty draft."""
    from specdec_kernels.rejection import kernel

    target_ids = torch.tensor([[7, 4000, 2999], [1, 2, 3], [4999, 5, 6]], device=device)
    target_probs = torch.zeros(3, 3, 5008, device=device).scatter_(2, target_ids[..., None], 1.0)
    draft_ids = torch.tensor([[7, 4000], [1, 9], [8, 5]], device=device)
    lengths, uniforms = (
        torch.tensor([2, 2, 0], device=device),
        torch.full((3, 3), 0.5, dtype=torch.float64, device=device),
    )
    expected = torch.tensor([[2, 1, 0], [2999, 2, 4999]])
    results = [
        torch.stack(kernel.launch(target_probs, draft_ids, draft_probs, lengths, uniforms)).cpu()
        for draft_probs in (None, torch.full((3, 2, 5008), 1 / 5008, device=device))
    ]
    return max((result != expected).double().mean().item() for result in results)


def _check(
    target_probs: Tensor, draft_ids: Tensor, draft_probs: Tensor | None, lengths: Tensor, uniforms: Tensor
) -> None:
    if target_probs.ndim != 3 or draft_ids.ndim != 2:
        raise ValueError(
            f"target_probs is {list(target_probs.shape)} and draft_ids {list(draft_ids.shape)}; pass [B, K+1, V] and"
            " [B, K]"
        )
    batch, num_ids = draft_ids.shape
    vocab_size = target_probs.shape[2]
    device = target_probs.device
    expected = {
        "target_probs": (target_probs, torch.float32, (batch, num_ids + 1, vocab_size)),
        "draft_ids": (draft_ids, torch.int64, (batch, num_ids)),
        "draft_probs": (draft_probs, torch.float32, (batch, num_ids, vocab_size)),
        "lengths": (lengths, torch.int64, (batch,)),
        "uniforms": (uniforms, torch.float64, (batch, num_ids + 1)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None and name == "draft_probs":
            continue
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; pass {dtype} {list(shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, target_probs on {device}; move them to one device")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; pass {name}.contiguous()")
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"target_probs has {vocab_size} ids; the kernel takes 1 to {MAX_VOCAB_SIZE}, specdec.core.verification"
            " any number"
        )
    if device.type != "cuda" and not interpreting():
        raise ValueError(
            f"target_probs is on {device}; the kernel runs on CUDA devices, specdec.core.verification everywhere"
        )
