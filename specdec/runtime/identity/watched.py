"""Containers that are compared with what they held: dicts, lists and sets, through a view of what counts in them."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from specdec.runtime.identity.digest import PLAIN, describe, own_class, shape_dtype_device
from specdec.runtime.identity.hooks import HOOKS

# Attributes that no forward reads, that are compared elsewhere (the attention implementation), or that cache an answer.
IGNORED = frozenset({
    "name_or_path", "_name_or_path", "generation_config", "hf_quantizer", "warnings_issued", "transformers_version",
    "_attn_implementation_internal", "_attn_implementation", "_specdec_state", "_commit_hash",
    "_output_capturing_hooks_installed", "_can_set_attn_implementation_cached_value",
    "_can_set_experts_implementation_cached_value",
})  # fmt: skip
# Attributes that depend on how a model was made (built, loaded, quantized in memory) and not on what it computes: they
# are compared, but are not part of the digest.
NOT_IN_DIGEST = IGNORED | {
    "_is_hf_initialized", "_weight_conversions", "is_quantized", "quantization_method", "hf_device_map", "loss_type",
    "all_tied_weights_keys", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_no_split_modules",
    "_skip_keys_device_placement", "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_save", "_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan", "_apply", "architectures",
}  # fmt: skip
# An nn.Module's own attributes: tensors, submodules and forward hooks are watched separately, the rest does not count.
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
MISSING: Any = object()


class Watched:
    """A dict, list or set, and what it held.

    kind: of its entries, "attribute" (path.key), "item" (path[key]), "tensor", "version", "code" or a name of hooks.
    view: what counts in the container, by key. grows: entries that are added do not count.
    quick: takes less time than the view, and differs wherever the view differs.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        container: Any,
        view: Callable[[Any], dict[Any, Any]],
        grows: bool = False,
        quick: Callable[[Any], Any] | None = None,
    ) -> None:
        self.path, self.kind, self.container, self.view, self.grows = path, kind, container, view, grows
        self.quick = quick or view
        self.before, self.quick_before = view(container), self.quick(container)

    def name(self, key: Any) -> str:
        if self.kind == "code":
            return f"the code of {last_name(key.__globals__)}.{key.__qualname__}"
        return f"{self.path}[{_short(key)}]" if self.kind == "item" else join(self.path, str(key))

    def change(self) -> str | None:
        """The first change in words; None where nothing changed that counts."""
        now = self.view(self.container)
        for key in self.before if self.grows else self.before | now:
            value, before = now.get(key, MISSING), self.before.get(key, MISSING)
            if _equal(value, before):
                continue
            if self.kind in HOOKS.values():
                return f"a {self.kind} is {'no longer ' if value is MISSING else ''}on {self.path or 'the model'}"
            if self.kind == "version":
                return f"{key} was written to"
            if value is MISSING or before is MISSING:
                return f"{self.name(key)} was {'added' if before is MISSING else 'removed'}"
            new, old = map(_tensor_in_words if self.kind == "tensor" else _short, (value, before))
            return f"{self.name(key)} " + ("was replaced" if new == old else f"is {new} and was {old}")
        self.before, self.quick_before = now, self.quick(self.container)
        return None

    def lines(self) -> list[str]:
        """What it held as text for a digest, without anything that depends on the process, a path or an address."""
        if self.kind == "version":
            return []
        keys = self.before.keys() - (NOT_IN_DIGEST if self.kind == "attribute" else frozenset())
        return [f"{self.kind} {self.path} {describe(key)} = {describe(self.before[key])}" for key in keys]


def attribute_view(state: dict[str, Any]) -> dict[str, Any]:
    """An object's __dict__; a copy of it is read, since a forward in another thread may set the attention meanwhile."""
    return {name: value for name, value in dict(state).items() if name not in IGNORED and name not in OF_EVERY_MODULE}


def model_view(model: Any) -> dict[str, Any]:
    """A model, given as a weak reference."""
    return {**attribute_view(vars(model())), "__class__": own_class(model())}


