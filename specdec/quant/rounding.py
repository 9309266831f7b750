"""Round to nearest with a search for the scales: 4 bits without calibration data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from specdec.quant.int4 import SYMMETRIC_ZERO, Int4Tensor, pack

# Factors of the range that the codes cover; clipping a few weights may reduce the error of the others
SHRINKS = torch.linspace(1.0, 0.7, 16)
CHUNK_WEIGHTS = 1 << 18  # rounded at a time, in several float32 copies that fit a CPU's cache
CUDA_CHUNK_WEIGHTS = 1 << 24  # enough that launches take no noticeable time


def round_to_nearest(weight: Tensor, group_size: int, symmetric: bool) -> Int4Tensor:
    """The 4-bit form of weight [N, K]; group_size G divides K, or is -1 for the whole row.

    The scale of each group is the one, out of a grid, with the least sum of |w| (w - w')^2: errors are weighted by the
    magnitude of the weight, as in llama.cpp's k-quants. Candidates are rounded to bfloat16, the dtype of the scales,
    before they are compared. Symmetric codes represent -8 … 7 times the scale, which is negative where the largest
    weight is positive; asymmetric ones have a zero point.
    """
    columns = weight.shape[1]
    size = columns if group_size == -1 else group_size
    if columns % size:
        raise ValueError(f"group_size={group_size} does not divide in_features={columns}")
    rows, step = len(weight), max(1, (CUDA_CHUNK_WEIGHTS if weight.is_cuda else CHUNK_WEIGHTS) // columns)
    search = _symmetric if symmetric else _asymmetric
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, columns // size, dtype=torch.bfloat16, device=weight.device)
    zeros = torch.empty(scales.shape, dtype=torch.uint8, device=weight.device)
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        codes[chunk], scales[chunk], zeros[chunk] = search(weight[chunk].float().unflatten(1, (-1, size)))
    return Int4Tensor(codes, scales, None if symmetric else zeros)


def _symmetric(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes [n, K/2], scales [n, K/G], zeros [n, K/G] of groups [n, K/G, G]."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    candidates = ((largest * shrink / -8) for shrink in SHRINKS.tolist())
    signed = (sign * scale for scale in candidates for sign in (1, -8 / 7))  # the largest weight at -8, or at 7
    return _best(groups, ((scale, torch.full_like(scale, SYMMETRIC_ZERO)) for scale in signed))


def _asymmetric(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same with a zero point for each group."""
    low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)

    def candidate(shrink: float) -> tuple[Tensor, Tensor]:
        scale = (high - low) * shrink / 15
        return scale, (-low * shrink / _nonzero(scale)).round()

    return _best(groups, (candidate(shrink) for shrink in SHRINKS.tolist()))


def _best(groups: Tensor, candidates: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Round with the best (scale, zero) candidate, [n, K/G, 1] each, of each group: -> as _symmetric."""
    importance = groups.abs()
    least = torch.full_like(groups[..., :1], torch.inf)
    best_scale, best_zero = torch.ones_like(least), torch.zeros_like(least)
    for candidate, zero in candidates:
        scale = _nonzero(candidate).bfloat16().float()
        error = groups - ((groups / scale + zero).round().clamp(0, 15) - zero) * scale
        loss = (importance * error.square()).sum(-1, keepdim=True)
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    codes = (groups / best_scale + best_zero).round().clamp(0, 15)
    return pack(codes.flatten(1)), best_scale[..., 0], best_zero[..., 0]


def _nonzero(scale: Tensor) -> Tensor:
    """The scale, 1 for a group of zeros and where bfloat16 could not represent it."""
    return torch.where(scale.abs() < 1e-30, torch.ones_like(scale), scale)
