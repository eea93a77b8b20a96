"""A demonstration in a minute: a server with the bundled model answers about a picture, a clip and a sound.

Starts `sensorium serve demo` on a free port and asks through OpenAI's client. Hugging Face's own class answers the same
questions in this process, and texts and numbers of tokens are compared. Then the playground stays open until Ctrl-C.
All media are drawn and rendered here; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import numpy as np
import openai
from PIL import Image, ImageDraw

from sensorium.media.encode import audio_to_data_url, image_to_data_url, video_to_data_url

SIZE = 112
SAMPLING_RATE = 16_000
START_TIMEOUT_S = 600.0
"""The first start on a machine compiles the kernels."""
STOP_TIMEOUT_S = 30.0
MAX_TOKENS = 48


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


def sound(num_beeps: int = 3) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Beeps of 880 Hz with pauses between them."""
    beep = 0.4 * np.sin(2 * np.pi * 880 * np.arange(int(0.15 * SAMPLING_RATE)) / SAMPLING_RATE)
    pause = np.zeros(int(0.2 * SAMPLING_RATE))
    return np.concatenate([pause, *[np.concatenate([beep, pause])] * num_beeps]).astype(np.float32)


@dataclass(frozen=True)
class Question:
    """A question about a media item, and a description of the item."""

    modality: str
    url: str
    text: str
    shown: str

    def messages(self) -> list[Any]:
        kind = f"{self.modality}_url"
        return [
            {"role": "user", "content": [{"type": kind, kind: {"url": self.url}}, {"type": "text", "text": self.text}]}
        ]


@dataclass(frozen=True)
class Answer:
    """The answer to a question, and its times."""

    text: str
    num_prompt_tokens: int
    num_tokens: int
    first_token_s: float
    whole_s: float


def questions() -> list[Question]:
    image = image_to_data_url(picture())
    video = video_to_data_url(clip(), fps=2)
    audio = audio_to_data_url(sound(), SAMPLING_RATE)
    return [
        Question("image", image, "What is in the image?", "a red circle top left, a blue square bottom right"),
        Question("image", image, "How many shapes are there?", "two shapes"),
        Question("video", video, "What moves?", "a green circle that moves right"),
        Question("audio", audio, "How many beeps are there?", "three beeps"),
    ]


@contextmanager
def running_server() -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server on a free port of this machine; its address, and its process."""
    command = [sys.executable, "-m", "sensorium.entrypoints.cli.main", "serve", "demo", "--port", "0"]
    flags = ["--dtype", "float32", "--device", "cpu", "--limit-mm-per-prompt", '{"image": 4, "video": 2, "audio": 2}']
    with tempfile.TemporaryFile("w+b") as log:
        process = subprocess.Popen([*command, *flags], stderr=log)
        try:
            yield _address(process, log), process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _address(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        log.seek(0)
        text = log.read().decode(errors="replace")
        if found := re.search(r"running on (http://[\d.]+:\d+)", text):
            return found[1]
        if process.poll() is not None:
            raise SystemExit(f"the server ended with status {process.returncode}:\n{text}")
        time.sleep(0.1)
    raise SystemExit(f"the server was not ready within {START_TIMEOUT_S:.0f} s:\n{text}")


def ask(client: openai.OpenAI, question: Question) -> Answer:
    """Stream an answer."""
    begin_s = time.perf_counter()
    first_token_s = 0.0
    pieces: list[str] = []
    usage = None
    stream = client.chat.completions.create(
        model="demo",
        messages=question.messages(),
        temperature=0,
        max_tokens=MAX_TOKENS,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            if choice.delta.content:
                first_token_s = first_token_s or time.perf_counter() - begin_s
                pieces.append(choice.delta.content)
    assert usage is not None
    whole_s = time.perf_counter() - begin_s
    return Answer("".join(pieces).strip(), usage.prompt_tokens, usage.completion_tokens, first_token_s, whole_s)


class HuggingFace:
    """transformers' own class, on prompts and media as Sensorium prepares them."""

    def __init__(self) -> None:
        import torch
        from transformers import Qwen2_5OmniThinkerForConditionalGeneration
        from transformers.utils import logging as transformers_logging

        from sensorium import LLM, SamplingParams

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self._torch: Any = torch
        self._params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
        self._llm = LLM("demo", dtype="float32", device="cpu", max_model_len=2048)
        path = self._llm.engine.config.model_config.model
        loaded = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
        self._model: Any = loaded.eval()

    def answer(self, question: Question) -> tuple[str, int]:
        """The greedy answer, and how many tokens it has."""
        from sensorium.multimodal.byte_patches import as_processed

        request = self._llm.preprocess_chat(question.messages(), self._params).engine_request
        inputs: dict[str, Any] = {"input_ids": self._torch.tensor([list(request.prompt_token_ids)])}
        inputs["attention_mask"] = self._torch.ones_like(inputs["input_ids"])
        for item in request.media:
            kwargs = as_processed(item.kwargs or {}, self._model.config.vision_config.temporal_patch_size)
            inputs |= {name: self._torch.as_tensor(value) for name, value in kwargs.items()}
        with self._torch.inference_mode():
            output = self._model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        return self._llm.get_tokenizer().decode(tokens, skip_special_tokens=True).strip(), len(tokens)


