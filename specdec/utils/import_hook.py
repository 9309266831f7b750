"""Runs a function after another package's module is imported, so that nothing imports it only to extend it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


def after_import(name: str, function: Callable[[], object], package: str) -> None:
    """Call function() once, as soon as the module `name` is imported: now where it already is.

    package: that function() imports from; while one of its submodules is being imported the call waits for the end of
    that import, since names of a module that has not run to its end cannot be imported.
    """
    if name in sys.modules:
        function()
    else:
        sys.meta_path.insert(0, _Finder(name, function, package))


class _Finder(MetaPathFinder):
    """Finds modules as PathFinder does, and calls the function after them. depth: how many of them are running."""

    def __init__(self, name: str, function: Callable[[], object], package: str) -> None:
        self.name, self.function, self.prefix = name, function, f"{package}."
        self.depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name and not fullname.startswith(self.prefix):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_and_call(module: ModuleType) -> None:
            self.depth += 1
            try:
                exec_module(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and self.name in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                self.function()

        spec.loader.exec_module = exec_and_call  # type: ignore[method-assign]
        return spec
