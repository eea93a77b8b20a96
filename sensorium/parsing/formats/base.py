"""What every form of calls has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from sensorium.parsing.reader import Reader, Steps
from sensorium.parsing.sink import Sink
from sensorium.parsing.tools import CALLED_NAME, Tools


class ToolFormat(ABC):
    """A form of calls. Has no state."""

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = ()
    """Texts that set calls apart; where they are special tokens, they must not be left out of the text."""
    call_id_chars: ClassVar[int | None] = None
    """Length of the ids that the model's templates insist on, of letters and digits; None: any."""

    @abstractmethod
    def read(self, reader: Reader, sink: Sink, tools: Tools) -> Steps[None]:
        """Read an answer to its end."""

    @abstractmethod
    def is_shown_by(self, text: str) -> bool:
        """Whether `text`, a call as a template writes it or the template itself, has this form."""


def is_name(name: str) -> bool:
    """Whether a function may have this name, whether or not there is one."""
    return CALLED_NAME.fullmatch(name) is not None
