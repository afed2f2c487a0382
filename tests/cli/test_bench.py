"""``deltamoe bench serve``: the load it makes, and what it reports of it."""

import json
import math
import statistics

import pytest

from deltamoe.cli import main
from deltamoe.cli.load import Felt, LoadPlan, LoadReport, Percentiles, ServerAddress
from deltamoe.errors import ConfigError
from tests.saved_run import save_run


def test_lengths_are_those_of_conversations() -> None:
    plan = LoadPlan(num_requests=2000, prompt_tokens=100, answer_tokens=40, seed=3)
    asked = plan.requests(257, 100_000)
    prompts = [len(prompt) for prompt, _ in asked]
    assert statistics.median(prompts) == pytest.approx(100, rel=0.1)  # 2,000 draws
    assert statistics.median([answer for _, answer in asked]) == pytest.approx(40, rel=0.1)
    assert statistics.stdev(map(math.log, prompts)) == pytest.approx(1.0, rel=0.1)
    assert plan.requests(257, 100_000) == asked
    assert all(len(prompt) + answer <= 64 for prompt, answer in plan.requests(257, 64))
    shared = LoadPlan(num_requests=5, shared_prefix=30).requests(257, 10_000)
    assert len({tuple(prompt[:30]) for prompt, _ in shared}) == 1


def test_a_report_counts() -> None:
    felt = [
        Felt(200, "", 10, 5, 0.1, 0.5, [0.1] * 4),
        Felt(200, "", 10, 5, 0.3, 0.7, [0.1] * 4),
        Felt(429, "status 429"),
        Felt(0, "ConnectionResetError"),
    ]
    report = LoadReport.of(felt, 2.0)
    assert (report.num_finished, report.num_refused, report.num_failed) == (2, 1, 1)
    assert report.tokens_per_second == 5.0
    assert report.inter_token_ms.p99 == pytest.approx(100.0)
    assert report.time_to_first_token_ms.p95 == pytest.approx(300.0)
    assert LoadReport.of([], 1.0).to_dict()["total_ms"]["p50"] is None
    assert math.isnan(Percentiles.of([]).p50)


def test_addresses() -> None:
    assert ServerAddress.parse("http://127.0.0.1:80/v1") == ServerAddress("127.0.0.1", 80)
    for wrong in ("https://a", "ftp://a", "http://"):
        with pytest.raises(ConfigError):
            ServerAddress.parse(wrong)


def test_a_server_of_its_own(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    run = save_run(tmp_path)
    load = ["--requests", "12", "--prompt-tokens", "20", "--answer-tokens", "10"]
    times = ["--concurrency", "4", "--rate", "50"]
    assert main(["bench", "serve", str(run), *load, *times, "--json"]) == 0
    poisson, closed = json.loads(capsys.readouterr().out)
    for report in (poisson, closed):
        assert report["num_finished"] == 12
        assert report["errors"] == {}
        assert report["tokens"] > 12
        first = report["time_to_first_token_ms"]
        assert 0 < first["p50"] <= first["p95"] <= first["p99"]
    assert main(["bench", "serve", "http://127.0.0.1:9"]) == 1
    assert main(["bench", "serve", str(tmp_path / "none")]) == 1
    assert "expected http://" in capsys.readouterr().err
