"""What a model's forward depends on, apart from the values of its weights.

A compiled forward or a recorded one is a copy of what a model did once. `Identity` is a snapshot of all that such a copy was made
of: the module tree, plain attributes, configs, the shapes and dtypes of tensors, hooks, and the code of every forward with the
functions, classes and globals that it reaches. `change` compares a model with it in a fraction of a millisecond; `digest` names
it across processes. Code is taken from code objects, which are what runs, and not from source files.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

# Packages whose code is not followed: their versions, and specdec's own sources, are named by whoever uses a digest.
LIBRARIES = frozenset(sys.stdlib_module_names) | {
    "torch", "functorch", "torchgen", "triton", "numpy", "specdec", "specdec_kernels", "accelerate", "huggingface_hub",
    "packaging",
}  # fmt: skip
# Of transformers only what is written for one family is followed, for the same reason; other functions of it that a forward calls
# are taken as they are.
FRAMEWORK, MODELING = "transformers", "transformers.models."
# Of these, which functions a forward's names stand for is noted nevertheless: torch.nn.functional is often patched.
NOTED = ("torch", "specdec", FRAMEWORK)
# Attributes of modules and configs that no forward reads, or (the attention implementation) that others keep an eye on.
IGNORED = frozenset({
    "name_or_path", "_name_or_path", "generation_config", "hf_quantizer", "warnings_issued", "transformers_version",
    "_attn_implementation_internal", "_attn_implementation", "_specdec_lent", "_specdec_state", "_commit_hash",
    "_output_capturing_hooks_installed",
})  # fmt: skip
# Attributes that differ with how a model came to be (built, loaded, quantized in memory) and not with what it computes.
UNNAMED = IGNORED | {
    "_is_hf_initialized", "_weight_conversions", "is_quantized", "quantization_method", "hf_device_map", "loss_type",
    "all_tied_weights_keys", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_no_split_modules",
    "_skip_keys_device_placement", "_keys_to_ignore_on_load_unexpected", "_keys_to_ignore_on_load_missing",
    "_keys_to_ignore_on_save", "_tp_plan", "_ep_plan", "_pp_plan", "_fsdp_plan", "_apply", "architectures",
}  # fmt: skip
HOOKS = {"_forward_hooks": "forward hook", "_forward_pre_hooks": "forward pre-hook"}
# transformers leaves these on a model that was once asked for hidden states; they do nothing where nobody asks
INERT_HOOKS = "transformers.utils.output_capturing"
# An nn.Module's own attributes: tensors, submodules and forward hooks are compared by themselves, the rest is not of a forward.
OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}
PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.Size)
# What is called of an object without being named.
CALLED = frozenset({
    "forward", "__call__", "_call_impl", "_wrapped_call_impl", "__getattr__", "__getattribute__", "__getitem__", "__iter__",
    "__len__", "__contains__", "__torch_function__", "__enter__", "__exit__",
})  # fmt: skip
CONSTRUCTORS = frozenset({"__new__", "__init__", "__post_init__"})
LARGEST_CONTAINER = 1024  # values of a container that are followed
MISSING: Any = type("Missing", (), {"__repr__": lambda self: "missing"})()

_STOCK = "_specdec_stock"  # in the class that enable() gives a model: the model's own class
_form = operator.attrgetter("shape", "dtype", "device")
_CACHED_FUNCTION = type(functools.lru_cache(lambda: None))


class Identity:
    """A snapshot of a model. It keeps the parts of the model alive, but not the model itself.

    Four-bit layers enter the layout of their device's kernel first, as their first forward would have them do.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._parts = _Parts(model)
        self._code = _code_of(self._parts)
        self._digest: str | None = None

    def change(self) -> str | None:
        """None while the model is what it was, else what changed first, in words."""
        model = self._model()
        if model is None:
            return "the model is gone"
        try:
            return self._parts.change(model) or self._code.change()
        except Exception as error:  # of a value that cannot be compared, or of a thread that is changing the model just now
            return f"it could not be compared with what it was ({type(error).__name__}: {error})"

    @property
    def digest(self) -> str:
        """32 hexadecimal digits, equal in every process for an equal model. Of the model as it is when first asked."""
        if self._digest is None:
            model = self._model()
            assert model is not None
            lines = [*self._parts.lines(model), *self._code.lines()]
            self._digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]
        return self._digest


