"""The page and a live model: prompt, tokens, keys, views, branches, stops and reloads."""

import json
import re
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.explorer.page.conftest import Server, record, show, start, until

VIEWS = [
    *("sparse", "experts", "load", "decay", "memory", "attention"),
    *("state", "next", "ablate", "export"),
]
SCALED = {"experts", "load", "decay", "memory", "attention"}  # colours that stand for numbers


def get(server: Server, path: str) -> Any:
    with urllib.request.urlopen(server.address + path) as answer:
        return json.loads(answer.read())


def state(page: Any, key: str) -> str:
    found: str = page.evaluate(f"new URLSearchParams(location.hash.slice(1)).get('{key}')")
    return found


def branch(page: Any) -> tuple[str, str]:
    """Write another token 7 than the model did; the addresses of the trace before and after."""
    first = record(page, "Once upon")
    show(page, "next")
    page.click(".token[data-index='6']")
    page.wait_for_selector("h3:has-text('After token 6')")
    assert page.locator("button:has-text('before the branch')").count() == 0
    page.click("button.bar >> nth=3")
    page.wait_for_selector(".token.is-pinned[data-index='7']")
    return first, state(page, "trace")


def test_a_prompt_becomes_tokens(page: Any, server: Server) -> None:
    start(page, server.address)
    trace = record(page, "Once upon")
    summary = get(server, f"api/trace/{trace}")
    chips = page.locator(".token").all_inner_texts()
    assert len(chips) == summary["num_tokens"] == 1 + 9 + 8
    assert "".join(chips[1:10]) == "Once·upon"
    assert page.locator(".token.is-written").count() == 8


def test_every_view_opens(page: Any, server: Server) -> None:
    start(page, server.address)
    record(page, "Once upon", write=2)
    for view in VIEWS:
        show(page, view)
        assert page.locator(".broken").count() == 0, view
        assert page.locator("#panel .explain").inner_text()
        if view in SCALED:
            for legend in page.locator("#panel .legend").all():
                low, high = (float(legend.get_attribute(f"data-{end}")) for end in ("low", "high"))
                assert low < high
                assert legend.get_attribute("data-unit")


def test_every_view_has_a_dark_side(page: Any, server: Server) -> None:
    start(page, server.address)
    record(page, "Once upon", write=2)
    page.keyboard.press("t")
    for view in VIEWS:
        show(page, view)
        assert page.locator(".broken").count() == 0, view
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, ground[4:-1].split(","))) < 64


def test_keys(page: Any, server: Server) -> None:
    start(page, server.address)
    record(page, "Once upon a time")
    page.click("#panel h2")
    for key, token in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 24)):
        page.keyboard.press(key)
        assert state(page, "token") == str(token)
        pinned = page.locator(".token.is-pinned")
        assert pinned.get_attribute("data-index") == str(token)
    page.keyboard.press("Home")
    page.keyboard.press("Space")
    page.wait_for_url(re.compile("token=2"))
    page.keyboard.press("Space")
    layer = int(state(page, "layer"))
    page.keyboard.press("ArrowUp")
    assert state(page, "layer") == str(layer + 1)
    page.keyboard.press("5")
    page.wait_for_selector(".panel-body[data-view=memory][data-ready]")
    page.keyboard.press("]")
    assert state(page, "head") == "1"
    page.keyboard.press("?")
    assert page.locator("dialog.keys").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "prompt"


def test_hover_previews_and_click_pins(page: Any, server: Server) -> None:
    start(page, server.address)
    record(page, "Once upon")
    page.hover(".token[data-index='4']")
    page.wait_for_selector(".block-place[data-token='4']")
    assert "id" in page.locator(".tooltip").inner_text()
    assert state(page, "token") == "0"
    page.click(".token[data-index='4']")
    assert state(page, "token") == "4"
    page.mouse.move(2, 2)
    page.wait_for_selector(".block-place[data-token='4']")


def test_the_stack_opens_blocks(page: Any, server: Server) -> None:
    start(page, server.address)
    record(page, "Once upon")
    page.click("button.half.is-mla")
    page.wait_for_selector("#block h2:has-text('Layer 3: MLA')")
    page.click("button:text-is('every layer')")
    assert page.locator("#stack .block").count() == 4
    page.click("#stack .block:last-child button.half.is-mlp, #stack button.half.is-mlp")
    page.wait_for_selector("#block h2:has-text('Layer 0: MLP')")
    page.click("button:text-is('to its mixer')")
    page.wait_for_selector("#block h2:has-text('Layer 0: KDA')")
    assert page.locator("#block .strip").count() >= 8


def test_branch(page: Any, server: Server) -> None:
    start(page, server.address)
    before, after = (get(server, f"api/trace/{trace}") for trace in branch(page))
    assert [t["id"] for t in after["tokens"][:7]] == [t["id"] for t in before["tokens"][:7]]
    assert after["source"]["branched_from"]["token"] == 6
    assert after["tokens"][7]["id"] != before["tokens"][7]["id"]


