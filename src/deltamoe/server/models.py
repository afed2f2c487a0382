"""``GET /v1/models``: the one model there is."""

from typing import Any

from fastapi import APIRouter, Request

from deltamoe.server.service import Service, service_of

__all__ = ["router"]

router = APIRouter()


@router.get("/v1/models")
async def list_models(request: Request) -> dict[str, Any]:
    """A list of one."""
    return {"object": "list", "data": [_card(service_of(request))]}


@router.get("/v1/models/{model_id:path}")
async def describe(model_id: str, request: Request) -> dict[str, Any]:
    """The model by its name."""
    service = service_of(request)
    service.check_model(model_id)
    return _card(service)


def _card(service: Service) -> dict[str, Any]:
    return {
        "id": service.settings.model_id,
        "object": "model",
        "created": service.created,
        "owned_by": "deltamoe",
        "max_model_len": service.context,
        "has_chat_template": service.chat_template is not None,
    }
