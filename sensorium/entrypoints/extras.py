"""The package's optional dependencies, and the error that says which to install."""

from __future__ import annotations

from importlib.util import find_spec

from sensorium.errors import ConfigError

EXTRAS = {
    "serve": ("starlette", "uvicorn", "pydantic", "prometheus_client", "python_multipart"),
    "tracing": ("opentelemetry.exporter.otlp.proto.http", "opentelemetry.sdk"),
    "bench": ("matplotlib",),
}
"""The modules of each extra of pyproject.toml that this package imports."""


def require(extra: str, what: str) -> None:
    """Return if an extra is installed. Imports nothing of it.

    Args:
        extra: a key of `EXTRAS`.
        what: the command, or the setting and its value, that needs it.

    Raises:
        ConfigError: It is not.
    """
    missing = [module for module in EXTRAS[extra] if not _is_there(module)]
    if missing:
        raise ConfigError(
            f"{what}: needs the package's extra {extra!r}, which is not installed ({', '.join(missing)} missing). "
            f"Run pip install 'sensorium[{extra}]'."
        )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # one of the packages that it lies in
        return False
