"""A chat about a picture, in two turns.

    python examples/chat_with_a_picture.py [PICTURE]

The bundled model knows shapes, printed text, charts, clips and short sounds. For other things, put a checkpoint's
directory in the place of "demo".
"""

import sys

from PIL import Image, ImageDraw

from sensorium import LLM, SamplingParams


def drawn() -> Image.Image:
    """A red circle at the top left and a blue square at the bottom right."""
    picture = Image.new("RGB", (112, 112), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((10, 10, 36, 36), fill="red")
    draw.rectangle((76, 78, 100, 102), fill="blue")
    return picture


picture = Image.open(sys.argv[1]) if len(sys.argv) > 1 else drawn()
llm = LLM("demo")
params = SamplingParams(temperature=0, max_tokens=64)

messages = [{"role": "user", "content": [{"type": "image", "image": picture}]}]
for question in ("What is in the image?", "How many shapes are there?"):
    if messages[-1]["role"] == "assistant":
        messages.append({"role": "user", "content": []})
    messages[-1]["content"].append({"type": "text", "text": question})
    [output] = llm.chat(messages, params)
    answer = output.outputs[0].text
    messages.append({"role": "assistant", "content": answer})
    print(f"{question}\n  {answer}")
    print(f"  ({output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens were cached)")
