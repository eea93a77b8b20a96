"""Answers about pictures that a program can read: a JSON schema constrains the output, token by token."""

import json

from PIL import Image, ImageDraw

from sensorium import LLM, SamplingParams, StructuredOutputs

COLORS = ["red", "green", "blue", "yellow"]
SCHEMA = {
    "type": "object",
    "properties": {"color": {"enum": COLORS}, "kind": {"enum": ["circle", "square"]}},
    "required": ["color", "kind"],
    "additionalProperties": False,
}


def drawn(kind: str, color: str) -> Image.Image:
    """One shape on white."""
    picture = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if kind == "circle" else draw.rectangle)((40, 40, 88, 88), fill=color)
    return picture


shapes = [(kind, color) for kind in ("circle", "square") for color in COLORS]
chats = []
for kind, color in shapes:
    text = {"type": "text", "text": f"Describe the {kind} in JSON."}
    chats.append([{"role": "user", "content": [{"type": "image", "image": drawn(kind, color)}, text]}])

params = SamplingParams(temperature=0, max_tokens=64, structured_outputs=StructuredOutputs(json=SCHEMA))
for shape, output in zip(shapes, LLM("demo").chat(chats, params), strict=True):
    answer = json.loads(output.outputs[0].text)
    print(shape, "->", answer)
