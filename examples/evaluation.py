"""How often is the model right? Drawn pictures with known answers, all in one call, and a table of the results."""

import itertools
from collections import Counter

from PIL import Image, ImageDraw

from sensorium import LLM, SamplingParams

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "black")
KINDS = ("circle", "square", "diamond")


def drawn(kind: str, color: str) -> Image.Image:
    """One shape on a grey background."""
    picture = Image.new("RGB", (128, 128), (225, 225, 225))
    draw = ImageDraw.Draw(picture)
    if kind == "diamond":
        draw.polygon([(64, 34), (94, 64), (64, 94), (34, 64)], fill=color)
    else:
        (draw.ellipse if kind == "circle" else draw.rectangle)((40, 40, 88, 88), fill=color)
    return picture


items = list(itertools.product(KINDS, COLORS))
chats = []
for kind, color in items:
    text = {"type": "text", "text": "What is in the image?"}
    chats.append([{"role": "user", "content": [{"type": "image", "image": drawn(kind, color)}, text]}])
outputs = LLM("demo").chat(chats, SamplingParams(temperature=0, max_tokens=64))

right = Counter()
for (kind, color), output in zip(items, outputs, strict=True):
    answer, expected = output.outputs[0].text.strip(), f"{color} {kind} in the center."
    right[kind] += answer.endswith(f" {expected}")
    if not answer.endswith(f" {expected}"):
        print(f"wrong: got {answer!r}, expected {expected!r}")
for kind in KINDS:
    print(f"{kind:8} {right[kind]} of {len(COLORS)} right")
print(f"all      {right.total() / len(items):.0%}")
