"""Trace files: opened without a model, exported, broken, hostile."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.explorer.page.conftest import Server, record, show, start

HOSTILE = "<img src=x onerror=\"document.title='taken'\">"


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A trace file whose summary was changed."""
    content = source.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    summary = json.loads(header["__metadata__"]["summary"])
    change(summary)
    header["__metadata__"]["summary"] = json.dumps(summary)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    target.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    return target


@pytest.fixture
def file_server(trace_file: Path) -> Any:
    from deltamoe.explorer import read_trace
    from deltamoe.explorer.app import create_app

    made = Server(create_app(first=read_trace(trace_file)))
    yield made
    made.stop()


def test_a_file_without_a_model(page: Any, file_server: Server) -> None:
    start(page, file_server.address)
    assert page.locator(".token").count() == 29
    assert page.locator("textarea.prompt").count() == 0
    for view in ("sparse", "memory", "attention", "next", "ablate"):
        show(page, view)
        assert page.locator(".broken").count() == 0, view


def test_the_page_outlives_the_server(
    page: Any, file_server: Server, trace_file: Path, tmp_path: Path
) -> None:
    """Exported as HTML and opened from the disk, with nobody answering any more."""
    start(page, file_server.address)
    show(page, "export")
    with page.expect_download() as download:
        page.click("button:text-is('One HTML file')")
    exported = tmp_path / "trace.html"
    download.value.save_as(exported)
    file_server.stop()
    page.watched.requests.clear()
    page.goto(exported.as_uri())
    page.wait_for_selector("body[data-started]")
    assert page.locator(".token").count() == 29
    for view in ("sparse", "decay", "memory", "attention", "state", "next", "export"):
        show(page, view)
        assert page.locator(".broken").count() == 0, view
    assert not [url for url in page.watched.requests if url.startswith("http")]
    with page.expect_download() as download:
        page.click("button:text-is('Trace file')")
    assert Path(download.value.path()).read_bytes() == trace_file.read_bytes()


def test_a_file_opened_by_hand(page: Any, server: Server, trace_file: Path) -> None:
    start(page, server.address)
    page.set_input_files("input[type=file]", trace_file)
    page.wait_for_selector(".token >> nth=28")
    show(page, "memory")


PICTURED = [
    *("sparse", "experts", "load", "decay", "memory", "attention"),
    *("state", "next", "ablate", "chat", "runs"),
]


def drawn_share(page: Any, picture: bytes, kind: str) -> float:
    """How much of a picture is not its ground; the browser opens it as any reader would."""
    found: float = page.evaluate(
        """async (url) => {
            const image = new Image();
            image.src = url;
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const pen = canvas.getContext("2d");
            pen.drawImage(image, 0, 0);
            const {data} = pen.getImageData(0, 0, canvas.width, canvas.height);
            const points = new Uint32Array(data.buffer);
            return points.filter((point) => point !== points[0]).length / points.length;
        }""",
        f"data:{kind};base64,{base64.b64encode(picture).decode()}",
    )
    return found


def saved(page: Any, place: Any, kind: str) -> bytes:
    with page.expect_download() as download:
        place.get_by_text(kind, exact=True).click()
    return Path(download.value.path()).read_bytes()


def check_pictures(page: Any, place: Any, *words: str) -> None:
    """Both kinds open, are not blank, and the SVG's words are words."""
    svg = saved(page, place, "SVG")
    text = " ".join(" ".join(ElementTree.fromstring(svg).itertext()).split())  # lines may break
    for word in words:
        assert word in text
    assert drawn_share(page, svg, "image/svg+xml") > 0.01
    png = saved(page, place, "PNG")
    assert png.startswith(b"\x89PNG")
    assert drawn_share(page, png, "image/png") > 0.01


def test_pictures_of_every_view(page: Any, server: Server) -> None:
    start(page, server.address)
    record(page, "Once upon")
    show(page, "chat")
    page.fill(".chat-field", "Upon a midnight")
    page.press(".chat-field", "Enter")
    page.wait_for_selector(".turn-fate", timeout=60_000)
    words = {"chat": "Upon a midnight", "runs": "Gradient norm", "next": "After token 0"}
    show(page, "export")
    place = page.locator(".figure:has-text('A picture of a view')")
    offered = place.locator("option").evaluate_all("all => all.map((one) => one.value)")
    assert offered == PICTURED
    for view in PICTURED:
        place.locator("select").select_option(view)
        title = page.locator(f".tab[data-view={view}]").inner_text()
        check_pictures(page, place, title, words.get(view, title))
    show(page, "chat")
    assert "Upon a midnight" in page.inner_text(".chat-log")  # it came back from its picture


def test_pictures_of_the_opened_block(page: Any, server: Server) -> None:
    start(page, server.address)
    record(page, "Once upon")
    show(page, "export")
    place = page.locator(".figure:has-text('A picture of the opened block')")
    check_pictures(page, place, "the channel's output")


def test_pictures_without_a_trace(page: Any, server: Server) -> None:
    start(page, server.address, view="export")
    page.wait_for_selector(".panel-body[data-view=export][data-ready]")
    assert page.locator("#panel option").all_inner_texts() == ["Chat", "Runs"]
    assert page.locator("#panel .figure").count() == 1
    page.locator("#panel select").select_option("runs")
    check_pictures(page, page.locator("#panel .figure"), "Gradient norm")


