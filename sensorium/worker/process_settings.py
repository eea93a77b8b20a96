"""What workers change for their whole process, put back when the last of them has ended.

In the engine core's own process they affect nothing else. `LLM` runs its worker in its caller's process, where all
other code runs under the same settings meanwhile.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import torch

from sensorium.config import EngineConfig
from sensorium.worker.memory import give_back_freed_memory, keep_freed_memory


class ProcessSettings:
    """Invariant: a setting that nobody holds is as it was found."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # garbage collection may end an engine at any moment, also within
        self._num_holders = 0
        self._put_back: dict[str, Callable[[], object]] = {}

    def hold(self, config: EngineConfig) -> None:
        """Set what a worker of this configuration needs."""
        num_threads = config.device_config.num_threads
        is_cpu = torch.device(config.device_config.device).type == "cpu"
        with self._lock:
            self._num_holders += 1
            if num_threads is not None:
                self._put_back.setdefault("threads", partial(torch.set_num_threads, torch.get_num_threads()))
                torch.set_num_threads(num_threads)
            if not is_cpu and config.model_config.dtype == torch.float32:
                # Torch lets convolutions round their float32 inputs to TF32, three decimal digits. A caller who asks
                # for float32 gets float32.
                cudnn = torch.backends.cudnn
                self._put_back.setdefault("TF32", partial(setattr, cudnn, "allow_tf32", cudnn.allow_tf32))
                cudnn.allow_tf32 = False
            if is_cpu and keep_freed_memory():
                self._put_back["memory"] = give_back_freed_memory

    def release(self) -> None:
        """Hold them no longer."""
        with self._lock:
            self._num_holders -= 1
            if self._num_holders == 0:
                for put_back in self._put_back.values():
                    put_back()
                self._put_back.clear()


PROCESS_SETTINGS = ProcessSettings()
"""Of this process."""
