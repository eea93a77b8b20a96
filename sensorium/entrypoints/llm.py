"""`LLM`: a model in a script. Loads once, then answers lists of prompts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sensorium.chat.renderer import ChatRenderer
from sensorium.engine.args import EngineArgs
from sensorium.engine.llm_engine import LLMEngine
from sensorium.engine.resolution import num_preprocess_threads
from sensorium.entrypoints.batch_run import BatchRun, Job, Output
from sensorium.entrypoints.instructions import instructed
from sensorium.entrypoints.progress import ProgressBar
from sensorium.entrypoints.scoring import Scoring
from sensorium.errors import InvalidRequestError, InvalidTypeError, RequestError
from sensorium.inputs.preprocess import ProcessedRequest
from sensorium.lora import LoRARequest
from sensorium.media import FetchPolicy, MediaLimits, MediaLoader
from sensorium.messages import LoadReport
from sensorium.outputs import PoolingRequestOutput, RequestOutput, ScoringOutput, ScoringRequestOutput
from sensorium.parsing import AnswerParser, Tool, Tools
from sensorium.pooling_params import PoolingParams, PoolingTask
from sensorium.sampling_params import SamplingParams
from sensorium.settings import unknown_setting

Conversation = Sequence[Mapping[str, Any]]
LoRAChoice = LoRARequest | str | Sequence[LoRARequest | str | None] | None


class LLM:
    """Runs a multimodal or text model over lists of prompts.

        llm = LLM("path/to/checkpoint", limit_mm_per_prompt={"image": 4})
        outputs = llm.generate(["Hello", {"prompt": "<image>What is this?", "multi_modal_data": {"image": image}}])
        outputs = llm.chat([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "cat.jpg"}}]}])

    Keyword arguments are the fields of `EngineArgs`. Files that prompts name are read with this process's rights, or
    only under `allowed_local_media_path` if that is set; addresses on the network are fetched under the limits of
    `sensorium.media`.

    The model runs in this process. Until `shutdown`, or until the object is forgotten, `num_threads` is torch's number
    of threads for everything in it; on a GPU, float32 convolutions don't round to TF32; and on a CPU the C library
    keeps some hundred MiB of freed memory for the next step. What transformers finds out about torchvision stays: where
    no processor of a model's needs it, transformers is told that there is none.
    """

    def __init__(self, model: str, *, media_limits: MediaLimits | None = None, **engine_args: Any) -> None:
        """Load a model; see `EngineArgs` for the settings. `max_token_gap_s` is infinite by default: nothing is
        streamed, and fuller steps mean fewer steps.

        Raises:
            ConfigError, ModelError, WeightsError: The model can't be served as asked.
        """
        for name in engine_args.keys() - EngineArgs.__dataclass_fields__.keys():
            raise unknown_setting(name, EngineArgs.__dataclass_fields__)
        args = EngineArgs(model=model, **{"max_token_gap_s": math.inf, **engine_args})
        folder = args.allowed_local_media_path
        policy = FetchPolicy(allowed_local_media_path=folder, allow_any_local_path=folder is None)
        self._media = MediaLoader(media_limits, policy)
        self.engine = LLMEngine(
            args.create_engine_config(), skip_tokenizer=args.skip_tokenizer_init, media_loader=self._media
        )
        self._num_threads = num_preprocess_threads(args)
        self._chat_template = args.chat_template
        self._tool_parser, self._reasoning_parser = args.tool_parser, args.reasoning_parser
        self._chat_renderer: ChatRenderer | None = None
        self._runs = itertools.count()

    @property
    def report(self) -> LoadReport:
        """What loading determined: the model's tier, its features, where memory went."""
        return self.engine.report

    def get_tokenizer(self) -> Any:
        """The tokenizer."""
        return self.engine.get_tokenizer()

    def get_default_sampling_params(self) -> SamplingParams:
        """The sampling parameters of prompts that come without: those of the checkpoint's generation config."""
        return self.engine.config.model_config.sampling_defaults.params()

    def generate(
        self,
        prompts: Any,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: Sequence[int] | None = None,
        lora_request: LoRAChoice = None,
        return_errors: bool = False,
    ) -> list[RequestOutput]:
        """Generate for one prompt or a list of prompts; outputs come in the order of the prompts.

        Args:
            prompts: A string, a list of token ids, a dict (`prompt` or `prompt_token_ids`, with `multi_modal_data` and
                `mm_processor_kwargs`), or a list of these.
            sampling_params: One for all, or one per prompt; `get_default_sampling_params()` if not given.
            use_tqdm: Show a progress bar; by default on runs of several prompts in a terminal.
            priority: One per prompt, for the priority policy; lower goes first.
            lora_request: The adapter, or its name, for all or one per prompt; None: the model alone.
            return_errors: A prompt that can't be served gets an output with `error` set. Otherwise the first such
                error is raised once the other prompts have finished.

        Raises:
            RequestError: A prompt, its media or its parameters are wrong; the message names the prompt's index.
            EngineDeadError: The engine can't go on.
        """
        each = _as_list(prompts)
        params = _per_prompt(sampling_params, len(each), "sampling_params", self.get_default_sampling_params())
        priorities = _per_prompt(priority, len(each), "priority", 0)
        adapters = _per_prompt(lora_request, len(each), "lora_request", None)
        jobs = [
            Job(prompt, own, own_priority, lora_request=adapter)
            for prompt, own, own_priority, adapter in zip(each, params, priorities, adapters, strict=True)
        ]
        return self._run(jobs, use_tqdm, return_errors)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        lora_request: LoRAChoice = None,
        return_errors: bool = False,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of conversations in the OpenAI message format.

        Content parts may be `text`, `image_url`, `video_url`, `audio_url`, `input_audio` (addresses, data URLs, paths),
        or hold Python objects as `image`, `video`, `audio`.

        Args:
            messages: `[{"role": ..., "content": ...}, ...]`, or a list of these.
            sampling_params: One for all, or one per conversation; `get_default_sampling_params()` if not given.
            use_tqdm: As in `generate`.
            chat_template: Instead of the checkpoint's.
            add_generation_prompt: End with the start of an answer.
            continue_final_message: Go on with the last message instead of starting an answer.
            tools: Functions that the model may call, as in OpenAI's format. Outputs are what the model wrote;
                `answer_parser` takes them apart.
            chat_template_kwargs: More variables for the template.
            mm_processor_kwargs: For the model's input processor and mappers.
            lora_request: As in `generate`.
            return_errors: As in `generate`.

        Raises:
            RequestError: As in `generate`.
        """
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        renderer = self._renderer()

        def prompt_of(conversation: Any) -> Any:
            return lambda: renderer.render(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                chat_template_kwargs=chat_template_kwargs,
                mm_processor_kwargs=mm_processor_kwargs,
            )

        params = _per_prompt(sampling_params, len(conversations), "sampling_params", self.get_default_sampling_params())
        if tools:  # marks of calls may be special tokens
            marks = renderer.answer_formats(chat_template=chat_template, has_tools=True).token_ids.values()
            params = [replace(each, visible_special_token_ids=sorted(marks)) for each in params]
        adapters = _per_prompt(lora_request, len(conversations), "lora_request", None)
        jobs = [
            Job(prompt_of(each), own, lora_request=adapter)
            for each, own, adapter in zip(conversations, params, adapters, strict=True)
        ]
        return self._run(jobs, use_tqdm, return_errors)

    def answer_parser(
        self, tools: Sequence[Mapping[str, Any]] | None = None, *, chat_template: str | None = None, prompt: str = ""
    ) -> AnswerParser:
        """A parser that splits one answer of `chat` into reasoning, content and calls.

            outputs = llm.chat(messages, params, tools=tools)
            answer = llm.answer_parser(tools).parse([outputs[0].outputs[0].text])
            print(answer.reasoning, answer.content, answer.tool_calls)

        For an output that `is_cut`, `parse(..., is_cut=True)` leaves out the part of a mark at its end.

        Args:
            tools: As given to `chat`.
            chat_template: As given to `chat`.
            prompt: The rendered prompt, `RequestOutput.prompt`, which shows whether it opens reasoning.

        Raises:
            RequestError: It isn't known how the model writes calls.
        """
        formats = self._renderer().answer_formats(chat_template=chat_template, has_tools=bool(tools))
        return AnswerParser(
            reasoning=formats.reasoning,
            is_reasoning_open=formats.is_reasoning_open(prompt),
            tool_format=formats.calls() if tools else None,
            tools=Tools(Tool.from_description(tool) for tool in tools or ()),
        )

    def preprocess_chat(
        self, messages: Conversation, sampling_params: SamplingParams | None = None, **options: Any
    ) -> ProcessedRequest:
        """A conversation as the engine would admit it: expanded ids, media spans and tensors. Nothing is run.

        `options` are those of `chat` for the template.

        Raises:
            RequestError: The conversation, its media or the parameters are wrong.
        """
        prompt = self._renderer().render(messages, **options)
        return self.engine.preprocess("preview", prompt, sampling_params)

    def encode(
        self,
        prompts: Any,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        pooling_task: PoolingTask | None = None,
        use_tqdm: bool | None = None,
        lora_request: LoRAChoice = None,
    ) -> list[PoolingRequestOutput]:
        """Pool one prompt or a list of prompts. `outputs.data` of each holds what the task says.

        Args:
            prompts: As in `generate`.
            pooling_params: One for all, or one per prompt.
            pooling_task: In the place of the parameters' task: "embed", "token_embed", "classify" or "token_classify".
                Without both, what the model is served for: vectors, if it makes any.
            use_tqdm: As in `generate`.
            lora_request: As in `generate`.

        Raises:
            RequestError: A prompt, its media or the parameters are wrong, or the model isn't served for the task.
        """
        each = _as_list(prompts)
        task = self.engine.config.model_config.pooler.tasks[0]
        params = _per_prompt(pooling_params, len(each), "pooling_params", PoolingParams(pooling_task or task))
        if pooling_task is not None:
            params = [replace(own, task=pooling_task) for own in params]
        adapters = _per_prompt(lora_request, len(each), "lora_request", None)
        return self._pool(each, params, use_tqdm, adapters)

    def embed(
        self,
        prompts: Any,
        *,
        dimensions: int | None = None,
        prompt_name: str | None = None,
        use_tqdm: bool | None = None,
        lora_request: LoRAChoice = None,
    ) -> list[PoolingRequestOutput]:
        """A vector for each prompt, `outputs.embedding` `(size,)`.

        Args:
            prompts: As in `generate`.
            dimensions: See `PoolingParams`.
            prompt_name: The checkpoint's text to put in front of each, such as "query" (its `prompts`, as
                sentence-transformers writes them); without one, its default, if it has one.
            use_tqdm: As in `generate`.
            lora_request: As in `generate`.

        Raises:
            RequestError: As in `encode`; or the checkpoint has no text of this name.
        """
        given = instructed(_as_list(prompts), self.engine.config.model_config.pooler, prompt_name)
        params = PoolingParams("embed", dimensions=dimensions)
        return self.encode(given, params, use_tqdm=use_tqdm, lora_request=lora_request)

    def classify(
        self, prompts: Any, *, use_tqdm: bool | None = None, lora_request: LoRAChoice = None
    ) -> list[PoolingRequestOutput]:
        """Probabilities of the labels of each prompt, `outputs.probs` `(num_labels,)`.

        Raises `RequestError` as `encode`.
        """
        return self.encode(prompts, PoolingParams("classify"), use_tqdm=use_tqdm, lora_request=lora_request)

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        chat_template: str | None = None,
        use_tqdm: bool | None = None,
        lora_request: str | LoRARequest | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts go together: one with each of several, or as many with as many, in pairs.

        A model with a classification head of one label reads both texts at once (a cross-encoder). One that makes a
        vector of a text is asked for the cosine of two, one that makes a vector for each token for the sum of each
        token's best match (late interaction).

        Args:
            data_1: A text such as a query, or a list of texts.
            data_2: A text such as a document, or a list of texts.
            truncate_prompt_tokens: See `PoolingParams`.
            chat_template: Of a cross-encoder: makes a prompt of messages of the roles "query" and "document".
            use_tqdm: As in `generate`.
            lora_request: One adapter, for all pairs.

        Raises:
            RequestError: The numbers of texts don't fit, or as `encode`.
        """
        template = chat_template or self._chat_template
        scoring = Scoring(self.engine.config.model_config, template, self.get_tokenizer())
        plan = scoring.plan(data_1, data_2, truncate_prompt_tokens=truncate_prompt_tokens)
        num_prompts = len(plan.prompts)
        outputs = self._pool(plan.prompts, [plan.params] * num_prompts, use_tqdm, [lora_request] * num_prompts)
        ends = [outputs[pair[-1]] for pair in plan.pairs]
        scores = plan.scores([each.outputs for each in outputs])
        return [
            ScoringRequestOutput(end.request_id, ScoringOutput(score), end.prompt_token_ids)
            for end, score in zip(ends, scores, strict=True)
        ]

    def _pool(
        self,
        prompts: Sequence[Any],
        params: Sequence[PoolingParams],
        use_tqdm: bool | None,
        adapters: Sequence[Any] | None = None,
    ) -> list[PoolingRequestOutput]:
        sampling, adapters = SamplingParams(max_tokens=1, detokenize=False), adapters or [None] * len(prompts)
        jobs = [
            Job(prompt, sampling, pooling=own, lora_request=adapter)
            for prompt, own, adapter in zip(prompts, params, adapters, strict=True)
        ]
        return self._run(jobs, use_tqdm, return_errors=False)

    def shutdown(self) -> None:
        """Free the model's memory."""
        self.engine.shutdown()

    def _renderer(self) -> ChatRenderer:
        if self._chat_renderer is None:
            self._chat_renderer = ChatRenderer(
                self.engine.config.model_config,
                self.get_tokenizer(),
                self._media,
                chat_template=self._chat_template,
                trust_request_chat_template=True,  # the caller is the program itself
                tool_parser=self._tool_parser,
                reasoning_parser=self._reasoning_parser,
            )
        return self._chat_renderer

    def _run(self, jobs: list[Job], use_tqdm: bool | None, return_errors: bool) -> list[Any]:
        progress = ProgressBar(len(jobs)) if ProgressBar.wanted(use_tqdm, len(jobs)) else None
        run = BatchRun(
            self.engine, jobs, num_threads=self._num_threads, prefix=f"run{next(self._runs)}", progress=progress
        )
        results = run.run()
        if not return_errors:
            _raise_first(results)
        return [_error_output(i, each) if isinstance(each, RequestError) else each for i, each in enumerate(results)]


def _as_list(prompts: Any) -> list[Any]:
    """A list of prompts; one prompt, token ids included, becomes a list of one."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidTypeError(
            f"got {type(prompts).__name__}, expected a prompt or a list of prompts.", field="prompts"
        )
    if prompts and isinstance(prompts[0], int):
        return [prompts]
    return list(prompts)


def _per_prompt(values: Any, count: int, name: str, default: Any) -> list[Any]:
    if values is None:
        return [default] * count
    if isinstance(values, str) or not isinstance(values, Sequence):
        return [values] * count
    if len(values) != count:
        raise InvalidRequestError(f"got {len(values)}, expected {count}, one per prompt.", field=name)
    return list(values)


def _raise_first(results: Sequence[Output | RequestError]) -> None:
    for index, result in enumerate(results):
        error = result if isinstance(result, RequestError) else result.error
        if error is None:
            continue
        if len(results) > 1:
            error.add_note(f"This was prompt {index} of {len(results)}; return_errors=True keeps the others' outputs.")
        raise error


def _error_output(index: int, error: RequestError) -> RequestOutput:
    return RequestOutput.failed(str(index), error)
