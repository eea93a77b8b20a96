"""The formats in which models write calls: how each is read, and the grammar that constrains a model to it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from sensorium.parsing.formats.base import ToolFormat
from sensorium.parsing.formats.json_text import JsonText, LlamaJson
from sensorium.parsing.formats.mistral import Mistral
from sensorium.parsing.formats.tagged import Glm, Hermes, QwenCoder

FORMATS: Mapping[str, ToolFormat] = MappingProxyType(
    {each.name: each for each in (QwenCoder(), Glm(), Hermes(), Mistral(), LlamaJson(), JsonText())}
)
"""The formats by name. Chat templates are searched for them in this order."""

__all__ = ["FORMATS", "ToolFormat"]
