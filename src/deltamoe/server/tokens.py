"""``/tokenize``, ``/detokenize``, ``/tokenizer_info``: the tokenizer for those who lack its file.

Text never encodes to a special token, here or in a prompt. One exception: a ``prompt`` that is
nothing but the name of a special token is looked up, since that is how evaluation programs ask for
its id.
"""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from deltamoe.server.answers import answered
from deltamoe.server.protocol import DetokenizeRequest, TokenizeRequest
from deltamoe.server.service import Service, service_of

__all__ = ["router"]

router = APIRouter()


@router.post("/tokenize", response_model=None)
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """The ids of a text or of a conversation, as the model reads them."""
    return await answered(_tokenized, service_of(request), body)


def _tokenized(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    special = service.tokenizer.special_ids
    if body.messages is not None:
        ids = service.conversation(body.messages)
    elif (prompt := body.prompt or "") in special:
        ids = (special[prompt],)
    else:
        ids = service.document(prompt, is_begun=not body.add_special_tokens)
    return {"tokens": ids, "count": len(ids), "max_model_len": service.context}


@router.post("/detokenize", response_model=None)
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of some ids."""
    return await answered(_detokenized, service_of(request), body)


def _detokenized(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    service.check_ids(body.tokens)
    return {"prompt": service.tokenizer.decode(body.tokens)}


@router.get("/tokenizer_info")
async def describe(request: Request) -> dict[str, Any]:
    """What the tokenizer is, and the form of the turns."""
    service = service_of(request)
    tokenizer, template = service.tokenizer, service.chat_template
    border = service.names.name(tokenizer.end_id)
    return {
        "tokenizer_class": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "fingerprint": tokenizer.fingerprint,
        "bos_token": border,
        "eos_token": border,
        "stop_tokens": sorted(service.names.name(token_id) for token_id in tokenizer.stop_ids),
        "special_tokens": dict(tokenizer.special_ids),
        "chat_template": None if template is None else template.jinja(),
    }