def test_what_a_file_says_is_text(
    page: Any, server: Server, trace_file: Path, tmp_path: Path
) -> None:
    def poison(summary: dict[str, Any]) -> None:
        for token in summary["tokens"]:
            token["text"] = HOSTILE
        summary["texts"] = dict.fromkeys(summary["texts"], HOSTILE)
        summary["source"] = {"name": HOSTILE, "label": HOSTILE}
        summary["finish_reason"] = HOSTILE
        for entry in summary["arrays"]:
            entry["meaning"] = entry["unit"] = HOSTILE

    start(page, server.address)
    hostile = rewritten(trace_file, tmp_path / "hostile.safetensors", poison)
    page.set_input_files("input[type=file]", hostile)
    page.wait_for_selector(".token >> nth=4")
    for view in ("sparse", "experts", "load", "decay", "memory", "attention", "next"):
        show(page, view)
    page.hover(".token >> nth=4")
    assert "<img" in page.locator(".tooltip").inner_text()
    assert page.locator("img").count() == 0
    assert page.title() == "deltamoe explorer"


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda content: b"", "0 bytes"),
        (lambda content: b"\xff" * 64, "longer than the file"),
        (lambda content: content[: len(content) // 2], "cut short"),
        (lambda content: content[:8] + b"{" * 40 + content[48:], "not JSON"),
        (lambda content: struct.pack("<Q", 2) + b"{}", "do not describe"),
    ],
    ids=["empty", "huge count", "truncated", "no JSON", "no trace"],
)
def test_a_broken_file_is_named(
    page: Any,
    server: Server,
    trace_file: Path,
    tmp_path: Path,
    broken: Callable[[bytes], bytes],
    why: str,
) -> None:
    start(page, server.address)
    path = tmp_path / "broken.safetensors"
    path.write_bytes(broken(trace_file.read_bytes()))
    page.set_input_files("input[type=file]", path)
    page.wait_for_selector(f".broken:has-text('{why}')")


def test_lies_about_sizes_are_named(
    page: Any, server: Server, trace_file: Path, tmp_path: Path
) -> None:
    def lie(summary: dict[str, Any]) -> None:
        summary["arrays"][0]["shape"] = [1 << 40]

    start(page, server.address)
    page.set_input_files(
        "input[type=file]", rewritten(trace_file, tmp_path / "lie.safetensors", lie)
    )
    page.wait_for_selector(".broken:has-text('misdescribed')")


def _with(*where: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    """Sets one value deep in a summary."""

    def change(summary: dict[str, Any]) -> None:
        place: Any = summary
        for step in where[:-1]:
            place = place[step]
        place[where[-1]] = to

    return change


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (_with("model", "config", "moe", "num_experts", to=10**9), "model.moe.num_experts"),
        (_with("model", "config", "kda", "num_value_heads", to=10**9), "model.kda.num_value_heads"),
        (_with("model", "config", "mla", "num_heads", to=10**9), "model.mla.num_heads"),
        (_with("model", "config", "moe", "num_experts", to=6), "misdescribed"),
        (_with("tokens", 3, to=None), "token 3"),
        (_with("num_tokens", to=28), "28 tokens"),
        (_with("timings", to=None), "timings"),
        (_with("timings", to={}), "timings"),
        (_with("checks", to={}), "checks"),
        (lambda summary: summary["layers"].pop(), "3 layers of 4"),
        (_with("layers", 1, "mixer", to="rnn"), "layer 1"),
        (_with("arrays", 0, "dtype", to="f32"), "misdescribed"),
        (_with("arrays", 0, "shape", to=[-29]), "misdescribed"),
        (_with("arrays", 0, to=None), "lists an array"),
        (lambda summary: summary["arrays"].pop(0), "is missing"),
        (_with("model", "parameters", to=None), "cannot be shown"),
    ],
)
def test_a_lie_leaves_what_was_there(
    page: Any,
    server: Server,
    trace_file: Path,
    tmp_path: Path,
    lie: Callable[[dict[str, Any]], None],
    why: str,
) -> None:
    """The reason is said, and the recorded run that was open comes back."""
    start(page, server.address)
    record(page, "Once upon", write=2)
    hostile = rewritten(trace_file, tmp_path / "lie.safetensors", lie)
    page.set_input_files("input[type=file]", hostile)
    page.wait_for_selector(f".broken:has-text('{why}')")
    page.click("button:text-is('Back')")
    page.wait_for_selector(".token >> nth=11")
    assert page.locator(".broken").count() == 0


def test_a_newer_file_is_named(page: Any, server: Server, trace_file: Path, tmp_path: Path) -> None:
    def age(summary: dict[str, Any]) -> None:
        summary["format"] = 3

    start(page, server.address)
    page.set_input_files(
        "input[type=file]", rewritten(trace_file, tmp_path / "newer.safetensors", age)
    )
    page.wait_for_selector(".broken:has-text('newer deltamoe')")


def test_a_trace_that_is_gone_is_named(page: Any, server: Server) -> None:
    page.watched.expected = ["404"]
    start(page, server.address, trace="AAAAAAAAAAAAAAAAAAAAAA")
    page.wait_for_selector(".broken:has-text('record it again')")
    record(page, "Once upon")
