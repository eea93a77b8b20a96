"""Decodes media in separate processes, so that no item can exhaust the front's memory or delay other items.

A thread talks to the processes; callers get futures, and cancelling a future abandons its item. Two lanes keep quick
items from waiting behind slow ones: every item starts in the quick lane, and moves to the slow lane, or waits for a
place there, when it takes long. At an item's deadline its process is killed.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from multiprocessing.connection import Pipe, wait

import msgspec

from sensorium.errors import MediaError, SensoriumError
from sensorium.logger import get_logger
from sensorium.media.container import takes_too_long
from sensorium.media.decoder_messages import (
    ERRORS,
    Choose,
    Chosen,
    Decoded,
    Failed,
    FromDecoder,
    Ready,
)
from sensorium.media.decoder_server import DecodedMedia, Decoder, ForkServer, Job
from sensorium.media.digest import EncodedMedia
from sensorium.media.limits import MediaLimits
from sensorium.media.video import cannot_be_sampled

logger = get_logger(__name__)

QUICK_LANE_S = 1.0
_GRACE_S = 1.0
"""Decoders of sound and video check the time themselves, and their errors say where they stopped."""


class DecoderPool:
    """At most `limits.decode_processes` processes in each lane. Thread-safe.

    Every future ends: with the canonical form, with an error, or because it was cancelled.
    """

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self._woken, self._waking = Pipe(duplex=False)
        self._incoming: deque[Job] = deque()
        self._quick_line: deque[Job] = deque()
        self._slow_line: deque[Job] = deque()
        self._decoders: list[Decoder] = []
        self._server: ForkServer | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._is_closing = False
        self._reader: msgspec.msgpack.Decoder[FromDecoder] = msgspec.msgpack.Decoder(FromDecoder)

    def start(self) -> None:
        """Start the processes, so that the first item need not wait for them. Returns at once."""
        with self._lock:
            if self._thread is None and not self._is_closing:
                self._thread = threading.Thread(target=self._run, name="sensorium-decode", daemon=True)
                self._thread.start()

    def submit(self, media: EncodedMedia) -> Future[DecodedMedia]:
        """A future for the canonical form of an item; cancelling it abandons the item.

        The future raises:
            MediaError, InvalidRequestError: See `EncodedMedia.decode`.
            SensoriumError: The processes can't be started, or are ended.
        """
        job = Job(media)
        job.future.add_done_callback(self._wake_if_cancelled)
        with self._lock:
            is_open = not self._is_closing
            if is_open:
                self._incoming.append(job)
        if not is_open:
            job.fail(_ended())
            return job.future
        self.start()
        self._wake()
        return job.future

    def close(self) -> None:
        """End the processes. Items that are being decoded fail. May be called again."""
        with self._lock:
            self._is_closing = True
        self._wake()
        if self._thread is not None:
            self._thread.join()

    def _wake(self) -> None:
        self._waking.send_bytes(b"!")

    def _wake_if_cancelled(self, future: Future[DecodedMedia]) -> None:
        if future.cancelled():
            self._wake()

    # The thread

    def _run(self) -> None:
        self._fork_missing()
        while not self._is_closing:
            try:
                self._turn()
            except Exception:
                logger.exception("decoding media failed")
                self._server_ended()
        self._server_ended()

    def _turn(self) -> None:
        """Wait for the next event and handle it."""
        by_source = {decoder.connection: decoder for decoder in self._decoders}
        server_end = [] if self._server is None else [self._server.end]
        ready = wait([self._woken, *server_end, *by_source], self._next_end_s())
        if self._woken in ready:
            self._woken.recv_bytes()
            self._take_incoming()
        if self._server is not None and self._server.end in ready:
            self._server_ended()
            return
        for source in ready:
            decoder = by_source.get(source)  # type: ignore[call-overload]
            if decoder in self._decoders:
                self._hear(decoder)
        self._end_overdue()
        self._fill()

    def _take_incoming(self) -> None:
        while self._incoming:
            self._quick_line.append(self._incoming.popleft())
        for line in (self._quick_line, self._slow_line):
            for job in [each for each in line if each.future.cancelled()]:
                line.remove(job)
        for decoder in [each for each in self._decoders if each.job is not None and each.job.future.cancelled()]:
            self._drop(decoder)

    # Lanes

    def _in_lane(self, *, slow: bool) -> list[Decoder]:
        return [decoder for decoder in self._decoders if decoder.is_slow is slow]

    def _fill(self) -> None:
        """Give waiting items to processes that are free."""
        if self._quick_line or self._slow_line or self._server is not None:
            self._fork_missing()
        for decoder in list(self._decoders):
            line = self._slow_line if decoder.is_slow else self._quick_line
            if decoder.is_ready and decoder.job is None and line:
                try:
                    decoder.begin(line.popleft())
                except OSError:
                    self._has_died(decoder)

    def _fork_missing(self) -> None:
        """Keep the quick lane full, and the slow one as full as it has items."""
        try:
            if self._server is None:
                self._server = ForkServer(self._limits)
            most = self._limits.decode_processes
            for _ in range(most - len(self._in_lane(slow=False))):
                self._decoders.append(self._server.fork(is_slow=False))
            num_slow = len(self._in_lane(slow=True))
            num_idle = sum(decoder.job is None for decoder in self._in_lane(slow=True))
            for _ in range(min(most - num_slow, len(self._slow_line) - num_idle)):
                self._decoders.append(self._server.fork(is_slow=True))
        except OSError:
            logger.warning("no process can be started to decode media", exc_info=True)
            self._server_ended()

    def _end_s(self, decoder: Decoder) -> float:
        """The time at which a process must leave its lane."""
        limit_s = self._limits.max_decode_s + _GRACE_S
        return decoder.started_s + (limit_s if decoder.is_slow else min(QUICK_LANE_S, limit_s))

    def _next_end_s(self) -> float | None:
        ends = [self._end_s(decoder) for decoder in self._decoders if decoder.job is not None]
        return max(min(ends) - time.monotonic(), 0.0) if ends else None

    def _end_overdue(self) -> None:
        """Stop items whose time is over, or move them to the slow lane."""
        now_s = time.monotonic()
        for decoder in [each for each in self._decoders if each.job is not None and self._end_s(each) <= now_s]:
            job = decoder.job
            assert job is not None
            if now_s - decoder.started_s >= self._limits.max_decode_s + _GRACE_S:
                job.fail(takes_too_long(job.media.modality, self._limits.max_decode_s))
                self._drop(decoder)
            elif len(self._in_lane(slow=True)) < self._limits.decode_processes:
                decoder.is_slow = True
                assert self._server is not None
                self._server.make_slow(decoder)
            else:
                self._drop(decoder)
                self._slow_line.append(job)

    # Processes

    def _hear(self, decoder: Decoder) -> None:
        """Handle one message from a process."""
        try:
            message = self._reader.decode(decoder.connection.recv_bytes())
            if isinstance(message, Ready):
                decoder.is_ready = True
            elif decoder.job is not None:
                self._take(decoder, decoder.job, message)
        except (EOFError, OSError, msgspec.MsgspecError):
            self._has_died(decoder)

    def _take(self, decoder: Decoder, job: Job, message: Choose | Decoded | Failed) -> None:
        if isinstance(message, Choose):
            decoder.send(Chosen(_chosen(job, message)))
            return
        if isinstance(message, Decoded):
            job.succeed(decoder.result(message, job.media.modality))
        else:
            job.fail(job.sampler_error or ERRORS[message.error](message.message))
        decoder.job = None
        if message.is_last or decoder.is_slow:
            self._drop(decoder)
        else:
            decoder.tidy()

    def _has_died(self, decoder: Decoder) -> None:
        """A process has ended by itself: its item made it crash."""
        if decoder.job is not None:
            modality = decoder.job.media.modality
            logger.warning("a process has ended while it decoded %s of a request", modality)
            decoder.job.fail(
                MediaError(
                    f"{modality} can't be decoded: got data on which the decoder fails, expected a whole {modality} of "
                    "usual size. Convert it, or send a smaller one."
                )
            )
        self._drop(decoder)

    def _drop(self, decoder: Decoder) -> None:
        self._decoders.remove(decoder)
        decoder.close()
        if self._server is not None:
            self._server.kill(decoder)

    def _server_ended(self) -> None:
        """Fail all waiting items; the next item starts new processes."""
        if not self._is_closing:
            logger.error("the processes that decode media have ended")
        jobs = [decoder.job for decoder in self._decoders if decoder.job is not None]
        jobs += [*self._quick_line, *self._slow_line, *self._incoming]
        for line in (self._quick_line, self._slow_line, self._incoming):
            line.clear()
        for decoder in list(self._decoders):
            self._drop(decoder)
        if self._server is not None:
            self._server.close()
            self._server = None
        for job in jobs:
            job.fail(_ended())


def _ended() -> SensoriumError:
    return SensoriumError("The media of the request could not be decoded. Send the request again.")


def _chosen(job: Job, question: Choose) -> list[int]:
    """The frames that the item's sampler chooses; None if it fails, which the decoder then reports."""
    try:
        return [int(index) for index in job.media.sampler(question.metadata)]
    except SensoriumError as error:
        job.sampler_error = error
    except Exception:  # samplers come with models
        logger.debug("frame sampler failed", exc_info=True)
        job.sampler_error = cannot_be_sampled(question.metadata)
    return []
