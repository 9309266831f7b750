"""Row-invariant computing: a position's result must not depend on how many positions a forward holds.

Verification runs K+1 positions at once, plain decoding one. A matmul library sums in another order for another number of rows, so
the last bits differ, and where 4-bit layers round their inputs to bfloat16 a last bit now and then becomes a visible one: texts
part at near ties. With a 4-bit model on a CPU every room of a decoding forward therefore does the same work for a row, whatever
is beside it: by specdec's own kernels where they have been built (specdec_kernels.cpu), else the int4 op by itself, other linear
layers and attention in blocks of 8 rows and 128 keys. Plain generate(), our plain loop and speculation then write the same text,
bit for bit. On a CUDA device the 4-bit kernel and the attention kernel are
row-invariant by themselves, and other linear layers run in blocks of 64 rows; norms are PyTorch's, and not proven to be.

A window of more than 64 positions is prefill and runs at full speed; but its last position, the one that the first id is sampled
from, is computed the decoding way, since that is how it is computed again when the first draft is verified. specdec's kernels
for a CPU know no phases: they are as fast on wide windows as what would run there.

Element-wise functions are left alone. PyTorch computes the rest of a tensor that no vector fills in another way, so widths should
be multiples of 32, as real models' are; three threads and more may cut even those unevenly, which has not been seen to reach a
text.
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
CUDA_BLOCK = 64  # and on a CUDA device, where up to so many take no longer than one: reading the weights decides
ATTENTION = "specdec_rows"  # the name of specdec/runtime/attention/select.py's function in transformers


def is_decoding(width: int, device: torch.device) -> bool:
    """Whether a window of so many positions is computed row by row throughout."""
    return (device.type == "cpu" and cpu.load()) or width <= MAX_WINDOW


def by_phase(x: Tensor, decode: Callable[[Tensor], Tensor], prefill: Callable[[Tensor], Tensor]) -> Tensor:
    """decode(x) for a window x [..., W, K] of up to 64 positions; else prefill(x), with decode() of the last position."""
    if x.shape[-2] <= MAX_WINDOW:
        return decode(x)
    y = prefill(x)
    if x.ndim > 2:
        y[..., -1:, :] = decode(x[..., -1:, :])
    return y


class BatchInvariantLinear(nn.Linear):
    """nn.Linear by a kernel that treats each row alone, or in blocks: of 8 rows on a CPU, of 64 on a CUDA device."""

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
            by_row: Tensor = torch.ops.specdec.linear(x, self.weight, self.bias)
            return by_row
        return by_phase(x, self._decode, super().forward)

    def _decode(self, x: Tensor) -> Tensor:
        rows, block = x.reshape(-1, self.in_features), CUDA_BLOCK if x.is_cuda else BLOCK
        count = len(rows)
        rows = F.pad(rows, (0, 0, 0, -count % block))
        blocks = [F.linear(piece, self.weight, self.bias) for piece in rows.split(block)]
        y = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return y[:count].view(*x.shape[:-1], self.out_features)


def make_batch_invariant(model: Any) -> None:
    """Replace a model's remaining linear layers and its sdpa attention by row-invariant ones, in place."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = BatchInvariantLinear
    config = model.config.get_text_config(decoder=True)
    if config._attn_implementation == "sdpa":
        below = [name for name in model.config.sub_configs if getattr(model.config, name, None) is config]
        model.set_attn_implementation({below[0]: ATTENTION} if below else ATTENTION)  # a vision tower keeps its own
