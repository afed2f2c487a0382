"""Long texts on a model of the demo's size: 512 tokens are there within 3 s, 2,048 scroll."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deltamoe.config.presets import preset
from deltamoe.explorer import Capture, trace
from deltamoe.explorer.app import create_app
from deltamoe.explorer.live import Live
from deltamoe.inference import OpenedModel
from deltamoe.inference.opened import open_model
from deltamoe.model import HybridLM
from tests.explorer.page.conftest import Server, show, start, write_run_folder

MOST_SECONDS = 3.0  # from the model's answer to a page that can be used
MOST_FRAME_MS = 200
VIEWS = ("decay", "memory", "attention", "next")
TEXT = "The king of the hill was no king at all. " * 60


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    """The demo's model before its training, which costs as much to look at as after it."""
    model = HybridLM(preset("nano").model)
    model.initialize(0)
    return open_model(write_run_folder(tmp_path_factory.mktemp("nano"), model))


@pytest.fixture(scope="module")
def nano_server(nano: OpenedModel) -> Iterator[Server]:
    made = Server(create_app(model=Live(nano, name="nano")))
    yield made
    made.stop()


@pytest.mark.parametrize("view", ["experts", *VIEWS])
def test_512_tokens_are_soon_there(
    page: Any,
    nano_server: Server,
    view: str,
    record_testsuite_property: Callable[[str, object], None],
) -> None:
    """The answer is there; then the tokens, the block and the view, and a key is obeyed."""
    start(page, nano_server.address, view=view)
    page.fill("input[name='tokens to write']", "20")
    page.fill("textarea.prompt", TEXT[:491])
    page.press("textarea.prompt", "Enter")
    page.wait_for_selector(".token", timeout=120_000)
    page.wait_for_selector(f".panel-body[data-view={view}][data-ready]")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".token.is-pinned[data-index='1'][style*=background]")
    page.wait_for_selector(".block-place[data-token='1'] .strip")
    took = page.evaluate(
        "(performance.now() - performance.getEntriesByName('answered').at(-1).startTime) / 1000"
    )
    record_testsuite_property(f"seconds until 512 tokens can be used, {view}", took)
    assert page.inner_text(".meter:nth-last-child(2) .meter-value") == "512 of 512"
    assert took < MOST_SECONDS


@pytest.fixture(scope="module")
def long_server(nano: OpenedModel) -> Iterator[Server]:
    capture = Capture(most_tokens=2048, has_lens=False)
    found = trace(nano.model, nano.tokenizer, TEXT[:2047], capture=capture)
    made = Server(create_app(first=found))
    yield made
    made.stop()


def frames(page: Any) -> list[float]:
    """Milliseconds of every frame while tokens and map are scrolled from end to end."""
    found: list[float] = page.evaluate(
        """async () => {
            const strip = document.querySelector(".token-scroller");
            const map = document.querySelector("#panel .heatmap-scroller");
            const frame = () => new Promise(requestAnimationFrame);
            const times = [await frame()];
            for (let i = 1; i <= 60; i++) {
                strip.scrollLeft = (i / 60) * strip.scrollWidth;
                map.scrollLeft = (i / 60) * map.scrollWidth;
                times.push(await frame());
            }
            return times.slice(1).map((time, i) => time - times[i]);
        }"""
    )
    return found


def test_2048_tokens_scroll(
    page: Any, long_server: Server, record_testsuite_property: Callable[[str, object], None]
) -> None:
    start(page, long_server.address, view="experts")
    page.wait_for_selector(".panel-body[data-view=experts][data-ready]")
    assert page.locator(".token").count() < 400  # only those in sight are in the document
    # others work on this machine too: the best of three counts, which a freeze spoils all the same
    best = min((frames(page) for _ in range(3)), key=max)
    for name, frame in (("median", sorted(best)[len(best) // 2]), ("slowest", max(best))):
        record_testsuite_property(f"{name} frame of 2,048 tokens, ms", frame)
    assert max(best) < MOST_FRAME_MS
    assert page.locator(".token[data-index='2047']").count() == 1
    page.keyboard.press("End")
    page.wait_for_selector(".token.is-pinned[data-index='2047']")
    page.keyboard.press("Home")
    page.wait_for_selector(".token.is-pinned[data-index='0']")
    for view in ("memory", "attention", "decay"):
        show(page, view)
        assert page.locator(".broken").count() == 0, view


def test_the_cap_is_on_the_page(page: Any, long_server: Server) -> None:
    start(page, long_server.address, view="attention")
    page.wait_for_selector(".panel-body[data-view=attention][data-ready]")
    assert "the whole map is drawn up to" in page.locator("#panel").inner_text()
