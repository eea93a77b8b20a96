"""Runs one step: encode media, gather rows, forward, sample.

Owns the KV cache tensors and, through `InputBatch`, `SamplingState` and `EncoderRunner`, everything that is kept per
request between steps. What it does is decided by the scheduler; which of a model's methods it calls, by the driver.

A failure has an owner: an item that can't be encoded fails the requests that use it; a forward pass that raises is
repeated request by request, which is safe because writing the same KV twice changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from sensorium.attention import AttentionMetadata
from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import ModelError, RequestError, SensoriumError
from sensorium.grammar.compiler import FormCompiler
from sensorium.grammar.constrained_slots import ConstrainedSlots, RowMasks
from sensorium.logger import get_logger
from sensorium.messages import (
    MediaItem,
    ModelRunnerOutput,
    RequestFailure,
    ScheduledChunk,
    SchedulerOutput,
    TokenLogprobs,
)
from sensorium.model_executor.drivers import MediaRows, ModelDriver, StepInputs
from sensorium.model_executor.drivers.media_kwargs import batch_kwargs
from sensorium.model_executor.drivers.placeholder_maps import index_maps
from sensorium.model_executor.failures import told_to_caller
from sensorium.model_executor.layers.sampler import Sampler, SamplingState, prompt_logprobs
from sensorium.model_executor.sampling_metadata import SamplingMetadata
from sensorium.model_executor.token_mask import TokenMask
from sensorium.worker.encoder_runner import EncoderRunner
from sensorium.worker.input_batch import InputBatch, MediaSlice, StepArrays
from sensorium.worker.pooling import Pooler

logger = get_logger(__name__)


@dataclass(slots=True, eq=False)
class _StepResult:
    """Collects what the passes of one step bring."""

    sampled: dict[str, list[int]] = field(default_factory=dict)
    logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: dict[str, list[TokenLogprobs]] = field(default_factory=dict)
    pooled: dict[str, Any] = field(default_factory=dict)
    failures: dict[str, RequestFailure] = field(default_factory=dict)
    complete: set[str] = field(default_factory=set)


class ModelRunner:
    """Invariant: between steps, slot holders are exactly the requests that the scheduler counts as running."""

    def __init__(
        self,
        config: EngineConfig,
        model: nn.Module,
        driver: ModelDriver,
        features: ModelFeatures,
        kv_caches: list[torch.Tensor],
        device: torch.device,
    ) -> None:
        model_config, max_num_seqs = config.model_config, config.scheduler_config.max_num_seqs
        self._model: Any = model
        self._driver = driver
        self._kv_caches = kv_caches
        self._device = device
        self._dtype = model_config.dtype
        self._isolates_media = not features.splits_media or getattr(driver, "merges_itself", False)
        self._splits_media = features.splits_media
        self._batch = InputBatch(
            max_num_seqs,
            model_config.max_model_len,
            config.cache_config.block_size,
            uses_mrope=model_config.uses_mrope,
        )
        self.encoder = EncoderRunner(driver)
        self._sampling = SamplingState(max_num_seqs, model_config.vocab_size, seed=model_config.seed)
        self._sampler = Sampler()
        self.form_compiler = FormCompiler(max_num_seqs, config.scheduler_config.max_form_compile_s)
        self._constrained = ConstrainedSlots(self.form_compiler)
        self._pooler = Pooler(model_config.pooler_config)
        self._reporting: set[str] = set()
        """Requests whose prompt rows are looked at: those that pool, or asked for prompt log probabilities."""

    @property
    def num_requests(self) -> int:
        """Requests that hold a slot."""
        return len(self._batch)

    @torch.inference_mode()
    def execute(self, step: SchedulerOutput) -> ModelRunnerOutput:
        """Run a step. Every chunk ends with a sampled token, with nothing (not its last chunk), or in `failures`."""
        self._take_in(step)
        result = _StepResult()
        errors = self.encoder.run(step.encoder_inputs, self._batch)
        chunks = self._without_failed_media(step.chunks, errors, result)
        begin = time.perf_counter()
        for group in self._passes(chunks):
            self._run(group, result)
        return ModelRunnerOutput(
            sampled_token_ids=result.sampled,
            logprobs=result.logprobs,
            prompt_logprobs=result.prompt_logprobs,
            pooled=result.pooled,
            failures=result.failures,
            complete_request_ids=frozenset(result.complete),
            encode_s=self.encoder.encode_s,
            forward_s=time.perf_counter() - begin,
        )

    def _take_in(self, step: SchedulerOutput) -> None:
        for request_id in step.freed_request_ids:
            state = self._batch.remove(request_id)
            if state is not None:
                self._sampling.remove(state.slot)
                self._constrained.remove(state.slot)
                self._pooler.remove(request_id)
                self._reporting.discard(request_id)
        for new in step.new_requests:
            state = self._batch.add(new)
            request = new.request
            self._sampling.add(
                state.slot,
                request.sampling_params,
                request.prompt_token_ids,
                new.output_token_ids,
                request.eos_token_ids,
            )
            self._constrained.add(state.slot, request.sampling_params, new.output_token_ids)
            if request.pooling or request.sampling_params.prompt_logprobs is not None:
                self._reporting.add(request.request_id)
        self._constrained.flush()
        for chunk in step.chunks:
            self._batch.append_blocks(chunk)
        self.encoder.free(step.free_encoder_keys)

    def _without_failed_media(
        self, chunks: Sequence[ScheduledChunk], errors: dict[str, SensoriumError], result: _StepResult
    ) -> list[ScheduledChunk]:
        """The chunks whose media were encoded; the others' requests fail."""
        if not errors:
            return list(chunks)
        remaining = []
        for chunk in chunks:
            keys = [item.key for item in self._batch[chunk.request_id].request.media]
            error = next((errors[key] for key in keys if key in errors), None)
            if error is None:
                remaining.append(chunk)
            else:
                result.failures[chunk.request_id] = RequestFailure(str(error), error.status)
        return remaining

    def _passes(self, chunks: Sequence[ScheduledChunk]) -> list[list[ScheduledChunk]]:
        """Chunks that share a forward pass. Where the model merges media itself, each chunk with media runs alone."""
        if not self._isolates_media:
            return [list(chunks)] if chunks else []
        shared, alone = [], []
        for chunk in chunks:
            if self._batch.media_rows(chunk):
                alone.append([chunk])
            else:
                shared.append(chunk)
        return [shared, *alone] if shared else alone

    def _run(self, chunks: list[ScheduledChunk], result: _StepResult) -> None:
        """One pass; where it raises, one per request, so that only the request at fault ends."""
        try:
            self._run_pass(chunks, result)
            return
        except Exception as error:
            if self._device.type != "cpu" and _is_device_fault(error):
                raise
            if len(chunks) == 1:
                logger.exception("the forward pass of request %s failed", chunks[0].request_id)
                result.failures[chunks[0].request_id] = RequestFailure(
                    f"The model failed on this request ({told_to_caller(error)}). Other requests go on.",
                    error.status if isinstance(error, RequestError) else 500,
                )
                return
            logger.warning("a forward pass of %d requests failed; repeating it one by one", len(chunks), exc_info=error)
        for chunk in chunks:
            self._run([chunk], result)

    def _run_pass(self, chunks: list[ScheduledChunk], result: _StepResult) -> None:
        arrays = self._batch.gather(chunks)
        hidden = _hidden_states(self._driver.forward(self._step_inputs(chunks, arrays)))
        if self._reporting:
            self._report_prompt(chunks, arrays, hidden, result)
        last = [i for i, chunk in enumerate(chunks) if chunk.is_last]
        sampling = []
        for i in last:
            if self._reporting and self._batch[chunks[i].request_id].request.pooling:
                result.pooled[chunks[i].request_id] = self._pooler.finish(chunks[i].request_id)
            else:
                sampling.append(i)
        if sampling:
            self._sample(chunks, arrays, hidden, sampling, result)

    def _step_inputs(self, chunks: list[ScheduledChunk], arrays: StepArrays) -> StepInputs:
        pieces = [
            (row, piece)
            for chunk, row in zip(chunks, arrays.starts.tolist(), strict=False)
            for piece in self._batch.media_rows(chunk)
        ]
        maps = None
        kwargs = None
        if pieces and not self._splits_media:
            items = [piece.item for _, piece in pieces]
            maps = index_maps(items, chunks[0].num_computed_tokens)
            kwargs = self._media_kwargs(items)
        return StepInputs(
            input_ids=self._to_device(arrays.token_ids),
            positions=self._to_device(arrays.positions),
            kv_caches=self._kv_caches,
            attn_metadata=AttentionMetadata.from_numpy(
                arrays.query_lens,
                arrays.seq_lens,
                arrays.block_table,
                arrays.slot_mapping,
                device=self._device,
                multi_modal_placeholder_index_maps=maps,
            ),
            media=self._gather_media(pieces) if pieces and self._splits_media else None,
            media_kwargs=kwargs,
        )

    def _media_kwargs(self, items: Sequence[MediaItem]) -> dict[str, Any]:
        """The arguments of whole items, per modality in prompt order."""
        by_modality: dict[str, list[Any]] = {}
        for item in items:
            by_modality.setdefault(item.modality, []).append(item.kwargs or {})
        kwargs: dict[str, Any] = {}
        for group in by_modality.values():
            kwargs |= batch_kwargs(group, self._device, self._dtype)
        return kwargs

    def _gather_media(self, pieces: Sequence[tuple[int, MediaSlice]]) -> MediaRows:
        index, rows = [], []
        for start, piece in pieces:
            encoded = self.encoder.rows(piece)
            assert encoded is not None, f"rows of {piece.item.key} are scheduled but were not encoded"
            index.append(piece.chunk_rows + start)
            rows.append(encoded)
        flat_index = torch.from_numpy(np.concatenate(index).astype(np.int64, copy=False)).to(self._device)
        return MediaRows(flat_index, rows[0] if len(rows) == 1 else torch.cat(rows))

    def _to_device(self, array: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _sample(
        self,
        chunks: list[ScheduledChunk],
        arrays: StepArrays,
        hidden: torch.Tensor,
        sampling: list[int],
        result: _StepResult,
    ) -> None:
        """Sample a token for each of these chunks from the row of its last position."""
        rows = arrays.starts[1:][sampling] - 1
        if len(rows) != len(hidden):
            hidden = hidden[torch.from_numpy(rows).to(self._device)]
        slots = arrays.slots if len(sampling) == len(chunks) else arrays.slots[sampling]
        metadata = SamplingMetadata(len(rows), state=self._sampling, slots=slots)
        logits = self._model.compute_logits(hidden, metadata)
        masks = self._constrained.masks(slots)  # computed while the model ran
        token_mask = None if masks is None else TokenMask(masks.rows, masks.words)
        output = self._sampler.sample(logits, self._sampling, slots, token_mask)
        token_ids = output.sampled_token_ids.cpu().numpy()
        # A row that failed gets a token here too; its request ends, so nobody reads it.
        self._batch.append_sampled(slots, arrays.seq_lens[sampling].astype(np.int64), token_ids)
        self._sampling.append_each(slots, token_ids)
        self._constrained.append_each(slots, token_ids)
        self._constrained.flush()
        failed, logprobs = output.failed_rows, output.logprobs
        for row, (i, token_id) in enumerate(zip(sampling, token_ids.tolist(), strict=True)):
            request_id = chunks[i].request_id
            if masks is not None and row in masks.complete_rows:
                result.complete.add(request_id)
                continue
            if row in failed or (masks is not None and row in masks.failures):
                result.failures[request_id] = _row_failure(row, masks)
                continue
            result.sampled[request_id] = [token_id]
            if logprobs is not None and (entry := logprobs[row]) is not None:
                result.logprobs[request_id] = [entry]

    def _report_prompt(
        self, chunks: list[ScheduledChunk], arrays: StepArrays, hidden: torch.Tensor, result: _StepResult
    ) -> None:
        """Prompt log probabilities and pooling, for the chunks that asked for them."""
        for i, chunk in enumerate(chunks):
            if chunk.request_id not in self._reporting:
                continue
            request = self._batch[chunk.request_id].request
            rows = slice(int(arrays.starts[i]), int(arrays.starts[i + 1]))
            if request.pooling:
                self._pooler.add(chunk.request_id, hidden[rows])
            top = request.sampling_params.prompt_logprobs
            start = chunk.num_computed_tokens
            if top is None or start + 1 >= len(request.prompt_token_ids):
                continue
            targets = list(request.prompt_token_ids[start + 1 : start + 1 + chunk.num_scheduled_tokens])
            followed = hidden[rows][: len(targets)]
            metadata = SamplingMetadata(len(targets))
            logits = self._model.compute_logits(followed, metadata)
            result.prompt_logprobs[chunk.request_id] = prompt_logprobs(logits, targets, top)


def _row_failure(row: int, masks: RowMasks | None) -> RequestFailure:
    """Why no token can be taken for a row."""
    if masks is not None:
        if row in masks.failures:
            return RequestFailure(masks.failures[row].message, masks.failures[row].status)
        if row in masks.rows:
            return RequestFailure(
                "structured_outputs: got a form that allows no token that bad_words, logit_bias and the model leave, "
                "expected one that does. Change the form, or remove what forbids tokens.",
                status=400,
            )
    return RequestFailure(
        "The model produced no valid logits for this request (NaN or infinity). Other requests go on."
    )


def _hidden_states(output: Any) -> torch.Tensor:
    """What `forward` returned, if it is what it should be. Raises `ModelError` (a `TypeError`)."""
    if not isinstance(output, torch.Tensor):
        raise ModelError(
            f"forward of the model: got a {type(output).__name__} from it, expected a tensor of hidden states "
            f"(num_tokens, hidden_size). Return that alone; compute_logits makes the logits."
        )
    return output


def _is_device_fault(error: Exception) -> bool:
    """A fault that leaves the device unusable, as opposed to one of the pass. Running out of memory is not one."""
    accelerator_error = getattr(torch, "AcceleratorError", None)
    return accelerator_error is not None and isinstance(error, accelerator_error)
