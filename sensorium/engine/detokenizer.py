"""Token ids to text, one token at a time, with stop strings.

Three layers: `Detokenizer` knows a tokenizer; a `TextStream` turns one output's ids into pieces of text and
holds back what is not a whole character yet; `IncrementalDetokenizer` joins the pieces, finds stop strings and
determines what may be shown.

At the end of an output, the pieces joined equal what the tokenizer decodes from prompt and output together,
less what it decodes from the prompt alone: a first token "▁Hello" gives " Hello" behind a prompt and "Hello"
without one.

The tokenizers library has an incremental decoder too. It is not used, because it has no end: bytes that never
become a character hold back all text behind them.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

from sensorium.engine.stop_strings import StopStringMatcher
from sensorium.sampling_params import SamplingParams

REPLACEMENT = "\ufffd"
"""The character in decoded text for bytes that aren't valid UTF-8."""

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece writes a token that is one byte."""
_MAX_CONTEXT_TOKENS = 6
"""Tokens of the prompt that decide how the first output token reads: enough to hold a character and a space.
"""
_MAX_HELD_TOKENS = 8
"""Tokens held back until they make whole characters. A character has at most four bytes, each in a token of
its own; twice that leaves room for tokens that end one character and begin another.
"""


class TextStream(Protocol):
    """Turns the ids of one output into pieces of text."""

    def push(self, token_id: int) -> str:
        """Take one id; returns the text that is certain now."""

    def flush(self) -> str:
        """Return the rest of the text, at the end of the output."""


class ByteLevelStream:
    """Text of a byte-level tokenizer, whose tokens are strings of bytes. Exact for any ids, O(1) per token."""

    def __init__(self, token_bytes: Callable[[int], bytes], context: Sequence[int]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._decoder.decode(b"".join(token_bytes(token_id) for token_id in context))
        # Bytes at the context's end that turn out to be no character were shown as such by the prompt itself.
        self._hides_replacement = self._decoder.getstate()[0] != b""

    def push(self, token_id: int) -> str:
        """See `TextStream`."""
        return self._shown(self._decoder.decode(self._token_bytes(token_id)))

    def flush(self) -> str:
        """See `TextStream`."""
        return self._shown(self._decoder.decode(b"", final=True))

    def _shown(self, piece: str) -> str:
        if piece and self._hides_replacement:
            self._hides_replacement = False
            return piece.removeprefix(REPLACEMENT)
        return piece


class WindowStream:
    """Text of any tokenizer, by decoding a window of its last tokens.

    How a token reads may depend on the one before it, so the window begins with the tokens of the last piece.
    New text is what the window's text has beyond theirs:

        window              text           piece
        ▁Hello              "Hello"        "Hello"
        ▁Hello ▁world       "Hello world"  " world"
        ▁world <0xC3>       "world�"       ""
        ▁world <0xC3> <0xA9>  "worldé"     "é"
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int]) -> None:
        self._decode = decode
        start, end = self._whole_characters(context)
        self._window = list(context[start:])
        self._num_shown = end - start
        self._shown = decode(self._window[: self._num_shown])
        self._context_text = decode(self._window)

    def _whole_characters(self, context: Sequence[int]) -> tuple[int, int]:
        """The part of the context to go by, which begins and ends with whole characters.

        A character of several tokens may lie across the context's beginning. One may also lie across its end: its
        tokens count as new, since the output completes it.
        """
        for end in range(len(context), max(len(context) - 4, 0), -1):
            for start in range(end):
                if REPLACEMENT not in self._decode(list(context[start:end])):
                    return start, end
        return len(context), len(context)

    def push(self, token_id: int) -> str:
        """See `TextStream`."""
        self._window.append(token_id)
        text = self._decode(self._window)
        is_clear = text != self._shown and not text.endswith(REPLACEMENT)
        if not is_clear and len(self._window) - self._num_shown < _MAX_HELD_TOKENS:
            return ""
        if text == self._shown:  # tokens without text
            del self._window[self._num_shown :]
            return ""
        return self._move(text)

    def flush(self) -> str:
        """See `TextStream`."""
        return self._move(self._decode(self._window)) if len(self._window) > self._num_shown else ""

    def _move(self, text: str) -> str:
        # A context that ends with U+FFFD for good, not for want of bytes, has shown it itself.
        before = self._context_text if text.startswith(self._context_text) else self._shown
        del self._window[: self._num_shown]
        self._num_shown = len(self._window)
        self._shown = self._context_text = self._decode(self._window)
        return text[len(before) :]


