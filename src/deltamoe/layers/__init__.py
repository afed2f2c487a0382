"""The layers: parameters and a call into the operators.

Lives here: KDA, MLA, the router, experts, dense channels, the norms, and the state a mixer carries.
May import: ``deltamoe.config``, ``deltamoe.ops``, ``deltamoe.errors``.
Read first: ``kda.py`` and ``moe.py``.
"""

from deltamoe.layers.kda import Kda, KdaInputs, KdaState
from deltamoe.layers.mla import Mla, MlaInputs, MlaState
from deltamoe.layers.mlp import Mlp
from deltamoe.layers.moe import Experts, Moe
from deltamoe.layers.norm import RMSNorm, StreamNorm
from deltamoe.layers.router import Router, Routing

__all__ = [
    "Experts",
    "Kda",
    "KdaInputs",
    "KdaState",
    "Mla",
    "MlaInputs",
    "MlaState",
    "Mlp",
    "Moe",
    "RMSNorm",
    "Router",
    "Routing",
    "StreamNorm",
]
