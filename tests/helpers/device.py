"""Where the tests' engines run: the CPU, or the device that SENSORIUM_TEST_DEVICE names.

On a machine with a GPU, `SENSORIUM_TEST_DEVICE=cuda python -m pytest tests/contract tests/engine/test_tiers.py` holds
CUDA to the same contract. The references stay on the CPU.
"""

from __future__ import annotations

import os

TEST_DEVICE = os.environ.get("SENSORIUM_TEST_DEVICE", "cpu")
