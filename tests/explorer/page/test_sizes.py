"""Long texts: 512 tokens are there within 3 s, 2,048 scroll."""

from typing import Any

import pytest

from deltamoe.explorer.app import create_app
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer
from tests.explorer.page.conftest import Server, record, show, start

MOST_SECONDS = 3.0  # from the model's answer to a page that can be used; issue's number


def test_512_tokens_are_soon_there(page: Any, server: Server) -> None:
    start(page, server.address, view="experts")
    record(page, "Once upon a time there were " * 17, write=20)
    ready = float(page.evaluate("document.body.dataset.readyMs")) / 1000
    assert ready < MOST_SECONDS
    for view in ("decay", "memory", "attention", "next"):
        begin = page.evaluate("performance.now()")
        show(page, view)
        assert page.evaluate("performance.now()") - begin < 1000 * MOST_SECONDS, view


@pytest.fixture(scope="module")
def long_server() -> Any:
    from deltamoe.explorer import Capture, trace

    text = "The king of the hill was no king at all. " * 60
    capture = Capture(most_tokens=2048, has_lens=False)
    found = trace(tiny_model(num_layers=2), ByteTokenizer(), text[:2047], capture=capture)
    made = Server(create_app(first=found))
    yield made
    made.stop()


def test_2048_tokens_scroll(page: Any, long_server: Server) -> None:
    start(page, long_server.address, view="experts")
    page.wait_for_selector(".panel-body[data-view=experts][data-ready]")
    assert page.locator(".token").count() < 400  # only those in sight are in the document
    slowest = page.evaluate(
        """async () => {
            const strip = document.querySelector(".token-scroller");
            const map = document.querySelector("#panel .heatmap-scroller");
            const frame = () => new Promise(requestAnimationFrame);
            let slowest = 0;
            for (let i = 1; i <= 20; i++) {
                const begin = performance.now();
                strip.scrollLeft = (i / 20) * strip.scrollWidth;
                map.scrollLeft = (i / 20) * map.scrollWidth;
                await frame(); await frame();
                slowest = Math.max(slowest, performance.now() - begin);
            }
            return slowest;
        }"""
    )
    assert slowest < 500  # two frames, software rendering, a busy machine; a freeze is seconds
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