def test_the_way_back_after_a_branch(page: Any, server: Server) -> None:
    """By its button, by the browser's Back, and by the list of all that is kept."""
    start(page, server.address)
    first, second = branch(page)
    page.click("button:has-text('before the branch at token 6')")
    page.wait_for_selector(".token.is-pinned[data-index='6']")
    assert state(page, "trace") == first
    page.go_back()
    page.wait_for_selector(".token.is-pinned[data-index='7']")
    assert state(page, "trace") == second
    page.go_back()
    page.wait_for_selector(".token.is-pinned[data-index='6']")
    assert state(page, "trace") == first


def test_the_recorded_runs_are_listed(page: Any, server: Server) -> None:
    start(page, server.address)
    first = record(page, "Once upon", write=2)
    second = record(page, "Once upon a time", write=3)
    page.click("#panel h2")
    page.keyboard.press("k")
    rows = page.locator("dialog.kept .kept-one")
    page.wait_for_selector(f".kept-one[data-trace='{second}'][aria-current]")
    kept = [trace["id"] for trace in get(server, "api/traces")["traces"]]
    assert [row.get_attribute("data-trace") for row in rows.all()] == kept
    assert "20 tokens" in rows.nth(0).inner_text()
    page.click(f".kept-one[data-trace='{first}']")
    page.wait_for_selector("text=12 tokens")
    assert state(page, "trace") == first
    assert page.locator("dialog.kept").is_hidden()
    page.keyboard.press("k")
    page.wait_for_selector(f".kept-one[data-trace='{first}'][aria-current]")
    page.keyboard.press("Escape")
    assert page.locator("dialog.kept").is_hidden()


def test_a_file_opened_while_it_records_stays(page: Any, server: Server, trace_file: Path) -> None:
    """What was asked for last is shown; the recording ends and does not come back."""
    start(page, server.address)
    page.fill("input[name='tokens to write']", "480")
    page.fill("textarea.prompt", "Once")
    page.press("textarea.prompt", "Enter")
    page.wait_for_selector(".progress")
    page.set_input_files("input[type=file]", trace_file)
    page.wait_for_selector(".token >> nth=28")
    assert page.locator("#ask button:has-text('Stop')").is_hidden()
    page.wait_for_timeout(500)
    assert page.locator(".token").count() == 29
    assert page.locator(".progress, .broken").count() == 0
    assert page.inner_text(".meter:last-child .meter-value") == "done"
    assert "trace=" not in page.evaluate("location.hash")  # a file has no address


def test_what_cannot_be_drawn_hears_nothing_more(
    page: Any, server: Server, trace_file: Path
) -> None:
    """A part that throws leaves no listener behind of the parts that were drawn before it."""
    head = "export function showStack(root, config, layers, store, numbersOf) {"

    def breakable(route: Any) -> None:
        body = route.fetch().text()
        assert head in body
        fault = f'{head} if (window.isBroken) throw new Error("no stack");'
        route.fulfill(body=body.replace(head, fault), content_type="text/javascript")

    page.route("**/views/stack.js", breakable)
    page.add_init_script(
        """window.heard = 0;
        const [on, off] = [window.addEventListener, window.removeEventListener];
        const count = (by, run) => function (kind, ...rest) {
            if (kind === "themechange") window.heard += by;
            return run.call(window, kind, ...rest);
        };
        window.addEventListener = count(1, on);
        window.removeEventListener = count(-1, off);"""
    )
    start(page, server.address)
    record(page, "Once upon", write=2)
    before = page.evaluate("heard")
    page.evaluate("window.isBroken = true")
    page.set_input_files("input[type=file]", trace_file)
    page.wait_for_selector(".broken:has-text('no stack')")
    page.evaluate("window.isBroken = false")
    page.click("button:text-is('Back')")
    page.wait_for_selector(".token >> nth=11")
    assert page.evaluate("heard") == before


def test_nothing_moves_for_those_who_want_it_still(browser: Any, server: Server) -> None:
    context = browser.new_context(reduced_motion="reduce")
    page = context.new_page()
    start(page, server.address)
    moving = "document.getAnimations().map((a) => a.animationName ?? a.transitionProperty)"
    record(page, "Once upon a time")
    page.click("#panel h2")
    page.keyboard.press("Space")
    page.wait_for_url(re.compile("token=1"))  # it still plays, step by step
    assert page.evaluate(moving) == []
    page.keyboard.press("Space")
    wait = "<div class=loading></div>"
    page.evaluate(f"document.querySelector('#panel').insertAdjacentHTML('beforeend', '{wait}')")
    assert page.evaluate(moving) == []
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(moving) == ["slide"]
    context.close()


def test_stop_and_go_on(page: Any, server: Server) -> None:
    start(page, server.address)
    page.fill("input[name='tokens to write']", "480")
    page.fill("textarea.prompt", "Once")
    page.press("textarea.prompt", "Enter")
    page.click("#ask button:has-text('Stop')")
    page.wait_for_selector("text=Stopped.")
    record(page, "Once upon")
    assert page.locator(".token").count() == 18


