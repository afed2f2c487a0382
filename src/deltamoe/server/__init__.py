"""The engine over HTTP, in the words of OpenAI's interface.

Lives here: the requests and answers (``protocol``), one module an endpoint, what stands between the
network and them (``guard``), and the life of the process that serves (``lifecycle``).
May import: errors, config, plan, model, checkpoint, tokenizer, inference, engine. FastAPI, uvicorn
and prometheus_client come with ``pip install 'deltamoe[serve]'``.
Read first: ``app.py``, then ``completions.py``.
"""

from deltamoe.server.app import create_app
from deltamoe.server.lifecycle import serve
from deltamoe.server.settings import Settings, is_loopback

__all__ = ["Settings", "create_app", "is_loopback", "serve"]
