"""Resolves import statements in a plug-in file.

An import statement calls the `__import__` of its module's builtins. A plug-in's module gets its own builtins, so names
are resolved differently there, also in functions that run later, and nowhere else: neither `sys.modules` nor the
process's finders change. The docstring of `sensorium.compat.v0` has the rules.
"""

from __future__ import annotations

import builtins
import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from sensorium.compat.v0.absent import reason
from sensorium.compat.v0.moved import moved
from sensorium.plugins import IMPORTS_VLLM, import_file

PLACES: dict[str, tuple[str, ...]] = {
    "vllm": ("sensorium.compat.v0.vllm", "sensorium"),
    "xformers": ("sensorium.compat.v0.xformers",),
    "flash_attn": ("sensorium.compat.v0.flash_attn",),
}
"""For each package, where its names are looked up, in order."""

MODELS = "vllm.model_executor.models"
SHARED = frozenset(f"{MODELS}.{name}" for name in ("interfaces", "registry", "utils"))
"""Modules in `models` that are the same here. Others of the same name have classes with other constructors."""


class PluginLoader(SourceFileLoader):
    """Runs a file as a plug-in."""

    def exec_module(self, module: ModuleType) -> None:
        """Run the file in its module (a method of loaders)."""
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        super().exec_module(module)


class PluginFinder(MetaPathFinder):
    """Finds the modules of packages that are plug-ins, and leaves all others to the finders behind it."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find a module's file, to run it as a plug-in; None for modules of other packages (a method of finders)."""
        if fullname.partition(".")[0] not in self.packages:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = PluginLoader(spec.loader.name, spec.loader.path)
        return spec


_finder = PluginFinder()


def add_package(module: str) -> None:
    """Import the modules of the package that `module` belongs to as plug-ins from now on."""
    _finder.packages.add(module.partition(".")[0])
    if _finder not in sys.meta_path:
        sys.meta_path.insert(sys.meta_path.index(PathFinder), _finder)


class PlacedModule(ModuleType):
    """A module that combines the names of several modules; if two have the same name, the first one's counts."""

    def __init__(self, name: str, modules: Sequence[ModuleType]) -> None:
        super().__init__(name, modules[0].__doc__)
        self.__path__: list[str] = []  # it may have submodules
        self._modules = tuple(modules)

    def __getattr__(self, name: str) -> Any:
        if name == "__all__":
            return sorted({each for module in self._modules for each in _public_names(module)})
        if name.startswith("__"):
            raise AttributeError(name)
        module = _find(f"{self.__name__}.{name}")
        if module is not None:
            return module
        for place in self._modules:
            value = getattr(place, name, _NOTHING)
            if value is not _NOTHING:
                return value
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


_NOTHING = object()
_found: dict[str, PlacedModule | None] = {}


def _public_names(module: ModuleType) -> Sequence[str]:
    return getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]


def _find(name: str) -> PlacedModule | None:
    """The module of this name, combined from the places of its package; None if none of them has it."""
    if name not in _found:
        package, _, rest = name.partition(".")
        modules = [
            module
            for place in PLACES[package]
            if place != "sensorium" or _means_the_same(name)
            if (module := _import_if_there(f"{place}.{rest}" if rest else place)) is not None
        ]
        _found[name] = PlacedModule(name, modules) if modules else None
    return _found[name]


def _means_the_same(name: str) -> bool:
    return not name.startswith(f"{MODELS}.") or name in SHARED


