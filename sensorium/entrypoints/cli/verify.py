"""`sensorium verify MODEL`: compares what a checkpoint computes here with what Hugging Face computes."""

from __future__ import annotations

import argparse
import json

from sensorium import logger as package_logger
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.cli.flags import add_config, add_flags, add_model, read_settings
from sensorium.errors import ConfigError

OWN = ("dtype", "skip_tokenizer_init", "load_format", "enable_prefix_caching", "max_num_batched_tokens", "num_blocks")
"""Settings that a verification chooses itself."""


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model(parser, "a directory or a name on the model hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--random-weights", action="store_true", help="make seeded weights for a folder that has only a config"
    )
    parser.add_argument(
        "--baseline",
        choices=["native", "generic"],
        help="compare the modules of transformers with the class of this engine, or the other way round",
    )
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], help="[float32 and its own]")
    parser.add_argument("--text-only", action="store_true", help="don't ask about media")
    parser.add_argument("--num-new-tokens", type=int, default=8, help="greedy tokens behind each prompt [8]")
    add_config(parser)
    add_flags(parser, EngineArgs, leave_out=["model", *OWN])
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Print the report. Status 1 if something differs, or media that a model takes weren't compared."""
    package_logger.configure(package_logger.LogSettings("ERROR"))
    from sensorium.entrypoints.verification.run import verify  # loads torch

    values = read_settings(parsed)
    if "model" not in values:
        raise ConfigError("model: got none, expected a directory or a name on the model hub.")
    settings = {name: value for name, value in values.items() if name in EngineArgs.__dataclass_fields__}
    report = verify(
        settings.pop("model"),
        baseline=parsed.baseline or "hugging face",
        random_weights=parsed.random_weights,
        dtypes=tuple(parsed.dtypes or ()),
        num_new_tokens=parsed.num_new_tokens,
        text_only=parsed.text_only,
        **settings,
    )
    print(json.dumps(report.as_dict()) if parsed.json else "\n".join(report.lines()))
    return 0 if report.is_equal else 1
