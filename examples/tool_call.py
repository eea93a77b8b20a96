"""Calls of a function about pictures, by OpenAI's client (`pip install openai`).

    python examples/tool_call.py [http://127.0.0.1:8000]

Without an address it starts `sensorium serve demo` itself. The bundled model was not trained on calls: a chat template
leaves the functions out of the prompt, and "required" makes it fill in a call. Models that were trained on calls need
neither.
"""

import base64
import io
import json
from importlib.resources import files

import openai
from PIL import Image, ImageDraw
from serving import server

SHAPES = {"type": "object", "properties": {"count": {"type": "integer"}}, "required": ["count"]}
TOOL = {"type": "function", "function": {"name": "order", "parameters": {**SHAPES, "additionalProperties": False}}}
WITHOUT_TOOLS = "{% if tools %}{% endif %}" + (files("sensorium") / "demo_model/chat_template.jinja").read_text()


def drawn(count: int) -> str:
    """Red circles side by side, as a data URL."""
    picture, png = Image.new("RGB", (128, 128), "white"), io.BytesIO()
    for i in range(count):
        ImageDraw.Draw(picture).ellipse((14 + 40 * i, 50, 40 + 40 * i, 76), fill="red")
    picture.save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


with (
    server("--chat-template", WITHOUT_TOOLS, "--tool-parser", "json") as address,
    openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
):
    for count in (2, 3):
        text = {"type": "text", "text": "How many shapes are there? Answer in JSON."}
        messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": drawn(count)}}, text]}]
        answer = client.chat.completions.create(
            model="demo", messages=messages, tools=[TOOL], tool_choice="required", temperature=0, max_tokens=64
        )
        for call in answer.choices[0].message.tool_calls:
            # What it returns would go back as {"role": "tool", "tool_call_id": call.id, "content": ...}.
            print(f"{count} circles: call {call.function.name} with {json.loads(call.function.arguments)}")
