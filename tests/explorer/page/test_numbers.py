"""Every pixel and label is the API's number; what the page works out, the API works out too."""

import json
import urllib.request
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deltamoe.explorer.wire import decode
from tests.explorer.page.conftest import Server, record, show, start

PROMPT = "Once upon a time"


def array(server: Server, trace: str, name: str, **query: int) -> NDArray[Any]:
    asked = "&".join(f"{key}={value}" for key, value in query.items())
    address = f"{server.address}api/trace/{trace}/{name}?{asked}"
    with urllib.request.urlopen(address) as answer:
        return decode(answer.read())[1]


def pixel(page: Any, row: int, column: int) -> list[int]:
    """The colour in the middle of a cell of the view's first map."""
    found: list[int] = page.evaluate(
        """([row, column]) => {
            const canvas = document.querySelector("#panel .heatmap-canvas");
            const {first, across, down} = canvas.dataset;
            const ratio = devicePixelRatio;
            const x = ((column - Number(first)) + 0.5) * Number(across) * ratio;
            const y = (row + 0.5) * Number(down) * ratio;
            const pen = canvas.getContext("2d");
            return [...pen.getImageData(Math.floor(x), Math.floor(y), 1, 1).data];
        }""",
        [row, column],
    )
    return found


def colour(page: Any, value: float, kind: str = "linear", scale: str = "viridis") -> list[int]:
    """What the first legend says the colour of a value is."""
    found: list[int] = page.evaluate(
        """async ([value, scale, kind]) => {
            const {low, high} = document.querySelector("#panel .legend").dataset;
            const {scale: make} = await import("/static/draw/scale.js");
            return make(scale, [Number(low), Number(high)], kind).rgb(value);
        }""",
        [value, scale, kind],
    )
    return found


def test_lit_experts_are_the_routers(page: Any, server: Server) -> None:
    start(page, server.address, layer=2)
    trace = record(page, PROMPT)
    ids = array(server, trace, "router.expert_ids", layer=2)
    weights = array(server, trace, "router.expert_weights", layer=2)
    scores = array(server, trace, "router.scores", layer=2)
    for token in (0, 3, 11):
        page.click(f".token[data-index='{token}']")
        page.mouse.move(2, 2)
        page.wait_for_selector(f".block-place[data-token='{token}']")
        lit = page.locator("#block .box.is-lit[data-name^='expert ']")
        names = {name.get_attribute("data-name") for name in lit.all()}
        assert names == {f"expert {e}" for e in ids[token]}
        rows = page.locator("#panel tbody tr").all_inner_texts()
        for place, expert in enumerate(ids[token]):
            cells = rows[place].split("\t")
            assert cells[0] == f"expert {expert}"
            assert float(cells[2]) == pytest.approx(scores[token, expert], rel=1e-3)  # 4 digits
            assert float(cells[4]) == pytest.approx(weights[token, place], rel=1e-3)
        assert page.locator("#panel .column.is-lit").count() == len(ids[token])
        total = page.locator("#panel tr.is-sum td").all_inner_texts()[4]
        assert float(total) == pytest.approx(2.446, abs=1e-3)  # the router's scale


def test_pixels_of_the_experts(page: Any, server: Server) -> None:
    start(page, server.address, layer=1)
    trace = record(page, PROMPT)
    show(page, "experts")
    page.wait_for_timeout(100)  # one frame
    ids = array(server, trace, "router.expert_ids", layer=1)
    weights = array(server, trace, "router.expert_weights", layer=1)
    for token in (1, 7, 20):
        for place, expert in enumerate(ids[token]):
            expected = [*colour(page, float(weights[token, place])), 255]
            assert pixel(page, int(expert), token) == expected
        idle = next(e for e in range(5) if e not in ids[token])
        assert pixel(page, idle, token)[3] == 0


def test_pixels_of_the_decay(page: Any, server: Server) -> None:
    start(page, server.address, layer=2)
    trace = record(page, PROMPT)
    show(page, "decay")
    page.wait_for_timeout(100)
    half_life = array(server, trace, "kda.half_life", layer=2)
    for token, head in ((0, 0), (5, 3), (21, 1)):
        expected = [*colour(page, float(half_life[token, head]), "log", "cividis"), 255]
        # one step of 256: the page and NumPy round the last bit of a logarithm differently
        assert np.abs(np.subtract(pixel(page, head, token), expected)).max() <= 2


