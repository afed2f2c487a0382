"""Which implementation of an operator runs, chosen from a table and refused out loud.

An operator with several implementations has one row a backend, the best first. ``auto`` takes the
first that can run on the tensors' device and says once, at INFO, why better ones were passed over.
A backend asked for by name is never replaced by another.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch

from deltamoe.errors import BackendUnavailableError
from deltamoe.ops import native

__all__ = ["Backend", "BackendRow", "select", "table"]

_log = logging.getLogger("deltamoe")


@dataclass(frozen=True)
class Backend:
    """One implementation: a module that defines the operator's functions.

    ``why_not(device_type, dtype)`` returns the reason it cannot run on such tensors, or None.
    """

    name: str
    module: str
    why_not: Callable[[str, torch.dtype], str | None]


@dataclass(frozen=True)
class BackendRow:
    """One line of ``deltamoe backends``: availability on this machine's best device."""

    operator: str
    name: str
    available: bool
    why_not: str | None
    is_default: bool


def _anywhere(device_type: str, dtype: torch.dtype) -> str | None:
    return None


def _needs_cuda(device_type: str, dtype: torch.dtype) -> str | None:
    if device_type != "cuda":
        return f"it runs on CUDA devices and the tensors are on {device_type!r}"
    if dtype == torch.float64:
        return "it does not compute in fp64"
    return None


def _needs_fla(device_type: str, dtype: torch.dtype) -> str | None:
    if reason := _needs_cuda(device_type, dtype):
        return reason
    for package in ("fla", "triton"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package!r} is not installed (pip install 'deltamoe[cuda]')"
    return None


def _needs_native(library: str) -> Callable[[str, torch.dtype], str | None]:
    def why_not(device_type: str, dtype: torch.dtype) -> str | None:
        if device_type != "cpu":
            return f"it runs on the CPU and the tensors are on {device_type!r}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it computes in fp32 and bf16, and the tensors are {dtype}"
        return native.why_not(library)

    return why_not


def _needs_amx(device_type: str, dtype: torch.dtype) -> str | None:
    if dtype != torch.bfloat16:
        return f"it multiplies in bf16, and {dtype} was asked for"
    if reason := _needs_native("muon")(device_type, dtype):
        return reason
    if not importlib.import_module("deltamoe.ops.muon.native").is_possible():
        return "this processor has no AMX tiles"
    return None


BACKENDS: dict[str, tuple[Backend, ...]] = {
    "kda": (
        Backend("fla", "deltamoe.ops.kda.fla", _needs_fla),
        Backend("native", "deltamoe.ops.kda.native", _needs_native("kda")),
        Backend("dyadic", "deltamoe.ops.kda.dyadic", _anywhere),
        Backend("reference", "deltamoe.ops.kda.reference", _anywhere),
    ),
    "attention": (
        Backend("native", "deltamoe.ops.attention.native", _needs_native("attention")),
        Backend("torch", "deltamoe.ops.attention.reference", _anywhere),
    ),
    "kda_decay": (
        Backend("native", "deltamoe.ops.kda.decay.native", _needs_native("decay")),
        Backend("torch", "deltamoe.ops.kda.decay.reference", _anywhere),
    ),
    "short_conv": (
        Backend("native", "deltamoe.ops.short_conv.native", _needs_native("conv")),
        Backend("torch", "deltamoe.ops.short_conv.reference", _anywhere),
    ),
    "norm": (
        Backend("native", "deltamoe.ops.norm.native", _needs_native("norm")),
        Backend("torch", "deltamoe.ops.norm.reference", _anywhere),
    ),
    "cross_entropy": (
        Backend("native", "deltamoe.ops.cross_entropy.native", _needs_native("loss")),
        Backend("torch", "deltamoe.ops.cross_entropy.reference", _anywhere),
    ),
    "muon": (
        Backend("native", "deltamoe.ops.muon.native", _needs_amx),
        Backend("torch", "deltamoe.ops.muon.reference", _anywhere),
    ),
    "experts": (
        Backend("grouped", "deltamoe.ops.experts.grouped", _needs_cuda),
        Backend("native", "deltamoe.ops.experts.native", _needs_native("experts")),
        Backend("segments", "deltamoe.ops.experts.segments", _anywhere),
        Backend("reference", "deltamoe.ops.experts.reference", _anywhere),
    ),
}


@cache
def select(operator: str, name: str, device_type: str, dtype: torch.dtype) -> ModuleType:
    """Return the module that implements ``operator`` for tensors on ``device_type``.

    Args:
        operator: "kda" or "experts".
        name: a backend's name, or "auto" for the best that can run.
        device_type: "cpu", "cuda", "mps", ...
        dtype: of the tensors to compute with.

    Raises:
        BackendUnavailableError: ``name`` is unknown, or was asked for and cannot run here.
    """
    rows = {backend.name: backend for backend in BACKENDS[operator]}
    if name == "auto":
        for backend in rows.values():
            reason = backend.why_not(device_type, dtype)
            if reason is None:
                return importlib.import_module(backend.module)
            _log.info("%s: backend %r passed over: %s", operator, backend.name, reason)
        raise BackendUnavailableError(f"no {operator} backend can run on {device_type!r}")
    if name not in rows:
        raise BackendUnavailableError(
            f"there is no {operator} backend {name!r}; known: {', '.join(rows)}, auto"
        )
    if reason := rows[name].why_not(device_type, dtype):
        raise BackendUnavailableError(
            f"the {operator} backend {name!r} was asked for, but {reason}"
        )
    return importlib.import_module(rows[name].module)


def table(device_type: str | None = None) -> list[BackendRow]:
    """List the backends: can each run on fp32 tensors of ``device_type`` (None: CUDA if any)?"""
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32
    rows = []
    for operator, backends in BACKENDS.items():
        default = next(b.name for b in backends if b.why_not(device_type, dtype) is None)
        for backend in backends:
            reason = backend.why_not(device_type, dtype)
            rows.append(
                BackendRow(operator, backend.name, reason is None, reason, backend.name == default)
            )
    return rows