def opaque(model: nn.Module) -> str | None:
    """Why a compiled copy of a forward would miss part of it: a hook, or a forward of one instance. None: it would not."""
    reason = hooked(model)
    if reason is None:
        for path, module in model.named_modules():
            if "forward" in vars(module) or "_call_impl" in vars(module):
                return f"the forward of {path or 'the model'} was replaced"
    return reason


def hooked(model: nn.Module) -> str | None:
    """Which hook a copy of a forward would not call, None where there is none; hooks of every module included."""
    for name, hooks in _global_hooks().items():
        if hooks:
            return f"a {name} is on all modules"
    for path, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            for attribute, name in HOOKS.items():
                if _active(vars(module)[attribute]):
                    return f"a {name} is on {path or 'the model'}"
        if "_hf_hook" in vars(module):
            return f"a hook of accelerate's is on {path or 'the model'}"
    return None


def form_of(tensor: Tensor) -> tuple[Any, ...]:
    """What a compiled forward takes for granted of a tensor that it is given: shape, dtype, device, strides."""
    return *_form(tensor), tensor.stride() if tensor.layout == torch.strided else None


class _Parts:
    """The objects that make up a model, and what they held."""

    def __init__(self, model: nn.Module) -> None:
        enter_layouts(model)
        self.root = id(model)
        self.root_type = _class_of(model)
        self.root_state = _filtered(vars(model))
        self.holders: list[Any] = []  # of attributes: modules but for the root, configs, other values
        self.paths: list[str] = []
        self.types: list[type] = []
        self.states: list[dict[str, Any]] = []
        self.strict: list[tuple[Any, dict[str, Any]]] = []  # of these, with their states, those without an ignored attribute
        self.loose: list[tuple[Any, dict[str, Any]]] = []  # and the others
        self.containers: list[Any] = []  # mutable ones
        self.container_paths: list[str] = []
        self.copies: list[Any] = []
        self.tensor_dicts: list[dict[str, Tensor | None]] = []
        self.tensor_paths: list[str] = []
        self.attributes: list[tuple[str, Tensor, int | None]] = []  # tensors that are neither parameters nor buffers
        self.functions: list[Any] = []  # that belong to instances
        self._seen: set[int] = set()
        for name, hooks in _global_hooks().items():
            self._watch(f"all modules\n{name}", hooks)
        self._add("", model)
        self.strict_states, self.loose_states = ([state for _, state in some] for some in (self.strict, self.loose))
        self.tensor_names, self.tensors = self._tensor_names(), self._tensors()

    def _add(self, path: str, value: Any) -> None:
        """Take down a value and what it holds."""
        if isinstance(value, PLAIN) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self.attributes.append((path, value, _version(value)))
        elif isinstance(value, nn.Module):
            self._add_module(path, value)
        elif _functions_of(value):
            self.functions.append(value)
        elif isinstance(value, dict | list | set):
            self._watch(path, value)
            if len(value) <= LARGEST_CONTAINER:
                for key, held in dict.items(value) if isinstance(value, dict) else enumerate(value):
                    self._add(f"{path}[{key!r}]", held)
        elif isinstance(value, tuple | frozenset):
            for index, held in enumerate(value):
                self._add(f"{path}[{index}]", held)
        elif not isinstance(value, type | ModuleType) and not _is_library(type(value).__module__):
            state = getattr(value, "__dict__", None)
            if isinstance(state, dict):
                self._hold(path, value)
                for name, held in _filtered(state).items():
                    self._add(f"{path}.{name}", held)

    def _hold(self, path: str, value: Any) -> None:
        state = _filtered(vars(value))
        self.holders.append(value)
        self.paths.append(path)
        self.types.append(_class_of(value))
        self.states.append(state)
        (self.loose if IGNORED & vars(value).keys() else self.strict).append((value, state))

    def _add_module(self, path: str, module: nn.Module) -> None:
        state = vars(module)
        if id(module) != self.root:
            self._hold(path, module)
        for attribute in HOOKS:
            self._watch(f"{path}\n{HOOKS[attribute]}", state[attribute])
        self._watch(path, module._modules)
        for tensors in (module._parameters, module._buffers):
            self.tensor_dicts.append(cast("dict[str, Tensor | None]", tensors))
            self.tensor_paths.append(path)
        for name, value in _filtered(state).items():
            if name not in OF_EVERY_MODULE:
                self._add(_join(path, name), value)
        for name, submodule in module._modules.items():
            if submodule is not None:
                self._add(_join(path, name), submodule)

    def _watch(self, path: str, container: Any) -> None:
        self.containers.append(container)
        self.container_paths.append(path)
        self.copies.append(_copy(container))

    def _tensors(self) -> list[Any]:
        """Of parameters and buffers, module by module: names, kinds, shapes and the like, strides, ties.

        Ties: for each tensor the number of the first one that lies in the same place.
        """
        names = [name for tensors in self.tensor_dicts for name, tensor in tensors.items() if tensor is not None]
        tensors = [tensor for tensors in self.tensor_dicts for tensor in tensors.values() if tensor is not None]
        try:
            strides: list[Any] = list(map(Tensor.stride, tensors))
            places = list(map(Tensor.data_ptr, tensors))
        except Exception:  # a sparse tensor has no strides, and a subclass may have no storage of its own
            strides = [tensor.stride() if tensor.layout == torch.strided else None for tensor in tensors]
            places = list(map(id, tensors))
        first: dict[int, int] = {}
        ties = [first.setdefault(place, index) for index, place in enumerate(places)]
        return [names, list(map(type, tensors)), list(map(_form, tensors)), strides, ties]

    def _tensor_names(self) -> list[str]:
        """Whole names, in the order of _tensors."""
        dicts = zip(self.tensor_paths, self.tensor_dicts, strict=True)
        return [_join(path, name) for path, tensors in dicts for name, tensor in tensors.items() if tensor is not None]

    def change(self, model: nn.Module) -> str | None:
        try:
            if self._is_same(model):
                return None
        except Exception:  # of a comparison, as that of two tensors; the slow way looks at each by itself
            pass
        return self._find(model)

    def _is_same(self, model: nn.Module) -> bool:
        return (
            self.containers == self.copies
            and [value.__dict__ for value, _ in self.strict] == self.strict_states
            and [_filtered(value.__dict__) for value, _ in self.loose] == self.loose_states
            and _filtered(model.__dict__) == self.root_state
            and list(map(type, self.holders)) == self.types
            and _class_of(model) is self.root_type
            and all(_version(tensor) == version for _, tensor, version in self.attributes)
            and self._tensors() == self.tensors
        )

    def _find(self, model: nn.Module) -> str | None:
        """The first change, name by name; None where only what does not matter has changed."""
        enter_layouts(model)  # weights that were loaded anew came in the canonical layout
        for index, (path, container, copy) in enumerate(zip(self.container_paths, self.containers, self.copies, strict=True)):
            if "\n" in path:
                where, kind = path.split("\n")
                found = _hook_change(where, kind, container, copy)
            else:
                found = _container_change(path, container, copy)
            if found is not None:
                return found
            self.copies[index] = _copy(container)
        if (cls := _class_of(model)) is not self.root_type:
            return f"the model is a {cls.__name__} and was a {self.root_type.__name__}"
        for path, value, cls in zip(self.paths, self.holders, self.types, strict=True):
            if _class_of(value) is not cls:
                return f"{path} is a {type(value).__name__} and was a {cls.__name__}"
        states: list[tuple[str, Any, dict[str, Any]]] = [("", vars(model), self.root_state)]
        states += zip(self.paths, map(vars, self.holders), self.states, strict=True)
        for path, state, saved in states:
            if (found := _state_change(path, _filtered(state), saved)) is not None:
                return found
        for path, tensor, version in self.attributes:
            if _version(tensor) != version:
                return f"{path} was written to"
        names, now = self._tensor_names(), self._tensors()
        if names != self.tensor_names:
            name = min(set(names) ^ set(self.tensor_names), default="a tensor")
            return f"{name} was {'added' if name in names else 'removed'}"
        for index, name in enumerate(names):
            for which in (1, 2, 3):
                if now[which][index] != self.tensors[which][index]:
                    return f"{name} is {_words_of(now, index)} and was {_words_of(self.tensors, index)}"
            if now[4][index] != self.tensors[4][index]:
                return f"{name} is tied to other weights than it was"
        return None

    def lines(self, model: nn.Module) -> Iterator[str]:
        """All of it as text; nothing of a process, a path or an address."""
        rows: list[tuple[str, type, dict[str, Any]]] = [("", _class_of(model), vars(model))]
        rows += zip(self.paths, self.types, map(vars, self.holders), strict=True)
        for path, cls, state in rows:
            yield f"{path} {_name(cls)}"
            state = _filtered(state)
            for name in sorted(state.keys() - UNNAMED - OF_EVERY_MODULE):
                yield f"{path} {name} {_plainly(state[name])}"
        for path, container in zip(self.container_paths, self.containers, strict=True):
            if "\n" in path:
                container = _active(container)
            if not any(part in UNNAMED for part in path.replace("[", ".").split(".")):
                yield f"{path} {_plainly(container)}"
        for path, tensor, _ in self.attributes:
            yield f"{path} {form_of(tensor)}"
        tensors = self._tensors()
        for index, name in enumerate(self._tensor_names()):
            yield f"{name} {_words_of(tensors, index)} {tensors[4][index]}"