def test_what_follows_is_the_same_on_both_sides(page: Any, server: Server) -> None:
    """derive.js against derive.py, on memory, recall, retention and attention."""
    start(page, server.address)
    trace = record(page, PROMPT)
    found = page.evaluate(
        """async (id) => {
            const {openTrace} = await import("/static/api.js");
            const {walk, attentionRow} = await import("/static/derive.js");
            const trace = await openTrace(id);
            const steps = await walk(trace, 1, 3);
            const {before, after} = steps.token(17);
            const {recalled, retained} = steps.recall(6);
            const [query, key] = await trace.arrays(["mla.query", "mla.key"], 3);
            return {memory: [...after], before: [...before], recall: [...recalled],
                    retention: [...retained], attention: [...attentionRow(query, key, 2, 9)]};
        }""",
        trace,
    )
    expected = {
        "memory": array(server, trace, "memory", layer=1, head=3, token=17),
        "before": array(server, trace, "memory", layer=1, head=3, token=16),
        "recall": array(server, trace, "recall", layer=1, head=3, token=6),
        "retention": array(server, trace, "retention", layer=1, head=3, token=6),
        "attention": array(server, trace, "attention", layer=3, head=2, token=9)[:10],
    }
    for name, theirs in expected.items():
        # fp32 on both sides, summed in another order
        np.testing.assert_allclose(found[name], theirs.ravel(), atol=1e-5, rtol=1e-4, err_msg=name)


def test_a_box_has_its_tensor(page: Any, server: Server) -> None:
    start(page, server.address, layer=1, part="mixer", head=3, token=9)
    trace = record(page, PROMPT)
    page.click(".token[data-index='9']")
    page.click("button.half.is-kda >> nth=0")
    page.wait_for_selector(".block-place[data-token='9'] [data-name='tensor k'] .strip")
    layer = int(page.evaluate("new URLSearchParams(location.hash.slice(1)).get('layer')"))
    key = array(server, trace, "kda.key", layer=layer)[9, 1]  # value head 3 reads key head 1
    cells = page.locator("[data-name='tensor k'] .strip-ground").bounding_box()
    for channel in (0, 4, 7):
        across = cells["width"] / len(key)
        page.mouse.move(cells["x"] + (channel + 0.5) * across, cells["y"] + cells["height"] / 2)
        shown = page.locator(".tooltip-line b").first.inner_text().replace("−", "-")
        assert float(shown) == pytest.approx(float(key[channel]), rel=1e-3)  # 4 digits


def test_counts_are_tokens_times_choices(page: Any, server: Server) -> None:
    start(page, server.address)
    trace = record(page, PROMPT)
    show(page, "load")
    counts = array(server, trace, "experts.counts", layer=1)
    total = page.locator(".fact:has-text('tokens × choices') b").inner_text()
    assert int(total) == counts.sum() == 25 * 2


def test_the_stack_of_the_released_model(page: Any, server: Server) -> None:
    """27 layers: the first dense, three KDA to one MLA, the last one MLA."""
    start(page, server.address)
    groups = page.evaluate(
        """async () => {
            const {runsOf, groupsOf} = await import("/static/views/stack.js");
            const layers = Array.from({length: 27}, (_, i) => ({
                mixer: i % 4 === 3 || i === 26 ? "mla" : "kda", channel: i ? "moe" : "mlp"}));
            const groups = groupsOf(runsOf(layers));
            return groups.map(({times, runs}) => [times, runs.map((run) => run.layers)]);
        }"""
    )
    assert groups[:3] == [[1, [[0]]], [1, [[1, 2]]], [1, [[3]]]]
    assert groups[3][0] == 5
    assert groups[3][1][1] == [7, 11, 15, 19, 23]
    assert groups[4:] == [[1, [[24, 25]]], [1, [[26]]]]


def test_the_next_token(page: Any, server: Server) -> None:
    start(page, server.address)
    trace = record(page, PROMPT)
    show(page, "next")
    page.click(".token[data-index='9']")
    page.mouse.move(2, 2)
    page.wait_for_selector("h3:has-text('After token 9')")
    chance = array(server, trace, "next.probabilities")[9]
    bars = page.locator("#panel .bar-value").all_inner_texts()
    shown = [float(text.split()[0]) / 100 for text in bars]
    np.testing.assert_allclose(shown, chance, rtol=6e-3)  # three digits
    ids = array(server, trace, "lens.ids")
    assert page.locator("table.lens tbody tr").count() == len(ids) == 4


def test_meters(page: Any, server: Server) -> None:
    start(page, server.address)
    with urllib.request.urlopen(server.address + "api/model") as answer:
        model = json.loads(answer.read())
    meters = page.locator("#meters")
    total = meters.locator("[data-total]")
    assert int(total.get_attribute("data-total")) == model["parameters"]["total"]
    assert int(total.get_attribute("data-active")) == model["parameters"]["active"]
    fixed = meters.locator("[data-fixed]").get_attribute("data-fixed")
    assert int(fixed) == model["state_bytes"]
    each = meters.locator("[data-each]").get_attribute("data-each")
    assert int(each) == model["cache_bytes_per_token"]
