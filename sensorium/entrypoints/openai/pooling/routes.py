"""Answers requests for vectors, labels and scores."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sensorium.entrypoints.instructions import instructed
from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.http import JsonResponse, read_body, while_connected
from sensorium.entrypoints.openai.pooling.bodies import (
    ClassifyBody,
    EmbeddingBody,
    InputsBody,
    PooledBody,
    PoolingBody,
    RerankBody,
    ScoreBody,
)
from sensorium.entrypoints.scoring import Scoring, ScoringPlan
from sensorium.inputs.admission import check_task
from sensorium.outputs import PoolingRequestOutput
from sensorium.pooling_params import PoolingParams


class PoolingRoutes:
    """One model's. A body may have thousands of texts, of which as many are in flight as a step may have."""

    def __init__(self, context: ServerContext) -> None:
        self._context = context
        self._config = context.engine.config.model_config
        self._scoring = Scoring(self._config, context.score_template, context.engine.tokenizer)

    def routes(self) -> list[Route]:
        """All of them; the last of several paths is the one that metrics and log name."""
        by_path = {
            "/v1/embeddings": self.embeddings,
            "/v1/classify": self.classify,
            "/classify": self.classify,
            "/v1/score": self.score,
            "/score": self.score,
            "/v1/rerank": self.rerank,
            "/v2/rerank": self.rerank,
            "/rerank": self.rerank,
            "/v1/pooling": self.pooling,
            "/pooling": self.pooling,
        }
        return [Route(path, endpoint, methods=["POST"]) for path, endpoint in by_path.items()]

    async def embeddings(self, request: Request) -> Response:
        """`POST /v1/embeddings`."""
        body = await read_body(request, EmbeddingBody)
        name = self._context.check_model(body.model)
        outputs = await self._pooled(request, body, body.pooling(), prompt_name=body.prompt_name)
        data = [
            {"object": "embedding", "index": index, "embedding": _numbers(output, body.encoding_format)}
            for index, output in enumerate(outputs)
        ]
        return JsonResponse({"object": "list", "data": data, "model": name, "usage": _usage(outputs)})

    async def classify(self, request: Request) -> Response:
        """`POST /classify`."""
        body = await read_body(request, ClassifyBody)
        head = self._head(request, "classify", body)
        outputs = await self._pooled(request, body, body.pooling())
        data = [self._label(index, output) for index, output in enumerate(outputs)]
        return JsonResponse({**head, "data": data, "usage": _usage(outputs)})

    async def pooling(self, request: Request) -> Response:
        """`POST /pooling`."""
        body = await read_body(request, PoolingBody)
        head = self._head(request, "pool", body)
        outputs = await self._pooled(request, body, body.pooling(self._config.pooler.tasks[0]))
        data = [
            {"object": "pooling", "index": index, "data": _numbers(output, body.encoding_format)}
            for index, output in enumerate(outputs)
        ]
        return JsonResponse({**head, "data": data, "usage": _usage(outputs)})

    async def score(self, request: Request) -> Response:
        """`POST /score`."""
        body = await read_body(request, ScoreBody)
        head = self._head(request, "score", body)
        first, second = body.texts()
        plan = self._scoring.plan(
            first, second, truncate_prompt_tokens=body.truncate_prompt_tokens, names=("text_1", "text_2")
        )
        outputs = await self._run_plan(request, body, plan)
        scores = plan.scores([output.outputs for output in outputs])
        data = [{"object": "score", "index": index, "score": score} for index, score in enumerate(scores)]
        return JsonResponse({**head, "data": data, "usage": _usage(outputs)})

    async def rerank(self, request: Request) -> Response:
        """`POST /rerank`: the documents, the best first."""
        body = await read_body(request, RerankBody)
        head = self._head(request, "rerank", body)
        documents = body.texts()
        plan = self._scoring.plan(
            body.query, documents, truncate_prompt_tokens=body.truncate_prompt_tokens, names=("query", "documents")
        )
        outputs = await self._run_plan(request, body, plan)
        scores = plan.scores([output.outputs for output in outputs])
        best = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n]
        results = [
            {
                "index": index,
                **({"document": {"text": documents[index]}} if body.return_documents else {}),
                "relevance_score": scores[index],
            }
            for index in best
        ]
        answer = {"id": head["id"], "model": head["model"], "results": results, "usage": _usage(outputs)}
        return JsonResponse(answer)

    # Inside

    def _head(self, request: Request, kind: str, body: PooledBody) -> dict[str, Any]:
        return {
            "id": f"{kind}-{request.state.request_id}",
            "object": "list",
            "created": int(time.time()),
            "model": self._context.check_model(body.model),
        }

    def _label(self, index: int, output: PoolingRequestOutput) -> dict[str, Any]:
        assert output.outputs is not None
        scores = output.outputs.probs
        labels, best = self._config.pooler.labels, int(scores.argmax())
        return {
            "index": index,
            "label": labels[best] if best < len(labels) else None,
            "probs": scores.tolist(),
            "num_classes": len(scores),
        }

    async def _pooled(
        self, request: Request, body: InputsBody, params: PoolingParams, *, prompt_name: str | None = None
    ) -> list[PoolingRequestOutput]:
        """What is made of each input of a body, in order."""
        check_task(params, self._config)  # before media are fetched
        self._context.check_kwargs(body.mm_processor_kwargs)
        if body.messages is None:
            prompts: list[Any] = list(body.prompts())
            if params.task == "embed":
                prompts = instructed(prompts, self._config.pooler, prompt_name)
        else:
            rendered = self._context.render(request, body.messages, **body.render_options())
            prompts = [await while_connected(request, rendered)]
        return await while_connected(request, self._run(request, body, prompts, params))

    async def _run_plan(self, request: Request, body: PooledBody, plan: ScoringPlan) -> list[PoolingRequestOutput]:
        return await while_connected(request, self._run(request, body, plan.prompts, plan.params))

    async def _run(
        self, request: Request, body: PooledBody, prompts: Sequence[Any], params: PoolingParams
    ) -> list[PoolingRequestOutput]:
        self._context.check_accepts(request)
        places = asyncio.Semaphore(self._context.engine.config.scheduler_config.max_num_seqs)

        async def pool(prompt: Any) -> PoolingRequestOutput:
            async with places:
                return await self._context.encode(
                    request,
                    prompt,
                    params,
                    model=body.model,
                    priority=body.priority,
                    cache_salt=body.cache_salt,
                )

        tasks = [asyncio.ensure_future(pool(prompt)) for prompt in prompts]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _usage(outputs: Sequence[PoolingRequestOutput]) -> dict[str, int]:
    num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


def _numbers(output: PoolingRequestOutput, encoding: str) -> Any:
    """An answer as nested lists, or the bytes of its float32 numbers, row by row."""
    assert output.outputs is not None
    data = output.outputs.data
    return base64.b64encode(data.astype("<f4").tobytes()).decode() if encoding == "base64" else data.tolist()
