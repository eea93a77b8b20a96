"""The same question about every picture of a folder, in one call: the engine batches them by itself.

    python examples/folder_of_pictures.py [FOLDER] > answers.jsonl

A file that can't be read gets an error of its own, and the others their answers.
"""

import json
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from sensorium import LLM, SamplingParams


def drawn() -> Path:
    """A folder with a picture of each of four colours, and a file that is none."""
    folder = Path(tempfile.mkdtemp())
    for color in ("red", "green", "blue", "black"):
        picture = Image.new("RGB", (128, 128), "white")
        ImageDraw.Draw(picture).rectangle((44, 44, 84, 84), fill=color)
        picture.save(folder / f"{color}.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


folder = Path(sys.argv[1]) if len(sys.argv) > 1 else drawn()
files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
question = {"type": "text", "text": "What is in the image?"}
chats = [
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": str(path)}}, question]}] for path in files
]
outputs = LLM("demo").chat(chats, SamplingParams(temperature=0, max_tokens=64), return_errors=True)
for path, output in zip(files, outputs, strict=True):
    result = {"error": str(output.error)} if output.error else {"answer": output.outputs[0].text}
    print(json.dumps({"file": path.name, **result}))
