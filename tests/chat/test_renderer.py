"""Chat messages to prompts: equal to Hugging Face's where it renders, and sensible where templates say
nothing.
"""

from __future__ import annotations

import asyncio
import base64
import io
import shutil
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sensorium.chat.content import parse_messages
from sensorium.chat.named_media import NamedMedia
from sensorium.chat.renderer import ChatRenderer
from sensorium.errors import (
    InvalidRequestError,
    InvalidTypeError,
    MediaError,
    MediaForbiddenError,
    MediaUnavailableError,
    RequestError,
    UnsupportedFeatureError,
)
from sensorium.media import EncodedMedia, FetchPolicy, MediaLoader
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.multimodal.hf_processors import cached_get_processor
from tests.helpers.checkpoints import make_checkpoint, make_tokenizer
from tests.helpers.processors import make_image
from tests.inputs.front import (
    TEMPLATES,
    Calls,
    Front,
    front_of,
    map_pictures,
    new_model,
    renderer_of,
    spans_of,
)

PARTS, STRINGS, IMAGES_FIRST = TEMPLATES["parts"], TEMPLATES["strings"], TEMPLATES["images first"]
ANY_PATH = FetchPolicy(allow_any_local_path=True)


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(value: Any = None, **fields: Any) -> dict[str, Any]:
    return {"type": "image", "image": make_image() if value is None else value, **fields}


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def image_token_front() -> Front:
    """A model whose config names its image token, as most do."""
    front = Front()
    assert front.preprocessor.encoder is not None
    token_id = front.preprocessor.encoder.tokenizer.convert_tokens_to_ids("<image>")
    front.config.model_config.hf_config.image_token_id = token_id
    return front


