"""Values as text that is equal in every process: plain ones as they are, code by its digest, others by their class."""

from __future__ import annotations

import functools
import hashlib
import operator
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.Size)
WRAPPERS = (
    MethodType, staticmethod, classmethod, property, functools.partial, functools.partialmethod,
    functools.cached_property, type(functools.lru_cache(lambda: None)),
)  # fmt: skip
WRAPPED = ("__func__", "fget", "fset", "func", "args", "keywords", "__wrapped__")  # what a wrapper calls and passes on
STOCK = "_specdec_stock"  # in the class that enable() gives a model: the model's own class

shape_dtype_device = operator.attrgetter("shape", "dtype", "device")


def describe(value: Any) -> str:
    if isinstance(value, PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, CodeType):
        return _code_digest(value)
    if isinstance(value, FunctionType):
        return f"function {value.__module__}.{value.__qualname__} {_code_digest(value.__code__)}"
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {shape_dtype_device(value)}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, WRAPPERS):
        return f"{type(value).__name__} of {describe(tuple(held_values(value)))}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(describe, value))}]"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(describe, value)))}}}"
    return f"{describe(own_class(value))} {getattr(value, '__qualname__', '')}"


def held_values(value: Any) -> list[Any]:
    """Of a function, the contents of its closure and its defaults; of a wrapper, what it calls and passes on."""
    if not isinstance(value, FunctionType):
        return [getattr(value, name) for name in WRAPPED if hasattr(value, name)]
    cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # without the empty ones
    return [*cells, value.__defaults__, value.__kwdefaults__]


def own_class(value: Any) -> type:
    """The class of a value; of an enabled model, the class that it had before."""
    cls: type = type(value).__dict__.get(STOCK, type(value))
    return cls


@functools.lru_cache(maxsize=4096)
def _code_digest(code: CodeType) -> str:
    """Of what a code object does; file name and line numbers do not count."""
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    parts = code.co_code.hex(), code.co_exceptiontable.hex(), describe(code.co_consts), counts, names
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
