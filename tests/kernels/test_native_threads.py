"""The kernels' own threads: callers at the same time, forked children, more threads than cores."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sensorium import kernels
from tests.helpers.waiting import HANG_S, until

pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.fixture(autouse=True)
def torchs_own_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Work:
    """A product large enough to be shared out, and its right answer."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        weight, self.x = torch.randn(512, 256), torch.randn(8, 256)
        self.packed = kernels.pack(weight)
        self.want = self.run()
        torch.testing.assert_close(self.want, self.x @ weight.T, atol=1e-4, rtol=1e-4)

    def run(self) -> torch.Tensor:
        return kernels.packed_linear(self.x, self.packed)

    def is_right(self, times: int = 1) -> bool:
        return all(torch.equal(self.run(), self.want) for _ in range(times))


@pytest.mark.parametrize("count", [2, 3, 7])
def test_many_jobs_in_a_row(count: int) -> None:
    """Also with pauses after which the workers sleep."""
    torch.set_num_threads(count)
    work = Work(0)
    assert work.is_right(300)
    for pause_s in (0, 0.0001, 0.001, 0.01):
        time.sleep(pause_s)
        assert work.is_right()


def test_callers_at_the_same_time() -> None:
    """Whoever finds the threads taken works alone; nobody gets another's rows."""
    torch.set_num_threads(3)
    works = [Work(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda work: work.is_right(150), works))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_gets_workers_of_its_own() -> None:
    """It has none of its parent's threads, and must not wait for them."""
    torch.set_num_threads(3)
    work = Work(0)
    assert work.is_right()
    child = os.fork()
    if child == 0:
        os._exit(0 if work.is_right(20) else 1)
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            break
        time.sleep(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(status) == 0
    assert work.is_right(20)


def _computing_s(during_s: float) -> float:
    """Seconds that this process computes while its main thread sleeps."""
    begin = time.process_time()
    time.sleep(during_s)
    return time.process_time() - begin


def test_workers_sleep_when_there_is_nothing_to_do() -> None:
    torch.set_num_threads(4)
    assert Work(0).is_right(5)
    until(lambda: _computing_s(0.2) < 0.1)  # workers that the machine gives no time yet are still on their way to bed
    assert threading.active_count() < 20  # they are no Python threads
