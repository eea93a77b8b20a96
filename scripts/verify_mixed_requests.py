"""Serves two hundred random requests, with arrivals, aborts, preemptions and chunks, on tiny random models that run by
the modules of transformers, and compares each survivor's tokens with those of a run alone. Takes some minutes.

    PYTHONPATH=. python scripts/verify_mixed_requests.py [TYPE...]
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import warnings
from dataclasses import asdict
from pathlib import Path

import transformers

from sensorium import logger
from tests.helpers.mixed_generic import mixed_outcomes

NUM_REQUESTS = 200
TYPES = ("olmo2", "gemma2", "lfm2_moe", "qwen3_next", "bloom", "gptj", "marian", "inkling_text", "t5", "bart")
"""Of each way to run: paged attention, windows, states, attention of a model's own, and by request."""


def main() -> None:
    warnings.simplefilter("ignore")
    logger.configure(logger.LogSettings("ERROR"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    num_different = 0
    for model_type in sys.argv[1:] or TYPES:
        with tempfile.TemporaryDirectory() as folder:
            outcomes = mixed_outcomes(model_type, Path(folder), NUM_REQUESTS)
        num_different += sum(len(outcome.different) for outcome in outcomes.values())
        print(json.dumps({model_type: {name: asdict(outcome) for name, outcome in outcomes.items()}}), flush=True)
    sys.exit(1 if num_different else 0)


if __name__ == "__main__":
    main()
