"""The process that `startup` starts: loads a model, makes one token, and says when. Settings come as JSON on stdin."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def main() -> None:
    """Times are those of the wall clock, since the process that compares them is another."""
    settings: dict[str, Any] = json.load(sys.stdin)
    from sensorium.entrypoints.llm import LLM

    times = {"imported": time.time()}
    llm = LLM(**settings)
    times["ready"] = time.time()
    from sensorium.sampling_params import SamplingParams

    llm.generate("Hello", SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)
    times["first_token"] = time.time()
    print(json.dumps({**times, "stages": llm.report.seconds}))


if __name__ == "__main__":
    main()
