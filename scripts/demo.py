"""The main job in a minute: the bundled model looks at a picture, watches a clip and listens to a sound.

Everything is drawn and rendered here, so nothing is downloaded. Sensorium generates the answers in one batch, then
Hugging Face's own class one by one, and the tokens are compared.
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from sensorium import LLM, SamplingParams

SIZE = 112
SAMPLING_RATE = 16_000


def picture() -> Image.Image:
    """A red circle at the top left and a blue square at the bottom right."""
    image = Image.new("RGB", (SIZE, SIZE), (240, 240, 235))
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 10, 36, 36), fill=(220, 40, 40))
    draw.rectangle((76, 78, 100, 102), fill=(40, 70, 220))
    return image


def clip(num_frames: int = 8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A green circle that moves to the right; `(num_frames, SIZE, SIZE, 3)`."""
    frames = []
    for i in range(num_frames):
        image = Image.new("RGB", (SIZE, SIZE), (240, 240, 235))
        x = 14 + round(i * (SIZE - 40) / (num_frames - 1))
        ImageDraw.Draw(image).ellipse((x, 44, x + 24, 68), fill=(40, 160, 60))
        frames.append(np.asarray(image))
    return np.stack(frames)


def sound(num_beeps: int = 3) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int]:
    """Beeps of 880 Hz with pauses between them."""
    beep = 0.4 * np.sin(2 * np.pi * 880 * np.arange(int(0.15 * SAMPLING_RATE)) / SAMPLING_RATE)
    pause = np.zeros(int(0.2 * SAMPLING_RATE))
    return np.concatenate([pause, *[np.concatenate([beep, pause])] * num_beeps]).astype(np.float32), SAMPLING_RATE


@dataclass(frozen=True)
class Question:
    """A question about something, and what that something shows."""

    modality: str
    data: Any
    text: str
    shown: str

    def messages(self) -> list[dict[str, Any]]:
        parts = [{"type": self.modality, self.modality: self.data}, {"type": "text", "text": self.text}]
        return [{"role": "user", "content": parts}]


QUESTIONS = (
    Question("image", picture(), "What is in the image?", "a red circle top left, a blue square bottom right"),
    Question("image", picture(), "How many shapes are there?", "two shapes"),
    Question("video", clip(), "What moves?", "a green circle that moves right"),
    Question("audio", sound(), "How many beeps are there?", "three beeps"),
)


def hugging_face_tokens(llm: LLM, question: Question, params: SamplingParams) -> list[int]:
    """Greedy tokens of transformers' class on the same admitted prompt."""
    request = llm.preprocess_chat(question.messages(), params).engine_request
    inputs: dict[str, Any] = {"input_ids": torch.tensor([list(request.prompt_token_ids)])}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for item in request.media:
        inputs |= {name: torch.as_tensor(value) for name, value in (item.kwargs or {}).items()}
    model = reference_model(llm.engine.config.model_config.model)
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=params.max_tokens, do_sample=False)
    tokens: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def reference_model(path: str, _cache: dict[str, Any] = {}) -> Any:  # noqa: B006
    if path not in _cache:
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration

        _cache[path] = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    return _cache[path]


def main() -> int:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    begin = time.perf_counter()
    llm = LLM("demo", dtype="float32", device="cpu", max_model_len=2048)
    print("\n".join(llm.report.lines()))
    print(f"ready after {time.perf_counter() - begin:.1f} s\n")
    params = SamplingParams(temperature=0, max_tokens=48)
    outputs = llm.chat([each.messages() for each in QUESTIONS], params, use_tqdm=False)
    equal = 0
    for question, output in zip(QUESTIONS, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        same = tokens == hugging_face_tokens(llm, question, params)
        equal += same
        print(f"[{question.modality}: {question.shown}]")
        print(f"  {question.text}\n  {output.outputs[0].text.strip()}")
        print(f"  {len(tokens)} tokens, {'equal to' if same else 'DIFFERENT FROM'} Hugging Face's\n")
    print(f"{equal} of {len(QUESTIONS)} answers have Hugging Face's tokens.")
    return 0 if equal == len(QUESTIONS) else 1


if __name__ == "__main__":
    sys.exit(main())
