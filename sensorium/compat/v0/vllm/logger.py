"""Loggers."""

from sensorium.logger import get_logger as init_logger

__all__ = ["init_logger"]
