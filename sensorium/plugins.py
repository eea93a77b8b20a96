"""Plug-ins: files and packages that add models, loaded in every process of the engine.

A package exposes a function in the group of entry points `sensorium.general_plugins`, or in vLLM's group; the function
registers what it has to. A plain file, or a module, is named by the setting `plugins` (`--plugin my_model.py`), and
registers what it has to when it is imported. Both may be loaded in several processes, and so must be fit to be run
again.

In all of them, imports from `vllm` mean what `sensorium.compat.v0` says.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from hashlib import sha256
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from sensorium.errors import ConfigError, SensoriumError
from sensorium.logger import get_logger

logger = get_logger(__name__)

GENERAL_PLUGINS_GROUP = "sensorium.general_plugins"
GROUP_OF_VLLM = "vllm.general_plugins"
"""Packages that were written for vLLM expose their functions here. What vllm itself exposes there is its own."""

IMPORTING = "sensorium.compat.v0.importing"
"""The module that runs plug-ins, and says what import statements mean in them. By name, since its room is above all."""

STYLE_OF_V0 = "sensorium.compat.v0.style"
"""The module that knows how classes which were written for vLLM 0.6 want to be treated."""
IMPORTS_VLLM = "__imports_vllm__"
"""Name among the globals of a plug-in's module that has imported from `vllm`."""

HOW_TO_ADD = (
    "Add one with ModelRegistry.register_model(architecture, model_class): in a file that you name with "
    "--plugin FILE.py or LLM(plugins=['FILE.py']), or in a package with an entry point in the group "
    f"'{GENERAL_PLUGINS_GROUP}'"
)
"""For messages on models that nobody has registered."""

_loaded = False
_failed: dict[str, str] = {}


def load_general_plugins() -> None:
    """Call every package's function, the first time this runs in a process. One that fails doesn't stop the others."""
    global _loaded  # noqa: PLW0603  once for each process
    if _loaded:
        return
    _loaded = True  # before the calls: a plug-in may itself make an engine
    of_vllm = [each for each in entry_points(group=GROUP_OF_VLLM) if each.module.partition(".")[0] != "vllm"]
    for entry_point in [*entry_points(group=GENERAL_PLUGINS_GROUP), *of_vllm]:
        try:
            _importing().add_package(entry_point.module)
            entry_point.load()()
        except Exception as error:
            _failed[entry_point.name] = f"{type(error).__name__}: {error}"
            logger.exception(
                "Plug-in %s (%s) failed to load; going on without it.", entry_point.name, entry_point.value
            )
        else:
            logger.info("Loaded plug-in %s (%s).", entry_point.name, entry_point.value)


def failed_plugins() -> str:
    """The packages that failed to load and why, in words; empty if there are none."""
    return "; ".join(f"plug-in {name} failed to load ({error})" for name, error in _failed.items())


def check_plugins(plugins: Sequence[str]) -> None:
    """Return if these can be tried. Raises `ConfigError` for a file that isn't there."""
    for plugin in plugins:
        plugin_file(plugin)


def load_plugins(plugins: Sequence[str]) -> None:
    """`load_plugin` for each, in order. Raises what it raises."""
    for plugin in plugins:
        load_plugin(plugin)


def load_plugin(plugin: str) -> ModuleType:
    """Import a plug-in, unless this process has it already.

    Args:
        plugin: The path of a Python file, or the name of a module that can be imported. A file may import others
            of its folder.

    Raises:
        ConfigError: There is no such file or module, or importing it fails.
    """
    path = plugin_file(plugin)
    try:
        module = _import_module(plugin) if path is None else import_file(path)
        if IMPORTS_VLLM in vars(module):
            importlib.import_module(STYLE_OF_V0).register_classes(module)
        return module
    except SensoriumError:
        raise
    except Exception as error:
        raise ConfigError(
            f"plugins: importing {plugin!r} failed: {type(error).__name__}: {str(error).rstrip('.')}. Correct it, or "
            f"set plugins (--plugin) to a file or a module that can be imported."
        ) from error


def plugin_file(plugin: str) -> Path | None:
    """The file that a plug-in is; None for a module's name. Raises `ConfigError` if there is no such file."""
    path = Path(plugin).expanduser()
    if path.suffix != ".py" and len(path.parts) == 1:
        return None
    if not path.is_file():
        raise ConfigError(
            f"plugins: got {plugin!r}, expected a Python file or the name of a module. There is no such file; correct "
            f"plugins (--plugin)."
        )
    return path.resolve()


def _import_module(name: str) -> ModuleType:
    _importing().add_package(name)
    return importlib.import_module(name)


def import_file(path: Path) -> ModuleType:
    """Run a file as a plug-in, unless this process has it already. Raises whatever it raises."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module  # imported by its own name, or the program that runs
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.append(folder)
    name = path.stem
    found = None if name in sys.modules else importlib.util.find_spec(name)
    if found is None or found.origin != str(path):  # the name is another module's
        name = f"sensorium_plugin_{sha256(bytes(path)).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path, loader=_importing().PluginLoader(name, str(path)))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def style_of(model_class: type) -> Any:
    """The module that knows how a class wants to be treated, if it was written for vLLM 0.6; else None."""
    modules = (sys.modules.get(each.__module__) for each in model_class.__mro__)
    if any(IMPORTS_VLLM in vars(module) for module in modules if module is not None):
        return importlib.import_module(STYLE_OF_V0)
    return None


def _importing() -> Any:
    return importlib.import_module(IMPORTING)
