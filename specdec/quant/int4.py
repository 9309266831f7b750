"""The canonical 4-bit form of a weight.

A weight W [N, K] (out, in) is N * K codes of four bits and a scale for every group of G columns of a row:

    W[n, k] = (code[n, k] - zero[n, k // G]) * scale[n, k // G]        zero is 8 where none is stored
    W[n, k] = codebook[code[n, k]] * scale[n, k // G]                  with a codebook (MXFP4)

Every checkpoint format is converted to this form. Products are computed in float32 and rounded once, so in the dtype of
its scales a weight equals, bit for bit, what the format's own library computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP_SIZES = (16, 32, 64, 128, 256, -1)  # columns that share a scale; -1: the whole row (per channel)
SYMMETRIC_ZERO = 8


def pack(codes: Tensor) -> Tensor:
    """Codes 0 … 15, [..., K] of any integer dtype -> uint8 [..., K/2]; the even column in the low nibble."""
    if codes.shape[-1] % 2:
        raise ValueError(f"two codes share a byte, so the number of columns must be even, got {codes.shape[-1]}")
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """uint8 [..., K/2] -> codes 0 … 15, uint8 [..., K]: the inverse of pack."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


@dataclass(frozen=True)
class Int4Tensor:
    """A weight [..., N, K] in the canonical form.

    weight: uint8 [..., N, K/2], two codes a byte (see pack).
    scale: [..., N, K/G], any floating dtype, float8_e8m0fnu included; not converted.
    zero: uint8 [..., N, K/G], or None where every zero point is 8 or there is a codebook.
    perm: int32 [K], or None: stored column j is the layer's input column perm[j] (GPTQ's activation order).
    codebook: [16] floating, or None: the value of each code.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None = None
    perm: Tensor | None = None
    codebook: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """[..., N, K] of the weight."""
        return (*self.weight.shape[:-1], 2 * self.weight.shape[-1])

    @property
    def group_size(self) -> int:
        """Columns that share a scale."""
        return 2 * self.weight.shape[-1] // self.scale.shape[-1]

    def __getitem__(self, index: Any) -> Int4Tensor:
        """Some rows, or one expert of [E, N, K]."""
        zero = None if self.zero is None else self.zero[index]
        return Int4Tensor(self.weight[index], self.scale[index], zero, self.perm, self.codebook)

    def codes(self) -> Tensor:
        """Codes 0 … 15, uint8 [..., N, K]."""
        return unpack(self.weight)

    def stored(self, dtype: torch.dtype) -> Tensor:
        """W [..., N, K] with its columns in stored order."""
        codes = self.codes()
        values = codes.float() if self.codebook is None else self.codebook.float()[codes.int()]
        groups = values.unflatten(-1, (self.scale.shape[-1], -1))
        if self.codebook is None:
            groups -= SYMMETRIC_ZERO if self.zero is None else self.zero.float()[..., None]
        groups *= self.scale.float()[..., None]
        return values.to(dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """W [..., N, K] with its columns in the order of the inputs.

        dtype: by default that of the scales, bfloat16 for 8-bit scales.
        """
        dtype = dtype or (torch.bfloat16 if self.scale.dtype.itemsize == 1 else self.scale.dtype)
        stored = self.stored(dtype)
        if self.perm is None:
            return stored
        weight = torch.empty_like(stored)
        weight[..., self.perm.long()] = stored
        return weight
