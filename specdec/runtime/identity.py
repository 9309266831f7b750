"""What a model's forward depends on, apart from the values of its weights.

A compiled or recorded forward is a copy of what a model once did. `Identity` is a snapshot of what it was made from.
One walk takes it: from the model through modules, attributes, configs, containers and classes to functions, and from a
function to the globals that it names. Each stop is a dict, list or set that is kept with a shallow copy: `change`
compares all of them in a fraction of a millisecond, `digest` names them across processes. Code is taken from code
objects, which are what runs, and not from source files.

The walk does not enter libraries, nor transformers outside its models: whoever uses a digest adds their versions.
Of a library's class only `forward` and `__call__` count, and of its other code the functions that a walked one names.

What it does not see: a patch deeper inside a library; what is added to a module's globals or to a table there, which
may be a cache; values in `__slots__`, and variables of a closure that are assigned anew.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import operator
import sys
import weakref
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

LIBRARIES = frozenset(sys.stdlib_module_names) | {
    "torch", "functorch", "torchgen", "triton", "numpy", "specdec", "specdec_kernels", "accelerate", "huggingface_hub",
    "packaging",
}  # fmt: skip
MODELING = ("transformers.models.", "transformers.activations")  # the modules of transformers that the walk enters
# Attributes that no forward reads, that are compared elsewhere (the attention implementation), or that cache an answer.
IGNORED = frozenset({
    "name_or_path", "_name_or_path", "generation_config", "hf_quantizer", "warnings_issued", "transformers_version",
    "_attn_implementation_internal", "_attn_implementation", "_specdec_lent", "_specdec_state", "_commit_hash",
    "_output_capturing_hooks_installed", "_can_set_attn_implementation_cached_value",
    "_can_set_experts_implementation_cached_value",
})  # fmt: skip
# Attributes that differ with how a model came to be (built, loaded, quantized in memory) and not with what it computes.
UNNAMED = IGNORED | {
    "_is_hf_initialized", "_weight_conversions", "is_quantized", "quantization_method", "hf_device_map", "loss_type",
    "all_tied_weights_keys", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_no_split_modules",
    "_skip_keys_device_placement", "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_save", "_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan", "_apply", "architectures",
}  # fmt: skip
HOOKS = {"_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook"}
GLOBAL_HOOKS: dict[str, Any] = {
    "forward hook": torch.nn.modules.module._global_forward_hooks,
    "forward pre-hook": torch.nn.modules.module._global_forward_pre_hooks,
}
# transformers leaves these on a model that was once asked for hidden states; they do nothing where nobody asks
INERT_HOOKS = "transformers.utils.output_capturing"
# An nn.Module's own attributes: tensors, submodules and forward hooks are watched apart, the rest does not count.
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.Size)
CALLED = frozenset({"forward", "__call__", "_call_impl"})  # the methods of a library's class that count
LARGEST_CONTAINER = 1024  # values of a container that the walk enters
MISSING: Any = object()

_STOCK = "_specdec_stock"  # in the class that enable() gives a model: the model's own class
_form = operator.attrgetter("shape", "dtype", "device")
_CACHED_FUNCTION = type(functools.lru_cache(lambda: None))
_WRAPPERS = (
    MethodType, staticmethod, classmethod, property, functools.partial, functools.partialmethod,
    functools.cached_property, _CACHED_FUNCTION,
)  # fmt: skip
_WRAPPED = ("__func__", "fget", "fset", "func", "args", "keywords", "__wrapped__")


class Identity:
    """A snapshot of a model. It keeps the parts of the model alive, but not the model itself.

    Four-bit layers enter the layout of their device's kernel first, as their first forward would have them do.
    """

    def __init__(self, model: nn.Module) -> None:
        enter_layouts(model)
        self._model = weakref.ref(model)
        self._whole: list[_Watched] = []  # compared with a copy
        self._viewed: list[_Watched] = []  # compared through their views, since the rest of them changes often
        self._objects: list[tuple[str, Any]] = []  # modules, configs and the like, by path
        self._tensor_dicts: list[tuple[str, dict[str, Any]]] = []  # a module's parameters or buffers, by its prefix
        self._other_tensors: list[tuple[str, Tensor]] = []
        self._functions: list[FunctionType] = []
        self._walk(model)
        self._live = [watched.live for watched in self._whole]
        self._copies = list(map(_copy, self._live))

    def change(self) -> str | None:
        """None while the model is what it was, else what changed first, in words."""
        model = self._model()
        if model is None:
            return "the model is gone"
        try:
            if self._is_same():
                return None
        except Exception:  # of two tensors, which `_find` tells apart by identity
            pass
        try:
            enter_layouts(model)  # weights that were loaded anew came in the canonical layout
            return self._find()
        except Exception as error:  # of a value, or of a thread that is changing the model just now
            return f"it could not be compared with what it was ({type(error).__name__}: {error})"

    def is_part_of(self, model: nn.Module) -> bool:
        """Whether the tensors that it keeps alive are the model's anyway."""
        held = {id(tensor) for _, tensors in self._tensor_dicts for tensor in tensors.values()}
        return held <= {id(tensor) for tensor in (None, *model.parameters(), *model.buffers())}

    @functools.cached_property
    def digest(self) -> str:
        """32 hexadecimal digits, equal in every process for an equal model."""
        return hashlib.sha256("\n".join(sorted(self._lines())).encode()).hexdigest()[:32]

    def _walk(self, model: nn.Module) -> None:
        self._waiting: list[tuple[str, Any, bool]] = []  # paths, values, and whether a module's globals led to them
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}  # namespaces, and the names that functions use
        for name, hooks in GLOBAL_HOOKS.items():
            self._whole.append(_Watched("all modules", name, hooks, _active))
        # by reference, since specdec's own attributes of an enabled model lead back to it
        self._watch(_Watched("", "attribute", self._model, _attributes_of_model), self._viewed)
        self._add_module("", model)
        seen = {id(model)}
        for path, value, is_global in self._waiting:  # which grows meanwhile
            if id(value) not in seen and not isinstance(value, (*PLAIN, ModuleType)):
                seen.add(id(value))
                self._add(path, value, is_global)
        for namespace, names in self._globals.values():
            self._viewed.append(_picked(_last_name(namespace), frozenset(names), namespace))
        self._viewed += [
            _Watched(
                "", "attribute", self._objects, _types, quick=lambda objects: [type(value) for _, value in objects]
            ),
            _Watched("", "tensor", self._tensor_dicts, _tensors, quick=_places),
            _Watched("", "version", self._other_tensors, _versions),
            _Watched("", "code", self._functions, lambda functions: {one: one.__code__ for one in functions}),
        ]
        del self._waiting, self._globals

    def _add(self, path: str, value: Any, is_global: bool) -> None:
        """Add a value, and let what it leads to wait."""
        if isinstance(value, Tensor):
            self._other_tensors.append((path, value))
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, FunctionType):
            self._add_function(path, value)
        elif isinstance(value, _WRAPPERS):
            self._waiting += [(path, part, is_global) for part in _held(value)]
        elif isinstance(value, dict | list | set):
            self._watch(_Watched(path, "item", value, _items, grows=is_global), self._whole)
        elif isinstance(value, tuple | frozenset):
            self._waiting += [(f"{path}[{index}]", held, is_global) for index, held in enumerate(value)]
        elif isinstance(state := getattr(value, "__dict__", None), dict) and (
            isinstance(value, nn.Module) or not _is_library(type(value).__module__)
        ):
            self._objects.append((path, value))
            attributes = _Watched(path, "attribute", state, _attributes, grows=is_global)
            self._watch(attributes, self._viewed if IGNORED & state.keys() else self._whole)
            if isinstance(value, nn.Module):
                self._add_module(path, value)
            else:
                self._waiting.append(("", _class_of(value), False))

    def _watch(self, watched: _Watched, among: list[_Watched]) -> None:
        among.append(watched)
        names = watched.was.keys() - (UNNAMED | OF_EVERY_MODULE if watched.kind == "attribute" else frozenset())
        if len(names) <= LARGEST_CONTAINER:
            self._waiting += [(watched.name(key), watched.was[key], watched.grows) for key in sorted(names, key=str)]

    def _add_module(self, path: str, module: nn.Module) -> None:
        for attribute, name in HOOKS.items():
            self._whole.append(_Watched(path, name, vars(module)[attribute], _active))
        self._tensor_dicts += [(_join(path, ""), vars(module)[attribute]) for attribute in ("_parameters", "_buffers")]
        self._watch(_Watched(path, "attribute", module._modules, _items), self._whole)
        self._waiting.append(("", _class_of(module), False))

    def _add_class(self, cls: type) -> None:
        if _is_own(cls.__module__):
            self._watch(_Watched(cls.__name__, "attribute", vars(cls), _members), self._whole)
        elif names := CALLED & vars(cls).keys():
            self._watch(_picked(cls.__name__, names, vars(cls)), self._viewed)
        self._waiting += [("", base, False) for base in cls.__bases__]

    def _add_function(self, path: str, function: FunctionType) -> None:
        """Its code, what decorators left in its closure, its defaults, and the globals that it names.

        In a library's namespace only functions count, and the walk ends at them unless they are a patch of the user's.
        """
        self._functions.append(function)
        is_own = _is_own(_name(function.__globals__))
        self._waiting += [(path, value, True) for value in _held(function) if is_own or callable(value)]
        names, attributes = _names(function.__code__)
        namespaces = [(function.__globals__, names)]
        for namespace, wanted in namespaces:  # which grows by the modules that are named
            is_own = _is_own(_name(namespace))
            for name in sorted(wanted & namespace.keys()):
                value = namespace[name]
                if isinstance(value, ModuleType):
                    is_torch = value.__name__.partition(".")[0] == "torch" and not name.startswith("_")
                    if (is_torch or _is_own(value.__name__)) and all(vars(value) is not one for one, _ in namespaces):
                        namespaces.append((vars(value), attributes))
                elif is_own or inspect.isroutine(value):
                    self._globals.setdefault(id(namespace), (namespace, set()))[1].add(name)
                    if is_own or _is_own(_name(getattr(value, "__globals__", {"__name__": "torch"}))):
                        self._waiting.append((f"{_last_name(namespace)}.{name}", value, True))

    def _is_same(self) -> bool:
        """Fast. False also where a change does not count, which `_find` finds out."""
        return self._live == self._copies and all(one.quick(one.live) == one.quick_was for one in self._viewed)

    def _find(self) -> str | None:
        """Slow: the first change in words. None where none counts; the next call compares with what there is now."""
        copies = list(map(_copy, self._live))
        found = next(filter(None, (watched.change() for watched in (*self._whole, *self._viewed))), None)
        if found is None:
            self._copies = copies
        return found

    def _lines(self) -> Iterator[str]:
        """All of it as text; nothing of a process, a path or an address."""
        for watched in (*self._whole, *self._viewed):
            for key in watched.was.keys() - (UNNAMED if watched.kind == "attribute" else ()):
                if watched.kind != "version":
                    yield f"{watched.kind} {watched.path} {_describe(key)} = {_describe(watched.was[key])}"
        for function in self._functions:
            yield f"{_describe(function)} {_describe(tuple(_held(function)))}"


