"""The demo model as a whole Qwen2.5-Omni without a voice: ``python -m training.export_omni FOLDER``.

The published checkpoints hold the thinker as one part of the whole, and some engines (vLLM, for one) read no other
layout. The weights are the same, under names that begin with ``thinker.``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from training.encoding import MODEL_FOLDER


def export(source: Path, target: Path) -> None:
    """Write the checkpoint in ``source`` to the folder ``target``, as a part of the whole."""
    target.mkdir(parents=True, exist_ok=True)
    thinker = json.loads((source / "config.json").read_text())
    whole = {
        "architectures": ["Qwen2_5OmniModel"],
        "model_type": "qwen2_5_omni",
        "enable_audio_output": False,
        "dtype": thinker["dtype"],
        "thinker_config": thinker,
    }
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, target)
    (target / "config.json").write_text(json.dumps(whole, indent=2) + "\n")
    weights = {f"thinker.{name}": tensor for name, tensor in load_file(source / "model.safetensors").items()}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    """Export the bundled checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    export(MODEL_FOLDER, parser.parse_args().folder)


if __name__ == "__main__":
    main()
