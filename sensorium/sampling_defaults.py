"""What a checkpoint's `generation_config.json` says: how requests sample that don't say it, and which tokens end.

Values that a request gives go before the checkpoint's, and these before the engine's own. What the file asks for and
the engine doesn't do, such as beams, is named in the load report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sensorium.errors import ModelError, RequestError
from sensorium.sampling_params import SamplingParams

FILE_NAME = "generation_config.json"

_FIELDS: Mapping[str, str] = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
    **{name: name for name in ("presence_penalty", "frequency_penalty")},
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
    "begin_suppress_tokens": "begin_suppress_tokens",
}
"""Names in the file, and those of `SamplingParams`."""
_FORBIDDEN = ("bad_words_ids", "suppress_tokens")
"""Lists of tokens that must not be generated: sequences, and single ones."""
_NOT_FOLLOWED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences", "typical_p"), (1,)),
    **dict.fromkeys(("encoder_repetition_penalty", "guidance_scale"), (1,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "diversity_penalty", "penalty_alpha", "min_length"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("sequence_bias", "exponential_decay_length_penalty"), ([], {})),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "force_words_ids", "constraints"), ([],)),
    "max_length": (20,),  # which the library writes where nobody has set it
    **dict.fromkeys(("top_h", "max_time", "watermarking_config", "dola_layers"), ()),
}
"""Names of what the engine doesn't do, with the values that ask for nothing."""


@dataclass(frozen=True)
class SamplingDefaults:
    """Values of `SamplingParams` for requests that leave them out."""

    values: Mapping[str, Any] = field(default_factory=dict)
    not_followed: tuple[str, ...] = ()
    """What the checkpoint asks for besides, as `name=value`."""

    def params(self, given: Mapping[str, Any] | None = None, **fallback: Any) -> SamplingParams:
        """The parameters of a request.

        Args:
            given: What the request says; None stands for "not said".
            fallback: Values of the route, where neither the request nor the checkpoint says anything.

        Raises:
            RequestError: A value is out of bounds.
        """
        said = {name: value for name, value in (given or {}).items() if value is not None}
        own = dict(self.values)
        # A default gives way where it contradicts what the request says.
        if "max_tokens" in said and isinstance(said["max_tokens"], int):
            own["min_tokens"] = max(0, min(own.get("min_tokens", 0), said["max_tokens"]))
        if isinstance(least := said.get("min_tokens"), int) and own.get("max_tokens") is not None:
            own["max_tokens"] = max(own["max_tokens"], least)
        if said.get("detokenize") is False:
            own.pop("stop", None)
        return SamplingParams(**{**fallback, **own, **said})

    def without(self, *names: str) -> SamplingDefaults:
        """The same, but for some values that mean something else to a route."""
        return SamplingDefaults({name: value for name, value in self.values.items() if name not in names})

    def line(self) -> str:
        """For the load report; empty where there is nothing to say."""
        values = ", ".join(f"{name} {value}" for name, value in self.values.items())
        not_followed = f"not followed: {', '.join(self.not_followed)}" if self.not_followed else ""
        return "; ".join(filter(None, (values, not_followed)))


NO_DEFAULTS = SamplingDefaults()
"""Those of a checkpoint that says nothing."""


def read_defaults(content: Mapping[str, Any]) -> SamplingDefaults:
    """The defaults that a generation config's content asks for; null stands for nothing.

    `do_sample: false` makes answers greedy unless a request gives a temperature, as it does for `generate` of Hugging
    Face. Where it is left out, a temperature is taken as it stands.

    Raises:
        ModelError: A value is of the wrong type or out of bounds.
    """
    values: dict[str, Any] = {}
    for name, target in _FIELDS.items():
        if content.get(name) is not None:
            values[target] = _checked(name, content[name], target, content[name])
    sequences: list[Any] = []
    for name in _FORBIDDEN:
        if content.get(name):
            given = content[name]
            found = [[each] for each in given] if name == "suppress_tokens" and isinstance(given, list) else given
            sequences += _checked(name, found, "bad_words_token_ids", given)
    if sequences:
        values["bad_words_token_ids"] = tuple(sequences)
    if content.get("do_sample") is False:
        values["temperature"] = 0.0
    not_followed = tuple(
        f"{name}={content[name]!r:.60}"
        for name, neutral in _NOT_FOLLOWED.items()
        if content.get(name) is not None and content[name] not in neutral
    )
    return SamplingDefaults(values, not_followed)


def _checked(name: str, value: Any, target: str, given: Any) -> Any:
    """A value as `SamplingParams` keeps it. Raises `ModelError` that names it as the file does."""
    try:
        return getattr(SamplingParams(**{"max_tokens": None, target: value}), target)
    except RequestError as error:
        raise ModelError(
            f"{name} in {FILE_NAME}: got {given!r:.120}, {error.reason or error.message}. Correct the file, or set "
            "generation_config (--generation-config) to 'none'."
        ) from error


def read_end_ids(content: Mapping[str, Any], file_name: str) -> frozenset[int]:
    """The ids in a config's `eos_token_id`: one, several, or none; negative ones stand for none.

    Raises:
        ModelError: They are no token ids.
    """
    found = content.get("eos_token_id")
    ids = found if isinstance(found, list | tuple) else [] if found is None else [found]
    if any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
        raise ModelError(
            f"eos_token_id in {file_name}: got {found!r:.120}, expected a token id or a list of them. Correct the file."
        )
    return frozenset(each for each in ids if each >= 0)
