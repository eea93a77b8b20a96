"""How prompts become token ids with placeholders: `INPUT_REGISTRY`, prompt types, contexts.

A model author registers an input processor, and a factory of dummy data, with `INPUT_REGISTRY`. Importing
this package loads neither torch nor transformers.
"""

from sensorium.inputs.data import (
    DecoderOnlyInputs,
    EncoderDecoderInputs,
    ExplicitEncoderDecoderPrompt,
    LLMInputs,
    ProcessorInputs,
    PromptType,
    SingletonInputs,
    SingletonPrompt,
    TextPrompt,
    TokenInputs,
    TokensPrompt,
    is_encoder_decoder_inputs,
    is_explicit_encoder_decoder_prompt,
    token_inputs,
)
from sensorium.inputs.registry import DummyData, InputRegistry
from sensorium.multimodal.context import InputContext, InputProcessingContext

INPUT_REGISTRY = InputRegistry()
"""The registry that model classes are decorated with."""

__all__ = [
    "INPUT_REGISTRY",
    "DecoderOnlyInputs",
    "DummyData",
    "EncoderDecoderInputs",
    "ExplicitEncoderDecoderPrompt",
    "InputContext",
    "InputProcessingContext",
    "InputRegistry",
    "LLMInputs",
    "ProcessorInputs",
    "PromptType",
    "SingletonInputs",
    "SingletonPrompt",
    "TextPrompt",
    "TokenInputs",
    "TokensPrompt",
    "is_encoder_decoder_inputs",
    "is_explicit_encoder_decoder_prompt",
    "token_inputs",
]