def png(path: Path | None = None, seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    make_image(seed=seed).save(buffer, "PNG")
    if path is not None:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def wav() -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(np.zeros(800, np.int16).tobytes())
    return buffer.getvalue()


def ways_to_render(renderer: ChatRenderer) -> list[Any]:
    return [renderer.render, lambda messages, **options: asyncio.run(renderer.arender(messages, **options))]


# Against Hugging Face


def with_first_token(family: str, path: Path) -> Path:
    """A checkpoint whose tokenizer puts a first token before every text, as Llama's does."""
    shutil.copytree(make_checkpoint(family), path)
    tokenizer = make_tokenizer()
    first = ("<|endoftext|>", tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    tokenizer.bos_token = first[0]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{first[0]} $A", special_tokens=[first])
    tokenizer.chat_template = AutoTokenizer.from_pretrained(path).chat_template
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("first_token", [True, False])
def test_prompts_and_ids_equal_hugging_face(
    family: str, add_generation_prompt: bool, first_token: bool, tmp_path: Path
) -> None:
    path = with_first_token(family, tmp_path / "checkpoint") if first_token else make_checkpoint(family)
    front = front_of(family, path)
    images = [make_image(60, 40, seed=1), make_image(80, 60, seed=2)]
    messages = [
        {"role": "system", "content": "You see."},
        {"role": "user", "content": [image(images[0]), text("What?")]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [text("And "), image(images[1]), text("here?")]},
    ]
    prompt = renderer_of(front, None).render(messages, add_generation_prompt=add_generation_prompt)
    processor = cached_get_processor(str(path))
    expected = processor.apply_chat_template(messages, add_generation_prompt=add_generation_prompt)
    assert prompt["prompt"] == expected
    encoded = processor.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = list(front(prompt).engine_request.prompt_token_ids)
    assert ids == encoded["input_ids"][0].tolist()
    assert (ids[0] == processor.tokenizer.bos_token_id) == first_token


def test_text_models_add_no_special_tokens_to_a_rendered_chat() -> None:
    model = type("TextModel", (torch.nn.Module,), {})
    prompt = renderer_of(Front(model), STRINGS).render([{"role": "user", "content": "hi"}])
    assert prompt == {"prompt": "[user]hi[assistant]", "add_special_tokens": False}


@pytest.mark.parametrize(("bos", "adds"), [("[user]", False), ("<other>", True), (None, True)])
def test_multimodal_models_add_them_unless_the_template_wrote_the_first(bos: str | None, adds: bool) -> None:
    front = Front()
    assert front.preprocessor.encoder is not None
    front.preprocessor.encoder.tokenizer.bos_token = bos
    assert renderer_of(front).render(user(text("hi")))["add_special_tokens"] is adds


def test_the_last_message_can_be_continued() -> None:
    messages = [*user(text("hi")), {"role": "assistant", "content": [text("I th")]}]
    assert renderer_of().render(messages, continue_final_message=True)["prompt"] == "[user]hi[assistant]I th"


# Where media stand


@pytest.mark.parametrize(
    ("template", "parts", "expected"),
    [
        (PARTS, [text("a"), image(), text("b")], "[user]a<image>b"),
        (PARTS, [image(), image(), text("b")], "[user]<image><image>b"),
        (IMAGES_FIRST, [text("a"), image()], "USER: <image>\na "),
        # one text: media first; several texts: in place
        (STRINGS, [text("what?"), image()], "[user]<image>\nwhat?"),
        (STRINGS, [text("a"), image(), text("b")], "[user]a\n<image>\nb"),
        (STRINGS, [text("only text")], "[user]only text"),
        # the user's own placeholders
        (PARTS, [text("a <image> b"), image()], "[user]a <image> b"),
        (PARTS, [text("a <image> b"), image(), image()], "[user]a <image> b<image>"),
        (PARTS, [image(), text("a <image> b"), image()], "[user]<image>a <image> b"),
        (STRINGS, [image(), text("a <image> b")], "[user]a <image> b"),
        (STRINGS, [image(), image(), text("a <image> b")], "[user]<image>\na <image> b"),
    ],
)
def test_media_stand_where_template_or_user_put_them(template: str, parts: list[Any], expected: str) -> None:
    prompt = renderer_of(image_token_front(), template).render(user(*parts), add_generation_prompt=False)
    assert prompt["prompt"] == expected


def test_more_placeholders_than_media_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[0\].content: got 2 image placeholders .* for 1 image"):
        renderer_of(image_token_front()).render(user(image(), text("<image> <image>")))


def test_declared_placeholders_are_counted_over_the_conversation() -> None:
    model = MULTIMODAL_REGISTRY.register_placeholder_str("image", lambda index: f"<|image_{index}|>")(new_model())
    messages = [*user(image(), text("one")), *user(image(), image(), text("see <|image_3|>"))]
    prompt = renderer_of(Front(model), STRINGS).render(messages, add_generation_prompt=False)
    assert prompt["prompt"] == "[user]<|image_1|>\none[user]<|image_2|>\nsee <|image_3|>"


def test_kinds_that_the_template_does_not_place_become_text() -> None:
    calls = Calls()
    model = new_model(mappers={name: map_pictures(name, calls) for name in ("image", "audio")})
    model = MULTIMODAL_REGISTRY.register_placeholder_str("audio", "<|AUDIO|>")(model)
    sound = {"type": "audio", "audio": np.zeros(4)}
    prompt = renderer_of(Front(model, limits={"audio": 2})).render(user(text("a"), sound, image()))
    assert prompt["prompt"] == "[user]a<|AUDIO|><image>[assistant]"
    assert {name: len(items) for name, items in prompt["multi_modal_data"].items()} == {"audio": 1, "image": 1}


def test_a_model_without_any_placeholder_says_what_to_register() -> None:
    with pytest.raises(UnsupportedFeatureError, match="register_placeholder_str"):
        renderer_of(template=STRINGS).render(user(image()))


def test_media_keep_their_order_and_names() -> None:
    images = [make_image(seed=seed) for seed in range(3)]
    messages = [*user(image(images[0], uuid="zero"), text("a")), *user(image(images[1]), image(images[2], uuid="two"))]
    prompt = renderer_of().render(messages)
    assert prompt["multi_modal_data"] == {"image": images}
    assert prompt["multi_modal_uuids"] == {"image": ["zero", None, "two"]}


def test_a_rendered_prompt_goes_through_preprocessing() -> None:
    front = Front()
    picture = np.ones((3, 4), np.float32)
    prompt = renderer_of(front).render(user(image(picture), text("x"), image(picture)))
    assert spans_of(front(prompt)) == [(6, 3), (10, 3)]


# Sources


def test_addresses_paths_and_data_urls_are_fetched_and_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    data = png(path)
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(data), "detail": "auto"}},
        {"type": "image_url", "image_url": data_url(data)},
        {"type": "image_url", "image_url": {"url": path.as_uri()}},
        {"type": "image", "image": str(path)},
        {"type": "image", "path": str(path)},
        {"type": "image", "image": data},
    ]
    for render in ways_to_render(renderer_of(media_loader=MediaLoader(policy=ANY_PATH))):
        for part in parts:
            (item,) = render(user(part))["multi_modal_data"]["image"]
            assert isinstance(item, EncodedMedia)
            assert item.data == data


