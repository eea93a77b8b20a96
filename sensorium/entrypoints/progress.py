"""The progress bar of long offline runs."""

from __future__ import annotations

import sys
import time

from sensorium.entrypoints.batch_run import Output
from sensorium.outputs import RequestOutput


class ProgressBar:
    """Requests done, with the tokens per second so far."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=total, desc="requests", unit="req", dynamic_ncols=True)
        self._begin = time.perf_counter()
        self._num_prompt = self._num_output = 0

    @staticmethod
    def wanted(use_tqdm: bool | None, num_jobs: int) -> bool:
        """As asked for; by default for several jobs in a terminal."""
        return use_tqdm if use_tqdm is not None else num_jobs > 1 and sys.stderr.isatty()

    def finished(self, output: Output) -> None:
        """Count a request that ended."""
        self._num_prompt += len(output.prompt_token_ids or ())
        if isinstance(output, RequestOutput):
            self._num_output += sum(len(each.token_ids) for each in output.outputs)
        seconds = max(time.perf_counter() - self._begin, 1e-9)
        rates = f"{self._num_prompt / seconds:.0f} prompt tok/s, {self._num_output / seconds:.0f} output tok/s"
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update()

    def close(self) -> None:
        """Leave the finished bar standing."""
        self._bar.close()
