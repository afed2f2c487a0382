"""A trace file: there and back, and every hostile one refused in a sentence."""

import contextlib
import copy
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from deltamoe.checkpoint.header import Header, TensorSpec, encode_header, read_header
from deltamoe.errors import BadFileError, DataError
from deltamoe.explorer import Trace, format, read_trace, trace
from deltamoe.explorer.format import to_bytes
from deltamoe.explorer.quantities import QUANTITIES
from deltamoe.explorer.views import VIEWS, show
from deltamoe.explorer.wire import answer, decode
from deltamoe.model import HybridLM
from deltamoe.tokenizer import ByteTokenizer
from tests.docs.pages import ROOT, rows


def write(path: Path, summary: Any, arrays: dict[str, np.ndarray], kind: str = "deltamoe.trace"):
    """A file of these parts, whether they fit together or not."""
    codes = {"<f4": "F32", "<i4": "I32", "<u2": "U16", "<f8": "F64"}
    specs = [TensorSpec(name, codes[a.dtype.str], a.shape) for name, a in arrays.items()]
    text = summary if isinstance(summary, str) else json.dumps(summary)
    header = encode_header(specs, {"kind": kind, "summary": text})
    path.write_bytes(header + b"".join(array.tobytes() for array in arrays.values()))
    return path


@pytest.fixture
def parts(recorded: Trace) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    return json.loads(json.dumps(recorded.summary)), dict(recorded.arrays)


def test_there_and_back(recorded: Trace, tmp_path: Path) -> None:
    recorded.save(tmp_path / "a.safetensors")
    again = Trace.load(tmp_path / "a.safetensors")
    assert again.summary == json.loads(json.dumps(recorded.summary))
    assert list(again.arrays) == list(recorded.arrays)
    for name, array in recorded.arrays.items():
        assert again.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(again.arrays[name], array)
    assert to_bytes(again) == (tmp_path / "a.safetensors").read_bytes()


def test_other_programs_can_read_it(recorded: Trace, tmp_path: Path) -> None:
    recorded.save(tmp_path / "a.safetensors")
    found = load_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(found["kda.beta"], recorded.arrays["kda.beta"])


def test_every_array_is_described(recorded: Trace) -> None:
    for entry in recorded.summary["arrays"]:
        array = recorded.arrays[entry["name"]]
        assert entry["shape"] == list(array.shape)
        assert len(entry["axes"]) == array.ndim
        assert entry["least"] <= entry["greatest"]
        assert entry["meaning"]
        low, high = entry["range"]
        assert low is None or entry["least"] >= low - 1e-5  # fp32 rounding of a norm of 1
        assert high is None or entry["greatest"] <= high + 1e-5


def test_an_array_that_is_not_there_is_said(recorded: Trace) -> None:
    with pytest.raises(DataError, match="it was for 0, 1, 2"):
        recorded.array("kda.beta", 3)
    with pytest.raises(DataError, match=r"no array 'kda\.bet'"):
        recorded.array("kda.bet")
    with pytest.raises(DataError, match="no layers"):
        recorded.array("next.entropy", 0)


def test_the_documentation_lists_every_array() -> None:
    def bound(value: float | None, sign: str) -> str:
        return f"{sign}∞" if value is None else f"{value:g}"

    written = [
        [
            f"`{q.name}`" + ("" if q.keep == "always" else f" ({q.keep})"),
            q.over or "",
            ", ".join(q.axes),
            q.dtype,
            q.unit,
            f"{bound(q.least, '−')} to {bound(q.most, '')}",
            q.meaning,
        ]
        for q in QUANTITIES.values()
    ]
    assert rows(ROOT / "docs" / "explorer.md", "trace arrays") == written


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(summary: dict[str, Any]) -> None:
        place: Any = summary
        for key in keys:
            place = place[key]
        place[last] = value

    return change


HOSTILE_SUMMARIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer": (_set("format", 2), "newer deltamoe"),
    "no format": (lambda s: s.pop("format"), "format"),
    "no tokens": (lambda s: s.pop("tokens"), "'tokens' is missing"),
    "tokens of a wrong kind": (_set("tokens", {}), "'tokens'"),
    "a huge count": (_set("num_tokens", 10**15), "tokens"),
    "a negative count": (_set("num_tokens", -1), "tokens"),
    "more prompt than text": (_set("num_prompt_tokens", 2000), "tokens"),
    "another count": (_set("num_tokens", 3), "tokens"),
    "a token without text": (_set("tokens", 0, {"id": 1}), "without an id and a text"),
    "a token of another id": (_set("tokens", 1, "id", 3), "disagree"),
    "a text of numbers": (_set("texts", {"1": 7}), "no text"),
    "a huge text": (_set("texts", {"1": "x" * 2000}), "1,024"),
    "a huge model": (_set("model", "config", "dim", 10**12), "model.dim"),
    "another model": (_set("model", "config", "kda", "key_dim", 9), "shape"),
    "no model": (_set("model", {}), "model = none"),
    "another layer": (_set("arrays", 4, "layers", [7]), "layers"),
    "layers twice": (_set("arrays", 6, "layers", [0, 0, 1, 2]), "layers"),
    "layers of text": (_set("arrays", 6, "layers", ["<script>"]), "layers"),
    "an unknown array": (_set("arrays", 0, "name", "evil"), "evil"),
    "an array twice": (_set("arrays", 1, "name", "tokens.ids"), "tensors"),
    "another dtype": (_set("arrays", 0, "dtype", "f32"), "I32"),
    "another shape": (_set("arrays", 0, "shape", [1]), "shape"),
    "layers that are not told of": (_set("layers", []), "describes 0 layers"),
    "no meters": (_set("model", "state_bytes", None), "model.state_bytes"),
    "an entry that is none": (_set("arrays", 0, 5), "entry"),
}


