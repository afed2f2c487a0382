"""Training runs on the page: what a metrics.jsonl says, while it grows; two of them together."""

import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deltamoe.checkpoint import write_run_config
from deltamoe.config import DataConfig, OptimizerConfig, RunConfig, TrainConfig, to_json
from deltamoe.explorer import read_trace
from deltamoe.explorer.app import create_app
from deltamoe.testing import tiny_config
from tests.explorer.page.conftest import Server, metrics_line, start, until

FOLLOW_S = 15  # the page asks every 2 s


def write_run(folder: Path, name: str, lines: list[str], *, lr: float | None = None) -> Path:
    run = folder / name
    run.mkdir(parents=True)
    if lr is not None:
        data = DataConfig(path="text.txt", context=32)
        config = RunConfig(model=tiny_config(), data=data, optimizer=OptimizerConfig(lr=lr))
        write_run_config(run, config)
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two runs: "long" of 60 steps with validations, "short" of 20."""
    validated = {20: 3.5, 40: 2.5, 60: 1.5}
    lines = [
        metrics_line(
            step,
            **(
                {"validation_loss": validated[step], "validation_bits_per_byte": validated[step]}
                if step in validated
                else {}
            ),
        )
        for step in range(1, 61)
    ]
    write_run(
        tmp_path, "short", [metrics_line(s, loss=5.0 + s / 100) for s in range(1, 21)], lr=1e-4
    )
    write_run(tmp_path, "long", lines, lr=1e-3)
    return tmp_path


@pytest.fixture
def serve(trace_file: Path) -> Iterator[Callable[[Path | None], Server]]:
    made: list[Server] = []

    def begin(folder: Path | None) -> Server:
        opened = folder and folder / "long"
        app = create_app(first=read_trace(trace_file), runs_folder=folder, opened=opened)
        made.append(Server(app))
        return made[-1]

    yield begin
    for server in made:
        server.stop()


def open_runs(page: Any, server: Server) -> None:
    start(page, server.address, view="runs")
    page.wait_for_selector(".chart-figure")


def exact(page: Any, value: float) -> str:
    """The number as the page writes it."""
    return str(page.evaluate("v => import('/static/draw/number.js').then(m => m.exact(v))", value))


def hover(page: Any, chart: str, share: float) -> dict[str, str]:
    """What the tooltip says at a share of a chart's axis: name to number, "" to the heading."""
    element = page.locator(f"[data-chart={chart}] .chart")
    element.scroll_into_view_if_needed()
    box = element.bounding_box()
    left, right = 54, 10  # what draw/line.js leaves beside the axis
    page.mouse.move(
        box["x"] + left + share * (box["width"] - left - right), box["y"] + box["height"] / 2
    )
    page.wait_for_selector(".tooltip:not([hidden])")
    said = {"": page.inner_text(".tooltip-head >> nth=0")}
    for line in page.locator(".tooltip-line").all():
        said[line.locator("span").inner_text()] = line.locator("b").inner_text()
    return said


def step_of(page: Any, run: str) -> int:
    text = page.inner_text(f"tr[data-run={run}] td >> nth=2")
    return int(re.match(r"[\d,]+", text)[0].replace(",", ""))  # type: ignore[index]


def test_hover_says_the_records_numbers(page: Any, folder: Path, serve: Any) -> None:
    open_runs(page, serve(folder))
    records = [json.loads(x) for x in (folder / "long" / "metrics.jsonl").read_text().splitlines()]
    last = hover(page, "loss", 1.0)
    assert last[""] == "step 60"
    assert last["training"] == exact(page, records[-1]["loss"])
    assert last["validation"] == "1.5"
    middle = hover(page, "loss", (30 - 1) / 59)
    assert middle[""] == "step 30"
    assert middle["training"] == exact(page, records[29]["loss"])
    assert "validation" not in middle  # nothing was measured there
    gradient = hover(page, "gradient", 0.0)
    assert gradient["gradient norm"] == exact(page, records[0]["grad_norm"])
    assert gradient["clipped at"] == "1"
    assert hover(page, "half_life", 0.5)["layer 2"] == "6"
    utilisation = hover(page, "utilisation", 0.5)
    fair = sum(records[0]["load"]["1"]) / 5
    assert utilisation["busiest"] == exact(page, 60 / fair)
    assert utilisation["idlest"] == exact(page, 40 / fair)
    entropy = -sum(n / (5 * fair) * math.log(n / (5 * fair)) for n in records[0]["load"]["1"])
    said = hover(page, "evenness", 0.5)
    assert said["layer 1, smoothed"] == exact(page, entropy / math.log(5))


def test_smoothing_forgets_by_steps_and_not_by_records(page: Any, folder: Path, serve: Any) -> None:
    open_runs(page, serve(folder))
    steps, values, weight = [1, 2, 4, 9], [4.0, 2.0, 8.0, 1.0], 0.9
    kept, norm, before, want = 0.0, 0.0, 0, []
    for step, value in zip(steps, values, strict=True):
        share = weight ** (step - before)
        kept, norm, before = share * kept + (1 - share) * value, share * norm + 1 - share, step
        want.append(kept / norm)
    smoothed = "([s, v, w]) => import('/static/training.js').then(m => m.smoothed(s, v, w))"
    assert page.evaluate(smoothed, [steps, values, weight]) == pytest.approx(want)
    assert page.evaluate(smoothed, [steps, values, 0]) == values


