"""Token sequences that dummy data is made of, and tensors between pipeline stages.

`SequenceData` is what a dummy-data factory returns: a prompt, mostly of one repeated placeholder token. The scheduler
has its own request type; this one exists for model authors. No torch at import.
"""

from __future__ import annotations

from array import array
from collections.abc import ItemsView, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

TOKEN_ID_ARRAY_TYPE = "l"
"""Type code of the arrays of token ids: signed, since placeholder ids may be negative."""

VLLM_TOKEN_ID_ARRAY_TYPE = TOKEN_ID_ARRAY_TYPE
"""The same under the name that dummy-data factories written for vLLM import."""


def _ids(token_ids: Iterable[int]) -> array[int]:
    return array(TOKEN_ID_ARRAY_TYPE, token_ids)


@dataclass
class SequenceData:
    """The token ids of one sequence: its prompt, and what was generated."""

    _prompt_token_ids: array[int]
    _output_token_ids: array[int] = field(default_factory=lambda: _ids(()))

    @classmethod
    def from_prompt_token_counts(cls, *token_counts: tuple[int, int]) -> SequenceData:
        """A prompt of runs: each `(token_id, count)` in turn.

        For example, `from_prompt_token_counts((32000, 576), (0, 24))` is 600 tokens, 576 of them image tokens.
        """
        prompt = _ids(())
        for token_id, count in token_counts:
            prompt.extend(_ids((token_id,)) * count)
        return cls(prompt)

    @classmethod
    def from_token_counts(cls, *token_counts: tuple[int, int]) -> SequenceData:
        """`from_prompt_token_counts` under its older name."""
        return cls.from_prompt_token_counts(*token_counts)

    @classmethod
    def from_seqs(cls, prompt_token_ids: Iterable[int], output_token_ids: Iterable[int] | None = None) -> SequenceData:
        """A prompt, and optionally output, from any sequences of ids."""
        return cls(_ids(prompt_token_ids), _ids(output_token_ids or ()))

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt."""
        return tuple(self._prompt_token_ids)

    @property
    def output_token_ids(self) -> tuple[int, ...]:
        """What was generated."""
        return tuple(self._output_token_ids)

    def get_prompt_len(self) -> int:
        """Tokens in the prompt."""
        return len(self._prompt_token_ids)

    def get_output_len(self) -> int:
        """Tokens generated."""
        return len(self._output_token_ids)

    def get_len(self) -> int:
        """Tokens in all."""
        return self.get_prompt_len() + self.get_output_len()

    def get_token_ids(self) -> list[int]:
        """Prompt and output together."""
        return [*self._prompt_token_ids, *self._output_token_ids]


@dataclass
class IntermediateTensors:
    """Named tensors that one pipeline stage hands to the next."""

    tensors: dict[str, torch.Tensor]

    def __getitem__(self, key: str | slice) -> Any:
        """The tensor of a name; with a slice, the same rows of every tensor."""
        if isinstance(key, str):
            return self.tensors[key]
        return IntermediateTensors({name: tensor[key] for name, tensor in self.tensors.items()})

    def __setitem__(self, key: str, value: torch.Tensor) -> None:
        self.tensors[key] = value

    def __len__(self) -> int:
        return len(self.tensors)

    def items(self) -> ItemsView[str, torch.Tensor]:
        """Names and tensors."""
        return self.tensors.items()
