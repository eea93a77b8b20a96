"""Names of `vllm` itself that `sensorium` has elsewhere."""

from sensorium.inputs import PromptType, TextPrompt, TokensPrompt

__all__ = ["PromptType", "TextPrompt", "TokensPrompt", "__version__"]

__version__ = "0.6.6"
"""The latest release whose names are here, for files that ask."""
