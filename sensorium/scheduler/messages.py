"""The messages under their former address; they are a leaf that every room may import."""

from sensorium.messages import *  # noqa: F403