def test_every_kind_of_part_may_have_a_name() -> None:
    renderer = renderer_of(media_loader=MediaLoader())
    parts = [
        {"type": "image_url", "image_url": data_url(png()), "uuid": "a"},
        {"type": "image", "image": make_image(), "uuid": "b"},
        {"type": "image_embeds", "image_embeds": torch.ones(1, 16), "uuid": "c"},
    ]
    assert renderer.render(user(*parts))["multi_modal_uuids"] == {"image": ["a", "b", "c"]}


def test_without_a_place_to_keep_media_a_name_alone_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"messages\[0\].content\[0\]: .* a uuid alone is not enough here"):
        renderer_of().render(user({"type": "image", "uuid": "a"}))


def test_media_are_found_by_their_names_and_named_by_their_contents() -> None:
    """Where messages come over a network, a name must not be an identity: anybody could have chosen it."""
    renderer = renderer_of(media_loader=MediaLoader(), named_media=NamedMedia(1 << 20))
    sent = {"type": "image_url", "image_url": data_url(png()), "uuid": "a"}
    embeds = {"type": "image_embeds", "image_embeds": torch.ones(1, 16), "uuid": "b"}
    renderer.render(user(sent, embeds), scope=b"me")
    again = [{"type": "image_url", "uuid": "a"}, {"type": "image_embeds", "image_embeds": None, "uuid": "b"}]
    for render in ways_to_render(renderer):
        prompt = render(user(*again), scope=b"me")
        picture, tensor = prompt["multi_modal_data"]["image"]
        assert (picture.data, tensor.shape) == (png(), (1, 16))
        assert "multi_modal_uuids" not in prompt
        for scope, name in ((b"you", "a"), (b"me", "c")):
            with pytest.raises(MediaUnavailableError, match=r"content\[0\].uuid: got '.' without content"):
                render(user({"type": "image_url", "uuid": name}), scope=scope)
        with pytest.raises(InvalidRequestError, match="uuid: got 600 characters"):
            render(user({**sent, "uuid": "x" * 600}))
    other = {"type": "image_url", "image_url": data_url(png(seed=7)), "uuid": "a"}
    first, second = renderer.render(user(again[0], other), scope=b"me")["multi_modal_data"]["image"]
    assert first.data == second.data, "the latest one, of the same request too"


def test_errors_call_messages_what_they_are_told() -> None:
    with pytest.raises(InvalidRequestError, match=r"input\[3\].content\[0\].type: got 'smell'"):
        renderer_of().render(user({"type": "smell"}), places=["input[3]"])