class _Code:
    """The functions that forwards reach, and what their names stand for.

    A name of a global is looked up where its function looks it up, an attribute of a method's first argument in the class that
    the method was reached through. Whose the other attributes are is not known: they are looked up in every class that an object
    within reach may be of.
    """

    def __init__(self, modules: Iterable[type], others: Iterable[type], functions: Iterable[Any]) -> None:
        self.classes: dict[type, set[str]] = {}  # and the names in their own namespaces that were followed
        self.functions: dict[int, FunctionType] = {}
        self.bindings: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}  # globals by namespace and name
        self.values: list[tuple[str, Any, Any]] = []  # where it was found, a mutable value, what it held
        self._seen: set[tuple[int, type | None]] = set()
        self._waiting: list[tuple[Any, type | None]] = [(function, None) for function in functions]
        self._attributes: set[str] = set()
        self._of_objects: dict[type, set[str]] = {}  # classes, and the attributes that were looked up in them
        for cls in (*modules, *others):
            self._add_objects_of(cls, CALLED)
        while self._waiting:
            while self._waiting:
                self._follow(*self._waiting.pop())
            for cls, found in list(self._of_objects.items()):
                if fresh := self._attributes - found:
                    found |= fresh
                    self._add_class(cls, fresh)
        self.namespaces = [vars(cls) for cls in self.classes]
        self.copies = [dict(namespace) for namespace in self.namespaces]
        self.pairs = list(self.bindings.values())
        self.bound = [namespace.get(name, MISSING) for namespace, name in self.pairs]
        self.of_functions = list(self.functions.values())
        self.codes = [_parts_of(function) for function in self.of_functions]

    def _add_objects_of(self, cls: type, names: Iterable[str]) -> None:
        self._of_objects.setdefault(cls, set())
        self._add_class(cls, names)

    def _add_class(self, cls: type, names: Iterable[str], whole: bool = False) -> None:
        """Follow names as an instance of a class finds them; whole: also what each class that it inherits from has."""
        for base in cls.__mro__[:-1]:
            self.classes.setdefault(base, set())
        for name in set(names) - CONSTRUCTORS if issubclass(cls, nn.Module) else names:
            for base in cls.__mro__[:-1]:
                self.classes[base].add(name)
                if name in vars(base):
                    self._waiting.append((vars(base)[name], cls))
                    if not whole:
                        break

    def _follow(self, value: Any, owner: type | None) -> None:
        """Follow a value; owner: the class that a method was reached through."""
        if isinstance(value, PLAIN) or (id(value), owner) in self._seen:
            return
        self._seen.add((id(value), owner))
        if isinstance(value, FunctionType):
            self._waiting += [(_content(cell), owner) for cell in value.__closure__ or ()]
            place = value.__globals__.get("__name__", "")
            if not _is_library(place):
                self.functions[id(value)] = value
            if _is_library(place) or _is_framework(place):
                if owner is not None and place.startswith(NOTED):
                    for chain in _uses(value.__code__, None).globals:
                        self._bind(value.__globals__, chain, note_only=True)
                return
            self._waiting += [(one, None) for one in (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())]
            uses = _uses(value.__code__, None)
            for chain in uses.globals:
                self._bind(value.__globals__, chain)
            if owner is not None:
                self._add_class(owner, uses.own, uses.is_super)
                self._add_class(owner, uses.others if uses.is_super else (), whole=True)
            self._attributes |= uses.others if owner is not None else uses.others | uses.own
        elif functions := _functions_of(value):
            self._waiting += [(function, owner) for function in functions]
        elif isinstance(value, type):
            if not _is_library(value.__module__) and not issubclass(value, BaseException):
                self._add_objects_of(value, CALLED if issubclass(value, nn.Module) else CALLED | CONSTRUCTORS)
        elif isinstance(value, dict | list | set | tuple | frozenset):
            if len(value) <= LARGEST_CONTAINER:
                self._waiting += [(held, None) for held in (dict.values(value) if isinstance(value, dict) else value)]
        elif not isinstance(value, ModuleType | nn.Module | Tensor) and not _is_library(type(value).__module__):
            self._add_objects_of(type(value), CALLED)

    def _bind(self, namespace: dict[str, Any], chain: tuple[str, ...], note_only: bool = False) -> None:
        """Follow a global and attributes of it, through modules and classes. note_only: take down which functions they are."""
        name, *attributes = chain
        if name not in namespace:
            return
        value = namespace[name]
        is_function = isinstance(value, FunctionType | BuiltinFunctionType)
        is_own = isinstance(value, FunctionType) and not _is_noted(value.__globals__.get("__name__", ""))
        if (id(namespace), name) not in self.bindings and (is_function or not note_only):
            self.bindings[id(namespace), name] = namespace, name
            if isinstance(value, dict | list | set):
                self.values.append((f"{_module(namespace)}.{name}", value, _copy(value)))
            if is_own or not note_only:
                self._waiting.append((value, None))
        if not attributes:
            return
        if isinstance(value, ModuleType):
            self._bind(vars(value), tuple(attributes), note_only)
        elif not note_only and not isinstance(value, dict | list | set | tuple | FunctionType):
            cls = value if isinstance(value, type) else type(value)
            if not _is_library(cls.__module__):
                self._add_class(cls, attributes[:1])

    def change(self) -> str | None:
        try:
            if (
                [namespace.get(name, MISSING) for namespace, name in self.pairs] == self.bound
                and self.namespaces == self.copies
                and [_parts_of(function) for function in self.of_functions] == self.codes
                and all(value == copy for _, value, copy in self.values)
            ):
                return None
        except Exception:
            pass
        return self._find()

    def _find(self) -> str | None:
        for (namespace, name), was in zip(self.pairs, self.bound, strict=True):
            if not _equal(now := namespace.get(name, MISSING), was):
                return _in_words(f"{_module(namespace)}.{name}", now, was)
        for index, (cls, names) in enumerate(self.classes.items()):
            members, was = vars(cls), self.copies[index]
            for name in sorted(names):
                if not _equal(now := members.get(name, MISSING), before := was.get(name, MISSING)):
                    return _in_words(f"{cls.__name__}.{name}", now, before)
            self.copies[index] = dict(members)
        for function, was in zip(self.of_functions, self.codes, strict=True):
            if _parts_of(function) != was:
                return f"the code of {_module(function.__globals__)}.{function.__qualname__} was replaced"
        for index, (path, value, copy) in enumerate(self.values):
            if _container_change(path, value, copy) is not None:
                # what is only added to a table of functions or objects was not there to be found by what was traced
                is_plain = _is_plain(copy) and bool(copy)
                if (
                    is_plain
                    or not isinstance(value, dict)
                    or any(not _equal(dict.get(value, key), held) for key, held in copy.items())
                ):
                    return f"{path} was changed"
                self.values[index] = path, value, _copy(value)
        return None

    def lines(self) -> list[str]:
        """All of it as text, in an order of its own."""
        lines = {f"{_module(namespace)}.{name} = {_plainly(namespace[name])}" for namespace, name in self.pairs}
        for cls, names in self.classes.items():
            for name in names & vars(cls).keys():
                lines.add(f"{_name(cls)}.{name} = {_plainly(vars(cls)[name])}")
        lines.update(_plainly(function) for function in self.of_functions)
        return sorted(lines)