@pytest.mark.parametrize("name", HOSTILE_SUMMARIES)
def test_a_summary_that_lies(
    name: str, parts: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    summary, arrays = parts
    change, sentence = HOSTILE_SUMMARIES[name]
    change(summary)
    path = write(tmp_path / "a.safetensors", summary, arrays)
    with pytest.raises(DataError, match=sentence) as fault:
        read_trace(path)
    assert str(path) in str(fault.value)


def _without(name: str) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.__delitem__(name)


def _with(name: str, value: Any) -> Callable[[dict[str, np.ndarray]], None]:
    return lambda arrays: arrays.update({name: value(arrays[name])})


def _first(value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[0] = value
        return array

    return change


HOSTILE_ARRAYS: dict[str, tuple[Callable[[dict[str, np.ndarray]], None], str]] = {
    "one is missing": (_without("kda.beta"), "kda.beta"),
    "one too many": (lambda a: a.update(more=np.zeros(3, "<f4")), "more"),
    "a token less": (_with("next.entropy", lambda a: a[1:]), "shape"),
    "wider numbers": (_with("kda.beta", lambda a: a.astype("<f8")), "F64"),
    "NaN": (_with("kda.beta", _first(np.nan)), "finite"),
    "infinity": (_with("kda.value", _first(np.inf)), "finite"),
    "a probability of 2": (_with("next.probabilities", _first(2.0)), "expected finite"),
    "an id beyond the vocabulary": (_with("next.ids", _first(257)), "256"),
    "an expert that is not there": (_with("router.expert_ids", _first(5)), "4"),
    "a negative count": (_with("experts.counts", _first(-1)), "experts.counts"),
    "a memory that grows": (_with("kda.log_decay", _first(1.0)), "kda.log_decay"),
}


@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_arrays_that_lie(
    name: str, parts: tuple[dict[str, Any], dict[str, np.ndarray]], tmp_path: Path
) -> None:
    summary, arrays = parts
    change, sentence = HOSTILE_ARRAYS[name]
    change(arrays)
    with pytest.raises(DataError, match=sentence):
        read_trace(write(tmp_path / "a.safetensors", summary, arrays))


def test_other_files(recorded: Trace, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(BadFileError):
        read_trace(path)
    for content in (b"", b"hello", b"\xff" * 100, (1 << 60).to_bytes(8, "little")):
        path.write_bytes(content)
        with pytest.raises(BadFileError):
            read_trace(path)
    with pytest.raises(DataError, match="expected a trace"):
        read_trace(write(path, {}, {"a": np.zeros(3, "<f4")}, kind="deltamoe.state"))
    for text in ("", "[]", "{", "[" * 100_000, '{"format": 1, "format": 1}', '{"format": NaN}'):
        with pytest.raises(DataError):
            read_trace(write(path, text, {}))


def test_truncated_anywhere(recorded: Trace, tmp_path: Path) -> None:
    content = to_bytes(recorded)
    path = tmp_path / "a.safetensors"
    for length in np.linspace(0, len(content) - 1, 40).astype(int):
        path.write_bytes(content[:length])
        with pytest.raises(BadFileError):
            read_trace(path)


def test_script_is_text(recorded: Trace, tmp_path: Path) -> None:
    """Markup in a prompt is kept letter by letter, as data."""
    summary = json.loads(json.dumps(recorded.summary))
    script = "<script>alert(1)</script>\u2028'\"\\"
    summary["prompt"] = script
    path = write(tmp_path / "a.safetensors", summary, dict(recorded.arrays))
    assert read_trace(path).summary["prompt"] == script


def test_an_array_of_a_newer_program_is_passed_over(recorded: Trace, tmp_path: Path) -> None:
    """Of the same format: what is added later takes nothing away from what is known."""
    summary = json.loads(json.dumps(recorded.summary))
    summary["arrays"].append({**summary["arrays"][0], "name": "kda.novelty", "axes": ["what"]})
    arrays = {**recorded.arrays, "kda.novelty": recorded.arrays["tokens.ids"]}
    again = read_trace(write(tmp_path / "a.safetensors", summary, arrays))
    assert again.summary == json.loads(json.dumps(recorded.summary))
    assert set(again.arrays) == set(recorded.arrays)


def test_arrays_may_be_missing(recorded: Trace, tmp_path: Path) -> None:
    """A file of before the boxes had tensors is a trace as ever."""
    inner = {name for name, quantity in QUANTITIES.items() if quantity.keep == "inner"}
    summary = json.loads(json.dumps(recorded.summary))
    summary["arrays"] = [entry for entry in summary["arrays"] if entry["name"] not in inner]
    arrays = {name: array for name, array in recorded.arrays.items() if name not in inner}
    again = read_trace(write(tmp_path / "a.safetensors", summary, arrays))
    assert show(again, "memory") == show(recorded, "memory")


def test_a_file_that_is_replaced_while_it_is_read(
    recorded: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recording puts its file in the old one's place: never this header and those arrays."""
    path = tmp_path / "a.safetensors"
    recorded.save(path)

    def read_late(asked: Path) -> Header:
        recorded.save(path)
        return read_header(asked)

    monkeypatch.setattr(format, "read_header", read_late)
    with pytest.raises(DataError, match="another file took its place"):
        read_trace(path)


@pytest.fixture(scope="module")
def small(model: HybridLM) -> Trace:
    """Three tokens, so that hundreds of files are read in seconds."""
    return trace(model, ByteTokenizer(), "ab")


FUZZ = settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.data())
def test_any_damage_is_our_error_or_harmless(
    small: Trace, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(to_bytes(small))
    length = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, length - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(BadFileError):
        look_everywhere(read_trace(path))


ODD: list[Any] = [
    *(None, True, -1, 0, 2, 10**9, 2**63, -(2**70), 1e308, 0.5),
    *("", "<script>alert(1)</script>", "kda.key", "\x00", "9" * 50, [], {}, [[]], [1] * 50),
    {"format": 1},
]


@FUZZ
@given(data=st.data())
def test_a_summary_of_odd_values_is_our_error_or_harmless(
    small: Trace, tmp_path: Path, data: st.DataObject
) -> None:
    """One to three values of the summary, however deep, are replaced or taken away."""
    summary = json.loads(json.dumps(small.summary))
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = summary
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            is_deeper = isinstance(place[key], dict | list) and data.draw(st.integers(0, 3))
            if not is_deeper:
                place[key] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
                break
            place = place[key]
    path = write(tmp_path / "a.safetensors", summary, dict(small.arrays))
    with contextlib.suppress(BadFileError):
        look_everywhere(read_trace(path))


@FUZZ
@given(data=st.data())
def test_arrays_of_odd_numbers_are_our_error_or_harmless(
    small: Trace, tmp_path: Path, data: st.DataObject
) -> None:
    """Numbers at the edge of what is allowed lead to numbers, or to a sentence."""
    arrays = dict(small.arrays)
    names = [name for name, array in arrays.items() if array.dtype == np.float32]
    for _ in range(data.draw(st.integers(1, 6))):
        name = data.draw(st.sampled_from(names))
        quantity = QUANTITIES[name]
        edges = [0.0, -0.0, 1e-38, 3e38, -3e38, quantity.least or 0.0, quantity.most or 1.0]
        array = arrays[name].copy()
        array.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(st.sampled_from(edges))
        arrays[name] = array
    summary = json.loads(json.dumps(small.summary))
    path = write(tmp_path / "a.safetensors", summary, arrays)
    with contextlib.suppress(BadFileError):
        look_everywhere(read_trace(path))


def look_everywhere(found: Trace) -> None:
    """Every view and every array that follows gives numbers for JSON, or our error."""
    for name in VIEWS:
        with contextlib.suppress(BadFileError):
            json.dumps(show(found, name, token=-1), allow_nan=False)
    for name in ("memory", "recall", "attention"):
        with contextlib.suppress(BadFileError):
            header, _ = decode(answer(found, name, layer=1, token=1, dtype="u8"))
            json.dumps(header, allow_nan=False)


def test_a_lie_costs_no_memory(small: Trace, tmp_path: Path) -> None:
    """However large the counts a file claims, reading it takes a few times its own length."""
    path = tmp_path / "a.safetensors"
    lies: list[Callable[[dict[str, Any]], None]] = [
        _set("num_tokens", 2_000_000_000),
        _set("model", "config", "num_layers", 1000),
        _set("model", "config", "moe", "num_experts", 60_000),
        _set("model", "config", "vocab_size", 1 << 24),
        _set("model", "config", "kda", "num_heads", 60_000),
        _set("arrays", 0, "shape", [1 << 40]),
        _set("arrays", 6, "layers", list(range(10_000))),
        _set("tokens", [{"id": 1, "text": ""}] * 5_000),
    ]
    for lie in lies:
        summary = json.loads(json.dumps(small.summary))
        lie(summary)
        write(path, summary, dict(small.arrays))
        tracemalloc.start()
        with contextlib.suppress(BadFileError):
            read_trace(path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 8 * path.stat().st_size + (8 << 20), most
