"""Runs steps: encode media, gather rows, forward, sample.

Owns the KV cache tensors and, through `InputBatch`, `SamplingState` and `EncoderRunner`, everything that is kept per
request between steps. What it does is decided by the scheduler; which of a model's methods it calls, by the driver.

A step is submitted, and its result is asked for later: `submit` gives the device all its work without waiting for any
of it, and `PendingStep.result` waits. Tokens that the host hasn't seen yet are read from where the step before left
them on the device (`_last_tokens`), so that the next step can be submitted meanwhile.

A failure has an owner: an item that can't be encoded fails the requests that use it; a forward pass that raises is
repeated request by request, which is safe because writing the same KV twice changes nothing, and because a state is
read from one row and written into another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from sensorium.attention import LayerCache
from sensorium.cache_spec import CacheGroup
from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import LostRankError, RequestError
from sensorium.logger import get_logger
from sensorium.messages import (
    ModelRunnerOutput,
    RequestFailure,
    ScheduledChunk,
    SchedulerOutput,
    TokenLogprobs,
)
from sensorium.model_executor.adapter_rows import adapter_ids_of_rows, adapter_of_all
from sensorium.model_executor.drivers import ModelDriver
from sensorium.model_executor.failures import told_to_caller
from sensorium.model_executor.host_copy import HostCopy
from sensorium.model_executor.layers.sampler import PromptLogprobs, Sampler, SamplerOutput, SamplingState
from sensorium.model_executor.sampling_metadata import BoolArray, SamplingMetadata
from sensorium.model_executor.token_counts import TokenCounts
from sensorium.model_executor.token_mask import TokenMask
from sensorium.token_masks import StepMasks
from sensorium.worker.block_tables import DeviceBlockTables
from sensorium.worker.encoder_runner import EncoderRunner
from sensorium.worker.graph_capture import GraphCapture
from sensorium.worker.input_batch import InputBatch, SlotState, StepArrays, max_blocks_of, num_tables
from sensorium.worker.item_spread import ItemSpread
from sensorium.worker.passes import PassRunner
from sensorium.worker.pooling import Pooler
from sensorium.worker.sampled_rows import SampledRows, WantedRows
from sensorium.worker.step_buffers import host_fields
from sensorium.worker.step_timer import StepClock, StepTimer
from sensorium.worker.token_masks import MaskReader, RowMasks

logger = get_logger(__name__)


@dataclass(slots=True, eq=False)
class PendingStep:
    """A step that was submitted; see `executor.PendingStep`."""

    runner: ModelRunner
    timer: StepTimer
    masks: StepMasks | None
    """Where the step's constrained requests have their masks; other ranks than the first don't know."""
    is_constrained: bool
    """Whether the first rank has `masks`."""
    sampled: list[SampledRows] = field(default_factory=list)
    prompt_logprobs: dict[str, PromptLogprobs] = field(default_factory=dict)
    pooled: dict[str, HostCopy] = field(default_factory=dict)
    failures: dict[str, RequestFailure] = field(default_factory=dict)

    def result(self) -> ModelRunnerOutput:
        """What the step brought. Every chunk ended with a token, with nothing (not its last), or in `failures`."""
        return self.runner.collect(self)


@dataclass(frozen=True, slots=True)
class PreparedStep:
    """An idle step that has ended."""

    is_prepared: bool

    def result(self) -> ModelRunnerOutput:
        """Whether something is left to get ready."""
        return ModelRunnerOutput({}, is_prepared=self.is_prepared)


class ModelRunner:
    """Invariant: between steps, slot holders are exactly the requests that the scheduler counts as running.

    Args:
        config: The engine's.
        model: For its `compute_logits`; passes go through `driver`.
        driver: Runs the model.
        features: What loading found out about the model.
        groups: The model's cache groups.
        kv_caches: An entry per layer with a cache.
        device: Where the model is.
        graph_capture: Records passes of decodes to be replayed; None: every pass is run call by call.
    """

    def __init__(
        self,
        config: EngineConfig,
        model: nn.Module,
        driver: ModelDriver,
        features: ModelFeatures,
        groups: Sequence[CacheGroup],
        kv_caches: list[LayerCache],
        device: torch.device,
        graph_capture: GraphCapture | None = None,
    ) -> None:
        model_config, max_num_seqs = config.model_config, config.scheduler_config.max_num_seqs
        self._model: Any = model
        self._driver = driver
        self._kv_caches = kv_caches
        self._device = device
        self._dtype = model_config.dtype
        self._isolates_media = not features.splits_media or getattr(driver, "merges_itself", False)
        self._splits_media = features.splits_media
        self._keeps_tokens = config.scheduler_config.max_steps_in_flight > 1 or graph_capture is not None
        """Whether a step may ask for tokens that the host hasn't seen."""
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        """By slot: the token that was sampled last. The last entry is for padding rows."""
        self._block_tables: DeviceBlockTables | None = None
        if device.type != "cpu" or graph_capture is not None:
            max_blocks = max_blocks_of(groups, model_config.max_model_len) + 1
            self._block_tables = DeviceBlockTables(num_tables(groups), max_num_seqs, max_blocks, device)
        self._batch = InputBatch(
            max_num_seqs,
            model_config.max_model_len,
            groups,
            uses_mrope=model_config.uses_mrope,
            device_tables=self._block_tables,
        )
        self._clock = StepClock(device)
        self._group = config.parallel_config.group
        self.spread: ItemSpread | None = None
        """Spreads media over ranks; None: there is one rank, or each has a share of the encoder."""
        if self._group.size > 1 and not config.parallel_config.division.towers:
            self.spread = ItemSpread(driver, self._group)
        self.encoder = EncoderRunner((self.spread or driver).encode, self._group)
        counts = None
        if config.counts_tokens_on_device:
            counts = TokenCounts(max_num_seqs, model_config.vocab_size, device)
        self._sampling = SamplingState(max_num_seqs, model_config.vocab_size, model_config.seed, counts)
        self._sampler = Sampler()
        self._masks = MaskReader()
        self._pooler = Pooler(model, model_config, device)
        self._reporting: set[str] = set()
        """Requests whose prompt rows are looked at: those that pool, or asked for prompt log probabilities."""
        self.passes = PassRunner(
            config,
            model,
            driver,
            features,
            kv_caches,
            self._batch,
            self._block_tables,
            self.encoder,
            self._last_tokens,
            graph_capture,
        )

    @property
    def num_requests(self) -> int:
        """Requests that hold a slot."""
        return len(self._batch)

    def close(self) -> None:
        """Close open files."""
        self._masks.close()

    @torch.inference_mode()
    def submit(self, step: SchedulerOutput) -> PendingStep:
        """Begin a step: give the device its work, and wait for none of it."""
        self._take_in(step)
        pending = PendingStep(
            self, self._clock.new_step(), step.masks, is_constrained=step.has_masks or step.masks is not None
        )
        pending.timer.begin()
        if self._block_tables is not None:
            self._block_tables.flush()
        self.encoder.run(step.encoder_inputs, self._batch)
        pending.timer.encoded()
        for group in self._passes(self._without_failed(step.chunks, pending)):
            self._run(group, pending)
        pending.timer.end()
        return pending

    @torch.inference_mode()
    def prepare(self) -> PreparedStep:
        """Record passes for later steps, for a moment."""
        return PreparedStep(is_prepared=not self.passes.record_next())

    @torch.inference_mode()
    def collect(self, pending: PendingStep) -> ModelRunnerOutput:
        """Wait for a step, and note what it sampled. In the order in which steps were submitted."""
        sampled: dict[str, list[int]] = {}
        logprobs: dict[str, list[TokenLogprobs]] = {}
        complete: set[str] = set()
        for rows in pending.sampled:
            accepted = rows.accepted()
            self._note_sampled(rows, accepted)
            self._report_sampled(rows, accepted, sampled, logprobs, complete, pending.failures)
        prompt_logprobs = {name: entries.messages() for name, entries in pending.prompt_logprobs.items()}
        pooled = _finite(pending)
        times = pending.timer.times()
        if not self._batch:
            self._clock.rest()
        return ModelRunnerOutput(
            sampled_token_ids=sampled,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            pooled=pooled,
            failures=pending.failures,
            complete_request_ids=frozenset(complete),
            lost_mask_source=self._masks.given_up_id,
            encode_s=times.encode_s,
            forward_s=times.forward_s,
            idle_s=times.idle_s,
        )

    def _note_sampled(self, rows: SampledRows, accepted: BoolArray | None) -> None:
        """Remember tokens, of the requests that still have their slots.

        A row that failed gets a token here too; its request ends, so nobody reads it.
        """
        slots, positions, token_ids = rows.wanted.slots, rows.wanted.positions, rows.output.token_ids
        held = self._batch.hold(rows.states)
        drafts = rows.wanted.drafts
        if drafts is not None and accepted is not None:
            kept = accepted & np.repeat(np.array(held, dtype=np.bool_), drafts.num_rows)
            self._sampling.advance(slots[kept & (drafts.offsets > 0)])
            slots, positions, token_ids = slots[kept], positions[kept], token_ids[kept]
        elif not all(held):
            kept = np.array(held, dtype=np.bool_)
            slots, positions, token_ids = slots[kept], positions[kept], token_ids[kept]
        self._batch.append_sampled(slots, positions, token_ids)
        self._sampling.append(slots, token_ids)

    @staticmethod
    def _report_sampled(
        rows: SampledRows,
        accepted: BoolArray | None,
        sampled: dict[str, list[int]],
        logprobs: dict[str, list[TokenLogprobs]],
        complete: set[str],
        failures: dict[str, RequestFailure],
    ) -> None:
        """Sort what came of each row into the parts of a step's result."""
        masks, failed, reports = rows.masks, rows.output.failed_rows, rows.output.logprobs
        token_ids = rows.output.token_ids.tolist()
        firsts: Sequence[int] = range(len(token_ids))
        ends: Sequence[int] = range(1, len(token_ids) + 1)
        if rows.wanted.drafts is not None and accepted is not None:
            first_rows = rows.wanted.drafts.first_rows
            firsts, ends = first_rows.tolist(), (first_rows + np.add.reduceat(accepted, first_rows, dtype=int)).tolist()
        for state, row, end in zip(rows.states, firsts, ends, strict=True):
            request_id = state.request.request_id
            if masks is not None and row in masks.complete_rows:
                complete.add(request_id)
            elif row in failed or (masks is not None and row in masks.failures):
                failures[request_id] = _row_failure(row, masks)
            else:
                sampled[request_id] = token_ids[row:end]
                if reports is not None and reports[row] is not None:
                    logprobs[request_id] = [entry for entry in reports[row:end] if entry is not None]

    def _take_in(self, step: SchedulerOutput) -> None:
        for request_id in step.freed_request_ids:
            state = self._batch.remove(request_id)
            if state is not None:
                self._sampling.remove(state.slot)
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
            if request.pooling is not None or request.sampling_params.prompt_logprobs is not None:
                self._reporting.add(request.request_id)
        if step.masks is not None:
            self._masks.begin_step(step.masks)
        for chunk in step.chunks:
            if chunk.new_block_ids:
                self._batch.append_blocks(chunk)
            if chunk.draft_token_ids:
                self._batch.write_drafts(chunk)
        self.encoder.free(step.free_encoder_keys)

    def _without_failed(self, chunks: Sequence[ScheduledChunk], pending: PendingStep) -> list[ScheduledChunk]:
        """The chunks of requests that can go on: none failed before, and their media are there."""
        remaining = []
        for chunk, state in zip(chunks, self._batch.states(chunks), strict=True):
            if state.failure is None and self.encoder.errors:
                errors = (self.encoder.errors.get(item.key) for item in state.request.media)
                error = next((error for error in errors if error is not None), None)
                if error is not None:
                    state.failure = RequestFailure.of(error)
            if state.failure is None:
                remaining.append(chunk)
            else:
                pending.failures[chunk.request_id] = state.failure
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

    def _run(self, chunks: list[ScheduledChunk], pending: PendingStep) -> None:
        """One pass; where it raises, one per request, so that only the request at fault ends."""
        try:
            self._run_pass(chunks, pending)
            return
        except Exception as error:
            if self._device.type != "cpu" and _is_device_fault(error):
                raise
            if not self._group.have_all_failed():
                raise LostRankError(
                    "a forward pass: got a failure that not all ranks had. Restart the engine."
                ) from error
            if len(chunks) == 1 and not chunks[0].draft_token_ids:
                logger.exception("the forward pass of request %s failed", chunks[0].request_id)
                failure = RequestFailure(
                    f"The model failed on this request ({told_to_caller(error)}). Other requests go on.",
                    error.status if isinstance(error, RequestError) else 500,
                )
                self._batch[chunks[0].request_id].failure = pending.failures[chunks[0].request_id] = failure
                return
            logger.warning("a forward pass of %d requests failed; repeating it one by one", len(chunks), exc_info=error)
        for chunk in chunks:
            # Alone, a chunk is tried as it is and then without what is only guessed.
            self._run([chunk if len(chunks) > 1 else chunk.without_drafts()], pending)

    def _run_pass(self, chunks: list[ScheduledChunk], pending: PendingStep) -> None:
        arrays = self._batch.gather(chunks)
        if self._is_plain_decode(chunks, arrays) and self._decode(chunks, arrays, pending):
            return
        pools = [self._is_pooling(chunk) for chunk in chunks] if self._reporting else [False] * len(chunks)
        sampling = [i for i, chunk in enumerate(chunks) if chunk.is_last and not pools[i]]
        wanted = WantedRows.of(chunks, arrays, sampling)
        fields = host_fields(arrays, wanted.rows, wanted.slots)
        hidden, tensors = self.passes.forward(chunks, arrays, fields)
        if self._reporting:
            self._report_prompt(chunks, arrays, hidden, pending)
        self._finish_pooling(
            [chunk for chunk, pool in zip(chunks, pools, strict=True) if pool and chunk.is_last], pending
        )
        if not sampling:
            return
        if len(wanted.rows) != len(hidden):
            hidden = hidden[tensors.sampled_rows]
        metadata = SamplingMetadata(len(hidden), state=self._sampling, slots=wanted.slots)
        adapter_ids = None if tensors.adapter_ids is None else tensors.adapter_ids[tensors.sampled_rows]
        with adapter_ids_of_rows(adapter_ids, arrays.adapters):
            logits = self._model.compute_logits(hidden, metadata)
        states = self._batch.states([chunks[i] for i in sampling])
        rows = self._sample(states, wanted, logits, pending.masks)
        if self._keeps_tokens:
            self._last_tokens.index_copy_(0, tensors.sampled_slots, rows.output.sampled_token_ids)
        pending.sampled.append(rows)

    def _is_pooling(self, chunk: ScheduledChunk) -> bool:
        return self._batch[chunk.request_id].request.pooling is not None

    def _finish_pooling(self, chunks: Sequence[ScheduledChunk], pending: PendingStep) -> None:
        """Make the answers of requests that have run to their prompts' ends, and begin to bring them to the host."""
        if not chunks:
            return
        requests = [self._batch[chunk.request_id].request for chunk in chunks]
        for request, answer in zip(requests, self._pooler.finish(requests), strict=True):
            pending.pooled[request.request_id] = HostCopy([answer])

    def _is_plain_decode(self, chunks: Sequence[ScheduledChunk], arrays: StepArrays) -> bool:
        """Whether every chunk is a single row of text that a token is sampled after, and nothing else is wanted."""
        if self.passes.decodes is None or self._reporting or not self._batch.is_all_decodes(arrays):
            return False
        return False not in [chunk.is_last for chunk in chunks]

    def _decode(self, chunks: Sequence[ScheduledChunk], arrays: StepArrays, pending: PendingStep) -> bool:
        """Run a pass of decodes as a graph; False: there is none for it."""
        decoded = self.passes.decode(arrays)
        if decoded is None:
            return False
        states = self._batch.states(chunks)
        wanted = WantedRows.of(chunks, arrays, range(len(chunks)))
        if not pending.is_constrained and self._sampling.is_plain[arrays.slots].all():
            rows = self._begin_rows(states, wanted, decoded.best)
        else:
            rows = self._sample(states, wanted, decoded.logits, pending.masks)
            self._last_tokens.index_copy_(0, decoded.slots, rows.output.sampled_token_ids)
        pending.sampled.append(rows)
        return True

    def _sample(
        self,
        states: list[SlotState],
        wanted: WantedRows,
        logits: torch.Tensor,
        step_masks: StepMasks | None,
    ) -> SampledRows:
        """Sample a token in each row of the logits, for these requests.

        The first rank does, and tells the others.
        """
        if self._group.rank > 0:
            output = SamplerOutput.of_another_rank(len(logits), logits.device)
            self._group.broadcast(output.sampled_token_ids)
            return self._begin_rows(states, wanted, output)
        masks = None if step_masks is None else self._read_masks(states, wanted, step_masks)
        token_mask = None if masks is None else TokenMask(masks.rows, masks.words)
        output = self._sampler.sample(logits, self._sampling, wanted.slots, token_mask, wanted.drafts)
        self._group.broadcast(output.sampled_token_ids)
        return self._begin_rows(states, wanted, output, masks)

    def _read_masks(self, states: list[SlotState], wanted: WantedRows, step_masks: StepMasks) -> RowMasks | None:
        """The masks of the rows, which were computed while the model ran."""
        request_ids, drafts = [state.request.request_id for state in states], wanted.drafts
        if drafts is None:
            return self._masks.read(step_masks, request_ids)
        of_rows = [
            name for name, count in zip(request_ids, drafts.num_rows.tolist(), strict=True) for _ in range(count)
        ]
        return self._masks.read(step_masks, of_rows, drafts.offsets.tolist())

    def _begin_rows(
        self,
        states: list[SlotState],
        wanted: WantedRows,
        output: SamplerOutput,
        masks: RowMasks | None = None,
    ) -> SampledRows:
        """Count a token for each request, and begin to bring what was sampled to the host."""
        output.fetch()
        drafts = wanted.drafts
        self._sampling.advance(wanted.slots if drafts is None else wanted.slots[drafts.first_rows])
        return SampledRows(states, wanted, output, masks)

    def _report_prompt(
        self, chunks: Sequence[ScheduledChunk], arrays: StepArrays, hidden: torch.Tensor, pending: PendingStep
    ) -> None:
        """Prompt log probabilities and pooling, for the chunks that asked for them."""
        for i, chunk in enumerate(chunks):
            if chunk.request_id not in self._reporting:
                continue
            request = self._batch[chunk.request_id].request
            rows = slice(*arrays.cu_seqlens_q[i : i + 2].tolist())
            if request.pooling is not None:
                self._pooler.add(request, chunk.num_computed_tokens, hidden[rows])
            top = request.sampling_params.prompt_logprobs
            start = chunk.num_computed_tokens
            if top is None or start + 1 >= len(request.prompt_token_ids):
                continue
            targets = list(request.prompt_token_ids[start + 1 : start + 1 + chunk.num_scheduled_tokens])
            followed = hidden[rows][: len(targets)]
            logits_of = partial(self._logits_of, request.adapter_id)
            pending.prompt_logprobs[chunk.request_id] = PromptLogprobs(logits_of, followed, targets, top)

    def _logits_of(self, adapter_id: int, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of rows of one request."""
        with adapter_of_all(adapter_id, hidden):
            logits: torch.Tensor = self._model.compute_logits(hidden, SamplingMetadata(len(hidden)))
        return logits


def _finite(pending: PendingStep) -> dict[str, npt.NDArray[np.float32]]:
    """The answers of pooling requests; those that are no numbers fail."""
    found = {}
    for request_id, copy in pending.pooled.items():
        answer: npt.NDArray[np.float32] = copy.wait()[0].numpy()
        if np.isfinite(answer).all():
            found[request_id] = answer
        else:
            pending.failures[request_id] = RequestFailure(
                "The model computed no numbers for this request (NaN or infinity). Other requests go on."
            )
    return found


def _row_failure(row: int, masks: RowMasks | None) -> RequestFailure:
    """Why no token can be taken for a row."""
    if masks is not None:
        if row in masks.failures:
            return masks.failures[row]
        if row in masks.rows:
            return RequestFailure(
                "got one that allows no token that bad_words, logit_bias and the model leave, "
                "expected one that does. Change it, or remove what forbids tokens.",
                status=400,
                field="structured_outputs",
            )
    return RequestFailure(
        "The model produced no valid logits for this request (NaN or infinity). Other requests go on."
    )


def _is_device_fault(error: Exception) -> bool:
    """A fault that leaves the device unusable, as opposed to one of the pass. Running out of memory is not one."""
    accelerator_error = getattr(torch, "AcceleratorError", None)
    return accelerator_error is not None and isinstance(error, accelerator_error)
