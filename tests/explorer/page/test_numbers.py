"""Every pixel and label is the API's number; what the page works out, the API works out too."""

import json
import re
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


BOXES = {
    (1, "mixer"): {
        "token": "mixer.input",
        "tensor q Linear": "kda.query_projected",
        "tensor q conv, SiLU": "kda.query_convolved",
        "tensor q": "kda.query",
        "tensor k Linear": "kda.key_projected",
        "tensor k conv, SiLU": "kda.key_convolved",
        "tensor v Linear": "kda.value_projected",
        "tensor v": "kda.value",
        "tensor decay 2 × Linear": "kda.decay_logits",
        "tensor beta Linear": "kda.beta_logits",
        "tensor beta": "kda.beta",
        "tensor output gate 2 × Linear": "kda.output_gate_logits",
        "tensor output gate": "kda.output_gate",
        "tensor RMSNorm": "kda.answer_normed",
        "tensor mixer output": "mixer.output",
    },
    (3, "mixer"): {
        "token": "mixer.input",
        "tensor query": "mla.query",
        "tensor key": "mla.key",
        "tensor value": "mla.value",
        "tensor latent_proj": "mla.latent_projected",
        "tensor latent": "mla.latent",
        "tensor answer": "mla.answer",
        "tensor mixer output": "mixer.output",
    },
    (1, "channel"): {
        "token": "channel.input",
        "tensor logits": "router.logits",
        "router": "router.scores",
        "tensor shared": "experts.shared",
        "tensor routed": "experts.routed",
        "tensor channel output": "channel.output",
    },
    (0, "channel"): {
        "token": "channel.input",
        "tensor gate": "mlp.gate",
        "tensor up": "mlp.up",
        "tensor channel output": "channel.output",
    },
}


def hovered(page: Any, box: str, channel: int, channels: int) -> float:
    """The number under the pointer at one channel of a box's strip."""
    cells = page.locator(f"#block [data-name='{box}'] .strip-ground").bounding_box()
    across = cells["width"] / channels
    page.mouse.move(cells["x"] + (channel + 0.5) * across, cells["y"] + cells["height"] / 2)
    number = page.locator(".tooltip-line b").first.inner_text().split()[0]
    return float(number.replace("−", "-"))


@pytest.mark.parametrize(("layer", "part"), BOXES)
def test_every_box_has_its_tensor(page: Any, server: Server, layer: int, part: str) -> None:
    """All boxes but the experts' (their answers lie in one of their own) show the API's numbers."""
    start(page, server.address)
    trace = record(page, PROMPT)
    page.goto(f"{server.address}#trace={trace}&view=next&layer={layer}&part={part}&head=2&token=9")
    page.wait_for_selector(f"#block h2:has-text('Layer {layer}:')")
    page.wait_for_selector(".block-place[data-token='9'] .strip")
    bare = page.evaluate(
        """() => [...document.querySelectorAll("#block .box")].map((box) =>
            box.querySelector(".strip") ? "" : box.dataset.name)"""
    )
    assert {name for name in bare if not name.startswith("expert ")} <= {""}
    address = f"{server.address}api/trace/{trace}/view/block?layer={layer}&head=2&token=9"
    with urllib.request.urlopen(address) as answer:
        boxes = json.loads(answer.read())["boxes"]
    for box, name in BOXES[layer, part].items():
        if name.startswith("kda.beta"):  # its box has all heads
            values = array(server, trace, name, layer=layer, token=9)
        else:
            values = np.array(boxes[name]["values"])
        for channel in (0, len(values) - 1):
            # 4 digits
            assert hovered(page, box, channel, len(values)) == pytest.approx(
                values[channel], rel=1e-3, abs=1e-12
            ), box


