"""A linear layer on 8-bit weights with a scale a row: the output head of a 4-bit model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from specdec_kernels import cpu, w8a16
from torch import Tensor, nn

from specdec.quant.batch_invariant import by_phase, in_row_blocks

MAX_CODE = 127  # -128 is not used, so that a weight and its negative have codes of one magnitude
TILE_WEIGHTS = 1 << 18  # weights that are in float32 at any one time


def tile_rows(in_features: int) -> int:
    """Rows of a weight that are in float32 at any one time."""
    return max(1, TILE_WEIGHTS // in_features)


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round weight [N, K] to nearest: -> codes int8 [N, K] and scales bfloat16 [N], the largest magnitude at 127."""
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.bfloat16, device=weight.device)
    step = tile_rows(weight.shape[1])
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        scale = (rows.abs().amax(1, keepdim=True) / MAX_CODE).bfloat16()
        scale = torch.where(scale == 0, 1, scale)
        codes[start : start + step] = (rows / scale.float()).round().clamp(-MAX_CODE, MAX_CODE).to(torch.int8)
        scales[start : start + step] = scale[:, 0]
    return codes, scales


class Int8Linear(nn.Module):
    """y = x W^T + b on an 8-bit weight: x [..., W, K] of any floating dtype -> [..., W, N] of the same.

    weight: int8 [N, K], codes -127 … 127; weight_scale: floating [N]. Row n of W is weight[n] * weight_scale[n].
    int8_inputs: on a CPU, round the inputs to 8 bits by group; see specdec_kernels.cpu.
    use_kernel: False computes with tiles of W in the dtype of the inputs.

    Batch-invariant: a row does not depend on the other rows. specdec's CPU kernel and, for decoding windows, the
    Triton kernel have this property; elsewhere tiles of W multiply blocks of a fixed number of rows.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.int8_inputs = self.use_kernel = True
        self.is_in_huge_pages = False
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"

    def choose_kernel(self) -> None:
        """Bring the weight into the memory that the CPU kernel reads fastest, where it runs."""
        if not self.is_in_huge_pages and self.weight.device.type == "cpu" and cpu.load():
            self.weight.data, self.is_in_huge_pages = cpu.in_huge_pages(self.weight), True

    def forward(self, x: Tensor) -> Tensor:
        self.choose_kernel()
        weight, scale = self.weight, self.weight_scale
        can_use_kernel = self.use_kernel and not (x.requires_grad and torch.is_grad_enabled())
        if can_use_kernel and not x.is_cuda and self.in_features % 16 == 0 and cpu.load():
            inputs = x if x.dtype in cpu.DTYPES else x.float()
            y = torch.ops.specdec.int8_linear(inputs, weight, scale, self.int8_inputs).to(x.dtype)
        elif can_use_kernel and w8a16.is_supported(x, weight, scale):
            y = by_phase(x, lambda rows: w8a16.matmul(rows, weight, scale), self._tiles)
        else:
            y = in_row_blocks(x, self._tiles)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of W, as an embedding reads them: ids [...] -> [..., K]."""
        return (self.weight[ids].float() * self.weight_scale[ids].float()[..., None]).to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [N, K], by default in the dtype of its scales."""
        return self._rows(slice(None)).to(dtype or self.weight_scale.dtype)

    def _tiles(self, x: Tensor) -> Tensor:
        step = tile_rows(self.in_features)
        starts = range(0, self.out_features, step)
        parts = [F.linear(x, self._rows(slice(start, start + step)).to(x.dtype)) for start in starts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def _rows(self, rows: slice) -> Tensor:
        """Rows of W in float32."""
        return self.weight[rows].float().mul_(self.weight_scale[rows].float()[:, None])

    def __getstate__(self) -> dict[str, Any]:
        """Pickles and copies have memory of their own."""
        return self.__dict__ | {"is_in_huge_pages": False}

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        self.is_in_huge_pages = False
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dtype != torch.int8:
            args[-1].append(f"{prefix}weight is {weight.dtype}, but this model's is 8-bit codes (int8)")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
