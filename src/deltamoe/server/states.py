"""``/v1/states``: read a text once, go on from it often.

The answer's ``id`` goes into the field ``state`` of a later request, whose prompt or messages then
continue the kept text.
"""

from typing import Any

from fastapi import APIRouter, Request

from deltamoe.engine import Request as EngineRequest
from deltamoe.server.batch import Batch, until_disconnect
from deltamoe.server.errors import ApiError
from deltamoe.server.protocol import StateRequest
from deltamoe.server.service import aside, scope_of, service_of

__all__ = ["router"]

router = APIRouter()


@router.post("/v1/states")
async def keep(body: StateRequest, request: Request) -> dict[str, Any]:
    """Read a text or a conversation, and keep what the model carries of it."""
    service = service_of(request)
    service.check_model(body.model)
    before = service.kept(request, body.state)
    is_begun = before is not None
    if body.messages is not None:
        ids = await aside(
            request, service.conversation, body.messages, is_begun=is_begun, is_answered=False
        )
    elif body.prompt is not None:
        [ids] = await aside(request, service.documents, body.prompt, is_begun=is_begun)
    reading = EngineRequest(
        prompt=ids, max_tokens=0, state=before, keep_state=True, scope=service.prefix_scope(request)
    )
    batch = Batch(service, [reading])
    [result] = await until_disconnect(request, batch.run())
    state = result.choices[0].state
    if state is None:
        raise ApiError(500, "the engine kept no state", code="internal_error")
    return service.states.keep(scope_of(request), state, body.name).to_dict()


@router.get("/v1/states")
async def list_kept(request: Request) -> dict[str, Any]:
    """The texts kept under this key."""
    kept = service_of(request).states.of(scope_of(request))
    return {"object": "list", "data": [state.to_dict() for state in kept]}


@router.get("/v1/states/{state_id}")
async def describe(state_id: str, request: Request) -> dict[str, Any]:
    """One kept text."""
    return service_of(request).states.find(scope_of(request), state_id).to_dict()


@router.delete("/v1/states/{state_id}")
async def drop(state_id: str, request: Request) -> dict[str, Any]:
    """Forget a kept text."""
    service_of(request).states.drop(scope_of(request), state_id)
    return {"id": state_id, "object": "state", "deleted": True}
