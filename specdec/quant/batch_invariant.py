"""Batch-invariant computation: a position's result does not depend on how many positions a forward holds.

Verification computes K+1 positions at once, plain decoding one. A matmul library sums in another order for another
number of rows, so the last bits differ. 4-bit layers that round their inputs turn some of these into larger
differences, and texts diverge at near ties. With a 4-bit model on a CPU every module of a decoding forward therefore
computes a row the same way in any batch: with specdec's own kernels where they have been built (specdec_kernels.cpu);
else the int4 op has this property, and other linear layers and attention run in blocks of 8 rows and 128 keys. Plain
generate(), specdec's plain loop and speculation then produce the same text, bit for bit. On a CUDA device the 4-bit
kernel and the attention kernel are batch-invariant, and other linear layers run in blocks of 64 rows; norms are
PyTorch's, and not proven to be.

A window of more than 64 positions is prefill and runs at full speed. Its last position, from which the first id is
sampled, is computed as in decoding, because the verification of the first draft computes it again. specdec's CPU
kernels make no such difference: they are as fast on wide windows as the alternatives.

Element-wise functions are not replaced. PyTorch computes the elements at the end of a tensor that fill no vector in
another way, so widths should be multiples of 32, as those of real models are. Three or more threads may split even
those unevenly; no text is known to differ by it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from specdec_kernels import cpu
from torch import Tensor, nn

MAX_WINDOW = 64  # positions of one row of a batch; a wider window is prefill
BLOCK = 8  # rows of one matmul on a CPU
CUDA_BLOCK = 64  # and on a CUDA device, where reading the weights takes the time, so 64 rows take no longer than one
ATTENTION = "specdec_rows"  # the name of specdec/runtime/attention/select.py's function in transformers


def is_decoding(width: int, device: torch.device) -> bool:
    """Whether all positions of a window of that width are computed as in decoding."""
    return (device.type == "cpu" and cpu.load()) or width <= MAX_WINDOW


def by_phase(x: Tensor, decode: Callable[[Tensor], Tensor], prefill: Callable[[Tensor], Tensor]) -> Tensor:
    """decode(x) for a window x [..., W, K] of up to 64 positions; else prefill(x), with decode() of the last one."""
    if x.shape[-2] <= MAX_WINDOW:
        return decode(x)
    y = prefill(x)
    if x.ndim > 2:
        y[..., -1:, :] = decode(x[..., -1:, :])
    return y


def in_row_blocks(x: Tensor, linear: Callable[[Tensor], Tensor]) -> Tensor:
    """linear(x) for x [..., W, K], batch-invariant: a decoding window in blocks of rows of one size.

    linear: rows [M, K] -> [M, N]. The blocks have 8 rows on a CPU and 64 on a CUDA device.
    """

    def decode(x: Tensor) -> Tensor:
        rows, block = x.reshape(-1, x.shape[-1]), CUDA_BLOCK if x.is_cuda else BLOCK
        num_rows = len(rows)
        rows = F.pad(rows, (0, 0, 0, -num_rows % block))
        blocks = [linear(chunk) for chunk in rows.split(block)]
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return y[:num_rows].unflatten(0, x.shape[:-1])

    return by_phase(x, decode, linear)


class BatchInvariantLinear(nn.Linear):
    """nn.Linear by specdec's CPU kernel, or in blocks of rows of one size: 8 on a CPU, 64 on a CUDA device."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type not in ("cpu", "cuda") or x.ndim < 2:
            return super().forward(x)
        has_gradients = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        if (
            not x.is_cuda
            and x.dtype == self.weight.dtype
            and x.dtype in cpu.DTYPES
            and not has_gradients
            and cpu.load()
        ):
            y: Tensor = torch.ops.specdec.linear(x, self.weight, self.bias)
            return y
        return in_row_blocks(x, super().forward)


def make_batch_invariant(model: Any) -> None:
    """Replace a model's remaining linear layers and its sdpa attention by batch-invariant ones, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = BatchInvariantLinear
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation == "sdpa":
        names = [name for name in model.config.sub_configs if getattr(model.config, name, None) is config]
        model.set_attn_implementation({names[0]: ATTENTION} if names else ATTENTION)  # a vision tower keeps its own
