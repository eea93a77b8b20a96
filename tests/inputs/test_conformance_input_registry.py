"""The rules of `INPUT_REGISTRY`: input processors, dummy data, contexts, prompt types."""

from __future__ import annotations

import functools
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig, PretrainedConfig

from sensorium.errors import SensoriumError
from sensorium.inputs import (
    INPUT_REGISTRY,
    DummyData,
    InputContext,
    InputProcessingContext,
    InputRegistry,
    LLMInputs,
    is_encoder_decoder_inputs,
    is_explicit_encoder_decoder_prompt,
    token_inputs,
)
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.sequence import VLLM_TOKEN_ID_ARRAY_TYPE, IntermediateTensors, SequenceData
from tests.helpers.configs import make_model_config
from tests.helpers.processors import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    make_image,
    make_tokenizer,
    make_video,
    save_llava,
    save_qwen2_vl,
)


def new_model(*, takes_media: bool = True) -> type:
    return type("Model", (nn.Module, SupportsMultiModal) if takes_media else (nn.Module,), {})


def profile(model: type, seq_len: int, *, is_encoder_data: bool = False, **fields: Any) -> DummyData:
    config = make_model_config(model, **fields)
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    return INPUT_REGISTRY.dummy_data_for_profiling(config, seq_len, MULTIMODAL_REGISTRY, is_encoder_data)


def process(model: type, inputs: Any) -> Any:
    return INPUT_REGISTRY.process_input(make_model_config(model), inputs)


# Dummy data


@pytest.mark.parametrize("is_encoder_data", [False, True])
def test_default_dummy_data_are_zeros_without_media(is_encoder_data: bool) -> None:
    dummy = profile(new_model(), 5, is_encoder_data=is_encoder_data)
    assert dummy.seq_data.prompt_token_ids == (0,) * 5
    assert dummy.multi_modal_data is None
    assert profile(new_model(takes_media=False), 7).seq_data.get_len() == 7


def test_a_factory_gets_the_context_the_length_and_the_limits() -> None:
    seen: dict[str, Any] = {}

    def factory(ctx: InputContext, seq_len: int, mm_counts: Any) -> DummyData:
        seen.update(ctx=ctx, seq_len=seq_len, counts=dict(mm_counts))
        return DummyData(SequenceData.from_prompt_token_counts((7, 6), (0, seq_len - 6)), {"image": ["x"] * 2})

    model = INPUT_REGISTRY.register_dummy_data(factory)(new_model())
    dummy = profile(model, 10, limits={"image": 2})
    assert dummy.seq_data.prompt_token_ids == (7,) * 6 + (0,) * 4
    assert seen["ctx"].model_config.model_class is model
    assert seen["seq_len"] == 10
    assert seen["counts"] == {"image": 2, "audio": 1, "video": 1}


def test_a_plain_pair_is_accepted_as_dummy_data() -> None:
    def factory(ctx: InputContext, seq_len: int, mm_counts: Any) -> Any:
        return SequenceData.from_seqs([1] * seq_len), {"image": "x"}

    dummy = profile(INPUT_REGISTRY.register_dummy_data(factory)(new_model()), 3)
    assert isinstance(dummy, DummyData)
    assert dummy.multi_modal_data == {"image": "x"}
    assert dummy.multi_modal_placeholders is None


@pytest.mark.parametrize("made", [None, [1, 2], SequenceData.from_seqs([1])])
def test_anything_else_is_not_dummy_data(made: Any) -> None:
    model = INPUT_REGISTRY.register_dummy_data(lambda ctx, n, counts: made)(new_model())
    with pytest.raises(TypeError, match="expected DummyData"):
        profile(model, 3)


def test_too_few_dummy_tokens_are_an_assertion_error() -> None:
    model = INPUT_REGISTRY.register_dummy_data(lambda *_: DummyData(SequenceData.from_seqs([0] * 4)))(new_model())
    assert profile(model, 4).seq_data.get_len() == 4
    with pytest.raises(AssertionError, match="Expected at least 5 dummy tokens for profiling, but found 4") as caught:
        profile(model, 5)
    assert isinstance(caught.value, SensoriumError)


def test_too_few_dummy_tokens_of_an_encoder_only_warn(caplog: pytest.LogCaptureFixture) -> None:
    def short_encoder_data(*_: object) -> DummyData:
        return DummyData(SequenceData.from_seqs([0] * 4))

    model = INPUT_REGISTRY.register_dummy_encoder_data(short_encoder_data)(new_model())
    assert INPUT_REGISTRY.has_dummy_encoder_data(model)
    assert profile(model, 5, is_encoder_data=True).seq_data.get_len() == 4
    assert "Expected at least 5 dummy tokens" in caplog.text
    assert not INPUT_REGISTRY.has_dummy_encoder_data(new_model())


