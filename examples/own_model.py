"""A model of your own: a checkpoint for the class in `colour_namer.py`, which the engine loads as a plug-in."""

import json
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageColor
from safetensors.torch import save_file

from sensorium import LLM, SamplingParams

WORDS = ["", "red", "orange", "yellow", "green", "cyan", "blue", "magenta", "white", "black"]

folder = Path(tempfile.mkdtemp())
config = {"model_type": "colour_namer", "architectures": ["ColourNamer"], "dtype": "float32"}
(folder / "config.json").write_text(json.dumps(config))
weights = torch.zeros(16, 16)
for token_id, word in enumerate(WORDS):
    if word:
        colour = torch.tensor(ImageColor.getrgb(word)) / 127.5 - 1
        weights[token_id, :3] = colour / colour.norm()
save_file({"words.weight": weights}, folder / "model.safetensors")

plugin = Path(__file__).with_name("colour_namer.py")
llm = LLM(str(folder), plugins=[str(plugin)], skip_tokenizer_init=True, limit_mm_per_prompt={"image": 2})
print("tier:", llm.report.features.tier)

for names in (["navy"], ["gold"], ["red", "yellow"]):
    images = [Image.new("RGB", (64, 48), name) for name in names]
    prompt = {"prompt_token_ids": [0] * len(images), "multi_modal_data": {"image": images}}
    [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=1))
    print(" and ".join(names), "->", WORDS[output.outputs[0].token_ids[0]])
