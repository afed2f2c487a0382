"""The app: endpoints around an engine, and the guard around them.

No documentation page is served, since FastAPI's would load scripts from elsewhere; the interface's
description is at ``/openapi.json``.
"""

from collections.abc import Mapping

from fastapi import FastAPI

from deltamoe.engine import Engine
from deltamoe.inference import TextState
from deltamoe.server import chat, completions, embeddings, health, models, tokens
from deltamoe.server import states as kept_states
from deltamoe.server.errors import add_error_handlers
from deltamoe.server.guard import Guard
from deltamoe.server.metrics import Metrics
from deltamoe.server.service import Service
from deltamoe.server.settings import Settings
from deltamoe.server.shelf import StateShelf
from deltamoe.tokenizer import ChatTemplate, Tokenizer
from deltamoe.version import __version__

__all__ = ["create_app"]


def create_app(
    engine: Engine,
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    chat_template: ChatTemplate | None = None,
    offered: Mapping[str, TextState] | None = None,
) -> FastAPI:
    """An app that answers with one engine.

    Args:
        engine: running; the app does not close it.
        tokenizer: of the engine's model.
        settings: whom it answers and how much it gives.
        chat_template: the form of the model's turns; None for a base model.
        offered: texts that everybody may go on from, by name.

    Raises:
        ConfigError: a name that no request could give.
    """
    states = StateShelf(
        max_states=settings.max_states, max_bytes=settings.max_state_bytes, offered=offered or {}
    )
    service = Service(
        engine=engine,
        tokenizer=tokenizer,
        chat_template=chat_template,
        settings=settings,
        metrics=Metrics(engine.stats, lambda: states.nbytes),
        states=states,
    )
    app = FastAPI(title="deltamoe", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    for endpoint in (completions, chat, embeddings, kept_states, models, tokens, health):
        app.include_router(endpoint.router)
    add_error_handlers(app)
    app.add_middleware(Guard, service=service)
    return app