def class_view(namespace: Any) -> dict[str, Any]:
    """A class, without the plain values that Python stores under names with two leading underscores."""
    return {name: value for name, value in attribute_view(namespace).items() if name[:2] != "__" or callable(value)}


def selected(path: str, names: frozenset[str], namespace: Any) -> Watched:
    """A namespace of which only these names count."""
    view = functools.partial(_select, names)
    present = sorted(view(namespace))
    quick = operator.itemgetter(*present, present[0]) if present else None  # two names or more: it returns a tuple
    return Watched(path, "attribute", namespace, view, quick=quick)


def _select(names: frozenset[str], namespace: Any) -> dict[str, Any]:
    return {name: namespace[name] for name in names if name in namespace}


def item_view(container: Any) -> dict[Any, Any]:
    """A whole dict, list or set."""
    if isinstance(container, dict):
        return dict(dict.items(container))  # without the __getitem__ of a subclass, which transformers' ACT2FN has
    return {value: value for value in set(container)} if isinstance(container, set) else dict(enumerate(container))


def copy_of(container: Any) -> Any:
    return item_view(container) if isinstance(container, dict) else container.copy()


def type_view(objects: list[tuple[str, Any]]) -> dict[str, type]:
    return {path: type(value) for path, value in objects}


def tensor_view(dicts: list[tuple[str, dict[str, Any]]]) -> dict[str, tuple[Any, ...]]:
    """Parameters and buffers by name: class, (shape, dtype, device), strides, and the tensor it is tied to."""
    by_name = {path + name: owner[name] for path, owner in dicts for name in owner if owner[name] is not None}
    values = by_name.values()
    try:
        strides: list[Any] = list(map(Tensor.stride, values))
        addresses = list(map(Tensor.data_ptr, values))
    except Exception:  # a sparse tensor has no strides, and a subclass may have no storage of its own
        strides = [tensor.stride() if tensor.layout == torch.strided else () for tensor in values]
        addresses = list(map(id, values))
    first: dict[int, str] = {}
    earlier = [first.setdefault(address, name) for name, address in zip(by_name, addresses, strict=True)]
    ties = [None if owner == name else owner for name, owner in zip(by_name, earlier, strict=True)]
    layouts = zip(map(type, values), map(shape_dtype_device, values), strides, ties, strict=True)
    return dict(zip(by_name, layouts, strict=True))


def address_view(dicts: list[dict[str, Any]]) -> list[Any]:
    """Parameters and buffers, and their addresses, shapes and strides: less time than `tensor_view`.

    A tensor that is the same object at the same address keeps its dtype and device.
    """
    values = [tensor for owner in dicts for tensor in owner.values() if tensor is not None]
    return [values, *(list(map(read, values)) for read in (Tensor.data_ptr, Tensor.size, Tensor.stride))]


def version_view(tensors: list[tuple[str, Tensor]]) -> dict[str, int | None]:
    return {path: None if tensor.is_inference() else tensor._version for path, tensor in tensors}


def namespace_name(namespace: dict[str, Any]) -> str:
    """The name of the module whose globals these are."""
    return str(namespace.get("__name__", "?"))


def last_name(namespace: dict[str, Any]) -> str:
    return namespace_name(namespace).rpartition(".")[-1]


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _equal(now: Any, before: Any) -> bool:
    if now is before:
        return True
    try:  # specdec's own objects, such as a layer's kernel, are made again with the weights
        return type(now) is type(before) and (type(now).__module__.startswith("specdec.") or bool(now == before))
    except Exception:  # the comparison of tensors
        return False


def _short(value: Any) -> str:
    if inspect.isroutine(value):
        return "a function"
    if isinstance(value, (*PLAIN, dict, list, tuple, set)):
        return f"{value!r:.60}"
    return f"a {(value if isinstance(value, type) else type(value)).__name__}"


def _tensor_in_words(layout: tuple[Any, ...]) -> str:
    cls, (shape, dtype, device), strides, tied_to = layout
    name = "" if issubclass(nn.Parameter, cls) else f" ({cls.__name__})"
    tie = "" if tied_to is None else f", tied to {tied_to}"
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} with strides {list(strides)} on {device}{name}{tie}"
