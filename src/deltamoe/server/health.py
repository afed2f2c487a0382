"""``GET /health`` and ``GET /metrics``: for those who watch over a server."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from deltamoe.server.service import service_of

__all__ = ["router"]

router = APIRouter()


@router.get("/health", response_model=None)
async def health(request: Request) -> JSONResponse:
    """200 while the engine's step loop moves; 503 when it stands still, is dead or is closing."""
    service = service_of(request)
    engine = service.engine
    age = engine.heartbeat_age_s
    if service.is_draining:
        status = "shutting_down"
    elif not engine.is_alive:
        status = "engine_dead"
    elif age > service.settings.heartbeat_limit_s:
        status = "stuck"
    else:
        status = "ok"
    content: dict[str, Any] = {"status": status, "heartbeat_age_s": round(age, 3)}
    return JSONResponse(content, 200 if status == "ok" else 503)


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """All counters and gauges, in Prometheus's text format."""
    content, media_type = await asyncio.to_thread(service_of(request).metrics.exposition)
    return Response(content, media_type=media_type)
