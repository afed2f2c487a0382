import json

import pytest

from deltamoe.cli import main
from tests.saved_run import save_run

PAIR = json.dumps({"sentence_good": "The cat sits.", "sentence_bad": "The cat sit."})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("eval"))


@pytest.fixture
def call(run, capsys):
    def call(*arguments):
        code = main(["eval", str(run), "--device", "cpu", "--max-tokens", "200", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_json_holds_every_measurement(call, run, tmp_path):
    (tmp_path / "agreement.jsonl").write_text(f"{PAIR}\n{PAIR}\n")
    code, out, err = call(
        "--json", "--streamed", "--baselines", "--blimp", str(tmp_path), "--blimp-pairs", "1"
    )
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["step"] == 3
    assert report["path"] == str(run / "checkpoints" / "step-3")
    assert report["num_tokens"] == 199
    assert set(report["recall"]) == {"repeated", "first", "common"}
    assert set(report["blimp"]["sets"]) == {"agreement"}
    assert report["blimp"]["average"] in (0.0, 1.0)
    assert {"bits_per_byte", "streamed_bits_per_byte", "baselines", "loss_by_position"} < set(
        report
    )


def test_the_tables_say_the_same(call):
    report = json.loads(call("--json", "--baselines")[1])
    code, out, _ = call("--baselines")
    assert code == 0
    assert f"{report['bits_per_byte']:.4f}" in out
    assert f"{report['baselines']['5-gram']:.4f}" in out
    for row in report["loss_by_position"]:
        assert f"{row['loss']:.4f}" in out
    assert "rare, seen before" in out


def test_context_is_the_runs_unless_given(call):
    assert json.loads(call("--json")[1])["context"] == 32
    longer = json.loads(call("--json", "--context", "64")[1])
    assert longer["context"] == 64
    assert longer["loss_by_position"][-1]["last"] == 64


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data", "no-such-text"], 2, "no file or folder"),
        (["--context", "0"], 2, "context = 0"),
        (["--max-tokens", "0"], 3, "empty"),
        (["--blimp", "no-such-folder"], 3, "no such file"),
        (["--blimp-pairs", "0"], 2, "--blimp-pairs"),
    ],
)
def test_wrong_wishes_are_named(call, arguments, code, message):
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
