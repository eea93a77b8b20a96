"""Packages that add models: found by an entry point, and loaded in every process of the engine.

A package exposes a function in the group `sensorium.general_plugins`; the function registers what it has to. It may be
called in several processes, and so must be fit to be called again.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from sensorium.logger import get_logger

logger = get_logger(__name__)

GENERAL_PLUGINS_GROUP = "sensorium.general_plugins"

_loaded = False


def load_general_plugins() -> None:
    """Call every plug-in's function, the first time this runs in a process. One that fails doesn't stop the others."""
    global _loaded
    if _loaded:
        return
    _loaded = True  # before the calls: a plug-in may itself make an engine
    for entry_point in entry_points(group=GENERAL_PLUGINS_GROUP):
        try:
            entry_point.load()()
        except Exception:
            logger.exception(
                "Plug-in %s (%s) failed to load; going on without it.", entry_point.name, entry_point.value
            )
        else:
            logger.info("Loaded plug-in %s (%s).", entry_point.name, entry_point.value)