def show(question: Question, answer: Answer) -> None:
    print(f"[{question.modality}: {question.shown}]")
    print(f"  {question.text}\n  {answer.text}")
    print(
        f"  {answer.num_prompt_tokens} prompt tokens, first token after {1000 * answer.first_token_s:.0f} ms, "
        f"{answer.num_tokens} tokens in {1000 * answer.whole_s:.0f} ms\n",
        flush=True,
    )


def compare(answers: dict[Question, Answer]) -> bool:
    """Whether all answers equal Hugging Face's."""
    reference = HuggingFace()
    num_equal = 0
    for question, answer in answers.items():
        expected = reference.answer(question)
        if expected == (answer.text, answer.num_tokens):
            num_equal += 1
        else:
            print(f"DIFFERENT: {question.text} got {answer}, Hugging Face says {expected}")
    print(f"{num_equal} of {len(answers)} answers are those of Hugging Face's class, in text and number of tokens.\n")
    return num_equal == len(answers)


def _shown_command() -> list[str]:
    """What a user types to run `sensorium` in this environment."""
    installed = Path(sys.executable).with_name("sensorium")
    if not installed.exists():
        return [sys.executable, "-m", "sensorium"]
    return [str(installed.relative_to(Path.cwd()) if installed.is_relative_to(Path.cwd()) else installed)]


def main() -> int:
    parser = argparse.ArgumentParser(description="Start a server with the bundled model, and ask it.")
    parser.add_argument("--exit", action="store_true", help="stop the server at the end")
    parser.add_argument("--no-compare", action="store_true", help="don't compare with Hugging Face")
    options = parser.parse_args()
    begin_s = time.perf_counter()
    print("starting: sensorium serve demo", flush=True)
    try:
        with running_server() as (url, process):
            print(f"ready after {time.perf_counter() - begin_s:.1f} s at {url}\n", flush=True)
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=httpx.Client(trust_env=False))
            with client:
                answers = {question: ask(client, question) for question in questions()}
            for question, answer in answers.items():
                show(question, answer)
            is_right = options.no_compare or compare(answers)
            print(f"The playground: {url}/", flush=True)
            print(f"The same server, without questions: {' '.join(_shown_command())} serve demo", flush=True)
            if not options.exit:
                print("Ctrl-C stops the server.", flush=True)
                status = process.wait()
                print(f"the server has ended by itself, with status {status}.")
                return 1
            return 0 if is_right else 1
    except KeyboardInterrupt:
        print("stopped.")
        return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    sys.exit(main())