def test_what_boxes_work_out(page: Any, server: Server) -> None:
    """What is not recorded as it is: the products with a gate, and one answer a choice."""
    start(page, server.address)
    trace = record(page, PROMPT)
    at = f"{server.address}#trace={trace}&view=next&token=9&head=2"
    page.goto(f"{at}&layer=1&part=mixer")
    page.wait_for_selector(".block-place[data-token='9'] [data-name='tensor gated'] .strip")
    normed = array(server, trace, "kda.answer_normed", layer=1, token=9, head=2)
    gated = normed * array(server, trace, "kda.output_gate", layer=1, token=9, head=2)
    assert hovered(page, "tensor gated", 3, len(gated)) == pytest.approx(gated[3], rel=1e-3)
    page.goto(f"{at}&layer=0&part=channel")
    page.wait_for_selector("#block [data-name='tensor product'] .strip")
    gate = array(server, trace, "mlp.gate", layer=0, token=9)
    opened = gate / (1 + np.exp(-gate))
    product = opened * array(server, trace, "mlp.up", layer=0, token=9)
    assert hovered(page, "tensor silu", 5, len(gate)) == pytest.approx(opened[5], rel=1e-3)
    assert hovered(page, "tensor product", 5, len(gate)) == pytest.approx(product[5], rel=1e-3)
    page.goto(f"{at}&layer=2&part=channel")
    page.wait_for_selector("#block [data-name='tensor answers'] .strip")
    answers = array(server, trace, "experts.answers", layer=2, token=9)
    cells = page.locator("#block [data-name='tensor answers'] .strip-ground").bounding_box()
    x = cells["x"] + 4.5 * cells["width"] / answers.shape[1]
    for choice in range(2):
        page.mouse.move(x, cells["y"] + (choice + 0.5) * cells["height"] / 2)
        lines = page.locator(".tooltip-line").first
        assert f"choice {choice}, channel 4" in lines.inner_text()
        shown = lines.locator("b").inner_text().replace("−", "-")
        assert float(shown) == pytest.approx(answers[choice, 4], rel=1e-3)


def test_both_sides_say_the_same(page: Any, server: Server) -> None:
    """The page's own numbers of its views, and those that ``--json`` prints."""
    start(page, server.address)
    trace = record(page, PROMPT)
    found = page.evaluate(
        """async (id) => {
            const {openTrace} = await import("/static/api.js");
            const {halfLife, norm, walk} = await import("/static/derive.js");
            const {metricOf} = await import("/static/metrics.js");
            const {entropy} = await import("/static/views/layers_experts.js");
            const trace = await openTrace(id);
            const colours = {};
            for (const name of ["surprise", "entropy", "half_life", "change"])
                colours[name] = [...(await metricOf(trace, name, 2)).values];
            const counts = await trace.array("experts.counts");
            const decay = await trace.array("kda.decay_p10", 1);
            const steps = (await walk(trace, 1, 3)).token(17);
            const entropies = counts.entry.layers.map((_, i) => entropy(counts.row(i)));
            return {...colours, entropies,
                lives: [...decay.data].map(halfLife), none: halfLife(-0),
                norms: [steps.after, steps.recalled, steps.delta].map(norm)};
        }""",
        trace,
    )

    def view(name: str, query: str = "") -> Any:
        with urllib.request.urlopen(f"{server.address}api/trace/{trace}/view/{name}{query}") as a:
            return json.loads(a.read())

    tokens = view("tokens", "?layer=2")
    memory = view("memory", "?layer=1&head=3&token=17")
    expected = {
        "surprise": tokens["surprise"],
        "entropy": tokens["router_entropy"]["values"],
        "half_life": tokens["half_life"]["values"],
        "change": tokens["memory_change"]["values"],
        "entropies": view("load")["entropy"],
        "lives": np.ravel(view("decay", "?layer=1")["half_life_p10"]),
        "norms": [memory[f"{name}_norm"] for name in ("memory", "recalled", "delta")],
    }
    for name, theirs in expected.items():
        # fp32 on one side, summed in another order
        np.testing.assert_allclose(found[name], theirs, rtol=1e-4, atol=1e-6, err_msg=name)
    assert found["none"] == 1e9  # a channel that forgets nothing


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
    assert all(re.fullmatch(r"\d+\.\d\d %|< 0\.01 %", text) for text in bars)  # they line up
    shown = [0.0 if text.startswith("<") else float(text.split()[0]) / 100 for text in bars]
    np.testing.assert_allclose(shown, chance, atol=5.1e-5)  # two decimals of a percent
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
