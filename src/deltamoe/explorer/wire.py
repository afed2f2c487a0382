"""One array on its way to the page: a JSON header, then its numbers.

u32 little-endian    length of the header, such that the numbers begin at a multiple of 8
JSON                 name, dtype, shape, axes, unit, range, scale, zero, …
bytes                little-endian, last axis fastest; value = zero + scale * stored
"""

import json
from typing import Any, Literal

import numpy as np

from deltamoe.errors import DataError
from deltamoe.explorer.derive import DERIVED, attention, check_finite
from deltamoe.explorer.format import Array, Trace
from deltamoe.explorer.quantities import QUANTITIES, layers_of

__all__ = ["answer", "decode", "encode"]

_STORED = {"f32": "<f4", "f16": "<f2", "u8": "u1", "i32": "<i4", "u16": "<u2"}
_HEADS = ("head", "value_head", "mla_head")
_LARGEST_F16 = 65_504.0


def answer(
    trace: Trace,
    name: str,
    *,
    layer: int | None = None,
    head: int | None = None,
    token: int | None = None,
    dtype: str = "f32",
) -> bytes:
    """The bytes for ``GET /api/trace/{id}/{array}``.

    Args:
        trace: where the numbers come from.
        name: an array of the trace, or one that follows from it.
        layer, head, token: take this one; None takes all there are.
        dtype: "f32", "f16" or "u8".

    Raises:
        DataError: no such array, layer, head, token or dtype; the message says what there is.
    """
    if dtype not in ("f32", "f16", "u8"):
        raise DataError(f"dtype = {dtype[:20]!r}: expected f32, f16 or u8")
    if token is not None:
        if not -trace.num_tokens <= token < trace.num_tokens:
            raise DataError(
                f"token = {token}: this trace has {trace.num_tokens} tokens, counted from 0"
            )
        token %= trace.num_tokens
    layers = None
    if name in DERIVED or name == "attention":
        with np.errstate(
            all="ignore"
        ):  # of a hostile file's numbers; what comes of them is refused
            array, axes, unit, bounds = _derived(trace, name, layer, head, token)
        check_finite(array, name)
    else:
        array = trace.array(name, layer)
        quantity = QUANTITIES[name]
        axes, unit, bounds = quantity.axes, quantity.unit, [quantity.least, quantity.most]
        if layer is None and quantity.over is not None:
            axes, found = ("layer", *axes), trace.layers(name)
            layers = None if found is None else list(found)
        array, axes = _pick(name, array, axes, ("token",), token)
        array, axes = _pick(name, array, axes, _HEADS, head)
    fields = {
        "name": name,
        "axes": list(axes),
        "layers": layers,
        "layer": layer,
        "head": head,
        "token": token,
        "unit": unit,
        "range": bounds,
    }
    return encode(array, dtype if array.dtype == np.float32 else None, fields)


def encode(array: Array, dtype: str | None, fields: dict[str, Any]) -> bytes:
    """Header and numbers.

    Args:
        array: fp32, int32 or uint16.
        dtype: what to round fp32 to; None keeps whole numbers as they are.
        fields: what else the header says.
    """
    stored_as = dtype or {"i": "i32", "u": "u16"}[array.dtype.kind]
    least, greatest = (float(array.min()), float(array.max())) if array.size else (None, None)
    scale, zero = 1.0, 0.0
    stored = array
    if stored_as == "u8" and least is not None and greatest is not None:
        scale, zero = (greatest - least) / 255 or 1.0, least
        stored = np.rint((array.astype(np.float64) - zero) / scale)
    elif stored_as == "f16":
        stored = array.clip(-_LARGEST_F16, _LARGEST_F16)
    header = {
        **fields,
        "dtype": stored_as,
        "shape": list(array.shape),
        "least": least,
        "greatest": greatest,
        "scale": scale,
        "zero": zero,
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(4 + len(text)) % 8)
    numbers = np.ascontiguousarray(stored.astype(_STORED[stored_as]))
    return len(text).to_bytes(4, "little") + text + numbers.tobytes()


def decode(content: bytes) -> tuple[dict[str, Any], Array]:
    """The header and the values of what ``encode`` made."""
    length = int.from_bytes(content[:4], "little")
    header: dict[str, Any] = json.loads(content[4 : 4 + length])
    stored = np.frombuffer(content[4 + length :], _STORED[header["dtype"]])
    stored = stored.reshape(header["shape"])
    if header["dtype"] in ("i32", "u16"):
        return header, stored
    return header, header["zero"] + header["scale"] * stored.astype(np.float32)


def _derived(
    trace: Trace, name: str, layer: int | None, head: int | None, token: int | None
) -> tuple[Array, tuple[str, ...], str, list[float | None]]:
    if layer is None:
        raise DataError(f"{name}: name a layer")
    _check_layer(trace, name, layer)
    if name == "attention":
        axes = tuple(
            axis
            for axis, given in (("mla_head", head), ("token", token), ("source", None))
            if given is None
        )
        return attention(trace, layer, head=head, token=token), axes, "probability", [0.0, 1.0]
    if token is None:
        raise DataError(f"{name}: name a token")
    derive, axes, unit = DERIVED[name]
    array = derive(trace, layer, token, head).astype(np.float32)
    if head is not None:
        array, axes = _pick(name, array, axes, ("value_head",), 0)
    bounds: list[float | None] = [0.0, 1.0] if name == "retention" else [None, None]
    return array, axes, unit, bounds


def _check_layer(trace: Trace, name: str, layer: int) -> None:
    mixer: Literal["mla", "kda"] = "mla" if name == "attention" else "kda"
    if layer not in (layers := layers_of(trace.config, mixer)):
        raise DataError(
            f"{name}: layer {layer} is no {mixer.upper()} layer; those are "
            + (", ".join(map(str, layers)) or "none")
        )


def _pick(
    name: str, array: Array, axes: tuple[str, ...], kinds: tuple[str, ...], index: int | None
) -> tuple[Array, tuple[str, ...]]:
    """Take one place of the axis that is of these kinds."""
    if index is None:
        return array, axes
    at = next((at for at, axis in enumerate(axes) if axis in kinds), None)
    if at is None:
        raise DataError(f"{name} has no {kinds[-1]} axis; its axes are {', '.join(axes)}")
    if not 0 <= index < array.shape[at]:
        raise DataError(f"{axes[at]} = {index}: {name} has {array.shape[at]}, counted from 0")
    return array.take(index, axis=at), (*axes[:at], *axes[at + 1 :])