@pytest.mark.parametrize(
    ("data", "num_items"), [(["x"], 1), ([], 0), ("x", 1), ({"a": 1, "b": 2}, 1), (np.zeros((4, 2)), 1)]
)
def test_too_few_dummy_items_are_an_assertion_error(data: Any, num_items: int) -> None:
    model = INPUT_REGISTRY.register_dummy_data(
        lambda ctx, n, counts: DummyData(SequenceData.from_seqs([0] * n), {"image": data})
    )(new_model())
    with pytest.raises(AssertionError, match=f"at least 2 dummy 'image' items for profiling, but found {num_items}"):
        profile(model, 3, limits={"image": 2})


def test_asking_for_the_count_of_an_unknown_modality_lists_the_known_ones() -> None:
    model = INPUT_REGISTRY.register_dummy_data(lambda ctx, n, counts: counts["smell"])(new_model())
    with pytest.raises(KeyError, match=r"'smell', expected one of \['audio', 'image', 'video'\]"):
        profile(model, 3)


def test_the_input_processor_is_not_applied_to_dummy_data() -> None:
    model = INPUT_REGISTRY.register_input_processor(lambda ctx, inputs: pytest.fail("called"))(new_model())
    assert profile(model, 3).seq_data.get_len() == 3


# Input processors


def test_without_a_processor_the_inputs_come_back_themselves() -> None:
    inputs = token_inputs([1, 2])
    assert process(new_model(), inputs) is inputs
    assert inputs["mm_processor_kwargs"] == {}


def test_a_processor_rewrites_the_inputs() -> None:
    def double(ctx: InputContext, inputs: Any) -> Any:
        return token_inputs(inputs["prompt_token_ids"] * 2, multi_modal_data=inputs.get("multi_modal_data"))

    model = INPUT_REGISTRY.register_input_processor(double)(new_model())
    processed = process(model, token_inputs([1, 2], multi_modal_data={"image": "x"}))
    assert processed["prompt_token_ids"] == [1, 2, 1, 2]
    assert processed["multi_modal_data"] == {"image": "x"}
    bound = INPUT_REGISTRY.create_input_processor(make_model_config(model))
    assert bound(token_inputs([3]))["prompt_token_ids"] == [3, 3]  # type: ignore[typeddict-item]


def test_a_processor_that_changes_its_argument_changes_a_copy() -> None:
    image = make_image()

    def vandal(ctx: InputContext, inputs: Any) -> Any:
        inputs["prompt_token_ids"].append(9)
        inputs["multi_modal_data"]["image"].clear()
        inputs["multi_modal_data"]["image"].append({"wrapped": image})
        return inputs

    model = INPUT_REGISTRY.register_input_processor(vandal)(new_model())
    inputs = token_inputs([1, 2], multi_modal_data={"image": [image]})
    processed = process(model, inputs)
    assert processed["prompt_token_ids"] == [1, 2, 9]
    assert processed["multi_modal_data"]["image"][0]["wrapped"] is image
    assert inputs["prompt_token_ids"] == [1, 2]
    assert inputs["multi_modal_data"]["image"] == [image]


def test_a_plain_dict_without_a_type_is_accepted() -> None:
    model = INPUT_REGISTRY.register_input_processor(
        lambda ctx, inputs: LLMInputs(prompt_token_ids=[5], prompt=None, multi_modal_data=None)
    )(new_model())
    assert process(model, token_inputs([1])) == {
        "type": "token",
        "prompt_token_ids": [5],
        "prompt": None,
        "multi_modal_data": None,
        "mm_processor_kwargs": {},
    }


@pytest.mark.parametrize("result", [None, [1, 2], {}, {"prompt": "text"}])
def test_a_processor_must_return_inputs(result: Any) -> None:
    model = INPUT_REGISTRY.register_input_processor(lambda ctx, inputs: result)(new_model())
    with pytest.raises(TypeError, match="token_inputs"):
        process(model, token_inputs([1]))


def test_what_a_processor_raises_passes_through() -> None:
    def fail(ctx: InputContext, inputs: Any) -> Any:
        raise TypeError("Invalid image type: float")

    model = INPUT_REGISTRY.register_input_processor(fail)(new_model())
    with pytest.raises(TypeError, match="Invalid image type"):
        process(model, token_inputs([1]))