_CODE_OF: dict[Any, _Code] = {}  # by classes: models of one kind share what their forwards reach
MOST_KEPT = 16


def _code_of(parts: _Parts) -> _Code:
    classes = frozenset([parts.root_type, *parts.types])
    modules = frozenset(cls for cls in classes if issubclass(cls, nn.Module))
    others = classes - modules
    if parts.functions:  # of this model alone
        return _Code(modules, others, parts.functions)
    code = _CODE_OF.get((modules, others))
    if code is None or code.change() is not None:
        if len(_CODE_OF) >= MOST_KEPT:
            _CODE_OF.pop(next(iter(_CODE_OF)), None)
        code = _CODE_OF[modules, others] = _Code(modules, others, ())
    return code


def enter_layouts(model: nn.Module) -> None:
    """Bring 4-bit layers to the kernels that there are now, whether or not they have been called."""
    for module in model.modules():
        enter: Callable[[Any], None] | None = getattr(type(module), "enter_layout", None)
        if enter is not None:
            enter(module)


def _copy(container: Any) -> Any:
    """A plain copy of a dict, list or set, past methods that a subclass may have put in the way (transformers' ACT2FN)."""
    return (
        dict.copy(container) if isinstance(container, dict) else set(container) if isinstance(container, set) else list(container)
    )