def test_sounds_come_inline() -> None:
    calls = Calls()
    model = new_model(mappers={"audio": map_pictures("audio", calls)})
    model = MULTIMODAL_REGISTRY.register_placeholder_str("audio", "<|AUDIO|>")(model)
    renderer = renderer_of(Front(model), STRINGS, media_loader=MediaLoader())
    encoded = base64.b64encode(wav()).decode()
    for part in (
        {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}},
        {"type": "audio_url", "audio_url": {"url": data_url(wav(), "audio/wav")}},
    ):
        (item,) = renderer.render(user(part))["multi_modal_data"]["audio"]
        assert item.data == wav()


@pytest.mark.parametrize(
    "audio_format", ["wav", "WAV", ".wav", "audio/wav", "x-wav", "audio/x-wav; codecs=1", "mp3", "", None, "sound file"]
)
def test_the_format_of_a_sound_in_any_spelling(audio_format: str | None) -> None:
    """Clients write the format as they like; a sound says by itself what it is."""
    model = new_model(mappers={"audio": map_pictures("audio", Calls())})
    model = MULTIMODAL_REGISTRY.register_placeholder_str("audio", "<|AUDIO|>")(model)
    renderer = renderer_of(Front(model), STRINGS, media_loader=MediaLoader())
    encoded = base64.b64encode(wav()).decode()
    for data in (encoded, encoded.rstrip("="), data_url(wav(), "audio/wav")):
        part = {"type": "input_audio", "input_audio": {"data": data, "format": audio_format}}
        (item,) = renderer.render(user(part))["multi_modal_data"]["audio"]
        assert item.data == wav()


def test_files_outside_the_allowed_folder_are_refused(tmp_path: Path) -> None:
    png(tmp_path / "image.png")
    renderer = renderer_of(media_loader=MediaLoader())
    with pytest.raises(MediaForbiddenError, match=r"^messages\[0\].content\[1\]: ") as caught:
        renderer.render(user(text("a"), {"type": "image_url", "image_url": (tmp_path / "image.png").as_uri()}))
    assert str(tmp_path) not in str(caught.value)


def test_broken_base64_is_named() -> None:
    for render in ways_to_render(renderer_of(media_loader=MediaLoader())):
        with pytest.raises(MediaError, match=r"^messages\[0\].content\[0\]: "):
            render(user({"type": "image_url", "image_url": "data:image/png;base64,%%%"}))


def test_without_a_loader_media_are_objects() -> None:
    with pytest.raises(UnsupportedFeatureError, match="nothing here fetches media"):
        renderer_of().render(user({"type": "image_url", "image_url": data_url(png())}))


def test_a_network_front_takes_no_objects() -> None:
    renderer = renderer_of(media_loader=MediaLoader(), accept_objects=False)
    for value in ([[1.0, 2.0]], {"a": 1}, 3):
        with pytest.raises(InvalidTypeError, match=r"messages\[0\].content\[0\]: got a value of type"):
            renderer.render(user(image(value)))
    with pytest.raises(InvalidTypeError, match="expected base64 of a safetensors file"):
        renderer.render(user({"type": "image_embeds", "image_embeds": [[1.0]]}))


@pytest.mark.parametrize("num_tensors", [1, 2])
def test_embeddings_come_as_tensors_or_safetensors(num_tensors: int) -> None:
    tensors = {"image_embeds": torch.ones(3, 16), "image_grid_thw": torch.tensor([[1, 2, 6]])}
    tensors = dict(list(tensors.items())[:num_tensors])
    value: Any = tensors["image_embeds"] if num_tensors == 1 else tensors
    encoded = base64.b64encode(save(tensors)).decode()
    for given in (value, encoded):
        prompt = renderer_of().render(user({"type": "image_embeds", "image_embeds": given}))
        (item,) = prompt["multi_modal_data"]["image"]
        found = {"image_embeds": item} if num_tensors == 1 else item
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("value", ["%%%", base64.b64encode(b"no safetensors").decode(), ""])
def test_embeddings_of_another_format_are_refused(value: str) -> None:
    with pytest.raises(InvalidRequestError, match="expected base64 of a safetensors file"):
        renderer_of().render(user({"type": "image_embeds", "image_embeds": value}))


