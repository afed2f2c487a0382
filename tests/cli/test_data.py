import json

import pytest
from click.testing import CliRunner

from deltamoe.cli import data as data_verb
from deltamoe.cli import main
from deltamoe.data import open_prepared


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for number in range(20):
        words = " ".join(f"{word}{number}" for word in ["one", "two", "three", "four"])
        (root / f"{number}.txt").write_text(f"Text {number}: {words}.\n" * 5)
    return root


@pytest.fixture
def run(tmp_path):
    def run(*arguments):
        cache = [] if arguments[0] == "verify" else ["--cache", str(tmp_path / "cache")]
        return CliRunner().invoke(
            data_verb.command, [*map(str, arguments), *cache], catch_exceptions=False
        )

    return run


def test_prepare_describes_what_it_made(run, corpus, tmp_path):
    out = tmp_path / "out"
    options = ["--tokenizer", "bpe:270", "--workers", 1, "--validation-fraction", "0.25"]
    result = run("prepare", corpus, "--out", out, *options)
    assert result.exit_code == 0
    assert "bpe:270, 270 ids" in result.stdout
    assert open_prepared(out, verify=True).validation.num_documents == 5
    verified = run("verify", out)
    assert f"{out} is whole" in verified.stdout


def test_info_says_the_same_in_json(run, corpus):
    plain = run("info", corpus).stdout
    report = json.loads(run("info", corpus, "--json").stdout)
    assert report["train"]["num_documents"] == 18
    assert f"{report['train']['num_tokens']:,}" in plain
    assert report["source_sha256"] in plain
    assert report["baselines"] is None


def test_info_measures_baselines_when_asked(run, corpus):
    result = run("info", corpus, "--baselines", "--json")
    assert set(json.loads(result.stdout)["baselines"]) >= {"xz", "xz_given_train", "ngram"}
    assert "5-gram" in result.stderr
    assert "given the training text" in run("info", corpus, "--baselines").stdout


def test_skipped_texts_are_shown(run, corpus):
    (corpus / "image.png").write_bytes(b"\x89PNG")
    assert "1 texts, first image.png: byte 0 is not UTF-8" in run("info", corpus).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["info", "no-such-corpus"], 2, "no file or folder"),
        (["prepare", "stdlib", "--validation-fraction", "2"], 2, "between 0 and 1"),
        (["prepare", "stdlib", "--workers", "0"], 2, "workers"),
        (["verify", "."], 3, "manifest.json"),
    ],
)
def test_errors_have_their_exit_codes(capsys, arguments, code, message):
    assert main(["data", *arguments]) == code
    assert message in capsys.readouterr().err
