"""Many streams from one event loop: the engine's core runs in its own process and batches all requests that it has."""

import asyncio

from PIL import Image, ImageDraw

from sensorium import AsyncLLMEngine, EngineArgs, SamplingParams
from sensorium.outputs import OutputKind


def drawn(color: str) -> Image.Image:
    """A circle in the middle."""
    picture = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(picture).ellipse((44, 44, 84, 84), fill=color)
    return picture


async def ask(engine: AsyncLLMEngine, color: str) -> None:
    """Read one answer as it comes. Leaving the loop early would end the request."""
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the image?"}]}
    text = engine.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    prompt = {"prompt": text, "multi_modal_data": {"image": drawn(color)}}
    pieces = []
    async for output in engine.generate(prompt, SamplingParams(temperature=0, max_tokens=32), kind=OutputKind.DELTA):
        pieces += [each.text for each in output.outputs if each.text]
    print(f"{color}: {'|'.join(pieces)}")


async def main() -> None:
    """Three at once."""
    engine = await AsyncLLMEngine.start(EngineArgs("demo"))
    try:
        await asyncio.gather(*[ask(engine, color) for color in ("red", "green", "blue")])
    finally:
        await engine.shutdown()


asyncio.run(main())