def _class_of(value: Any) -> type:
    cls: type = type(value).__dict__.get(_STOCK, type(value))
    return cls


def _is_library(name: str) -> bool:
    return name.partition(".")[0] in LIBRARIES


def _is_framework(name: str) -> bool:
    return name.partition(".")[0] == FRAMEWORK and not name.startswith(MODELING)


def _is_noted(name: str) -> bool:
    return _is_library(name) or _is_framework(name)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _filtered(state: dict[str, Any]) -> dict[str, Any]:
    # of a copy: another thread's forward may put its name of the attention into a config meanwhile
    return {name: value for name, value in dict(state).items() if name not in IGNORED}


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _global_hooks() -> dict[str, Any]:
    module = torch.nn.modules.module
    return {"forward hook": module._global_forward_hooks, "forward pre-hook": module._global_forward_pre_hooks}


def _active(hooks: dict[int, Any]) -> list[Any]:
    return [hook for hook in hooks.values() if getattr(hook, "__module__", None) != INERT_HOOKS]


def _functions_of(value: Any) -> list[Any]:
    """What a callable of Python's or functools' hands on to; [] for everything else."""
    if isinstance(value, FunctionType | BuiltinFunctionType):
        return [value]
    if isinstance(value, MethodType | staticmethod | classmethod):
        return [value.__func__]
    if isinstance(value, property):
        return [function for function in (value.fget, value.fset) if function is not None]
    if isinstance(value, functools.partial | functools.partialmethod):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, functools.cached_property):
        return [value.func]
    if isinstance(value, _CACHED_FUNCTION):
        return [value.__wrapped__]
    return []


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _parts_of(function: FunctionType) -> tuple[Any, ...]:
    """What a tool that reloads code puts into a function in place."""
    return function.__code__, function.__defaults__, function.__kwdefaults__


