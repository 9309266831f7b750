"""What a model's forward depends on, apart from the values of its weights.

A compiled or recorded forward is a copy of the model's forward at one time. `Identity` is a snapshot of what that copy
was made from. It is taken in one walk: from the model through modules, attributes, configs, containers and classes to
functions, and from a function to the globals that it names. Every dict, list or set on the way is kept with a shallow
copy. `change` compares all of them in a fraction of a millisecond; `digest` identifies their content across processes.
Code is taken from code objects, which are what runs, and not from source files.

The walk does not enter libraries, nor transformers outside its models: users of a digest add the versions of those. Of
a library's class only `forward` and `__call__` count, and of a library's functions only those that walked code names.

Not detected: a patch deeper inside a library; entries added to a module's globals or to a table there, which may be a
cache; values in `__slots__`; and variables of a closure that are assigned again.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import sys
import weakref
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from specdec.runtime.identity.digest import PLAIN, WRAPPERS, describe, held_values, own_class
from specdec.runtime.identity.hooks import GLOBAL_HOOKS, HOOKS, active_hooks
from specdec.runtime.identity.watched import (
    IGNORED,
    NOT_IN_DIGEST,
    OF_EVERY_MODULE,
    Watched,
    address_view,
    attribute_view,
    class_view,
    copy_of,
    item_view,
    join,
    last_name,
    model_view,
    namespace_name,
    selected,
    tensor_view,
    type_view,
    version_view,
)

LIBRARIES = frozenset(sys.stdlib_module_names) | {
    "torch", "functorch", "torchgen", "triton", "numpy", "specdec", "specdec_kernels", "accelerate", "huggingface_hub",
    "packaging",
}  # fmt: skip
MODELING = ("transformers.models.", "transformers.activations")  # the modules of transformers that the walk enters
CALLED = frozenset({"forward", "__call__", "_call_impl"})  # the methods of a library's class that count
MAX_CONTAINER = 1024  # entries of the largest container whose values the walk enters


class Identity:
    """A snapshot of a model. It keeps the parts of the model alive, but not the model itself.

    4-bit layers enter the layout of their device's kernel first, as they would in their first forward.
    """

    def __init__(self, model: nn.Module) -> None:
        enter_layouts(model)
        self._model = weakref.ref(model)
        self._whole: list[Watched] = []  # compared with a copy
        self._viewed: list[Watched] = []  # compared through their views, since the rest of them changes often
        self._objects: list[tuple[str, Any]] = []  # modules, configs and the like, by path
        self._tensor_dicts: list[tuple[str, dict[str, Any]]] = []  # a module's parameters or buffers, by its prefix
        self._other_tensors: list[tuple[str, Tensor]] = []
        self._functions: list[FunctionType] = []
        self._walk(model)
        self._containers = [watched.container for watched in self._whole]
        self._containers += [owner for _, owner in self._tensor_dicts if not owner]  # `_is_same` has no view of these
        self._copies = list(map(copy_of, self._containers))

    def change(self) -> str | None:
        """None while the model is what it was, else the first change in words."""
        model = self._model()
        if model is None:
            return "the model is gone"
        try:
            if self._is_same():
                return None
        except Exception:  # tensors do not compare to one truth value; `_find_change` compares them by identity
            pass
        try:
            enter_layouts(model)  # weights that were loaded again have the canonical layout
            return self._find_change()
        except Exception as error:  # a value's own error, or a thread that is changing the model at this time
            return f"it could not be compared with what it was ({type(error).__name__}: {error})"

    @property
    def placement(self) -> object:
        """The same object as long as no parameter or buffer was replaced or moved, by the last `change`."""
        return self._tensors.quick_before

    def is_part_of(self, model: nn.Module) -> bool:
        """Whether every tensor that the snapshot keeps alive is one of the model's."""
        kept = {id(tensor) for _, owner in self._tensor_dicts for tensor in owner.values()}
        return kept <= {id(tensor) for tensor in (None, *model.parameters(), *model.buffers())}

    @functools.cached_property
    def digest(self) -> str:
        """32 hexadecimal digits, equal in every process for an equal model."""
        return hashlib.sha256("\n".join(sorted(self._lines())).encode()).hexdigest()[:32]

    def _walk(self, model: nn.Module) -> None:
        self._queue: list[tuple[str, Any, bool]] = []  # path, value, and whether it was reached from a module's globals
        self._globals: dict[int, tuple[dict[str, Any], set[str]]] = {}  # namespaces, and the names that functions use
        for name, hooks in GLOBAL_HOOKS.items():
            self._whole.append(Watched("all modules", name, hooks, active_hooks))
        # by weak reference, since specdec's own attributes of an enabled model refer back to it
        self._watch(Watched("", "attribute", self._model, model_view), self._viewed)
        self._add_module("", model)
        seen = {id(model)}
        for path, value, is_global in self._queue:  # grows during the loop
            if id(value) not in seen and not isinstance(value, (*PLAIN, ModuleType)):
                seen.add(id(value))
                self._add(path, value, is_global)
        filled = [owner for _, owner in self._tensor_dicts if owner]
        self._tensors = Watched("", "tensor", self._tensor_dicts, tensor_view, quick=lambda dicts: address_view(filled))
        for namespace, names in self._globals.values():
            self._viewed.append(selected(last_name(namespace), frozenset(names), namespace))
        self._viewed += [
            Watched(
                "", "attribute", self._objects, type_view, quick=lambda objects: [type(value) for _, value in objects]
            ),
            self._tensors,
            Watched("", "version", self._other_tensors, version_view),
            Watched(
                "",
                "code",
                self._functions,
                lambda functions: {one: one.__code__ for one in functions},
                quick=lambda functions: [one.__code__ for one in functions],
            ),
        ]
        del self._queue, self._globals

    def _add(self, path: str, value: Any, is_global: bool) -> None:
        """Add a value, and queue the values that it refers to."""
        if isinstance(value, Tensor):
            self._other_tensors.append((path, value))
        elif isinstance(value, type):
            self._add_class(value)
        elif isinstance(value, FunctionType):
            self._add_function(path, value)
        elif isinstance(value, WRAPPERS):
            self._queue += [(path, part, is_global) for part in held_values(value)]
        elif isinstance(value, dict | list | set):
            self._watch(Watched(path, "item", value, item_view, grows=is_global), self._whole)
        elif isinstance(value, tuple | frozenset):
            self._queue += [(f"{path}[{index}]", item, is_global) for index, item in enumerate(value)]
        elif isinstance(state := getattr(value, "__dict__", None), dict) and (
            isinstance(value, nn.Module) or not _is_library(type(value).__module__)
        ):
            self._objects.append((path, value))
            watched = Watched(path, "attribute", state, attribute_view, grows=is_global)
            self._watch(watched, self._viewed if IGNORED & state.keys() else self._whole)
            if isinstance(value, nn.Module):
                self._add_module(path, value)
            else:
                self._queue.append(("", own_class(value), False))

    def _watch(self, watched: Watched, watched_list: list[Watched]) -> None:
        watched_list.append(watched)
        ignored = NOT_IN_DIGEST | OF_EVERY_MODULE if watched.kind == "attribute" else frozenset()
        names = watched.before.keys() - ignored
        if len(names) <= MAX_CONTAINER:
            self._queue += [(watched.name(key), watched.before[key], watched.grows) for key in sorted(names, key=str)]

    def _add_module(self, path: str, module: nn.Module) -> None:
        for attribute, name in HOOKS.items():
            self._whole.append(Watched(path, name, vars(module)[attribute], active_hooks))
        self._tensor_dicts += [(join(path, ""), vars(module)[attribute]) for attribute in ("_parameters", "_buffers")]
        self._watch(Watched(path, "attribute", module._modules, item_view), self._whole)
        self._queue.append(("", own_class(module), False))

    def _add_class(self, cls: type) -> None:
        if _is_entered(cls.__module__):
            self._watch(Watched(cls.__name__, "attribute", vars(cls), class_view), self._whole)
        elif names := CALLED & vars(cls).keys():
            self._watch(selected(cls.__name__, names, vars(cls)), self._viewed)
        self._queue += [("", base, False) for base in cls.__bases__]

    def _add_function(self, path: str, function: FunctionType) -> None:
        """Add its code, what decorators left in its closure, its defaults, and the globals that it names.

        Of a library's globals only functions count, and the walk enters them only if they come from outside libraries.
        """
        self._functions.append(function)
        is_entered = _is_entered(namespace_name(function.__globals__))
        self._queue += [(path, value, True) for value in held_values(function) if is_entered or callable(value)]
        names, names_and_attributes = _names(function.__code__)
        namespaces = [(function.__globals__, names)]
        for namespace, wanted in namespaces:  # grows by the modules that the function names
            is_entered = _is_entered(namespace_name(namespace))
            for name in sorted(wanted & namespace.keys()):
                value = namespace[name]
                if isinstance(value, ModuleType):
                    is_torch = value.__name__.partition(".")[0] == "torch" and not name.startswith("_")
                    is_new = all(vars(value) is not added for added, _ in namespaces)
                    if is_new and (is_torch or _is_entered(value.__name__)):
                        namespaces.append((vars(value), names_and_attributes))
                elif is_entered or inspect.isroutine(value):
                    self._globals.setdefault(id(namespace), (namespace, set()))[1].add(name)
                    if is_entered or _is_entered(namespace_name(getattr(value, "__globals__", {"__name__": "torch"}))):
                        self._queue.append((f"{last_name(namespace)}.{name}", value, True))

    def _is_same(self) -> bool:
        """Fast. False also where a change does not count, which `_find_change` finds out."""
        return self._containers == self._copies and all(
            watched.quick(watched.container) == watched.quick_before for watched in self._viewed
        )

    def _find_change(self) -> str | None:
        """Slow: the first change in words. None where none counts; then the present state becomes the reference."""
        copies = list(map(copy_of, self._containers))
        found = next(filter(None, (watched.change() for watched in (*self._whole, *self._viewed))), None)
        if found is None:
            self._copies = copies
        return found

    def _lines(self) -> Iterator[str]:
        """Everything as text, without anything that depends on the process, a path or an address."""
        for watched in (*self._whole, *self._viewed):
            yield from watched.lines()
        for function in self._functions:
            yield f"{describe(function)} {describe(tuple(held_values(function)))}"


def enter_layouts(model: nn.Module) -> None:
    """Move the weights of 4-bit layers into the layout of the kernels that are available now."""
    for module in model.modules():
        getattr(type(module), "choose_kernel", lambda layer: None)(module)


def _is_library(module: str) -> bool:
    return module.partition(".")[0] in LIBRARIES


def _is_entered(module: str) -> bool:
    """Whether the walk enters the code of a module of this name."""
    is_modeling = module.startswith(MODELING) and not module.startswith("transformers.models.auto.")
    return not _is_library(module) and (module.partition(".")[0] != "transformers" or is_modeling)


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals that a function and those nested in it name; and all names in them, attributes too."""
    loads = [one.argval for one in dis.get_instructions(code) if one.opname in ("LOAD_GLOBAL", "LOAD_NAME")]
    names, attributes = frozenset(name for name in loads if not name.startswith("__")), frozenset(code.co_names)
    for inner in (_names(const) for const in code.co_consts if isinstance(const, CodeType)):
        names, attributes = names | inner[0], attributes | inner[1]
    return names, attributes
