"""``POST /v1/embeddings``: the direction of the last hidden state behind each text."""

import base64
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltamoe.engine import Request as EngineRequest
from deltamoe.engine import Result
from deltamoe.server.answers import answered
from deltamoe.server.batch import Batch, until_disconnect
from deltamoe.server.protocol import EmbeddingRequest
from deltamoe.server.service import aside, service_of

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/embeddings", response_model=None)
async def embed(body: EmbeddingRequest, request: Request) -> Response:
    """One vector of length 1 for each text."""
    service = service_of(request)
    service.check_model(body.model)
    scope = service.prefix_scope(request)
    prompts = await aside(request, service.documents, body.input)
    batch = Batch(
        service,
        [
            EngineRequest(prompt=ids, max_tokens=0, wants_embedding=True, scope=scope)
            for ids in prompts
        ],
    )
    results = await until_disconnect(request, batch.run())
    is_base64 = body.encoding_format == "base64"
    return await answered(_listed, results, service.settings.model_id, is_base64)


def _listed(results: Sequence[Result], model_id: str, is_base64: bool) -> dict[str, Any]:
    num_tokens = sum(result.num_prompt_tokens for result in results)
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _vector(result, is_base64=is_base64),
            }
            for index, result in enumerate(results)
        ],
        "model": model_id,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _vector(result: Result, *, is_base64: bool) -> list[float] | str:
    """As numbers, or as the base64 of little-endian fp32."""
    assert result.embedding is not None, "it was asked for"
    vector = result.embedding.float().cpu()
    vector = vector / vector.norm().clamp_min(1e-12)
    if is_base64:
        return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
    return [float(value) for value in vector.tolist()]
