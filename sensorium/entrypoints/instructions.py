"""Texts that a checkpoint wants in front of what it embeds, by name: the prompts of sentence-transformers.

    config_sentence_transformers.json
        {"prompts": {"query": "Instruct: ...", "document": ""}, "default_prompt_name": null}

Source: how sentence-transformers encodes texts, queries and documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sensorium.config import PoolerConfig
from sensorium.errors import InvalidRequestError


def instructed(prompts: Sequence[Any], pooler: PoolerConfig, name: str | None) -> list[Any]:
    """Prompts with the text of a name in front; without a name, with the checkpoint's default, if it has one.

    Token ids come as they should be, and stay so.

    Raises:
        InvalidRequestError: The checkpoint has no text of this name, or one is named for token ids.
    """
    if name is not None and name not in pooler.prompts:
        known = sorted(pooler.prompts)
        raise InvalidRequestError(
            f"got {name!r:.60}, expected one of {known or 'none: the checkpoint has no prompts'}. Change or remove it.",
            field="prompt_name",
        )
    text = pooler.prompts.get(name or pooler.default_prompt or "", "")
    return [_instructed(each, text, is_named=name is not None) for each in prompts] if text else list(prompts)


def of_role(pooler: PoolerConfig, role: str) -> str | None:
    """The name for queries or documents, where the checkpoint has one."""
    return role if role in pooler.prompts else None


def _instructed(prompt: Any, text: str, *, is_named: bool) -> Any:
    if isinstance(prompt, str):
        return text + prompt
    if isinstance(prompt, Mapping) and isinstance(prompt.get("prompt"), str):
        return {**prompt, "prompt": text + prompt["prompt"]}
    if is_named:
        raise InvalidRequestError(
            "got a name for a prompt of token ids, expected a text to put it in front of. Remove it, and put its "
            "token ids in front.",
            field="prompt_name",
        )
    return prompt
