"""Tries every encoder and every classifier of text that the installed transformers has, on a tiny random checkpoint:
how it runs, and whether its vectors or scores are those of its own modules. Writes what docs/models.md shows. Takes
some minutes.

    PYTHONPATH=. python scripts/verify_pooling.py [TYPE...]
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from sensorium import LLM, logger
from sensorium.entrypoints.model_table import VERIFIED_POOLING
from tests.helpers.generic import PROMPTS
from tests.helpers.tiny_architectures import spread, tiny_config

LONGEST_REASON = 200
LARGEST_ERROR = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types of models; all by default")
    chosen = parser.parse_args().types
    warnings.simplefilter("ignore")
    logger.configure(logger.LogSettings("ERROR"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    known = json.loads(VERIFIED_POOLING.read_text())["architectures"] if chosen else {}
    for model_type, architecture in classes():
        if not chosen or model_type in chosen:
            result = {"model_type": model_type, **tried(model_type, architecture)}
            print(f"{architecture}: {result}", flush=True)
            known[architecture] = result
            write(known)


def classes() -> list[tuple[str, str]]:
    """Types and their classes with a head for labels, and of encoders those without a head."""
    heads = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.items()
    bare = modeling_auto.MODEL_MAPPING_NAMES
    encoders = ((each, bare[each]) for each in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES if each in bare)
    return [(kind, name if isinstance(name, str) else name[0]) for kind, name in (*heads, *encoders)]


def write(known: dict[str, Any]) -> None:
    """Save after each class, so that an interrupted run keeps its results."""
    versions = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    date = dt.datetime.now(tz=dt.UTC).date().isoformat()
    content = {"date": date, "versions": versions, "architectures": dict(sorted(known.items()))}
    VERIFIED_POOLING.write_text(json.dumps(content, indent=1) + "\n")


def tried(model_type: str, architecture: str) -> dict[str, Any]:
    """The tier, whether outputs are equal, and the error if there was one."""
    with tempfile.TemporaryDirectory() as name:
        try:
            model = made(model_type, architecture, Path(name))
        except Exception as error:  # noqa: BLE001  whatever a config or a class raises
            return {"tier": "", "is_equal": False, "note": f"not tried: no tiny config ({first_line(error)})"}
        try:
            llm = LLM(name, device="cpu", skip_tokenizer_init=True, runner="pooling", max_model_len=100, max_num_seqs=4)
            error = largest_error(llm, model)
        except Exception as raised:  # noqa: BLE001  whatever modules raise
            return {"tier": "", "is_equal": False, "note": first_line(raised).replace(name, "the checkpoint")}
        features = llm.report.features
        llm.shutdown()
    tier = "native" if features.tier == "text" else features.tier.removeprefix("transformers ")
    why = next((note for note in features.notes if note.startswith("not transformers flat")), "")
    is_equal = error < LARGEST_ERROR
    note = why.removeprefix("not transformers flat: ") if is_equal else f"outputs differ by {error:.0e}"
    return {"tier": tier, "is_equal": is_equal, "note": note[:LONGEST_REASON]}


def made(model_type: str, architecture: str, folder: Path) -> PreTrainedModel:
    """A model with seeded weights, saved."""
    config = tiny_config(model_type)
    config.num_labels = 3
    if hasattr(config, "pooler_hidden_size"):
        config.pooler_hidden_size = config.hidden_size
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, architecture)(config).eval()
    spread(model, 0)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def largest_error(llm: LLM, model: PreTrainedModel) -> float:
    """Of prompts beside each other, compared with each alone by transformers. They end as texts of theirs do."""
    end = getattr(model.config, "eos_token_id", None)
    prompts = [[*ids, end] if isinstance(end, int) else ids for ids in PROMPTS]
    pooler = llm.engine.config.model_config.pooler
    outputs = llm.encode([{"prompt_token_ids": ids} for ids in prompts], use_tqdm=False)
    errors = []
    for ids, output in zip(prompts, outputs, strict=True):
        given = torch.tensor([ids])
        found = model(input_ids=given, attention_mask=torch.ones_like(given))
        if "classify" in pooler.tasks:
            expected = found.logits[0].softmax(-1)
        else:
            rows = found[0][0]
            expected = F.normalize(rows[-1] if pooler.pooling_type == "last" else rows.mean(0), dim=-1)
        assert output.outputs is not None
        errors.append(float(np.abs(output.outputs.data - expected.numpy()).max()))
    return max(errors)


def first_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:LONGEST_REASON]


if __name__ == "__main__":
    main()
