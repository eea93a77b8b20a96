"""The words of a sound, by OpenAI's client (`pip install openai`).

    python examples/transcription.py [http://127.0.0.1:8000 [SOUND]]

Without an address it starts `sensorium serve demo` itself; without a sound it sends one in which a synthetic voice says
three digits. The bundled model knows the digits and 32 more English words.
"""

import sys
from pathlib import Path

import openai
from serving import server

sound = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).with_name("seven_three_nine.mp3")

with server() as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
    whole = client.audio.transcriptions.create(model="demo", file=sound)
    print(f"{sound.name}: {whole.text!r}")
    print("as a stream:", end="")
    for event in client.audio.transcriptions.create(model="demo", file=sound, stream=True):
        if event.type == "transcript.text.delta":
            print(f" [{event.delta}]", end="", flush=True)
    print()