def _equal(now: Any, was: Any) -> bool:
    if now is was:
        return True
    try:
        return type(now) is type(was) and bool(now == was)
    except Exception:  # as of tensors
        return False


def _module(namespace: dict[str, Any]) -> str:
    """The last part of the name of the module whose globals these are."""
    return str(namespace.get("__name__", "?")).rpartition(".")[2]


def _in_words(path: str, now: Any, was: Any) -> str:
    """How a value changed."""
    if _is_plain(now) and _is_plain(was):
        return f"{path} is {_short(now)} and was {_short(was)}"
    if was is MISSING:
        return f"{path} was {'replaced' if callable(now) else 'added'}"
    if now is MISSING:
        return f"{path} was removed"
    if type(now) is not type(was) and not (callable(now) and callable(was)):
        return f"{path} is {_short(now)} and was {_short(was)}"
    return f"{path} was replaced"


def _short(value: Any) -> str:
    if not _is_plain(value):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _words_of(tensors: list[Any], index: int) -> str:
    """A tensor of _Parts._tensors in words."""
    _, kinds, forms, strides, _ = tensors
    shape, dtype, device = forms[index]
    kind = "" if issubclass(nn.Parameter, kinds[index]) else f" ({kinds[index].__name__})"
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} with strides {list(strides[index] or ())} on {device}{kind}"