def test_a_growing_run_is_followed(page: Any, folder: Path, serve: Any) -> None:
    open_runs(page, serve(folder))
    assert step_of(page, "long") == 60
    assert "running" in page.inner_text("tr[data-run=long]")
    with open(folder / "long" / "metrics.jsonl", "a") as metrics:
        for step in range(61, 71):
            metrics.write(metrics_line(step))
        torn = metrics_line(71)
        metrics.write(torn[:40])
        metrics.flush()
        until(
            page,
            "document.querySelector('tr[data-run=long]').innerText.includes('70 of')",
            timeout_s=FOLLOW_S,
        )
        assert hover(page, "loss", 1.0)[""] == "step 70"
        metrics.write(torn[40:])
        metrics.flush()
    until(
        page,
        "document.querySelector('tr[data-run=long]').innerText.includes('71 of')",
        timeout_s=FOLLOW_S,
    )
    # the pointer rests on the chart, which was drawn anew under it
    assert page.inner_text(".tooltip-head >> nth=0") == "step 71"


def test_a_real_training_is_followed(page: Any, tmp_path: Path, serve: Any) -> None:
    """``deltamoe train`` in a process of its own: running while it runs, finished when it is."""
    (tmp_path / "text.txt").write_text("The sheep jumps over the fence. " * 200)
    data = DataConfig(
        path=str(tmp_path / "text.txt"), context=16, rows=2, cache=str(tmp_path / "cache")
    )
    steps = 400  # some seconds
    train = TrainConfig(steps=steps, checkpoint_every=50, validate_every=0, threads=1)
    config = tmp_path / "tiny.json"
    config.write_text(to_json(RunConfig(model=tiny_config(), data=data, train=train)))
    runs = tmp_path / "runs"
    runs.mkdir()
    command = [sys.executable, "-m", "deltamoe", "train", str(config), "--out", str(runs / "long")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as trainer:
        try:
            while not (runs / "long" / "metrics.jsonl").exists():
                assert trainer.poll() is None, trainer.stderr and trainer.stderr.read()
                time.sleep(0.05)
            open_runs(page, serve(runs))
            row = "document.querySelector('tr[data-run=long]').innerText"
            seen = [step_of(page, "long")]
            assert "running" in page.inner_text("tr[data-run=long]")
            while f"{steps} of" not in page.inner_text("tr[data-run=long]"):
                before = page.inner_text("tr[data-run=long]")
                until(page, f"{row} !== {json.dumps(before)}", timeout_s=60)
                seen.append(step_of(page, "long"))
            assert len(set(seen)) > 2, "it was followed, and not only found at its end"
            assert trainer.wait(timeout=60) == 0
        finally:
            trainer.kill()
    until(page, f"{row}.includes('finished')", timeout_s=FOLLOW_S)
    assert "Nobody trains here now" in page.inner_text(".run-notice")
    last = json.loads((runs / "long" / "metrics.jsonl").read_text().splitlines()[-1])
    assert hover(page, "loss", 1.0)["training"] == exact(page, last["loss"])
    assert page.locator("[data-chart=loss] .flag.is-checkpoint").count() > 0
    assert page.locator(".keys-of [data-flag]").all_inner_texts() == ["checkpoint"]


def test_only_what_is_new_is_read(page: Any, folder: Path, serve: Any) -> None:
    open_runs(page, serve(folder))
    told: list[Any] = []
    page.on("response", lambda r: told.append(r) if "from=" in r.url else None)
    with open(folder / "long" / "metrics.jsonl", "a") as metrics:
        metrics.write(metrics_line(61))
    row = "document.querySelector('tr[data-run=long]').innerText"
    until(page, f"{row}.includes('61 of')", timeout_s=FOLLOW_S)
    read = [[record["step"] for record in answer.json()["records"]] for answer in told]
    assert [steps for steps in read if steps] == [[61]]


def test_flags_are_named(page: Any, tmp_path: Path, serve: Any) -> None:
    run = write_run(tmp_path, "long", [metrics_line(s) for s in range(1, 30)], lr=1e-3)
    (run / "checkpoints" / "step-12").mkdir(parents=True)  # no plan asks for it: stopped there
    (run / "nonfinite-step-20.json").write_text("{}")
    open_runs(page, serve(tmp_path))
    key = page.locator(".keys-of [data-flag]")
    assert key.all_inner_texts() == ["checkpoint", "resumed", "stopped", "not finite"]
    for flag, kind in zip(key.all(), ("checkpoint", "resume", "stop", "nan"), strict=True):
        shape = flag.locator("path").get_attribute("d")[len("M1 1") :]
        drawn = page.locator(f"[data-chart=loss] .flag.is-{kind} path").get_attribute("d")
        assert drawn.endswith(shape), kind


def test_a_resumed_run_is_drawn_as_it_is_now(page: Any, folder: Path, serve: Any) -> None:
    open_runs(page, serve(folder))
    metrics = folder / "long" / "metrics.jsonl"
    kept = metrics.read_text().splitlines(keepends=True)[:50]
    metrics.write_text("".join([*kept, *(metrics_line(s, loss=9.0) for s in range(51, 66))]))
    until(
        page,
        "document.querySelector('tr[data-run=long]').innerText.includes('65 of')",
        timeout_s=FOLLOW_S,
    )
    assert hover(page, "loss", (55 - 1) / 64)["training"] == "9"
    resumed = page.locator(".run-events .is-resume")
    assert "step 50" in resumed.inner_text()
    assert page.locator("[data-chart=loss] .flag.is-resume").count() == 1


def test_two_runs_share_the_axes(page: Any, folder: Path, serve: Any) -> None:
    open_runs(page, serve(folder))
    page.select_option("select[aria-label=beside]", "short")
    page.wait_for_selector("tr[data-run=short]")
    both = hover(page, "loss", (20 - 1) / 59)
    assert both[""] == "step 20"
    assert both["short: training"] == "5.2"
    assert both["long: training"] == exact(page, 6.0 * 0.97**20)
    behind = hover(page, "loss", (40 - 1) / 59)
    assert "long: training" in behind
    assert "short: training" not in behind
    configs = page.locator(".figure", has_text="What differs in their configs")
    assert configs.locator("tbody tr").count() == 1
    assert configs.locator("tbody tr td").all_inner_texts() == ["optimizer.lr", "0.001", "0.0001"]
    page.select_option("select[aria-label=over]", "tokens")
    until(page, "document.querySelector('[data-chart=loss] .chart').ariaLabel.endsWith('tokens')")
    assert hover(page, "loss", 1.0)[""] == "tokens 15.4 k"  # 60 steps of 256
    page.reload()
    page.wait_for_selector("tr[data-run=short]")


def test_a_loss_that_is_no_number_is_an_event(page: Any, tmp_path: Path, serve: Any) -> None:
    lines = [metrics_line(s) for s in (1, 2)] + ['{"format": 1, "step": 3, "loss": NaN}\n', "%%\n"]
    write_run(tmp_path, "long", [*lines, metrics_line(4)])
    open_runs(page, serve(tmp_path))
    assert "the loss is not finite" in page.inner_text(".run-events .is-nan")
    assert page.locator("[data-chart=loss] .flag.is-nan").count() == 1
    assert step_of(page, "long") == 4


def test_a_run_without_experts_has_no_charts_of_them(page: Any, tmp_path: Path, serve: Any) -> None:
    plain = [json.dumps({"step": s, "loss": 5.0 - s / 10}) + "\n" for s in range(1, 9)]
    write_run(tmp_path, "long", plain)
    open_runs(page, serve(tmp_path))
    charts = page.locator("[data-chart]").evaluate_all("all => all.map(c => c.dataset.chart)")
    assert charts == ["loss"]
    assert page.locator(".broken").count() == 0


def test_a_constant_is_a_line_and_no_hang(page: Any, tmp_path: Path, serve: Any) -> None:
    """A smoothed constant differs in its last digits; an axis for that has no round values."""
    write_run(tmp_path, "long", [metrics_line(s, grad_norm=0.17) for s in range(1, 40)])
    open_runs(page, serve(tmp_path))
    assert hover(page, "gradient", 0.5)["gradient norm"] == "0.17"
    assert hover(page, "max_vio", 0.5)["layer 1, smoothed"] == "0.17"


def test_a_run_that_has_not_begun_says_so(page: Any, tmp_path: Path, serve: Any) -> None:
    write_run(tmp_path, "long", [], lr=1e-3)
    start(page, serve(tmp_path).address, view="runs")
    page.wait_for_selector("text=No step has ended yet")


def test_no_run_says_so(page: Any, serve: Any) -> None:
    start(page, serve(None).address, view="runs")
    page.wait_for_selector("text=No training run is here")


def test_names_of_runs_are_text(page: Any, tmp_path: Path, serve: Any) -> None:
    name = "<b onclick=alert(1)>run"
    write_run(tmp_path, name, [metrics_line(1), metrics_line(2)])
    open_runs(page, serve(tmp_path))
    assert name in page.inner_text(".run-table tbody")
    assert page.locator(".run-table tbody b").count() == 0


def test_what_is_drawn_stays_when_the_server_is_gone(page: Any, folder: Path, serve: Any) -> None:
    server = serve(folder)
    open_runs(page, server)
    page.watched.expected.append("Failed to load resource")
    server.stop()
    page.wait_for_selector(".run-notice .is-wrong", timeout=1000 * FOLLOW_S)
    assert "asking again" in page.inner_text(".run-notice")
    assert page.locator("[data-chart=loss] .line").count() > 0