def test_reload_in_the_middle(page: Any, server: Server) -> None:
    start(page, server.address)
    page.fill("input[name='tokens to write']", "480")
    page.fill("textarea.prompt", "Once")
    page.press("textarea.prompt", "Enter")
    page.wait_for_selector(".progress")
    page.reload()
    page.wait_for_selector("body[data-started]")
    trace = record(page, "Once upon")
    page.click(".token[data-index='5']")
    page.reload()
    page.wait_for_selector(".token.is-pinned[data-index='5']")
    assert state(page, "trace") == trace


def test_ablate(page: Any, server: Server) -> None:
    start(page, server.address)
    trace = record(page, "Once upon")
    show(page, "ablate")
    with page.expect_response("**/api/ablate") as told:
        page.click("button:text-is('Layer off')")
    answer = told.value.json()
    page.wait_for_selector("#panel [data-ready] .fact")
    assert told.value.request.post_data_json["trace"] == trace
    shown = page.locator("#panel .fact:has-text('loss after') b").inner_text()
    assert float(shown.split()[0]) == pytest.approx(answer["after"]["loss"], rel=1e-3)  # 4 digits
    page.click("#panel button:has-text('✕')")
    page.wait_for_selector("text=Nothing is off")


def test_ablation_is_asked_once(page: Any, server: Server) -> None:
    """Looking at other layers and views asks nothing; another part off does."""
    start(page, server.address)
    record(page, "Once upon", write=2)
    show(page, "ablate")
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url) if r.url.endswith("api/ablate") else None)
    page.click("button:text-is('Layer off')")
    page.wait_for_selector("#panel [data-ready] .fact")
    page.keyboard.press("ArrowUp")
    page.wait_for_selector("#panel [data-ready] .fact")
    show(page, "sparse")
    show(page, "ablate")
    page.wait_for_selector("#panel [data-ready] .fact")
    assert len(asked) == 1
    page.click("button:text-is('Layer off')")
    page.wait_for_selector("#panel button:has-text('✕') >> nth=1")
    page.wait_for_selector("#panel [data-ready] .fact")
    assert len(asked) == 2


def test_another_address_opens_another_trace(page: Any, server: Server) -> None:
    """What a changed hash names is opened, and what it overstates is cut to what there is."""
    start(page, server.address)
    first = record(page, "Once upon", write=2)
    second = record(page, "Once upon a time", write=4)
    page.evaluate(f"location.hash = 'trace={first}&token=9999&expert=9999&layer=99&part=lid'")
    page.wait_for_selector(".token.is-pinned[data-index='11']")
    assert state(page, "trace") == first != second
    until(page, "location.hash.includes('token=11')")
    assert (state(page, "layer"), state(page, "expert")) == ("3", "4")
    assert state(page, "part") in ("mixer", "channel")
    assert page.input_value("textarea.prompt") == "Once upon"


def test_enter_while_it_records_is_no_second_recording(page: Any, server: Server) -> None:
    start(page, server.address)
    asked: list[str] = []
    page.on("request", lambda r: asked.append(r.url) if r.url.endswith("api/trace") else None)
    page.fill("input[name='tokens to write']", "480")
    page.fill("textarea.prompt", "Once")
    page.press("textarea.prompt", "Enter")
    page.press("textarea.prompt", "Enter")
    page.click("#ask button:has-text('Stop')")
    page.wait_for_selector("text=Stopped.")
    assert len(asked) == 1


def test_a_branch_replaces_a_recording(page: Any, server: Server) -> None:
    """The recording that is cut off says nothing any more."""
    start(page, server.address)
    record(page, "Once upon", write=2)
    show(page, "next")
    page.wait_for_selector("button.bar >> nth=3")
    page.fill("input[name='tokens to write']", "480")
    page.fill("textarea.prompt", "Once")
    page.press("textarea.prompt", "Enter")
    page.wait_for_selector(".progress")
    page.fill("input[name='tokens to write']", "3")
    page.click("button.bar >> nth=3")
    page.wait_for_selector(".token.is-pinned[data-index='1']")
    assert page.locator(".token").count() == 5
    assert page.locator(".broken, .progress").count() == 0
    assert page.locator("#ask button:has-text('Stop')").is_hidden()


def test_a_text_beyond_the_cap_is_refused_in_words(page: Any, server: Server) -> None:
    page.watched.expected = ["400"]
    start(page, server.address)
    page.fill("textarea.prompt", "x" * 600)
    page.press("textarea.prompt", "Enter")
    page.wait_for_selector(".broken:has-text('at most')")
    record(page, "Once upon")


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (1920, 1080)])
def test_nothing_sticks_out(page: Any, server: Server, width: int, height: int) -> None:
    page.set_viewport_size({"width": width, "height": height})
    start(page, server.address)
    record(page, "Once upon a time")
    for view in VIEWS:
        show(page, view)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.evaluate("document.querySelector('#panel').scrollWidth")
        assert wide <= page.evaluate("document.querySelector('#panel').clientWidth") + 1, view
