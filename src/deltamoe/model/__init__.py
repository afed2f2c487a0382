"""The model: blocks stacked by a schedule, and the state they carry.

Lives here: ``HybridLM``, its block, its state, its initial weights; ``Decoder``, which reads single
tokens on a CPU.
May import: ``deltamoe.layers`` and what stands left of it. Knows nothing of text or training.
Read first: ``model.py``.
"""

from deltamoe.layers import KdaState, MlaState, Routing
from deltamoe.model.decoder import Decoder, token_reader
from deltamoe.model.model import Hidden, HybridLM
from deltamoe.model.state import ModelState, PooledState

__all__ = [
    "Decoder",
    "Hidden",
    "HybridLM",
    "KdaState",
    "MlaState",
    "ModelState",
    "PooledState",
    "Routing",
    "token_reader",
]