class _Watched:
    """A dict, list or set, and what it held.

    kind: of its keys, "attribute" (path.key), "item" (path[key]), "tensor", "version", "code" or a name of hooks.
    view: what counts of it, by key. grows: what is added to it does not count. quick: takes less time than the view, and
    differs where the view may.
    """

    def __init__(
        self,
        path: str,
        kind: str,
        live: Any,
        view: Callable[[Any], dict[Any, Any]],
        grows: bool = False,
        quick: Callable[[Any], Any] | None = None,
    ) -> None:
        self.path, self.kind, self.live, self.view, self.grows = path, kind, live, view, grows
        self.quick = quick or view
        self.was, self.quick_was = view(live), self.quick(live)

    def name(self, key: Any) -> str:
        if self.kind == "code":
            return f"the code of {_last_name(key.__globals__)}.{key.__qualname__}"
        return f"{self.path}[{_short(key)}]" if self.kind == "item" else _join(self.path, str(key))

    def change(self) -> str | None:
        now = self.view(self.live)
        for key in self.was if self.grows else self.was | now:
            value, before = now.get(key, MISSING), self.was.get(key, MISSING)
            if _equal(value, before):
                continue
            if self.kind in HOOKS.values():
                return f"a {self.kind} is {'no longer ' if value is MISSING else ''}on {self.path or 'the model'}"
            if self.kind == "version":
                return f"{key} was written to"
            if value is MISSING or before is MISSING:
                return f"{self.name(key)} was {'added' if before is MISSING else 'removed'}"
            words, other = map(_tensor_in_words if self.kind == "tensor" else _short, (value, before))
            return f"{self.name(key)} " + ("was replaced" if words == other else f"is {words} and was {other}")
        self.was, self.quick_was = now, self.quick(self.live)
        return None


