"""`sensorium generate MODEL PROMPT...`: answers prompts in this process and ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensorium import logger as package_logger
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.chat.attachments import MODALITIES, Attachment, attach
from sensorium.entrypoints.cli.flags import accept_in_config, add_config, add_flags, build, read_settings
from sensorium.entrypoints.cli.prompt_sources import Prompt, read_prompts
from sensorium.errors import InvalidRequestError
from sensorium.media.limits import MediaLimits
from sensorium.sampling_params import SamplingParams
from sensorium.structured_outputs import StructuredOutputs

if TYPE_CHECKING:
    from sensorium.entrypoints.llm import LLM
    from sensorium.outputs import RequestOutput

NO_FLAG = (
    *("prompt_logprobs", "logprobs", "bad_words_token_ids", "begin_suppress_tokens", "allowed_token_ids"),
    *("timestamps", "structured_outputs", "detokenize"),
)
"""Sampling parameters that are only useful to programs."""
DEFAULTS = {"max_tokens": 512}
"""Defaults where neither a flag nor the checkpoint sets a value."""
OF_PARSED_ANSWERS = ("tool_parser", "reasoning_parser")
"""Settings of the engine that have no effect here: answers are shown as the model writes them."""


def fill(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("model", help='a directory, a name on the model hub, or "demo"')
    parser.add_argument("prompt", nargs="*", help="prompts; without any, standard input is one")
    parser.add_argument(
        "--file", metavar="FILE", help="prompts, one a line; in a .jsonl, objects with prompt or messages"
    )
    for modality in MODALITIES:
        parser.add_argument(
            f"--{modality}", action="append", default=[], metavar="PATH", help=f"{modality} that goes with every prompt"
        )
    parser.add_argument("--system", metavar="TEXT", help="system text")
    parser.add_argument(
        "--plain", action="store_true", help="continue the prompts as they are, without a chat around them"
    )
    parser.add_argument("--format", choices=["text", "jsonl"], default="text", help="form of the output [text]")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="write the answer as it comes; by default for one prompt in a terminal",
    )
    add_config(parser)
    add_flags(parser, SamplingParams, leave_out=NO_FLAG, defaults=DEFAULTS)
    add_flags(parser, StructuredOutputs, leave_out=["json"])
    parser.add_argument("--json-schema", metavar="FILE", help="schema that the answers keep to: a file, or JSON")
    accept_in_config(parser, "json_schema", str)
    add_flags(parser, EngineArgs, leave_out=["model", "seed", *OF_PARSED_ANSWERS])
    add_flags(parser, MediaLimits)
    parser.set_defaults(run=run)


def run(parsed: argparse.Namespace) -> int:
    """Answer all prompts. Status 1 if one of them could not be."""
    values = read_settings(parsed)
    values["structured_outputs"] = _form(values)
    given = {name: value for name, value in values.items() if name in SamplingParams.__dataclass_fields__}
    params, limits = SamplingParams(**{**DEFAULTS, **given}), build(MediaLimits, values)
    prompts = read_prompts(parsed.prompt, parsed.file)
    media = [attach(path, modality) for modality in MODALITIES for path in getattr(parsed, modality)]
    if parsed.plain and (parsed.system or any(prompt.messages for prompt in prompts)):
        raise InvalidRequestError(
            "got a system text or messages, expected prompts as text. Leave out --plain.", field="plain"
        )
    streams = _streams(parsed, len(prompts), params)
    package_logger.configure(package_logger.LogSettings("WARNING"))
    from sensorium.entrypoints.llm import LLM  # loads torch

    settings = {name: value for name, value in values.items() if name in EngineArgs.__dataclass_fields__}
    settings.pop("seed", None)  # here the name is the sampling parameter's
    if media:
        settings.setdefault("limit_mm_per_prompt", _counts(media))
    llm = LLM(**settings, media_limits=limits)
    params = llm.engine.config.model_config.sampling_defaults.params(given, **DEFAULTS)
    try:
        requests = [_plain(each, media) if parsed.plain else each.chat(parsed.system, media) for each in prompts]
        if streams:
            return _stream(llm, requests[0], params, is_plain=parsed.plain)
        answer = llm.generate if parsed.plain else llm.chat
        outputs = answer(requests, params, return_errors=True)
    finally:
        llm.shutdown()
    return _write(prompts, outputs, parsed.format)


def _form(values: Mapping[str, Any]) -> StructuredOutputs | None:
    """The constraint on the answers, if one is given."""
    given = {name: value for name, value in values.items() if name in StructuredOutputs.__dataclass_fields__}
    if (schema := values.get("json_schema")) is not None:
        given["json"] = schema if schema.lstrip().startswith("{") else _read(schema)
    return StructuredOutputs(**given) if given else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"got {path!r}, expected JSON or a file ({type(error).__name__}).", field="json_schema"
        ) from None


def _streams(parsed: argparse.Namespace, num_prompts: int, params: SamplingParams) -> bool:
    can = num_prompts == 1 and params.n == 1 and parsed.format == "text"
    if parsed.stream and not can:
        raise InvalidRequestError(
            "got several answers or JSON lines, expected one text. Leave out --stream.", field="stream"
        )
    return can and (sys.stdout.isatty() if parsed.stream is None else bool(parsed.stream))


def _counts(media: Sequence[Attachment]) -> Mapping[str, int]:
    return {name: count for name in MODALITIES if (count := sum(each.modality == name for each in media))}


def _plain(prompt: Prompt, media: Sequence[Attachment]) -> Any:
    from sensorium.media import EncodedMedia, FetchPolicy, MediaLoader

    if not media:
        return prompt.text
    loader = MediaLoader(policy=FetchPolicy())
    data: dict[str, list[EncodedMedia]] = {}
    for each in media:
        encoded = loader.encoded(each.modality, each.name if each.data is None else each.data)
        data.setdefault(each.modality, []).append(encoded)
    return {"prompt": prompt.text, "multi_modal_data": data}


def _stream(llm: LLM, request: Any, params: SamplingParams, *, is_plain: bool) -> int:
    from sensorium.outputs import OutputKind

    engine = llm.engine
    processed = engine.preprocess("one", request, params) if is_plain else llm.preprocess_chat(request, params)
    engine.add_processed(processed, OutputKind.DELTA)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.error is not None:
                raise output.error
            sys.stdout.write("".join(each.text for each in output.outputs))  # type: ignore[union-attr]
            sys.stdout.flush()
    print()
    return 0


def _write(prompts: Sequence[Prompt], outputs: Sequence[RequestOutput], form: str) -> int:
    status = 0
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if output.error is not None:
            status = 1
            print(f"sensorium: prompt {index + 1}: {output.error}", file=sys.stderr)
        if form == "jsonl":
            print(_json_line(index, prompt, output))
        elif output.error is None:
            _write_text(output, f"[{index + 1}] {prompt.shown}" if len(prompts) > 1 else "")
    return status


def _write_text(output: RequestOutput, head: str) -> None:
    if head:
        print(head)
    print("\n".join(each.text for each in output.outputs) + ("\n" if head else ""))


def _json_line(index: int, prompt: Prompt, output: RequestOutput) -> str:
    import msgspec

    answers = [
        {"text": each.text, "finish_reason": each.finish_reason, "num_tokens": len(each.token_ids)}
        for each in output.outputs
    ]
    record = {
        "index": index,
        **({"messages": prompt.messages} if prompt.messages else {"prompt": prompt.text}),
        "outputs": answers,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "error": None if output.error is None else str(output.error),
    }
    return msgspec.json.encode(record).decode()