def test_both_halves_of_encoder_decoder_inputs_get_kwargs() -> None:
    def split(ctx: InputContext, inputs: Any, *, tiles: int = 1) -> Any:
        return {"encoder": token_inputs([1] * tiles), "decoder": token_inputs([2], mm_processor_kwargs={"own": 1})}

    model = INPUT_REGISTRY.register_input_processor(split)(new_model())
    processed = process(model, {**token_inputs([1]), "mm_processor_kwargs": {"tiles": 3}})
    assert is_encoder_decoder_inputs(processed)
    assert processed["encoder"]["mm_processor_kwargs"] == {"tiles": 3}  # type: ignore[typeddict-item]
    assert processed["decoder"]["mm_processor_kwargs"] == {"own": 1}  # type: ignore[typeddict-item]
    plain = {"encoder": token_inputs([1]), "decoder": token_inputs([2])}
    assert process(new_model(), plain) is plain


def test_subclasses_inherit_processors_and_registries_are_apart() -> None:
    model = INPUT_REGISTRY.register_input_processor(lambda ctx, inputs: token_inputs([8]))(new_model())
    subclass = type("Subclass", (model,), {})
    assert process(subclass, token_inputs([1]))["prompt_token_ids"] == [8]
    config = make_model_config(subclass)
    inputs = token_inputs([1])
    assert InputRegistry().process_input(config, inputs) is inputs
    assert INPUT_REGISTRY.has_registrations(subclass)
    assert not InputRegistry().has_registrations(subclass)


def test_a_model_without_a_class_has_the_defaults() -> None:
    inputs = token_inputs([1])
    assert INPUT_REGISTRY.process_input(make_model_config(None), inputs) is inputs


def test_partials_and_bound_methods_are_processors() -> None:
    class Bound:
        def process(self, ctx: InputContext, inputs: Any) -> Any:
            return token_inputs([6])

    for function in (Bound().process, functools.partial(lambda n, ctx, inputs: token_inputs([n]), 6)):
        model = INPUT_REGISTRY.register_input_processor(function)(new_model())
        assert process(model, token_inputs([1]))["prompt_token_ids"] == [6]


# Prompt types


def test_token_inputs_leave_out_what_is_none() -> None:
    assert token_inputs([1]) == {"type": "token", "prompt_token_ids": [1]}
    full: dict[str, Any] = {
        "prompt": "text",
        "token_type_ids": [0],
        "multi_modal_data": {"image": "x"},
        "multi_modal_inputs": {},
        "multi_modal_hashes": ["h"],
        "multi_modal_placeholders": {"image": []},
        "mm_processor_kwargs": {"a": 1},
    }
    assert token_inputs([1], **full) == {"type": "token", "prompt_token_ids": [1], **full}


def test_explicit_encoder_decoder_prompts_are_told_apart() -> None:
    assert is_explicit_encoder_decoder_prompt({"encoder_prompt": "a", "decoder_prompt": None})
    assert not is_explicit_encoder_decoder_prompt({"prompt": "a"})
    assert not is_explicit_encoder_decoder_prompt("a")


# Contexts


def test_a_context_gives_the_config_of_the_asked_type() -> None:
    ctx = InputContext(make_model_config(hf_config=LlamaConfig()))
    assert ctx.get_hf_config() is ctx.model_config.hf_config
    assert ctx.get_hf_config(LlamaConfig) is ctx.get_hf_config((LlavaConfig, PretrainedConfig))
    with pytest.raises(TypeError, match="got LlamaConfig, expected LlavaConfig"):
        ctx.get_hf_config(LlavaConfig)


def test_a_context_is_frozen() -> None:
    ctx = InputContext(make_model_config())
    with pytest.raises(AttributeError):
        ctx.model_config = make_model_config()  # type: ignore[misc]


def test_a_context_gives_media_limits_of_multimodal_models_only() -> None:
    assert InputContext(make_model_config(new_model(), limits={"image": 3})).get_mm_config().limit_per_prompt == {
        "image": 3
    }
    with pytest.raises(RuntimeError, match="Not a multimodal model"):
        InputContext(make_model_config(new_model(takes_media=False))).get_mm_config()


def test_a_context_gives_the_image_processors_settings() -> None:
    settings = {"size": {"shortest_edge": 28}}
    config = make_model_config(hf_image_processor_config=settings)
    assert InputContext(config).get_hf_image_processor_config() == settings
    assert InputContext(make_model_config()).get_hf_image_processor_config() == {}


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


