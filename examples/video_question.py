"""Questions about a clip: frames as an array, or a file by its path.

python examples/video_question.py [CLIP]
"""

import sys

import numpy as np
from PIL import Image, ImageDraw

from sensorium import LLM, SamplingParams


def drawn(num_frames: int = 8) -> np.ndarray:
    """A green circle that moves to the right: `(frames, height, width, 3)`, taken as two frames a second."""
    frames = []
    for left in np.linspace(10, 70, num_frames):
        frame = Image.new("RGB", (112, 112), "white")
        ImageDraw.Draw(frame).ellipse((left, 44, left + 26, 70), fill="green")
        frames.append(np.asarray(frame))
    return np.stack(frames)


if len(sys.argv) > 1:
    clip = {"type": "video_url", "video_url": {"url": sys.argv[1]}}
else:
    clip = {"type": "video", "video": drawn()}

questions = ["What moves?", "How many shapes are there?", "Which way does the green circle move? Answer in JSON."]
chats = [[{"role": "user", "content": [clip, {"type": "text", "text": text}]}] for text in questions]
outputs = LLM("demo").chat(chats, SamplingParams(temperature=0, max_tokens=64))
for question, output in zip(questions, outputs, strict=True):
    [rows] = output.media_token_counts["video"]
    print(f"{question}\n  {output.outputs[0].text}  (the clip takes {rows} prompt tokens)")
