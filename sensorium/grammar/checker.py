"""Tries grammars before anything relies on them: each compiles once in a forked child, which may come to grief alone.

A child that is not back in time is killed, one that takes too much memory dies, one that overflows its stack crashes;
each is a verdict. Two lanes keep quick grammars from waiting behind slow ones: every grammar starts in the quick lane,
and moves to the slow lane when its time there is over.

The process has one thread only, since it forks.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import NoReturn

import msgspec
from llguidance import LLTokenizer

from sensorium.errors import InvalidRequestError
from sensorium.grammar.matchers import compile_grammar, refusal
from sensorium.grammar.messages import CancelCheck, CheckGrammar, Verdict

QUICK_LANE_S = 0.5
NUM_QUICK, NUM_SLOW = 2, 2
MAX_CHILD_BYTES = 512 << 20
"""Address space that compiling may take."""
MAX_COST_BYTES = 128 << 20
"""Memory that a compiled grammar may take."""
_QUICK_NICE, _SLOW_NICE = 5, 15


@dataclass(slots=True, eq=False)
class _Child:
    order: CheckGrammar
    pid: int
    pipe: Connection
    started_s: float
    is_slow: bool


class Checker:
    """Answers `CheckGrammar`s with `Verdict`s, in any order."""

    def __init__(self, connection: Connection, tokenizer: LLTokenizer, deadline_s: float) -> None:
        """`deadline_s`: most seconds that a grammar may take to compile."""
        self._connection = connection
        self._tokenizer = tokenizer
        self._deadline_s = deadline_s
        self._decoder: msgspec.msgpack.Decoder[CheckGrammar | CancelCheck] = msgspec.msgpack.Decoder(
            CheckGrammar | CancelCheck
        )
        self._quick_line: deque[CheckGrammar] = deque()
        self._slow_line: deque[CheckGrammar] = deque()
        self._children: list[_Child] = []

    def run(self) -> None:
        """Work until the other end closes; no child outlives this."""
        try:
            while True:
                self._fill_lanes()
                pipes = {child.pipe: child for child in self._children}
                for ready in wait([self._connection, *pipes], self._next_deadline_s()):
                    if ready is self._connection:
                        self._take(self._decoder.decode(self._connection.recv_bytes()))
                    elif pipes[ready] in self._children:  # type: ignore[index]
                        self._finish(pipes[ready])  # type: ignore[index]
                self._end_lanes()
        except (EOFError, OSError):
            return
        finally:
            for child in list(self._children):
                self._kill(child)

    def _take(self, message: CheckGrammar | CancelCheck) -> None:
        if isinstance(message, CheckGrammar):
            self._quick_line.append(message)
            return
        for line in (self._quick_line, self._slow_line):
            for order in [each for each in line if each.check_id == message.check_id]:
                line.remove(order)
        for child in [each for each in self._children if each.order.check_id == message.check_id]:
            self._kill(child)

    def _answer(self, verdict: Verdict) -> None:
        self._connection.send_bytes(msgspec.msgpack.encode(verdict))

    # Lanes

    def _num(self, *, slow: bool) -> int:
        return sum(child.is_slow is slow for child in self._children)

    def _fill_lanes(self) -> None:
        while self._slow_line and self._num(slow=True) < NUM_SLOW:
            self._start(self._slow_line.popleft(), is_slow=True)
        while self._quick_line and self._num(slow=False) < NUM_QUICK:
            self._start(self._quick_line.popleft(), is_slow=False)

    def _limit_s(self, child: _Child) -> float:
        return child.started_s + (self._deadline_s if child.is_slow else min(QUICK_LANE_S, self._deadline_s))

    def _next_deadline_s(self) -> float | None:
        if not self._children:
            return None
        return max(min(map(self._limit_s, self._children)) - time.monotonic(), 0.0)

    def _end_lanes(self) -> None:
        """Stop children whose time is over, or let them go on in the slow lane."""
        now_s = time.monotonic()
        for child in [each for each in self._children if self._limit_s(each) <= now_s]:
            order = child.order
            if now_s - child.started_s >= self._deadline_s:
                self._kill(child)
                reason = f"compiling it takes more than {self._deadline_s:g} s"
                self._answer(Verdict.refused(order.check_id, refusal(order.grammar, reason)))
            elif self._num(slow=True) < NUM_SLOW:
                child.is_slow = True
                _renice(child.pid, _SLOW_NICE)
            else:
                self._kill(child)
                self._slow_line.append(order)

    # Children

    def _start(self, order: CheckGrammar, *, is_slow: bool) -> None:
        receiving, sending = Pipe(duplex=False)
        pid = os.fork()
        if pid == 0:
            self._check(order, sending, _SLOW_NICE if is_slow else _QUICK_NICE)
        sending.close()
        self._children.append(_Child(order, pid, receiving, time.monotonic(), is_slow))

    def _check(self, order: CheckGrammar, sending: Connection, nice: int) -> NoReturn:
        """The child's whole life."""
        try:
            self._connection.close()
            for child in self._children:
                child.pipe.close()
            _confine(nice, self._deadline_s)
            sending.send_bytes(msgspec.msgpack.encode(_verdict(order, self._tokenizer)))
        finally:
            os._exit(0)

    def _finish(self, child: _Child) -> None:
        """Pass on what a child found, or that it came to grief."""
        try:
            verdict = msgspec.msgpack.decode(child.pipe.recv_bytes(), type=Verdict)
        except (EOFError, OSError, msgspec.MsgspecError):
            reason = "compiling it takes too much memory or too deep a recursion"
            verdict = Verdict.refused(child.order.check_id, refusal(child.order.grammar, reason))
        self._kill(child)
        self._answer(verdict)

    def _kill(self, child: _Child) -> None:
        self._children.remove(child)
        child.pipe.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(child.pid, signal.SIGKILL)
        os.waitpid(child.pid, 0)


def _verdict(order: CheckGrammar, tokenizer: LLTokenizer) -> Verdict:
    """Compile, and compute the first mask."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        matcher = compile_grammar(order.grammar, tokenizer)
        matcher.compute_bitmask()
        if matcher.is_error():
            raise refusal(order.grammar, matcher.get_error())
        cost_bytes = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if cost_bytes > MAX_COST_BYTES:
            raise refusal(order.grammar, f"compiled it takes {cost_bytes >> 20} MiB")
    except InvalidRequestError as error:
        return Verdict.refused(order.check_id, error)
    return Verdict(order.check_id, cost_bytes=cost_bytes)


def _confine(nice: int, deadline_s: float) -> None:
    """Bound what this process may take, and keep it from writing anywhere."""
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    os.nice(nice)
    seconds = int(deadline_s) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # where there is no /proc, the deadline has to do
        with open("/proc/self/statm") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + MAX_CHILD_BYTES, in_use + MAX_CHILD_BYTES))


def _renice(pid: int, nice: int) -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, pid, nice)
