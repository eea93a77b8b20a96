"""The config of InternVL's checkpoints of the kind `internvl_chat`, and of those that are made like them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

__all__ = ["H2OVLChatConfig", "InternVLChatConfig", "NVLM_D_Config"]

DEFAULTS: dict[str, Any] = {
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "select_layer": -1,
    "force_image_size": None,
    "downsample_ratio": 0.5,
    "template": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "ps_version": "v1",
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
}


class InternVLChatConfig(PretrainedConfig):  # type: ignore[misc]
    """Values by the names of checkpoints, each with a default. `llm_config` of a checkpoint is `text_config` here."""

    model_type = "internvl_chat"

    def __init__(
        self,
        vision_config: Mapping[str, Any] | None = None,
        llm_config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.vision_config = _part(vision_config)
        self.text_config = _part(settings.pop("text_config", None) or llm_config)
        for name, default in DEFAULTS.items():
            setattr(self, name, settings.pop(name, default))
        super().__init__(**settings)


class NVLM_D_Config(InternVLChatConfig):  # noqa: N801
    """NVLM-D's."""

    model_type = "NVLM_D"


class H2OVLChatConfig(InternVLChatConfig):
    """H2OVL's."""

    model_type = "h2ovl_chat"


def _part(given: Any) -> PretrainedConfig:
    """The config of a part, of its own class where transformers has that."""
    if isinstance(given, PretrainedConfig):
        return given
    values = dict(given or {})
    kind = CONFIG_MAPPING[values["model_type"]] if values.get("model_type") in CONFIG_MAPPING else PretrainedConfig
    values.pop("model_type", None)
    made: PretrainedConfig = kind(**values)
    return made


for each in (InternVLChatConfig, NVLM_D_Config, H2OVLChatConfig):
    AutoConfig.register(each.model_type, each, exist_ok=True)
