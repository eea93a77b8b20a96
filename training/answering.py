"""Answers to items, greedily, through transformers, through Sensorium, or quickly through the training network.

The transformers side needs no torchvision: images go through the Pillow backend of the checkpoint's image processor,
sounds through its feature extractor, and clips, for which transformers has no such backend, through
:func:`training.features.patchify`.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from training.blueprint import FRAMES_PER_SECOND, SAMPLE_RATE, TEMPORAL_PATCH_SIZE
from training.dialogue import FULL_SCALE, Item, Media
from training.encoding import IGNORE, merged_grid, num_audio_tokens, tokenizer
from training.features import patchify
from training.loader import collate
from training.network import Thinker

MAX_NEW_TOKENS = 64
# A placeholder between its marks. A single-row item would be found again, but the smallest image has 64 rows.
_PLACEHOLDERS = {
    "image": ("<|vision_bos|>", "<|IMAGE|>", "<|vision_eos|>"),
    "video": ("<|vision_bos|>", "<|VIDEO|>", "<|vision_eos|>"),
    "audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
}


class Answerer(Protocol):
    """Answers the first question of items."""

    def answers(self, items: Sequence[Item]) -> list[str]:
        """One answer per item, in order."""


class TransformersAnswerer:
    """The checkpoint in Hugging Face's own class, in batches of items whose prompts have equal media."""

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        from transformers import (
            AutoTokenizer,
            Qwen2_5OmniThinkerForConditionalGeneration,
            WhisperFeatureExtractor,
        )
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self._model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, dtype="auto").eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._images = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self._sounds = WhisperFeatureExtractor.from_pretrained(folder)
        self._batch_size = batch_size

    def answers(self, items: Sequence[Item]) -> list[str]:
        """One answer per item, in order."""
        by_media: dict[tuple[str, ...], list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            by_media[tuple(media.modality for media in item.media)].append(index)
        answers = [""] * len(items)
        for indices in by_media.values():
            for start in range(0, len(indices), self._batch_size):
                chosen = indices[start : start + self._batch_size]
                for index, answer in zip(chosen, self._answer_batch([items[index] for index in chosen]), strict=True):
                    answers[index] = answer
        return answers

    def prompt(self, item: Item) -> str:
        """The chat prompt with every placeholder repeated once per row."""
        text: str = self._tokenizer.apply_chat_template(item.messages(), tokenize=False, add_generation_prompt=True)
        for media in item.media:
            count = num_audio_tokens(len(media.data)) if media.modality == "audio" else int(np.prod(merged_grid(media)))
            begin, placeholder, end = _PLACEHOLDERS[media.modality]
            text = text.replace(f"{begin}{placeholder}{end}", f"{begin}{placeholder * count}{end}", 1)
        return text

    def token_ids(self, item: Item) -> torch.Tensor:
        """The prompt as token ids ``(1, length)``."""
        ids: torch.Tensor = self._tokenizer(self.prompt(item), return_tensors="pt")["input_ids"]
        return ids

    @torch.no_grad()
    def logits(self, item: Item) -> torch.Tensor:
        """Logits of the prompt ``(1, length, vocab_size)``."""
        ids = self.token_ids(item)
        inputs = self._media_inputs(item.media)
        logits: torch.Tensor = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits
        return logits

    @torch.no_grad()
    def _answer_batch(self, items: Sequence[Item]) -> list[str]:
        inputs = self._tokenizer([self.prompt(item) for item in items], padding=True, return_tensors="pt")
        media = [media for item in items for media in item.media]
        generated = self._model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            **self._media_inputs(media),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
        new = generated[:, inputs["input_ids"].shape[1] :]
        answers: list[str] = self._tokenizer.batch_decode(new, skip_special_tokens=True)
        return answers

    def _media_inputs(self, media: Sequence[Media]) -> dict[str, Any]:
        inputs: dict[str, Any] = {}
        if images := [item.data for item in media if item.modality == "image"]:
            inputs.update(self._images(images=images, input_data_format="channels_last", return_tensors="pt"))
        if clips := [item.data for item in media if item.modality == "video"]:
            patches = [patchify(torch.from_numpy(clip)[None]) for clip in clips]
            sides = [
                (clip.shape[1] // self._images.patch_size, clip.shape[2] // self._images.patch_size) for clip in clips
            ]
            inputs["pixel_values_videos"] = torch.cat([patch.flatten(0, 1) for patch in patches])
            inputs["video_grid_thw"] = torch.tensor(
                [(len(patch), *side) for patch, side in zip(patches, sides, strict=True)]
            )
            inputs["video_second_per_grid"] = torch.full((len(clips),), TEMPORAL_PATCH_SIZE / FRAMES_PER_SECOND)
        if sounds := [item.data for item in media if item.modality == "audio"]:
            features = self._sounds(
                sounds, sampling_rate=SAMPLE_RATE, padding="max_length", return_attention_mask=True, return_tensors="pt"
            )
            inputs["input_features"] = features["input_features"]
            inputs["feature_attention_mask"] = features["attention_mask"]
        return inputs


class NetworkAnswerer:
    """The training network, in one forward pass per batch instead of one per token.

    It is given the reference answer and predicts the likeliest token after each of its tokens. That is the reference
    answer if and only if greedy generation gives it; otherwise generation may give another wrong answer.
    """

    def __init__(self, folder: Path, batch_size: int = 16) -> None:
        from safetensors.torch import load_file

        self._network = Thinker().eval()
        self._network.load_state_dict(load_file(folder / "model.safetensors"))
        self._batch_size = batch_size

    def answers(self, items: Sequence[Item]) -> list[str]:
        """One answer per item, in order."""
        by_shape: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            shapes = (media.data.shape if media.modality != "audio" else () for media in item.media)
            by_shape[tuple(shapes)].append(index)
        answers = [""] * len(items)
        for indices in by_shape.values():
            for start in range(0, len(indices), self._batch_size):
                chosen = indices[start : start + self._batch_size]
                for index, answer in zip(chosen, self._answer_batch([items[index] for index in chosen]), strict=True):
                    answers[index] = answer
        return answers

    @torch.no_grad()
    def _answer_batch(self, items: list[Item]) -> list[str]:
        batch = collate(items)
        predicted = self._network.lm_head(self._network.hidden_states(batch)[:, :-1]).argmax(-1)
        is_answer = batch.labels[:, 1:] != IGNORE
        return [tokenizer().decode(row[mask].tolist()) for row, mask in zip(predicted, is_answer, strict=True)]


class SensoriumAnswerer:
    """The checkpoint in Sensorium, all items in one call, so that the engine can batch them."""

    def __init__(self, folder: Path, **engine_args: Any) -> None:
        from sensorium import LLM, SamplingParams

        self._llm = LLM(str(folder), limit_mm_per_prompt={"image": 2}, **engine_args)
        self._params = SamplingParams(temperature=0.0, max_tokens=MAX_NEW_TOKENS)

    def answers(self, items: Sequence[Item]) -> list[str]:
        """One answer per item, in order."""
        outputs = self._llm.chat([openai_messages(item) for item in items], self._params)
        return [output.outputs[0].text for output in outputs]


def openai_messages(item: Item) -> list[dict[str, Any]]:
    """The first turn with media as data URLs, the way a client of the server sends them."""
    messages = item.messages()
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [_openai_part(part) for part in message["content"]]
    return messages


def _openai_part(part: dict[str, Any]) -> dict[str, Any]:
    match part["type"]:
        case "image":
            return {"type": "image_url", "image_url": {"url": _data_url("image/png", _png(part["image"]))}}
        case "video":
            return {
                "type": "video_url",
                "video_url": {"url": _data_url("video/x-matroska", _lossless_clip(part["video"]))},
            }
        case "audio":
            audio = base64.b64encode(_wav(part["audio"])).decode()
            return {"type": "input_audio", "input_audio": {"data": audio, "format": "wav"}}
    return part


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _png(pixels: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _wav(waveform: np.ndarray[Any, np.dtype[np.float32]]) -> bytes:
    import wave

    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(2)
        writer.setframerate(SAMPLE_RATE)
        writer.writeframes((waveform * FULL_SCALE).astype("<i2").tobytes())
    return buffer.getvalue()


def _lossless_clip(frames: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """A clip as FFV1 in RGB at two frames a second: the decoder gives the very same pixels."""
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=int(FRAMES_PER_SECOND))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="bgr0")))
        container.mux(stream.encode(None))
    return buffer.getvalue()
