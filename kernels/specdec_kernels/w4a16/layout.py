"""The kernel's weight layout: contiguous tiles of 128 rows of W^T, and scales packed into words.

    tiles   int32 [T, N', 16]   T = ceil(K / 128), N' = N padded to whole blocks of columns; code i of half h of
                                word 2a + c of tile t is W^T's row t*128 + (4c + i)*16 + 2a + h
    scale   int32 [ceil(groups / 2), N']   symmetric: the 16-bit scales of two groups a word, the even one low
            int32 [groups, N']             asymmetric: the scale low, -zero times UNIT of its dtype high
            int32 [groups / 4, N']         e2m1: the multipliers' exponents of four groups a word, the first one low

Dot d of 8 reads the 16 rows from t*128 + 16d on, and the two rows in one register of a tensor core are the halves of a
word: a mask of both gives an operand. A code 0 … 15 is stored as its nibble. The bits of the four E2M1 codes of a
half-word are spread (see SPREAD): a shift and a mask then give a bfloat16 number, subnormal where the code's magnitude
is, which is the code's value times 2^-126.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["symmetric", "asymmetric", "e2m1"]
TILE = 128  # rows
DOTS = 8  # of a tile, of 16 rows each, the fewest that tensor cores multiply
SYMMETRIC_ZERO = 8
MIN_TILES = 4  # of a block
TARGET_BLOCKS = 512  # about four for each multiprocessor of a large GPU
UNIT = {torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}  # the operand of a code of 1, see dequantize.py

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
E2M1_GROUP = 32
E2M1_SPAN = 120  # largest exponent difference between a weight's scales: up to it every product is exact
E2M1_UNIT = 126  # bfloat16's sign at bit 15 and three bits from 6 on: the code's value times 2^-126
# For code k of a half-word: the bit of its sign, and the lowest bit of its magnitude.
SPREAD = ((15, 6), (12, 3), (14, 9), (13, 0))


@dataclass(frozen=True)
class PackedWeight:
    """A weight W [N, K] in the kernel's layout.

    tiles, scale: see above. kind: how codes are decoded. group_size: columns that share a scale, 32, 64 or 128; the
    scales of wider groups are repeated. scale_dtype: of the 16-bit scales (e2m1: bfloat16). exponent: W is 2^exponent
    times the value of tiles and scale. splits: the number of blocks among which a column is divided; it depends on the
    weight's shape alone, so that a row is summed in the same order at any M.
    """

    tiles: Tensor
    scale: Tensor
    kind: Kind
    group_size: int
    scale_dtype: torch.dtype
    exponent: int
    splits: int
    out_features: int
    in_features: int

    def rows(self, start: int, stop: int) -> PackedWeight:
        """Rows start … stop of W, as views. The kernel can run on them if start is a multiple of block_n."""
        end = start + -(-(stop - start) // block_n(self.group_size)) * block_n(self.group_size)
        return replace(self, tiles=self.tiles[:, start:end], scale=self.scale[:, start:end], out_features=stop - start)

    def codes(self) -> Tensor:
        """Codes 0 … 15, uint8 [N, K]."""
        tiles = self.tiles if self.kind != "e2m1" else gather_e2m1(self.tiles)
        return unpack_tiles(tiles)[: self.out_features, : self.in_features]


def block_n(group_size: int) -> int:
    """Columns of a block of the kernel. More columns take fewer instructions a weight, which small groups need."""
    return 128 if group_size >= TILE else 256


def prepack(
    codes: Tensor, scale: Tensor, zero: Tensor | None = None, codebook: Tensor | None = None
) -> PackedWeight | None:
    """Pack codes uint8 [N, K], scale [N, K/G], zero uint8 [N, K/G], codebook [16]; None where there is no kernel.

    There is one for groups of 32, 64, a multiple of 128, or the whole row, with float16 or bfloat16 scales; and for the
    E2M1 codebook in groups of 32 with float8_e8m0fnu scales (MXFP4), if these are within 2^120 of each other.
    """
    (rows, in_features), groups = codes.shape, scale.shape[1]
    if 0 in codes.shape:
        return None
    width = in_features // groups
    if groups == 1 or width % TILE == 0:
        group_size, repeats = TILE, -(-width // TILE)
    elif width in (32, 64):
        group_size, repeats = width, 1
    else:
        return None
    block = block_n(group_size)

    def padded(values: Tensor) -> Tensor:
        """[N, groups] -> int32 [N', groups of whole tiles], padded with zeros."""
        values = values.int().repeat_interleave(repeats, dim=1)
        return F.pad(values, (0, -values.shape[1] % (TILE // group_size), 0, -rows % block))

    tiles, dtype, exponent = pack_tiles(codes, block), scale.dtype, 0
    kind: Kind
    if codebook is not None:
        powers = _powers_of_two(scale) if group_size == E2M1_GROUP and _is_e2m1(codebook) else None
        if powers is None:
            return None
        kind, dtype, exponent = "e2m1", torch.bfloat16, int(powers.max())
        tiles = spread_e2m1(tiles)
        words = _pack_words(padded(powers - exponent + E2M1_UNIT + 127), 8)  # the multipliers' biased exponents
    elif scale.dtype not in UNIT:
        return None
    elif zero is None:
        kind, words = "symmetric", _pack_words(padded(_bits(scale)), 16)
    else:
        kind, words = "asymmetric", padded(_bits(scale) | _bits((zero.float() * -UNIT[dtype]).to(dtype)) << 16)
    splits = num_splits(tiles.shape[0], tiles.shape[1] // block)
    words = words.T.clone(memory_format=torch.contiguous_format)
    return PackedWeight(tiles, words, kind, group_size, dtype, exponent, splits, rows, in_features)


def concatenate(weights: list[PackedWeight]) -> PackedWeight | None:
    """Concatenate the rows of weights, each padded to whole blocks; None where the weights differ in more than N."""
    first = weights[0]
    if any(_quantization(weight) != _quantization(first) for weight in weights):
        return None
    tiles = torch.cat([weight.tiles for weight in weights], dim=1)
    scale = torch.cat([weight.scale for weight in weights], dim=1)
    splits = num_splits(tiles.shape[0], tiles.shape[1] // block_n(first.group_size))
    return replace(first, tiles=tiles, scale=scale, splits=splits, out_features=tiles.shape[1])


def num_splits(num_tiles: int, blocks: int) -> int:
    """Number of blocks among which a column is divided: enough to fill a GPU, each with tiles to prefetch."""
    return max(1, min(num_tiles // MIN_TILES, round(TARGET_BLOCKS / blocks)))


def _quantization(weight: PackedWeight) -> tuple[object, ...]:
    device = weight.tiles.device
    return weight.kind, weight.group_size, weight.scale_dtype, weight.exponent, weight.in_features, device


def pack_tiles(codes: Tensor, block: int) -> Tensor:
    """Codes 0 … 15, uint8 [N, K] -> tiles int32 [T, N', 16], N' a multiple of block; padding is 0."""
    codes = F.pad(codes, (0, -codes.shape[1] % TILE, 0, -codes.shape[0] % block))
    # [N', T, c, i, a, h] -> [T, N', a, c, h, i]
    codes = codes.view(len(codes), -1, 2, 4, 8, 2).permute(1, 0, 4, 2, 5, 3)
    tiles = torch.zeros(codes.shape[:4], dtype=torch.int32, device=codes.device)
    for h in range(2):
        for i in range(4):
            tiles |= codes[..., h, i].int() << 16 * h + 4 * i
    return tiles.flatten(2)


def unpack_tiles(tiles: Tensor) -> Tensor:
    """tiles int32 [T, N', 16] -> codes 0 … 15, uint8 [N', 128 T]: the inverse of pack_tiles."""
    words = tiles.unflatten(2, (8, 2))  # [T, N', a, c]
    halves = [torch.stack([(words >> 16 * h + 4 * i & 15).to(torch.uint8) for i in range(4)], -1) for h in range(2)]
    codes = torch.stack(halves, dim=-2)  # [T, N', a, c, h, i]
    return codes.permute(1, 0, 3, 5, 2, 4).reshape(tiles.shape[1], -1)


def spread_e2m1(tiles: Tensor) -> Tensor:
    """The same tiles with the bits of each half-word moved as SPREAD defines."""
    spread = torch.zeros_like(tiles)
    for half in (0, 16):
        for k, (sign, magnitude) in enumerate(SPREAD):
            code = tiles >> half + 4 * k & 15
            spread |= (code >> 3) << half + sign | (code & 7) << half + magnitude
    return spread


def gather_e2m1(spread: Tensor) -> Tensor:
    """The inverse of spread_e2m1."""
    tiles = torch.zeros_like(spread)
    for half in (0, 16):
        for k, (sign, magnitude) in enumerate(SPREAD):
            tiles |= ((spread >> half + sign & 1) << 3 | spread >> half + magnitude & 7) << half + 4 * k
    return tiles


def _bits(values: Tensor) -> Tensor:
    """16-bit floats -> their bits, int32."""
    return values.contiguous().view(torch.int16).int() & 0xFFFF


def _pack_words(values: Tensor, bits: int) -> Tensor:
    """int32 [N', groups], numbers of so many bits -> int32 [N', words], the first group in the low bits."""
    per_word = 32 // bits
    values = F.pad(values, (0, -values.shape[1] % per_word)).unflatten(1, (-1, per_word))
    words = values[..., 0].clone()
    for i in range(1, per_word):
        words |= values[..., i] << bits * i
    return words


def _is_e2m1(codebook: Tensor) -> bool:
    return tuple(codebook.float().tolist()) == E2M1  # -0.0 == 0.0: no product differs by it


def _powers_of_two(scale: Tensor) -> Tensor | None:
    """float8_e8m0fnu -> int32 exponents, None where one is NaN or they differ by more than E2M1_SPAN."""
    if scale.dtype != torch.float8_e8m0fnu:
        return None
    powers = scale.view(torch.uint8).int() - 127
    top = int(powers.max())
    return None if top == 128 or top - int(powers.min()) > E2M1_SPAN else powers
