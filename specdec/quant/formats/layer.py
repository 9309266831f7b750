"""What the formats share: settings and one layer's tensors, checked as they are taken, and the description of a format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specdec.quant.int4 import GROUP_SIZES, SYMMETRIC_ZERO, Int4Tensor, pack, unpack

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
AGAIN = "the checkpoint is damaged or incomplete, so download it again"


@dataclass(frozen=True)
class Settings:
    """A quantization_config or a part of it; what is read is checked, and ValueError says what was given and what to do.

    subject: what an error calls it. other_reader: what reads the format in all its forms.
    """

    subject: str
    values: Mapping[str, Any]
    other_reader: str

    def one_of(self, name: str, *choices: Any, default: Any = ...) -> Any:
        """The choice that a setting has; where it is not set, `default` if given, else the first one."""
        value = self.values.get(name)
        if value is None:
            value = choices[0] if default is ... else default
        for choice in choices:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool) and not isinstance(value, float):
                return choice
        listed = " or ".join(repr(choice) for choice in choices if choice is not None) or "null"
        raise ValueError(
            f"{self.subject} has {name}={value!r}; only {listed} can be read; {self.other_reader} reads others, or load the"
            " original in full precision, which is quantized while it loads"
        )

    def flag(self, name: str, default: bool) -> bool:
        """A setting that is true or false."""
        return bool(self.one_of(name, default, not default))

    def group_size(self) -> int:
        return int(self.one_of("group_size", *GROUP_SIZES, default=128))

    def table(self, name: str) -> Settings:
        """A setting that has settings of its own; an empty one where it is not set."""
        value = self.values.get(name)
        if not isinstance(value, Mapping | None):
            raise ValueError(
                f"{self.subject} has {name}={value!r}, but it must be an object with names; is config.json whole?"
            )
        return Settings(f"{name} of {self.subject}", value or {}, self.other_reader)

    def changed_by(self, table: Settings) -> Settings:
        """These settings with those of `table` in their place, where it has some; errors name the table."""
        return Settings(table.subject, {**self.values, **table.values}, self.other_reader)

    def pattern(self, text: str) -> re.Pattern[str]:
        """A regular expression that a setting has for names of layers."""
        try:
            return re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{self.subject} has {text!r}, which is no regular expression ({error}); correct it"
            ) from error


@dataclass(frozen=True)
class Layer:
    """The tensors of one quantized layer, by the ends of their names; each is checked when it is taken."""

    name: str
    tensors: Mapping[str, Tensor]

    def take(self, suffix: str, dtypes: Sequence[torch.dtype], *shape: int | None) -> Tensor:
        """One tensor; None in its shape stands for any number but zero."""
        value = self.tensors.get(suffix)
        if value is None:
            raise ValueError(f"there is no {self.name}{suffix} beside {self.name}{min(self.tensors)}; {AGAIN}")
        fits = value.ndim == len(shape) and all(
            want in (None, got) for want, got in zip(shape, value.shape, strict=True)
        )
        if not fits or value.numel() == 0 or value.dtype not in dtypes:
            expected = (
                f"{' or '.join(map(str, dtypes))} [{', '.join('any' if size is None else str(size) for size in shape)}]"
            )
            raise ValueError(
                f"{self.name}{suffix} is {value.dtype} {list(value.shape)}, but must be {expected}; {AGAIN}"
            )
        return value

    def groups(self, scheme: Scheme, suffix: str, columns: int, dim: int) -> int:
        """How many groups the scales at `suffix` have along `dim`, as the scheme has it for so many columns."""
        counts = {
            1 if size == -1 else columns // size for size in scheme.group_sizes if size == -1 or columns % size == 0
        }
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

    def group_of_columns(self, suffix: str, columns: int, groups: int) -> Tensor:
        """The group of each input column, int64 [columns], from `suffix`; in their order where there is no such tensor."""
        if suffix not in self.tensors:
            return torch.arange(columns) // (columns // groups)
        group = self.take(suffix, (torch.int32, torch.int64), columns).long()
        inside = ((group >= 0) & (group < groups)).all()
        if not inside or (group.bincount(minlength=groups) != columns // groups).any():
            raise ValueError(
                f"{self.name}{suffix} must put {columns // groups} input columns into each of {groups} groups, and it does not;"
                " uneven groups are not supported, so quantize the original again"
            )
        return group

    def ordered(self, suffix: str, weight: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
        """Canonical codes [N, K/2] and perm: columns by the group that `suffix` gives each, where that is not their own order."""
        perm = self.group_of_columns(suffix, 2 * weight.shape[1], groups).argsort(stable=True)
        if perm.equal(torch.arange(len(perm))):
            return weight, None
        return pack(unpack(weight)[:, perm]), perm.int()


@dataclass(frozen=True)
class Override:
    """What differs for the layers of some names. changes: fields of their Scheme; None: they are in full precision."""

    matches: Callable[[str], Any]
    changes: Mapping[str, Any] | None


@dataclass(frozen=True)
class Scheme:
    """A checkpoint's format, or one layer's.

    suffixes: the ends of the names of a layer's tensors. read: these tensors -> the weight, in float32 where bits is not 4.
    group_sizes: -1 for a whole row; several where the config has several groups of layers. has_activation_scales: a tensor
    `.scales` alone, at an activation function, divides what comes out of it. overrides: the first that matches counts.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Layer, Scheme], Int4Tensor | Tensor]
    group_sizes: tuple[int, ...]
    symmetric: bool
    bits: int = 4
    version: str = ""
    act_order: bool = False
    has_activation_scales: bool = False
    overrides: Sequence[Override] = field(default=())

    def of(self, name: str) -> Scheme | None:
        """The scheme of the layer of that name, None where it is left in full precision."""
        for override in self.overrides:
            if override.matches(name):
                return None if override.changes is None else replace(self, **override.changes)
        return self


def as_bytes(words: Tensor) -> Tensor:
    """int32 [..., W] -> uint8 [..., 4 W], the lowest byte first: words of eight nibbles, lowest first, are canonical codes."""
    return words.contiguous().view(torch.uint8)


def codes_of(words: Tensor, bits: int = 4) -> Tensor:
    """int32 [..., W] -> the codes of 2, 4 or 8 bits in them, the lowest first, uint8 [..., 32 / bits * W]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (as_bytes(words)[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def zero_points(zero: Tensor | None) -> Tensor | None:
    """Zero points, None where all of them are the symmetric one."""
    return None if zero is None or (zero == SYMMETRIC_ZERO).all() else zero.contiguous()