def test_embeddings_can_be_switched_off() -> None:
    with pytest.raises(UnsupportedFeatureError, match="switched off"):
        renderer_of(accept_embeddings=False).render(user({"type": "image_embeds", "image_embeds": torch.ones(1, 16)}))


def test_too_many_items_are_refused_before_anything_is_fetched() -> None:
    class Fetcher:
        def encoded(self, *args: Any) -> Any:
            raise AssertionError("fetched")

    with pytest.raises(InvalidRequestError, match=r"At most 4 image\(s\)"):
        renderer_of(media_loader=Fetcher()).render(user(*[{"type": "image_url", "image_url": "http://x"}] * 5))


# Wrong messages


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        (None, InvalidTypeError, "messages: got nothing, expected a list"),
        ("hi", InvalidTypeError, "messages: got a value of type str"),
        ([], InvalidRequestError, "messages: got none"),
        (["hi"], InvalidTypeError, r"messages\[0\]: got a value of type str"),
        ([{"content": "hi"}], InvalidTypeError, r"messages\[0\].role"),
        ([{"role": "user"}], InvalidTypeError, r"messages\[0\].content: got nothing"),
        ([{"role": "user", "content": 3}], InvalidTypeError, r"messages\[0\].content: got a value of type int"),
        (user(3), InvalidTypeError, r"messages\[0\].content\[0\]: got a value of type int"),
        (user({"type": "smell"}), InvalidRequestError, r"messages\[0\].content\[0\].type: got 'smell'"),
        (user({}), InvalidRequestError, "type: got None"),
        (user({"type": "text"}), InvalidTypeError, r"content\[0\].text: got nothing"),
        (user(text("a"), {"type": "image_url"}), InvalidRequestError, r"content\[1\].image_url: got nothing"),
        (user({"type": "image_url", "image_url": {}}), InvalidRequestError, r"image_url.url: got nothing"),
        (user({"type": "image_url", "image_url": 3}), InvalidTypeError, "expected an address"),
        (user({"type": "image_url", "image_url": {"url": "x", "detail": "low"}}), UnsupportedFeatureError, "detail"),
        (user({"type": "image_url", "image_url": "x", "size": 3}), InvalidRequestError, r"unknown fields \['size'\]"),
        (user(image(uuid=3)), InvalidTypeError, "uuid"),
        (user({"type": "image", "image": 1, "url": "x"}), InvalidRequestError, "expected one of them"),
        (user({"type": "input_audio", "input_audio": "x"}), InvalidTypeError, "a dict with data and format"),
        (user({"type": "input_audio", "input_audio": {"data": 3}}), InvalidTypeError, "base64 as a string"),
        (
            user({"type": "input_audio", "input_audio": {"data": "", "format": 3}}),
            InvalidRequestError,
            "input_audio.format",
        ),
        ([{"role": "a", "tool_calls": 3}], InvalidTypeError, r"messages\[0\].tool_calls"),
        ([{"role": "a", "tool_calls": [3]}], InvalidTypeError, r"tool_calls\[0\]"),
        ([{"role": "a", "content": "b", "reasoning": 3}], InvalidTypeError, r"messages\[0\].reasoning"),
    ],
)
def test_wrong_messages_are_refused_by_name(messages: Any, error: type[RequestError], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_messages(messages)


def test_a_string_among_parts_is_text() -> None:
    (message,) = parse_messages(user("a", {"type": "refusal", "refusal": "no"}))
    assert message.texts() == ["a", "no"]


def test_tools_are_a_list() -> None:
    with pytest.raises(InvalidTypeError, match="tools"):
        renderer_of().render(user(text("a")), tools="weather")
