"""The front's handles on the decoder processes; see `decoder_process`."""

from __future__ import annotations

import contextlib
import itertools
import mmap
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from sensorium.anonymous_file import anonymous_file, write_all
from sensorium.errors import SensoriumError
from sensorium.media.audio import AudioClip
from sensorium.media.decoder_messages import COMMAND, FORK, KILL, SLOW, Decode, Decoded, ToDecoder
from sensorium.media.digest import EncodedMedia
from sensorium.media.image import BYTES_PER_PIXEL, image_of
from sensorium.media.limits import MediaLimits
from sensorium.media.video import VideoFrames

if TYPE_CHECKING:
    from PIL.Image import Image

_EXIT_GRACE_S = 2.0
_KEPT_BYTES = 16 << 20
"""Of a file that a process shares with the front, between two items."""
_READ_BYTES = 1 << 30

DecodedMedia: TypeAlias = "Image | AudioClip | VideoFrames"


@dataclass(slots=True, eq=False)
class Job:
    """An item to be decoded. Its future may be cancelled until it has a result."""

    media: EncodedMedia
    future: Future[DecodedMedia] = field(default_factory=Future)
    sampler_error: SensoriumError | None = None

    def succeed(self, result: DecodedMedia) -> None:
        """Resolve the future, unless it was cancelled."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_result(result)

    def fail(self, error: SensoriumError) -> None:
        """Fail the future, unless it was cancelled."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(slots=True, eq=False)
class Decoder:
    """The front's handle on one decoder process."""

    number: int
    connection: Connection
    input_fd: int
    output_fd: int
    is_slow: bool
    is_ready: bool = False
    job: Job | None = None
    started_s: float = 0.0

    def send(self, message: ToDecoder) -> None:
        """Raises `OSError` if the process has ended."""
        self.connection.send_bytes(msgspec.msgpack.encode(message))

    def begin(self, job: Job) -> None:
        """Send an item. Raises `OSError` if the process has ended."""
        self.job, self.started_s = job, time.monotonic()
        media = job.media
        write_all(self.input_fd, media.data, 0)
        self.send(Decode(media.modality, len(media.data), media.media_type))

    def tidy(self) -> None:
        """Return the memory that large items took."""
        for fd in (self.input_fd, self.output_fd):
            if os.fstat(fd).st_size > _KEPT_BYTES:
                os.ftruncate(fd, 0)

    def result(self, message: Decoded, modality: str) -> DecodedMedia:
        """The canonical form, in memory of this process. Raises `EOFError` if the file doesn't hold it."""
        if modality == "image":
            height, width = message.shape
            return self._image(width, height)
        if modality == "audio":
            return AudioClip(self._read(message.shape, np.float32), message.sampling_rate)
        assert message.metadata is not None
        return VideoFrames(self._read(message.shape, np.uint8), message.metadata)

    def _image(self, width: int, height: int) -> Image:
        num_bytes = height * width * BYTES_PER_PIXEL
        if os.fstat(self.output_fd).st_size < num_bytes:
            raise EOFError
        with mmap.mmap(self.output_fd, num_bytes, prot=mmap.PROT_READ) as pixels:
            return image_of(pixels, (width, height))

    def _read(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        array = np.empty(shape, dtype)
        view = array.reshape(-1).data.cast("B")
        offset = 0
        while offset < len(view):
            num_read = os.preadv(self.output_fd, [view[offset : offset + _READ_BYTES]], offset)
            if not num_read:
                raise EOFError
            offset += num_read
        return array

    def close(self) -> None:
        """Close this handle."""
        self.connection.close()
        os.close(self.input_fd)
        os.close(self.output_fd)


class ForkServer:
    """The front's handle on the fork server; see `decoder_process`."""

    def __init__(self, limits: MediaLimits) -> None:
        """Returns at once; the process goes on loading."""
        self._control, theirs = socket.socketpair()
        self._numbers = itertools.count()
        with theirs:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sensorium.media.decoder_process"),
                    *(str(theirs.fileno()), msgspec.json.encode(limits).decode()),
                ],
                pass_fds=[theirs.fileno()],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "MALLOC_ARENA_MAX": "2",  # one for each thread would look like memory in use
                    "OPENBLAS_NUM_THREADS": "1",  # a process that forks has one thread
                    "OMP_NUM_THREADS": "1",
                },
                stdin=subprocess.DEVNULL,
            )

    @property
    def end(self) -> socket.socket:
        """Readable once the process has ended."""
        return self._control

    def fork(self, *, is_slow: bool) -> Decoder:
        """Fork a new process. Raises `OSError` if the server has ended."""
        ours, theirs = Pipe()
        decoder = Decoder(next(self._numbers), ours, anonymous_file(), anonymous_file(), is_slow)
        try:
            command = COMMAND.pack(FORK, decoder.number)
            files = [theirs.fileno(), decoder.input_fd, decoder.output_fd]
            socket.send_fds(self._control, [command], files)
            if is_slow:
                self.make_slow(decoder)
        except OSError:
            decoder.close()
            raise
        finally:
            theirs.close()
        return decoder

    def make_slow(self, decoder: Decoder) -> None:
        """Lower the process's priority."""
        self._control.sendall(COMMAND.pack(SLOW, decoder.number))

    def kill(self, decoder: Decoder) -> None:
        """Kill a process."""
        with contextlib.suppress(OSError):
            self._control.sendall(COMMAND.pack(KILL, decoder.number))

    def close(self) -> None:
        """End all processes."""
        self._control.close()
        try:
            self._process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