def opaque(model: nn.Module) -> str | None:
    """Why a compiled copy of a forward would miss part of it: a hook, or a forward of one instance; else None."""
    replaced = (path for path, module in model.named_modules() if {"forward", "_call_impl"} & vars(module).keys())
    return hooked(model) or next((f"the forward of {path or 'the model'} was replaced" for path in replaced), None)


def hooked(model: nn.Module) -> str | None:
    """Which hook a copy of a forward would not call, None where there is none; hooks of every module included."""
    for name, hooks in GLOBAL_HOOKS.items():
        if hooks:
            return f"a {name} is on all modules"
    for path, module in model.named_modules():
        for attribute, name in HOOKS.items():
            if (hooks := vars(module)[attribute]) and _active(hooks):
                return f"a {name} is on {path or 'the model'}"
        if "_hf_hook" in vars(module):
            return f"a hook of accelerate's is on {path or 'the model'}"
    return None


def enter_layouts(model: nn.Module) -> None:
    """Bring 4-bit layers to the kernels that there are now, whether or not they have been called."""
    for module in model.modules():
        getattr(type(module), "choose_kernel", lambda layer: None)(module)


def _attributes(state: dict[str, Any]) -> dict[str, Any]:
    """Of a copy, since another thread's forward may set its attention meanwhile."""
    return {name: value for name, value in dict(state).items() if name not in IGNORED and name not in OF_EVERY_MODULE}


