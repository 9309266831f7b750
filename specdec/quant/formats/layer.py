"""What the formats share: checked access to settings and to a layer's tensors, and the description of a format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from specdec.quant.int4 import GROUP_SIZES, SYMMETRIC_ZERO, Int4Tensor, pack, unpack

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DOWNLOAD_AGAIN = "the checkpoint is damaged or incomplete, so download it again"


@dataclass(frozen=True)
class Settings:
    """A quantization_config or a part of it; each setting is checked when it is read.

    subject: its name in errors. other_reader: the library that reads all variants of the format.
    """

    subject: str
    values: Mapping[str, Any]
    other_reader: str

    def one_of(self, name: str, *choices: Any, default: Any = ...) -> Any:
        """The value of a setting, one of `choices`; if it is not set, `default` if given, else the first choice."""
        value = self.values.get(name)
        if value is None:
            value = choices[0] if default is ... else default
        for choice in choices:
            if value == choice and isinstance(value, bool) == isinstance(choice, bool) and not isinstance(value, float):
                return choice
        listed = " or ".join(repr(choice) for choice in choices if choice is not None) or "null"
        raise ValueError(
            f"{self.subject} has {name}={value!r}; only {listed} can be read; {self.other_reader} reads others, or"
            " load the original in full precision, which is quantized while it loads"
        )

    def flag(self, name: str, default: bool) -> bool:
        """The value of a boolean setting."""
        return bool(self.one_of(name, default, not default))

    def group_size(self) -> int:
        """The value of group_size, -1 for a whole row."""
        return int(self.one_of("group_size", *GROUP_SIZES, default=128))

    def table(self, name: str) -> Settings:
        """A setting that is an object of settings; an empty one if it is not set."""
        value = self.values.get(name)
        if not isinstance(value, Mapping | None):
            raise ValueError(
                f"{self.subject} has {name}={value!r}, but it must be an object with names; is config.json damaged?"
            )
        return Settings(f"{name} of {self.subject}", value or {}, self.other_reader)

    def changed_by(self, table: Settings) -> Settings:
        """These settings, overridden by those of `table`; errors name the table."""
        return Settings(table.subject, {**self.values, **table.values}, self.other_reader)

    def pattern(self, text: str) -> re.Pattern[str]:
        """A compiled regular expression for names of layers."""
        try:
            return re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{self.subject} has {text!r}, which is no regular expression ({error}); correct it in config.json"
            ) from error


@dataclass(frozen=True)
class Layer:
    """The tensors of one quantized layer by the suffixes of their names; each is checked when it is taken."""

    name: str
    tensors: Mapping[str, Tensor]

    def take(self, suffix: str, dtypes: Sequence[torch.dtype], *shape: int | None) -> Tensor:
        """One tensor, which must have one of `dtypes` and the shape; None in the shape is any size but zero."""
        value = self.tensors.get(suffix)
        if value is None:
            raise ValueError(
                f"the checkpoint has {self.name}{min(self.tensors)} but no {self.name}{suffix}; {DOWNLOAD_AGAIN}"
            )
        fits = value.ndim == len(shape) and all(
            size in (None, found) for size, found in zip(shape, value.shape, strict=True)
        )
        if not fits or value.numel() == 0 or value.dtype not in dtypes:
            expected = (
                f"{' or '.join(map(str, dtypes))} [{', '.join('any' if size is None else str(size) for size in shape)}]"
            )
            raise ValueError(
                f"{self.name}{suffix} is {value.dtype} {list(value.shape)}, but must be {expected}; {DOWNLOAD_AGAIN}"
            )
        return value

    def groups(self, scheme: Scheme, suffix: str, columns: int, dim: int) -> int:
        """The number of groups along `dim` of the scales at `suffix`, checked against the scheme's group sizes."""
        counts = {
            1 if size == -1 else columns // size for size in scheme.group_sizes if size == -1 or columns % size == 0
        }
        if not counts or columns % 2:
            raise ValueError(
                f"{self.name} has {columns} input columns, which group_size={scheme.group_sizes[0]} does not divide; a"
                " last group of another width is not supported, so quantize the original with one of"
                f" {GROUP_SIZES} that divides them"
            )
        found = self.take(suffix, FLOAT_DTYPES, None, None).shape[dim]
        if found not in counts:
            raise ValueError(
                f"{self.name}{suffix} has {found} groups, but {columns} input columns in groups of"
                f" {scheme.group_sizes[0]} make {min(counts)}; is group_size in the checkpoint's config right?"
            )
        return found

    def group_of_columns(self, suffix: str, columns: int, groups: int) -> Tensor:
        """The group of each input column, int64 [columns], from the tensor at `suffix`; in order if there is none."""
        if suffix not in self.tensors:
            return torch.arange(columns) // (columns // groups)
        group = self.take(suffix, (torch.int32, torch.int64), columns).long()
        is_in_range = ((group >= 0) & (group < groups)).all()
        if not is_in_range or (group.bincount(minlength=groups) != columns // groups).any():
            raise ValueError(
                f"{self.name}{suffix} must put {columns // groups} input columns into each of {groups} groups, and it"
                " does not; uneven groups are not supported, so quantize the original again"
            )
        return group

    def ordered(self, suffix: str, weight: Tensor, groups: int) -> tuple[Tensor, Tensor | None]:
        """Sort the columns of codes [N, K/2] by the groups at `suffix`: -> codes, and perm [K], None if unchanged."""
        perm = self.group_of_columns(suffix, 2 * weight.shape[1], groups).argsort(stable=True)
        if perm.equal(torch.arange(len(perm))):
            return weight, None
        return pack(unpack(weight)[:, perm]), perm.int()


@dataclass(frozen=True)
class Override:
    """An exception for some layers. matches: their names. changes: fields of their Scheme; None: full precision."""

    matches: Callable[[str], Any]
    changes: Mapping[str, Any] | None


@dataclass(frozen=True)
class Scheme:
    """A checkpoint's format, or one layer's.

    suffixes: of the names of a layer's tensors. read: a layer's tensors -> its weight, in float32 if bits is not 4.
    group_sizes: -1 for a whole row; several if the config has several groups of layers. has_activation_scales: a tensor
    `.scales` of an activation function divides its output. overrides: the first that matches applies.
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

    def for_layer(self, name: str) -> Scheme | None:
        """The scheme of a layer, None if it is in full precision."""
        for override in self.overrides:
            if override.matches(name):
                return None if override.changes is None else replace(self, **override.changes)
        return self


def as_bytes(words: Tensor) -> Tensor:
    """int32 [..., W] -> uint8 [..., 4 W], the lowest byte first; words of nibbles, lowest first, give packed codes."""
    return words.contiguous().view(torch.uint8)


def codes_of(words: Tensor, bits: int = 4) -> Tensor:
    """int32 [..., W] -> their codes of 2, 4 or 8 bits, the lowest first, uint8 [..., 32 / bits * W]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (as_bytes(words)[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def zero_points(zero: Tensor | None) -> Tensor | None:
    """Zero points for an Int4Tensor: None if all are the symmetric one."""
    return None if zero is None or (zero == SYMMETRIC_ZERO).all() else zero.contiguous()
