"""What the formats share: one layer's tensors, checked as they are taken, and the description of a checkpoint's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specdec.quant.int4 import GROUP_SIZES, SYMMETRIC_ZERO, Int4Tensor, pack, unpack

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
AGAIN = "the checkpoint is damaged or incomplete, so download it again"


@dataclass(frozen=True)
class Layer:
    """The tensors of one quantized layer, by the ends of their names; each is checked when it is taken."""

    name: str
    tensors: Mapping[str, Tensor]

    def take(self, suffix: str, dtypes: Sequence[torch.dtype], *shape: int | None) -> Tensor:
        """One tensor; None in its shape stands for any number."""
        value = self.tensors.get(suffix)
        if value is None:
            raise ValueError(f"there is no {self.name}{suffix} beside {self.name}{min(self.tensors)}; {AGAIN}")
        fits = value.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
        if not fits or value.dtype not in dtypes:
            expected = f"{' or '.join(map(str, dtypes))} [{', '.join('any' if size is None else str(size) for size in shape)}]"
            raise ValueError(f"{self.name}{suffix} is {value.dtype} {list(value.shape)}, but must be {expected}; {AGAIN}")
        return value

    def groups(self, scheme: Scheme, suffix: str, columns: int, dim: int) -> int:
        """How many groups the scales at `suffix` have along `dim`, as the scheme has it for so many columns."""
        counts = {1 if size == -1 else columns // size for size in scheme.group_sizes if size == -1 or columns % size == 0}
        if not counts or columns % 2:
            raise ValueError(
                f"{self.name} has {columns} input columns, which group_size={scheme.group_sizes[0]} does not divide; a last group"
                f" of another width is not supported, so quantize the original with one of {GROUP_SIZES} that divides them"
            )
        found = self.take(suffix, FLOATS, None, None).shape[dim]
        if found not in counts:
            raise ValueError(
                f"{self.name}{suffix} has {found} groups, but {columns} input columns in groups of {scheme.group_sizes[0]}"
                f" make {min(counts)}; is group_size in the checkpoint's config right?"
            )
        return found

    def ordered(self, suffix: str, weight: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
        """Canonical codes [N, K/2] and perm: columns by the group that `suffix` gives each, where that is not their own order."""
        columns = 2 * weight.shape[1]
        group = self.take(suffix, (torch.int32, torch.int64), columns).long()
        inside = ((group >= 0) & (group < groups)).all()
        if not inside or (group.bincount(minlength=groups) != columns // groups).any():
            raise ValueError(
                f"{self.name}{suffix} must put {columns // groups} input columns into each of {groups} groups, and it does not;"
                " uneven groups are not supported, so quantize the original again"
            )
        perm = group.argsort(stable=True)
        if perm.equal(torch.arange(columns)):
            return weight, None
        return pack(unpack(weight)[:, perm]), perm.int()


@dataclass(frozen=True)
class Scheme:
    """A checkpoint's format. group_sizes: -1 for a whole row; several where the config has several groups of layers."""

    suffixes: tuple[str, ...]
    read: Callable[[Layer, Scheme], Int4Tensor]
    group_sizes: tuple[int, ...]
    symmetric: bool
    version: str = ""
    act_order: bool = False


def require(method: str, settings: Mapping[str, Any], **wanted: Sequence[Any]) -> None:
    """Each setting must have one of its wanted values; the first is the default."""
    for name, values in wanted.items():
        value = settings.get(name, values[0])
        if value not in values:
            choice = " or ".join(repr(value) for value in values if value is not None)
            raise ValueError(f"this {method} checkpoint has {name}={value!r}; only {choice} can be read")


def as_bytes(words: Tensor) -> Tensor:
    """int32 [..., W] -> uint8 [..., 4 W], the lowest byte first: words of eight nibbles, lowest first, are canonical codes."""
    return words.contiguous().view(torch.uint8)


def nibbles(words: Tensor) -> Tensor:
    """int32 [..., W] -> their nibbles, the lowest first, uint8 [..., 8 W]."""
    return unpack(as_bytes(words))


def zero_points(zero: Tensor | None) -> Tensor | None:
    """Zero points, None where all of them are the symmetric one."""
    return None if zero is None or (zero == SYMMETRIC_ZERO).all() else zero.contiguous()