class Detokenizer:
    """What is needed of a Hugging Face tokenizer to turn ids into text. One for all requests."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._num_ids = len(tokenizer)
        self._is_byte_level = type(getattr(self._backend, "decoder", None)).__name__ == "ByteLevel"
        self.special_ids = self._find_special_ids()
        """Ids that `skip_special_tokens` leaves out."""
        self._bytes: dict[int, bytes] = {}
        self._texts: dict[int, str] = {}

    def stream(self, prompt_token_ids: Sequence[int], hidden_ids: frozenset[int]) -> TextStream:
        """Start the text of an output behind a prompt, of which `hidden_ids` are not seen."""
        nearby = prompt_token_ids[-4 * _MAX_CONTEXT_TOKENS :]
        context = [i for i in nearby if i not in hidden_ids and self._has_token(i)][-_MAX_CONTEXT_TOKENS:]
        if self._is_byte_level:
            return ByteLevelStream(self._token_bytes, context)
        return WindowStream(self._decode, context)

    def token_text(self, token_id: int) -> str:
        """How a token reads within a text, special tokens included."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._read_token(token_id)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token within a text: those of its text, or its own if they are not whole characters."""
        if self._is_byte_level:
            return self._token_bytes(token_id)
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._read_bytes(token_id)
        return found

    def spell(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> tuple[str, list[int]]:
        """A text from its beginning, and for each token, where in it what it stands for begins."""
        hidden_ids = self.special_ids if skip_special_tokens else frozenset[int]()
        stream, pieces, offsets, num_chars = self.stream((), hidden_ids), list[str](), list[int](), 0
        for token_id in token_ids:
            offsets.append(num_chars)
            if token_id not in hidden_ids:
                pieces.append(stream.push(token_id))
                num_chars += len(pieces[-1])
        return "".join(pieces) + stream.flush(), offsets

    def _read_bytes(self, token_id: int) -> bytes:
        text, token = self.token_text(token_id), self._token(token_id)
        if (byte := _BYTE_TOKEN.fullmatch(token)) is not None and text != token:
            return bytes([int(byte[1], 16)])
        if REPLACEMENT in text or not text:  # perhaps a token of bytes, however its vocabulary writes them
            for spelled in (_as_byte_level(token), _as_latin_1(token)):
                if spelled is not None and text in (spelled.decode(errors="replace"), spelled.decode(errors="ignore")):
                    return spelled
        return text.encode()

    def _token(self, token_id: int) -> str:
        """A token as the vocabulary writes it; empty for an id without one."""
        if not self._has_token(token_id):
            return ""
        if self._backend is not None:
            return self._backend.id_to_token(token_id) or ""
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else ""

    def _read_token(self, token_id: int) -> str:
        if self._is_byte_level:
            return self._token_bytes(token_id).decode("utf-8", errors="replace")
        before = self._ordinary_ids
        return self._decode([*before, token_id])[len(self._decode(before)) :]

    @cached_property
    def _ordinary_ids(self) -> list[int]:
        """One token that reads as plain letters, to see how others read behind it; empty if there is none."""
        for token_id in range(self._num_ids):
            text = self._decode([token_id]) if token_id not in self.special_ids else ""
            if text.isascii() and text.isalnum():
                return [token_id]
        return []

    def _find_special_ids(self) -> frozenset[int]:
        if self._backend is None:
            return frozenset(self._tokenizer.all_special_ids)
        added = self._backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    def _has_token(self, token_id: int) -> bool:
        """Heads are often wider than the tokenizer, and media placeholders may be negative."""
        if token_id < 0:
            return False
        if self._backend is None:
            return token_id < self._num_ids
        return self._backend.id_to_token(token_id) is not None

    def _decode(self, token_ids: list[int]) -> str:
        """All ids, special ones too. The backend passes over ids that it has no token for."""
        if self._backend is not None:
            text: str = self._backend.decode(token_ids, skip_special_tokens=False)
            return text
        known = [token_id for token_id in token_ids if self._has_token(token_id)]
        return str(self._tokenizer.decode(known, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _token_bytes(self, token_id: int) -> bytes:
        """The bytes that a byte-level token stands for; none for an id without a token."""
        token_bytes = self._bytes.get(token_id)
        if token_bytes is None:
            token = self._token(token_id)
            spelled = _as_byte_level(token)
            # An added token is written as it reads.
            token_bytes = self._bytes[token_id] = token.encode() if spelled is None else spelled
        return token_bytes


def _byte_of_char() -> dict[str, int]:
    """The characters that byte-level vocabularies write bytes as.

    Printable Latin-1 characters stand for their own codes, the other bytes in order for the characters from
    U+0100 on. Source: `bytes_to_unicode` of Hugging Face's GPT-2 tokenizer.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_of_char()


def _as_byte_level(token: str) -> bytes | None:
    """What a token stands for that is written as byte-level vocabularies write bytes; None if it isn't."""
    try:
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    except KeyError:
        return None


def _as_latin_1(token: str) -> bytes | None:
    """What a token stands for that has a character of the same number for each byte; None if it hasn't."""
    try:
        return token.encode("latin-1")
    except UnicodeEncodeError:
        return None


class IncrementalDetokenizer:
    """The text of one output as it grows, up to its stop string if one appears.

    Text that may still turn out to be the beginning of a stop string is held back until it is clear or the
    output ends. Without stop strings, ids become text only when it is read.
    """

    def __init__(self, detokenizer: Detokenizer, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        special_ids = detokenizer.special_ids
        visible_ids = params.visible_special_token_ids if params.skip_special_tokens else special_ids
        self._hidden_ids = special_ids.difference(visible_ids)
        self._joined_ids = frozenset[int]() if params.spaces_between_special_tokens else special_ids
        self._stream = detokenizer.stream(prompt_token_ids, self._hidden_ids)
        self._stops = StopStringMatcher(params.stop) if params.stop else None
        self._min_tokens = params.min_tokens
        self._keeps_stop = params.include_stop_str_in_output
        self._text = ""
        self.token_offsets: list[int] = []
        """For each id that has become text, where in it what it stands for begins."""
        self._last_id = -1
        self._unread: list[int] = []
        """Ids that have not become text yet."""
        self._is_finished = False
        self.stop_string: str | None = None
        """The stop string that ended the output."""

    @property
    def text(self) -> str:
        """What may be shown."""
        self._read()
        if self._stops is None or self._is_finished:
            return self._text
        num_open = self._stops.num_open_chars
        return self._text[:-num_open] if num_open else self._text

    def update(self, token_ids: Sequence[int]) -> int:
        """Take in new ids up to one that completes a stop string; returns how many. Not after the end."""
        if self._stops is None:
            self._unread += token_ids
            return len(token_ids)
        for count, token_id in enumerate(token_ids, 1):
            self.token_offsets.append(len(self._text))
            if token_id not in self._hidden_ids:
                self._append(self._piece(token_id))
                if self._is_finished:
                    return count
        return len(token_ids)

    def finish(self) -> None:
        """End the output: release the text that was held back."""
        if not self._is_finished:
            self._read()
            self._append(self._stream.flush())
            self._is_finished = True

    def _read(self) -> None:
        """Turn the remaining ids into text."""
        if self._unread:
            unread, self._unread = self._unread, []
            pieces, num_chars = list[str](), len(self._text)
            for token_id in unread:
                self.token_offsets.append(num_chars)
                if token_id not in self._hidden_ids:
                    pieces.append(self._piece(token_id))
                    num_chars += len(pieces[-1])
            self._text += "".join(pieces)

    def _piece(self, token_id: int) -> str:
        piece = self._stream.push(token_id)
        if token_id in self._joined_ids and self._last_id in self._joined_ids:
            piece = piece.lstrip(" ")
        self._last_id = token_id
        return piece

    def _append(self, piece: str) -> None:
        if self._stops is not None:
            match = self._stops.feed(piece)
            while match is not None and len(self.token_offsets) < self._min_tokens:
                self._text, piece = self._text + piece[: match.end], piece[match.end :]
                match = self._stops.feed(piece)
            if match is not None:
                self._end_at(self._text + piece[: match.end], match.stop)
                return
        self._text += piece

    def _end_at(self, text: str, stop: str) -> None:
        self._text = text if self._keeps_stop else text[: -len(stop)]
        self.stop_string = stop
        self._is_finished = True
