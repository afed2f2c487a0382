"""What went wrong, as OpenAI's clients expect to hear it.

``{"error": {"message", "type", "param", "code"}}`` with the status that makes a client do the right
thing: its mistakes are 4xx and not retried, a full queue is 429 with Retry-After, 503 means later.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from deltamoe.engine import (
    ContextTooLongError,
    EngineDeadError,
    QueueFullError,
    ShuttingDownError,
)
from deltamoe.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeltamoeError,
    DoesNotFitError,
)

__all__ = ["ApiError", "add_error_handlers", "as_api_error"]

_LOG = logging.getLogger("deltamoe.server")


class ApiError(Exception):
    """A refusal or a failure with its status.

    Attributes:
        status: of the HTTP response.
        message: for the person who wrote the client.
        code: for the client; None where the status says it all.
        param: the field of the request at fault.
        headers: sent beside.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def encoded(self) -> bytes:
        """``body`` as it is sent."""
        return json.dumps(self.body()).encode()


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


def as_api_error(error: BaseException) -> ApiError:
    """Any exception as an answer; what nobody foresaw is a 500 without its details, and logged."""
    match error:
        case ApiError():
            return error
        case QueueFullError():
            return ApiError(
                429, str(error), code="rate_limit_exceeded", headers={"Retry-After": "1"}
            )
        case ContextTooLongError():
            return ApiError(400, str(error), code="context_length_exceeded")
        case ShuttingDownError():
            return ApiError(503, str(error), code="shutting_down", headers={"Retry-After": "5"})
        case EngineDeadError():
            return ApiError(503, "the engine has failed; the server is ending", code="engine_dead")
        case ConfigError() | DataError() | CheckpointError():
            return ApiError(400, str(error))
        case DoesNotFitError():
            return ApiError(400, str(error), code="does_not_fit")
    _LOG.error("a request failed", exc_info=error)
    return ApiError(500, f"the request failed: {type(error).__name__}", code="internal_error")


def add_error_handlers(app: FastAPI) -> None:
    """Let refusals and failures leave the app in OpenAI's shape; the guard sees to the rest."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        fault = as_api_error(_translated(error))
        return JSONResponse(fault.body(), fault.status, headers=fault.headers)

    for kind in (RequestValidationError, HTTPException, ApiError, DeltamoeError):
        app.add_exception_handler(kind, answer)


def _translated(error: Exception) -> Exception:
    if isinstance(error, RequestValidationError):
        first, *others = error.errors()
        if first["type"] == "json_invalid":
            return ApiError(400, "the body is not valid JSON", code="invalid_json")
        where = [part for part in first["loc"] if part != "body"]
        message = first["msg"].removeprefix("Value error, ")
        # Where a field may be of several kinds, each has its complaint, and its name in the place.
        if others and where and all(other["loc"][1:2] == (where[0],) for other in others):
            where = where[:1]
            message = "; or: ".join(dict.fromkeys(fault["msg"] for fault in error.errors()))
        place = ".".join(map(str, where))
        return ApiError(400, f"{place}: {message}" if place else message, param=place or None)
    if isinstance(error, HTTPException):
        return ApiError(
            error.status_code, str(error.detail), headers=dict(error.headers or {}) or None
        )
    return error
