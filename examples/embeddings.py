"""Pictures and texts as vectors, compared by the cosine of their angle.

The bundled model was trained to answer, not to compare: its vectors show how the call works, but carry little meaning.
To search with vectors, take a checkpoint that was trained for it.
"""

import numpy as np
from PIL import Image, ImageDraw

from sensorium import LLM


def drawn(color: str, left: int) -> dict[str, object]:
    """A prompt of one picture: a circle."""
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).ellipse((left, 44, left + 40, 84), fill=color)
    return {"prompt": "<|vision_bos|><|IMAGE|><|vision_eos|>", "multi_modal_data": {"image": picture}}


llm = LLM("demo", pooling_type="mean")
prompts = {
    "a red circle": drawn("red", 20),
    "the same again": drawn("red", 20),
    "a red circle elsewhere": drawn("red", 64),
    "a blue circle": drawn("blue", 20),
    "a text": "There is a red circle.",
}
vectors = np.stack([each.outputs.embedding for each in llm.encode(list(prompts.values()))])
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
print("vectors", vectors.shape)
for name, cosine in zip(prompts, vectors @ vectors[0], strict=True):
    print(f"{cosine:6.3f}  {name}")