def test_a_context_gives_the_whole_processor_without_torchvision(qwen2_vl: Path) -> None:
    from transformers import LlavaProcessor, Qwen2VLProcessor

    config = make_model_config(model=qwen2_vl, mm_processor_kwargs={"min_pixels": 56 * 56, "max_pixels": 56 * 112})
    ctx = InputContext(config)
    processor = ctx.get_hf_processor(Qwen2VLProcessor)
    assert processor.image_processor.size.longest_edge == 56 * 112
    assert ctx.get_hf_processor(max_pixels=56 * 56).image_processor.size.longest_edge == 56 * 56
    with pytest.raises(TypeError, match="got Qwen2VLProcessor, expected LlavaProcessor"):
        ctx.get_hf_processor(LlavaProcessor)


def test_a_processing_context_puts_its_tokenizer_into_the_processor(qwen2_vl: Path) -> None:
    tokenizer = make_tokenizer(IMAGE_TOKEN, VIDEO_TOKEN)
    ctx = InputProcessingContext(make_model_config(model=qwen2_vl), tokenizer)
    processor = ctx.get_hf_processor()
    assert processor.tokenizer is tokenizer
    assert InputContext(ctx.model_config).get_hf_processor().tokenizer is not tokenizer
    output = ctx.call_hf_processor(
        processor, f"what is {IMAGE_TOKEN} ?", {"images": [make_image(56, 112)]}, {"padding": False}
    )
    assert output["pixel_values"].shape == (4 * 8, 3 * 2 * 14 * 14)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    assert (output["input_ids"] == image_token_id).sum() == 4 * 8 // 4


def test_videos_go_through_the_whole_processor(qwen2_vl: Path) -> None:
    ctx = InputProcessingContext(make_model_config(model=qwen2_vl), make_tokenizer(IMAGE_TOKEN, VIDEO_TOKEN))
    output = ctx.call_hf_processor(
        ctx.get_hf_processor(), f"a {VIDEO_TOKEN} b", {"videos": [make_video(5, 56, 112)]}, {}
    )
    assert output["video_grid_thw"].tolist() == [[3, 4, 8]]
    assert (output["input_ids"] == ctx.tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)).sum() == 3 * 4 * 8 // 4


def test_a_failure_in_the_processor_is_a_runtime_error_of_the_request(qwen2_vl: Path) -> None:
    ctx = InputProcessingContext(make_model_config(model=qwen2_vl), make_tokenizer(IMAGE_TOKEN, VIDEO_TOKEN))
    with pytest.raises(RuntimeError, match="failed on") as caught:
        ctx.call_hf_processor(ctx.get_hf_processor(), "no place for it", {"images": [3.5]}, {})
    assert isinstance(caught.value, SensoriumError)
    assert caught.value.status == 400


def test_a_processor_without_videos_is_put_together_too(tmp_path: Path) -> None:
    processor = InputContext(make_model_config(model=save_llava(tmp_path))).get_hf_processor()
    assert type(processor).__name__ == "LlavaProcessor"
    assert processor.image_processor.size.shortest_edge == 28


def test_a_checkpoint_without_a_processor_is_a_runtime_error(tmp_path: Path) -> None:
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="HuggingFace processor"):
        InputContext(make_model_config(model=tmp_path)).get_hf_processor()


# Sequences


def test_sequence_data_from_counts_and_from_sequences() -> None:
    data = SequenceData.from_prompt_token_counts((-3, 2), (5, 1))
    assert data.prompt_token_ids == (-3, -3, 5)
    assert SequenceData.from_token_counts((5, 2)).prompt_token_ids == (5, 5)
    assert SequenceData.from_prompt_token_counts().get_len() == 0
    data = SequenceData.from_seqs([1, 2], [3])
    assert (data.get_prompt_len(), data.get_output_len(), data.get_token_ids()) == (2, 1, [1, 2, 3])
    assert VLLM_TOKEN_ID_ARRAY_TYPE == "l"
    assert SequenceData(array(VLLM_TOKEN_ID_ARRAY_TYPE, [1, 2])).prompt_token_ids == (1, 2)


def test_intermediate_tensors_are_named_and_sliced_together() -> None:
    tensors = IntermediateTensors({"hidden": torch.arange(6).reshape(3, 2)})
    assert tensors["hidden"].shape == (3, 2)
    assert tensors[1:].tensors["hidden"].tolist() == [[2, 3], [4, 5]]
    tensors["residual"] = torch.zeros(1)
    assert (len(tensors), [name for name, _ in tensors.items()]) == (2, ["hidden", "residual"])