def _attributes_of_model(model: Any) -> dict[str, Any]:
    return {**_attributes(vars(model())), "__class__": _class_of(model())}


def _members(namespace: Any) -> dict[str, Any]:
    """Of a class: without what Python notes in it under names with two underscores."""
    return {name: value for name, value in _attributes(namespace).items() if name[:2] != "__" or callable(value)}


def _pick(names: frozenset[str], namespace: Any) -> dict[str, Any]:
    return {name: namespace[name] for name in names if name in namespace}


def _picked(path: str, names: frozenset[str], namespace: Any) -> _Watched:
    """Some names of a namespace."""
    view = functools.partial(_pick, names)
    there = sorted(view(namespace))
    quick = operator.itemgetter(*there, there[0]) if there else None  # of two names or more it gives a tuple
    return _Watched(path, "attribute", namespace, view, quick=quick)


def _types(objects: list[tuple[str, Any]]) -> dict[str, type]:
    return {path: type(value) for path, value in objects}


def _places(dicts: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Parameters and buffers, where they lie, and their shapes and strides: the form of one that stays there stays."""
    tensors = [tensor for _, held in dicts for tensor in held.values() if tensor is not None]
    return [tensors, *(list(map(of, tensors)) for of in (Tensor.data_ptr, Tensor.size, Tensor.stride))]


def _active(hooks: dict[int, Any]) -> dict[int, Any]:
    return dict(enumerate(one for one in hooks.values() if getattr(one, "__module__", None) != INERT_HOOKS))


def _items(container: Any) -> dict[Any, Any]:
    if isinstance(container, dict):
        return dict(dict.items(container))  # past a subclass's __getitem__, which transformers' ACT2FN has
    return {value: value for value in set(container)} if isinstance(container, set) else dict(enumerate(container))


def _copy(container: Any) -> Any:
    return _items(container) if isinstance(container, dict) else container.copy()


def _tensors(dicts: list[tuple[str, dict[str, Any]]]) -> dict[str, tuple[Any, ...]]:
    """Of parameters and buffers by name: class, form, strides, and which earlier one lies in the same place."""
    named = {path + name: held[name] for path, held in dicts for name in held if held[name] is not None}
    tensors = named.values()
    try:
        strides: list[Any] = list(map(Tensor.stride, tensors))
        places = list(map(Tensor.data_ptr, tensors))
    except Exception:  # a sparse tensor has no strides, and a subclass may have no storage of its own
        strides = [tensor.stride() if tensor.layout == torch.strided else () for tensor in tensors]
        places = list(map(id, tensors))
    first: dict[int, str] = {}
    earlier = [first.setdefault(place, name) for name, place in zip(named, places, strict=True)]
    ties = [None if one == name else one for name, one in zip(named, earlier, strict=True)]
    return dict(zip(named, zip(map(type, tensors), map(_form, tensors), strides, ties, strict=True), strict=True))


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in LIBRARIES


def _is_own(module: str) -> bool:
    """Whether the walk enters a module's code."""
    is_modeling = module.startswith(MODELING) and not module.startswith("transformers.models.auto.")
    return not _is_library(module) and (module.partition(".")[0] != "transformers" or is_modeling)


def _class_of(value: Any) -> type:
    cls: type = type(value).__dict__.get(_STOCK, type(value))
    return cls


def _versions(tensors: list[tuple[str, Tensor]]) -> dict[str, int | None]:
    return {path: None if tensor.is_inference() else tensor._version for path, tensor in tensors}


def _name(namespace: dict[str, Any]) -> str:
    """Of the module whose globals these are."""
    return str(namespace.get("__name__", "?"))


def _last_name(namespace: dict[str, Any]) -> str:
    return _name(namespace).rpartition(".")[-1]


def _held(value: Any) -> list[Any]:
    """The contents of a function's closure and its defaults; what a wrapper passes on to."""
    if not isinstance(value, FunctionType):
        return [getattr(value, name) for name in _WRAPPED if hasattr(value, name)]
    cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]  # and not those yet empty
    return [*cells, value.__defaults__, value.__kwdefaults__]


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals that a function and those within it name; and all that they name, attributes too."""
    loads = [one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    names, attributes = frozenset(name for name in loads if not name.startswith("__")), frozenset(code.co_names)
    for inner in (_names(one) for one in code.co_consts if isinstance(one, CodeType)):
        names, attributes = names | inner[0], attributes | inner[1]
    return names, attributes


def _equal(now: Any, was: Any) -> bool:
    if now is was:
        return True
    try:  # specdec's own objects, as a layer's kernel, are made anew with the weights
        return type(now) is type(was) and (type(now).__module__.startswith("specdec.") or bool(now == was))
    except Exception:  # as of tensors
        return False


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _short(value: Any) -> str:
    if inspect.isroutine(value):
        return "a function"
    if isinstance(value, (*PLAIN, dict, list, tuple, set)):
        return f"{value!r:.60}"
    return f"a {(value if isinstance(value, type) else type(value)).__name__}"


def _tensor_in_words(row: tuple[Any, ...]) -> str:
    kind, (shape, dtype, device), strides, tied_to = row
    name = "" if issubclass(nn.Parameter, kind) else f" ({kind.__name__})"
    tie = "" if tied_to is None else f", tied to {tied_to}"
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} with strides {list(strides)} on {device}{name}{tie}"


def _describe(value: Any) -> str:
    """A value in the same words in every process: plain ones as they are, code by its digest, others by their class."""
    if isinstance(value, PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, CodeType):
        return _code_digest(value)
    if isinstance(value, FunctionType):
        return f"function {value.__module__}.{value.__qualname__} {_code_digest(value.__code__)}"
    if isinstance(value, Tensor):
        return f"{type(value).__name__} {_form(value)}"
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, _WRAPPERS):
        return f"{type(value).__name__} of {_describe(tuple(_held(value)))}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_describe, value))}]"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(_describe, value)))}}}"
    return f"{_describe(_class_of(value))} {getattr(value, '__qualname__', '')}"


@functools.lru_cache(maxsize=4096)
def _code_digest(code: CodeType) -> str:
    """Of what a code object does, without where it stands."""
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_name, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    parts = code.co_code.hex(), code.co_exceptiontable.hex(), _describe(code.co_consts), counts, names
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
