"""What tensors free stays with the process."""

from __future__ import annotations

import resource

import torch

from sensorium.worker.memory import keep_freed_memory


def test_large_tensors_reuse_pages() -> None:
    """Without it, each tensor takes new pages from the system, thousands in all, and gives them back."""
    if not keep_freed_memory():  # another C library: nothing is promised
        return

    def new_pages() -> int:
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(50):
            torch.ones(4 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin

    new_pages()  # the heap grows
    assert new_pages() < 500