def _state_change(path: str, state: dict[str, Any], saved: dict[str, Any]) -> str | None:
    """What changed in an object's attributes. What does not matter is taken over, so that it is not found again."""
    for name in sorted(state.keys() | saved.keys()):
        now, was = state.get(name, MISSING), saved.get(name, MISSING)
        if now is was or (name in OF_EVERY_MODULE and name in state and name in saved):
            continue
        if not _equal(now, was) and not (type(now) is type(was) and type(now).__module__.startswith("specdec.")):
            return _in_words(_join(path, name), now, was)
        saved[name] = now
    return None


def _hook_change(path: str, kind: str, now: dict[int, Any], was: dict[int, Any]) -> str | None:
    if _active(now) == _active(was):
        return None
    on = f"on {path or 'the model'}"
    return f"a {kind} is {on}" if len(_active(now)) >= len(_active(was)) else f"a {kind} is no longer {on}"


def _container_change(path: str, now: Any, was: Any) -> str | None:
    """What changed in a dict, list or set; submodules included."""
    try:
        if now == was:
            return None
    except Exception:
        pass
    if not isinstance(now, dict):
        return f"{path} was changed"
    for key in sorted(now.keys() | was.keys(), key=str):
        value, before = dict.get(now, key, MISSING), was.get(key, MISSING)
        if _equal(value, before):
            continue
        name = _join(path, key) if isinstance(value, nn.Module) or isinstance(before, nn.Module) else f"{path}[{key!r}]"
        if isinstance(value, nn.Module) and isinstance(before, nn.Module):
            cls, other = type(value).__name__, type(before).__name__
            return f"{name} is another {cls}" if cls == other else f"{name} is a {cls} and was a {other}"
        return f"{name} was added" if before is MISSING else _in_words(name, value, before)
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(held) for key, held in dict.items(value))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_plain, value))
    return isinstance(value, PLAIN)


