"""Parses a typed line: text, and the files named in it.

    What is in @cat.jpg and in '/home/me/My Pictures/dog.png'?

A file is named by @ in front of its path, anywhere in the line; a path that was pasted or dropped into the terminal
counts too if it has a slash and leads to a picture, a clip or a sound. Spaces in paths stand behind a backslash or
within quotes.
"""

from __future__ import annotations

import re
from pathlib import Path

from sensorium.entrypoints.chat.attachments import Attachment, attach, looks_like_media
from sensorium.errors import InvalidRequestError

Content = list[str | Attachment]
"""Texts and attachments in their order."""

_WORD = re.compile(r"""(?<!\S)(@?)('[^']+'|"[^"]+"|(?:\\.|[^\s\\'"])(?:\\.|[^\s\\])*)(?!\S)""")
_ADDRESSES = ("http://", "https://")


def parse_line(line: str) -> Content:
    """Parse a line. Raises `InvalidRequestError` for a file that is named by @ and can't be read."""
    content: Content = []
    start = 0
    for match in _WORD.finditer(line):
        source = _unquoted(match[2])
        if not _is_named(source, has_mark=bool(match[1])):
            continue
        content += [line[start : match.start()], attach(source)]
        start = match.end()
    content.append(line[start:])
    stripped = [each.strip() if isinstance(each, str) else each for each in content]
    return [each for each in stripped if each != ""]


def paths_of(text: str) -> list[str]:
    """Paths and addresses that follow a command. Raises `InvalidRequestError` without any."""
    found = [_unquoted(match[2]) for match in _WORD.finditer(text)]
    if not found:
        raise InvalidRequestError("got no path, expected one or several. Give a path.", field="media")
    return found


def _is_named(source: str, *, has_mark: bool) -> bool:
    if has_mark:  # "@anna" is a person, "@anna.jpg" a file, there or not
        return (
            source.startswith(_ADDRESSES) or Path(source).expanduser().is_file() or bool(re.search(r"[/.]\w", source))
        )
    plain = source.removeprefix("file://")
    return "/" in plain and not source.startswith(_ADDRESSES) and looks_like_media(Path(plain).expanduser())


def _unquoted(word: str) -> str:
    if word[0] in "'\"" and word[-1] == word[0]:
        return word[1:-1]
    return re.sub(r"\\(.)", r"\1", word)
