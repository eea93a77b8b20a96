"""The processes that decode untrusted media: a fork server that has loaded all libraries, and its children.

A child decodes one item after the other, within a limit of memory. It may hang, grow or crash: the front kills it, and
the fork server replaces it within milliseconds. The fork server has only one thread, because it forks. It and its
children end when the front's end of the socket is closed, for whatever reason.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from sensorium.anonymous_file import write_all
from sensorium.errors import RequestError
from sensorium.media import memory_fence
from sensorium.media.audio import decode_audio
from sensorium.media.decoder_messages import (
    COMMAND,
    ERRORS,
    FORK,
    KILL,
    SLOW,
    Choose,
    Chosen,
    Decode,
    Decoded,
    Failed,
    FromDecoder,
    Ready,
    ToDecoder,
)
from sensorium.media.image import BYTES_PER_PIXEL, decode_image, warm_up
from sensorium.media.limits import MediaLimits, takes_too_much_memory
from sensorium.media.sampling import VideoMetadata
from sensorium.media.video import decode_video

if TYPE_CHECKING:
    from PIL.Image import Image

_NUM_FILES = 3
_SLOW_NICE = 15
_STRIP_BYTES = 1 << 20
_KEPT_BYTES = 64 << 20
"""Memory that a process may keep between two items."""


def main(control_fd: int, limits: MediaLimits) -> None:
    """Serve the front until it closes its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the front; these processes stop when it closes its end
    _load_decoders()
    children: dict[int, int] = {}
    with socket.socket(fileno=control_fd) as control:
        try:
            while True:
                data, files, _, _ = socket.recv_fds(control, COMMAND.size, _NUM_FILES)
                if len(data) < COMMAND.size:
                    return
                command, number = COMMAND.unpack(data)
                if command == FORK:
                    children[number] = _fork(control, files, limits)
                elif command == KILL:
                    _kill(children.pop(number))
                elif command == SLOW:
                    with contextlib.suppress(OSError):
                        os.setpriority(os.PRIO_PROCESS, children[number], _SLOW_NICE)
        finally:
            for pid in children.values():
                _kill(pid)


def _load_decoders() -> None:
    import av  # noqa: F401  children find it loaded

    warm_up()


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _fork(control: socket.socket, files: Sequence[int], limits: MediaLimits) -> int:
    pid = os.fork()
    if pid == 0:
        control.close()
        _live(files, limits)
    for fd in files:
        os.close(fd)
    return pid


def _live(files: Sequence[int], limits: MediaLimits) -> NoReturn:
    """The main function of a child."""
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        memory_fence.confine(limits.max_decode_bytes)
        connection_fd, input_fd, output_fd = files
        _Decoder(Connection(connection_fd), input_fd, output_fd, limits).run()
    finally:
        os._exit(0)


class _Decoder:
    """Decodes what the front sends, one item at a time."""

    def __init__(self, connection: Connection, input_fd: int, output_fd: int, limits: MediaLimits) -> None:
        self._connection = connection
        self._input_fd = input_fd
        self._output = _Output(output_fd)
        self._limits = limits
        self._reader: msgspec.msgpack.Decoder[ToDecoder] = msgspec.msgpack.Decoder(ToDecoder)

    def run(self) -> None:
        """Decode until the front closes its end, or until this process has become too large."""
        self._send(Ready())
        while True:
            try:
                order = self._receive()
            except EOFError:
                return
            assert isinstance(order, Decode)
            answer = self._answer(order)
            self._output.forget()
            is_last = memory_fence.has_grown(_KEPT_BYTES)
            self._send(msgspec.structs.replace(answer, is_last=is_last))
            if is_last:
                return

    def choose(self, metadata: VideoMetadata) -> list[int]:
        """Ask the front which frames are wanted."""
        self._send(Choose(metadata))
        chosen = self._receive()
        assert isinstance(chosen, Chosen)
        return chosen.indices

    def _send(self, message: FromDecoder) -> None:
        self._connection.send_bytes(msgspec.msgpack.encode(message))

    def _receive(self) -> ToDecoder:
        return self._reader.decode(self._connection.recv_bytes())

    def _answer(self, order: Decode) -> Decoded | Failed:
        try:
            memory_fence.allow(memory_fence.HEADER_BYTES + order.num_bytes)
            return self._decode(order)
        except MemoryError:
            error: RequestError = takes_too_much_memory(order.modality)
        except RequestError as found:
            error = found
        name = next(each.__name__ for each in type(error).__mro__ if each.__name__ in ERRORS)
        return Failed(name, str(error))

    def _decode(self, order: Decode) -> Decoded:
        data = _read(self._input_fd, order.num_bytes)
        if order.modality == "image":
            return self._image(decode_image(data, self._limits))
        if order.modality == "audio":
            clip = decode_audio(data, self._limits)
            self._output.write(clip.samples)
            return Decoded(clip.samples.shape, clip.sampling_rate)
        video = decode_video(
            data, self._limits, _Sampler(self), media_type=order.media_type, allocate=self._output.array
        )
        self._output.write(video.frames)
        return Decoded(video.frames.shape, metadata=video.metadata)

    def _image(self, image: Image) -> Decoded:
        """Strip by strip, in the layout in which the image library keeps pixels."""
        width, height = image.size
        self._output.reserve(width * height * BYTES_PER_PIXEL)
        rows = max(_STRIP_BYTES // (width * BYTES_PER_PIXEL), 1)
        for top in range(0, height, rows):
            strip = image.crop((0, top, width, min(top + rows, height)))
            self._output.write_at(strip.tobytes("raw", "RGBX"), top * width * BYTES_PER_PIXEL)
        return Decoded((height, width))


class _Sampler:
    """Calls the front's sampler by a message."""

    key = "the front's"

    def __init__(self, decoder: _Decoder) -> None:
        self._decoder = decoder

    def __call__(self, metadata: VideoMetadata, /) -> Sequence[int]:
        return self._decoder.choose(metadata)


class _Output:
    """The file that results are written to. Its pages are reused, which is faster than allocating new ones."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._array: NDArray[np.uint8] | None = None

    def reserve(self, num_bytes: int) -> None:
        """Make the file at least `num_bytes` long."""
        if os.fstat(self._fd).st_size < num_bytes:
            os.ftruncate(self._fd, num_bytes)

    def array(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array inside the file: a result that is computed into it need not be copied."""
        num_bytes = int(np.prod(shape))
        self.reserve(num_bytes)
        memory = mmap.mmap(self._fd, num_bytes)
        self._array = np.frombuffer(memory, np.uint8).reshape(shape)
        return self._array

    def write(self, result: NDArray[Any]) -> None:
        """Write `result` to the start of the file, unless it lies there already."""
        if result is self._array:
            return
        self.reserve(result.nbytes)
        self.write_at(np.ascontiguousarray(result).data.cast("B"), 0)

    def write_at(self, data: bytes | memoryview, offset: int) -> None:
        """Write bytes to a place in the file."""
        write_all(self._fd, data, offset)

    def forget(self) -> None:
        """Drop the reference to the array."""
        self._array = None


def _read(fd: int, num_bytes: int) -> bytes:
    if not num_bytes:
        return b""
    with mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ) as memory:
        return memory[:]


if __name__ == "__main__":
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=MediaLimits))