LIBRARY_FUNCTION = "a function of a library"


def _plainly(value: Any) -> str:
    """A value in words that are the same in every process: plain ones as they are, code by its digest, others by their class."""
    if isinstance(value, torch.Size):
        return repr(tuple(value))
    if isinstance(value, PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{_plainly(key)}: {_plainly(held)}' for key, held in dict.items(value)))}}}"
    if isinstance(value, set | frozenset):
        return f"{{{', '.join(sorted(map(_plainly, value)))}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plainly, value))}]"
    if isinstance(value, FunctionType):
        if _is_library(value.__globals__.get("__name__", "")) and not value.__closure__:
            return LIBRARY_FUNCTION
        held = [_content(cell) for cell in value.__closure__ or ()]
        values = [_code_digest(one.__code__) if isinstance(one, FunctionType) else _shallow(one) for one in held]
        defaults = [_shallow(one) for one in (*(value.__defaults__ or ()), *sorted((value.__kwdefaults__ or {}).items()))]
        return f"function {value.__module__}.{value.__qualname__} {_code_digest(value.__code__)} {defaults} {values}"
    if functions := [one for one in _functions_of(value) if one is not value]:
        return f"{type(value).__name__} of [{', '.join(map(_plainly, functions))}]"
    if isinstance(value, BuiltinFunctionType):
        return LIBRARY_FUNCTION
    if isinstance(value, type):
        return f"class {_name(value)}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    return f"a {_name(type(value))}"


def _shallow(value: Any) -> str:
    """As _plainly, without going into containers of what is not plain, which may hold the function itself."""
    return _plainly(value) if _is_plain(value) else f"a {_name(type(value))}"


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class _Uses(NamedTuple):
    """The names that a function uses, and those within it.

    globals: each with the attributes that are taken of it. own: attributes of its first argument. others: of anything else.
    is_super: methods may be looked up behind the class that the function stands in.
    """

    globals: frozenset[tuple[str, ...]]
    own: frozenset[str]
    others: frozenset[str]
    is_super: bool


@functools.lru_cache(maxsize=4096)
def _uses(code: CodeType, first: str | None) -> _Uses:
    """first: what the first argument of a function around it is called, None where there is no function around it."""
    if first is None and code.co_argcount:
        first = code.co_varnames[0]
    chains: set[tuple[str, ...]] = set()
    own: set[str] = set()
    others: set[str] = set()
    is_super = "__class__" in code.co_freevars
    chain: tuple[str, ...] | None = None  # of the global that was loaded last
    is_first = False  # whether the first argument was
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            chain, is_first = (name,), False
            chains.add(chain)
        elif operation in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            if chain is not None:
                chain = (*chain, name)
                chains.add(chain)
            (own if is_first else others).add(name)
            is_first = False
        elif operation.startswith(("LOAD_FAST", "LOAD_DEREF")):
            loaded = name if isinstance(name, tuple) else (name,)  # two at once
            chain, is_first = None, first is not None and loaded[-1] == first
        elif operation not in ("CACHE", "PUSH_NULL", "EXTENDED_ARG", "NOP"):
            chain, is_first = None, False
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            inner = _uses(constant, first or "")
            chains |= inner.globals
            own |= inner.own
            others |= inner.others
            is_super |= inner.is_super
    return _Uses(frozenset(chains), frozenset(own), frozenset(others), is_super)


@functools.lru_cache(maxsize=4096)
def _code_digest(code: CodeType) -> str:
    """Of what a code object does, without where it stands."""
    constants = [_code_digest(one) if isinstance(one, CodeType) else _plainly(one) for one in code.co_consts]
    counts = code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags
    names = code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars
    parts = code.co_name, code.co_code.hex(), code.co_exceptiontable.hex(), constants, counts, names
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
