"""An engine that says what a test tells it to, token by token, behind a real server."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer

from sensorium import SamplingParams
from sensorium.engine.detokenizer import Detokenizer, IncrementalDetokenizer
from sensorium.outputs import CompletionOutput, Logprob, OutputKind, RequestOutput
from sensorium.parsing import FORMATS
from tests.entrypoints.served import Served
from tests.helpers.checkpoints import make_checkpoint


def checkpoint_with_marks(directory: Path) -> Path:
    """A tiny text model whose tokenizer has tokens for the marks of calls and reasoning, the bracketed ones special."""
    path = directory / "marks"
    shutil.copytree(make_checkpoint("llama"), path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    marks = [
        *(mark for each in FORMATS.values() for mark in each.markers),
        "<think>",
        "</think>",
        "[THINK]",
        "[/THINK]",
    ]
    tokenizer.add_tokens(
        [AddedToken(mark, special=mark.startswith(("[", "<|")), normalized=False) for mark in dict.fromkeys(marks)]
    )
    tokenizer.save_pretrained(path)
    return path


@dataclass
class Script:
    """What the next requests are answered with."""

    texts: list[str] = field(default_factory=list)
    """One for each choice."""
    finish_reason: str = "stop"
    tokens_at_once: int = 1
    prompts: list[str] = field(default_factory=list)
    """Those that came, rendered."""
    params: list[SamplingParams] = field(default_factory=list)

    def install(self, served: Served) -> None:
        """Let a server's engine say the script. Only what is no prompt's or token's is made up."""
        tokenizer = served.engine.tokenizer
        detokenizer = Detokenizer(tokenizer)

        async def generate(
            prompt: Any, params: SamplingParams, *, kind: OutputKind, **options: Any
        ) -> AsyncIterator[RequestOutput]:
            self.prompts.append(prompt["prompt"])
            self.params.append(params)
            prompt_ids = tokenizer.encode(prompt["prompt"], add_special_tokens=False)
            news = [
                list(self._said(index, text, params, tokenizer, detokenizer, prompt_ids))
                for index, text in enumerate(self.texts)
            ]
            if kind is OutputKind.FINAL_ONLY:
                yield RequestOutput("r", None, prompt_ids, [_joined(each) for each in news], True)
                return
            for step in range(max(map(len, news))):
                said = [each[step] for each in news if step < len(each)]
                yield RequestOutput("r", None, prompt_ids, said, step + 1 == max(map(len, news)))

        served.engine.generate = generate  # type: ignore[method-assign, assignment]

    def _said(
        self, index: int, text: str, params: SamplingParams, tokenizer: Any, detokenizer: Detokenizer, prompt: list[int]
    ) -> Any:
        ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
        stream = IncrementalDetokenizer(detokenizer, prompt, params)
        shown = 0
        for at in range(0, len(ids), self.tokens_at_once):
            new = ids[at : at + self.tokens_at_once]
            is_last = at + len(new) == len(ids)
            stream.update(new)
            if is_last:
                stream.finish()
            logprobs = None if params.logprobs is None else [{i: Logprob(-1.0, 1, "x")} for i in new]
            reason = self.finish_reason if is_last else None
            yield CompletionOutput(index, stream.text[shown:], new, None, logprobs, reason)
            shown = len(stream.text)


def _joined(deltas: list[CompletionOutput]) -> CompletionOutput:
    logprobs = None if deltas[0].logprobs is None else [each for delta in deltas for each in delta.logprobs or ()]
    text, ids = "".join(each.text for each in deltas), [i for each in deltas for i in each.token_ids]
    return CompletionOutput(deltas[0].index, text, ids, None, logprobs, deltas[-1].finish_reason)
