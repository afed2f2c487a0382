"""Arrays on their way to the page."""

import json
from typing import Any

import numpy as np
import pytest

from deltamoe.errors import DataError
from deltamoe.explorer import Trace, derive, wire

_STORED = {"f32": "<f4", "f16": "<f2", "u8": "u1", "i32": "<i4", "u16": "<u2"}


def decode(content: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """As the page does it."""
    length = int.from_bytes(content[:4], "little")
    assert (4 + length) % 8 == 0
    header = json.loads(content[4 : 4 + length])
    stored = np.frombuffer(content[4 + length :], _STORED[header["dtype"]])
    return header, header["zero"] + header["scale"] * stored.reshape(header["shape"]).astype(float)


def test_an_array_as_it_is(recorded: Trace) -> None:
    header, values = decode(wire.answer(recorded, "kda.beta"))
    np.testing.assert_array_equal(values, recorded.arrays["kda.beta"])
    assert header["axes"] == ["layer", "token", "value_head"]
    assert header["layers"] == [0, 1, 2]
    assert (header["unit"], header["range"]) == ("fraction", [0, 2])


def test_whole_numbers_stay_whole(recorded: Trace) -> None:
    header, values = decode(wire.answer(recorded, "router.ranks", layer=1, dtype="u8"))
    assert header["dtype"] == "u16"
    np.testing.assert_array_equal(values, recorded.array("router.ranks", 1))


def test_one_layer_one_head_one_token(recorded: Trace) -> None:
    header, values = decode(wire.answer(recorded, "kda.log_decay", layer=1, head=3, token=-1))
    np.testing.assert_array_equal(values, recorded.array("kda.log_decay", 1)[-1, 3])
    assert header["axes"] == ["key_channel"]
    assert (header["layer"], header["head"], header["token"]) == (1, 3, recorded.num_tokens - 1)


@pytest.mark.parametrize("dtype", ["u8", "f16"])
def test_rounding_is_bounded_and_said(recorded: Trace, dtype: str) -> None:
    exact = recorded.array("kda.value", 2)
    header, values = decode(wire.answer(recorded, "kda.value", layer=2, dtype=dtype))
    assert header["dtype"] == dtype
    assert (header["least"], header["greatest"]) == (exact.min(), exact.max())
    bound = header["scale"] / 2 * 1.001 if dtype == "u8" else abs(exact).max() * 2**-11
    assert abs(values - exact).max() <= bound


def test_a_constant_has_a_scale() -> None:
    header, values = decode(wire.encode(np.full(5, 0.25, np.float32), "u8", {}))
    assert header["scale"] > 0
    np.testing.assert_array_equal(values, 0.25)
    header, values = decode(wire.encode(np.zeros((0, 3), np.float32), "f32", {}))
    assert header["least"] is None
    assert values.shape == (0, 3)


def test_what_follows(recorded: Trace) -> None:
    header, values = decode(wire.answer(recorded, "memory", layer=1, token=7, head=2))
    np.testing.assert_array_equal(values, derive.memory(recorded, 1, 7)[2])
    assert header["axes"] == ["key_channel", "value_channel"]
    header, values = decode(wire.answer(recorded, "attention", layer=3, token=9))
    np.testing.assert_array_equal(values, derive.attention(recorded, 3, token=9))
    assert header["axes"] == ["mla_head", "source"]
    header, values = decode(wire.answer(recorded, "recall", layer=0, token=4))
    assert header["axes"] == ["later", "value_head"]
    assert values.shape[0] == recorded.num_tokens - 4


@pytest.mark.parametrize(
    ("name", "query", "sentence"),
    [
        ("kda.beta", {"layer": 3}, "not recorded for layer 3"),
        ("kda.beta", {"layer": 0, "head": 4}, "value_head = 4"),
        ("kda.beta", {"token": 1000}, "token = 1000"),
        ("kda.beta", {"dtype": "f64"}, "f32, f16 or u8"),
        ("next.entropy", {"head": 0}, "has no"),
        ("next.entropy", {"layer": 0}, "no layers"),
        ("../etc/passwd", {}, "no array"),
        ("memory", {"token": 1}, "name a layer"),
        ("memory", {"layer": 0}, "name a token"),
        ("memory", {"layer": 3, "token": 0}, "no KDA layer"),
        ("attention", {"layer": 0, "head": 0}, "no MLA layer"),
    ],
)
def test_what_is_not_there_is_said(
    recorded: Trace, name: str, query: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DataError, match=sentence):
        wire.answer(recorded, name, **query)