def _import_if_there(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise


def _import(
    name: str,
    globals: Mapping[str, Any] | None = None,
    locals: Mapping[str, Any] | None = None,
    fromlist: Sequence[str] | None = (),
    level: int = 0,
) -> Any:
    """`__import__` of a plug-in's module."""
    scope: dict[str, Any] = globals if isinstance(globals, dict) else {}
    if level:
        return _import_relative(name, scope, locals, tuple(fromlist or ()), level)
    package = name.partition(".")[0]
    if package == "transformers" and fromlist:
        return _of_transformers(name, fromlist)
    if package not in PLACES:
        _import_beside(package, scope)
        return builtins.__import__(name, globals, locals, fromlist or (), level)
    if package == "vllm":
        scope[IMPORTS_VLLM] = True
    module = _named(name, tuple(fromlist or ()))
    return module if fromlist else _find(package)


def _of_transformers(name: str, fromlist: Sequence[str]) -> ModuleType:
    """A module of transformers with the names that it had at the time of V0."""
    failure: ImportError | None = None
    result = ModuleType(name)
    try:
        result = importlib.import_module(name)
    except ImportError as error:  # it was removed, or needs a package that isn't installed
        failure = error
    gone = [each for each in fromlist if not hasattr(result, each)]
    if not gone:
        return result
    values = {each: getattr(result, each) for each in fromlist if each not in gone}
    for each in gone:
        try:
            values[each] = moved(name, each)
        except KeyError:
            message = f"{name} has no name {each!r} for plug-ins. {reason(name, each)}."
            raise failure or ImportError(message, name=name) from None
    result = ModuleType(name)
    vars(result).update(values)
    return result


def _import_beside(name: str, scope: dict[str, Any]) -> None:
    """If a plug-in imports a file beside it by its plain name, run that file as a plug-in too."""
    file = Path(scope["__file__"]).with_name(f"{name}.py")
    if name not in sys.modules and not scope.get("__package__") and file.is_file():
        found = PathFinder.find_spec(name)
        if found is not None and found.origin == str(file):
            import_file(file)


def _named(name: str, fromlist: Sequence[str]) -> ModuleType:
    """The module of a name. Raises ImportError if it doesn't exist, or lacks one of the names in `fromlist`."""
    module = _find(name)
    if module is None:
        raise ModuleNotFoundError(f"No module named {name!r} for plug-ins. {reason(name)}.", name=name)
    for each in fromlist:
        if each != "*" and not hasattr(module, each):
            raise ImportError(f"{name} has no name {each!r} for plug-ins. {reason(name, each)}.", name=name)
    return module


def _import_relative(
    name: str,
    scope: dict[str, Any],
    locals: Mapping[str, Any] | None,
    fromlist: Sequence[str],
    level: int,
) -> Any:
    """`from .name import ...`: a file beside the plug-in, else the module of this name among V0's models."""
    if scope.get("__package__"):
        return _import_in_package(name, scope, locals, fromlist, level)
    folder = Path(scope["__file__"]).parents[level - 1]
    if name:
        return _beside(folder, name, level, scope, fromlist)
    result = ModuleType(scope["__name__"])
    for each in fromlist:  # from . import a, b
        result.__dict__[each] = _beside(folder, each, level, scope, ())
    return result


def _import_in_package(
    name: str,
    scope: dict[str, Any],
    locals: Mapping[str, Any] | None,
    fromlist: Sequence[str],
    level: int,
) -> Any:
    try:
        return builtins.__import__(name, scope, locals, fromlist, level)
    except ModuleNotFoundError as error:
        parent = scope["__package__"].rsplit(".", level - 1)[0]
        if error.name != f"{parent}.{name}":
            raise
        return _of_v0(name, level, scope, fromlist)


def _beside(folder: Path, name: str, level: int, scope: dict[str, Any], fromlist: Sequence[str]) -> ModuleType:
    path = folder.joinpath(*name.split("."))
    for file in (path.with_name(f"{path.name}.py"), path / "__init__.py"):
        if file.is_file() and not _is_engine_part(file):
            return import_file(file.resolve())
    return _of_v0(name, level, scope, fromlist)


def _is_engine_part(file: Path) -> bool:
    """Whether a file is part of a copy of vllm itself, and belongs to its engine rather than to a model."""
    return file.parent.as_posix().endswith("/vllm/model_executor/models") and f"{MODELS}.{file.stem}" in SHARED


def _of_v0(name: str, level: int, scope: dict[str, Any], fromlist: Sequence[str]) -> ModuleType:
    scope[IMPORTS_VLLM] = True
    parent = MODELS.rsplit(".", level - 1)[0]
    return _named(f"{parent}.{name}", fromlist)
