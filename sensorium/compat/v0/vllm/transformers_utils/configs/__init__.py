"""Configs of checkpoints that transformers has no class for. It knows them once a plug-in has imported them."""

from sensorium.compat.v0.vllm.transformers_utils.configs.chatglm import ChatGLMConfig
from sensorium.compat.v0.vllm.transformers_utils.configs.ultravox import UltravoxConfig

__all__ = ["ChatGLMConfig", "UltravoxConfig"]
