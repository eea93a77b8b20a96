"""The requests that every engine gets: functions of a seed, so that all see the same, and no two share an image or a
text unless a case wants them to."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

QUESTION_TOKENS = 64
PLACEHOLDERS = {
    "qwen2_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava": "<image>\n",
}
WORDS = ("red", "house", "beside", "two", "small", "trees", "under", "clouds", "boat", "water", "near", "people")

Request = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """Requests for one checkpoint; images are written to `folder`."""

    checkpoint: Path
    folder: Path
    image_size: int

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.checkpoint / "config.json").read_text())
        return config

    @property
    def takes_images(self) -> bool:
        return "vision_config" in self.config

    def text_requests(self, seed: int, count: int, num_tokens: int) -> list[Request]:
        """Random tokens, none of them special: those come last in a vocabulary."""
        rng = np.random.default_rng(seed)
        vocabulary = Tokenizer.from_file(str(self.checkpoint / "tokenizer.json")).get_vocab_size(False)
        return [{"token_ids": row} for row in rng.integers(300, vocabulary - 100, (count, num_tokens)).tolist()]

    def image_requests(self, seed: int, count: int) -> list[Request]:
        return [self.image_request(seed + i, self._words(seed + i, QUESTION_TOKENS)) for i in range(count)]

    def image_request(self, seed: int, question: str, instruction: str = "") -> Request:
        """A chat of one turn about one image."""
        kind = self.config["model_type"]
        if kind not in PLACEHOLDERS:
            raise SystemExit(
                f"model type: got {kind!r}, expected one of {sorted(PLACEHOLDERS)}. Take another checkpoint."
            )
        picture = PLACEHOLDERS[kind]
        if kind == "llava":
            prompt = f"{instruction} USER: {picture}{question} ASSISTANT:"
        else:
            prompt = f"<|im_start|>system\n{instruction}<|im_end|>\n" if instruction else ""
            prompt += f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n"
        return {"prompt": prompt, "image": str(self._image(seed))}

    def instruction(self, seed: int) -> str:
        """A system text of 256 tokens."""
        return self._words(seed, 256)

    def _words(self, seed: int, num_tokens: int) -> str:
        tokenizer = Tokenizer.from_file(str(self.checkpoint / "tokenizer.json"))
        rng, words = random.Random(seed), f"{seed}"
        while len(tokenizer.encode(words).ids) < num_tokens:
            words += f" {rng.choice(WORDS)}"
        return words

    def _image(self, seed: int) -> Path:
        """Large soft shapes with a little noise, which keep an encoder from seeing equal patches."""
        path = self.folder / f"{seed}.png"
        if not path.exists():
            rng = np.random.default_rng(seed)
            shapes = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            size = (self.image_size, self.image_size)
            pixels = np.asarray(shapes.resize(size, Image.Resampling.BICUBIC), dtype=np.int32)
            noise = rng.normal(0, 8, (*size, 1)).astype(np.int32)
            Image.fromarray((pixels + noise).clip(0, 255).astype(np.uint8)).save(path)
        return path
