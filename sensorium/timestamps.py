"""How tokens that tell times stand in a transcript: the rules of Whisper. A leaf, importable by all.

Ids from some id on are times, in steps from 0; those below an end-of-sequence id are text. Times stand in pairs, the
end of one piece of text and the begin of the next, and never go back.

Source: Radford et al. 2022; `transformers` `WhisperTimeStampLogitsProcessor`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TimestampRules:
    """The ids of one model. The id below the first time stands for "no times" and never comes."""

    first_id: int
    """Stands for 0; all ids from it on are times."""
    end_id: int
    """Ends the output; all ids below it are text."""
    max_first: int | None = None
    """Steps that the first time may be at most; None: any."""

    def forbidden(self, output_token_ids: list[int], vocab_size: int) -> list[tuple[int, int]]:
        """Ranges `[begin, end)` of ids that may not come next.

        Worked example, times from 100 on and text below 90: after `[100]` comes text; after `[100, 5]` anything but
        the time 100; after `[100, 5, 120]` a time from 120 on, or the end; after `[100, 5, 120, 120]` text.
        """
        first = self.first_id
        ranges = [(first - 1, first)]
        if not output_token_ids:
            ranges.append((0, first))
            if self.max_first is not None:
                ranges.append((first + self.max_first + 1, vocab_size))
            return ranges
        last_is_time = output_token_ids[-1] >= first
        one_before_is_time = len(output_token_ids) < 2 or output_token_ids[-2] >= first
        if last_is_time:
            ranges.append((first, vocab_size) if one_before_is_time else (0, self.end_id))
        latest = next((each for each in reversed(output_token_ids) if each >= first), None)
        if latest is not None:
            ends_text = last_is_time and not one_before_is_time
            ranges.append((first, latest if ends_text else latest + 1))
        return ranges
