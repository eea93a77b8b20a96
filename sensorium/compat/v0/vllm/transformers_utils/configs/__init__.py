"""Configs of checkpoints that transformers has no class for. It knows them once a plug-in of V0 is loaded."""

from sensorium.compat.v0.vllm.transformers_utils.configs.chatglm import ChatGLMConfig
from sensorium.compat.v0.vllm.transformers_utils.configs.internvl import (
    H2OVLChatConfig,
    InternVLChatConfig,
    NVLM_D_Config,
)
from sensorium.compat.v0.vllm.transformers_utils.configs.ultravox import UltravoxConfig

__all__ = ["ChatGLMConfig", "H2OVLChatConfig", "InternVLChatConfig", "NVLM_D_Config", "UltravoxConfig"]
