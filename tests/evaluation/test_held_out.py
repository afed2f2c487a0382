import json

import pytest

from deltamoe.data import prepare
from deltamoe.errors import ConfigError
from deltamoe.evaluation.held_out import held_out, training_ids
from deltamoe.evaluation.report import measure
from deltamoe.inference.opened import open_model
from tests.saved_run import TEXT, save_run


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    return open_model(save_run(tmp_path_factory.mktemp("held_out")), device="cpu")


def text_of(opened, token_ids):
    return opened.tokenizer.decode(token_ids)


def test_by_default_what_the_run_held_out(opened):
    found = held_out(opened)
    text = text_of(opened, found.token_ids)
    assert TEXT.endswith(text)
    assert len(text.encode()) == pytest.approx(0.25 * len(TEXT.encode()), abs=4)  # one character
    assert found.document_starts.tolist() == [0]
    assert text_of(opened, training_ids(opened, max_tokens=1 << 20)) + text == TEXT


def test_another_text_is_taken_whole(opened, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Quite another text. " * 20)
    found = held_out(opened, str(other))
    assert text_of(opened, found.token_ids) == other.read_text()


def test_the_training_text_under_another_name_is_not(opened, tmp_path):
    copy = tmp_path / "copy.txt"
    copy.write_text(TEXT, encoding="utf-8")
    run = opened.checkpoint.path.parent.parent
    (run / "data.json").write_text(json.dumps(prepare(opened.config.data).manifest))
    found = held_out(opened, str(copy))
    assert found.token_ids.tolist() == held_out(opened).token_ids.tolist()
    (run / "data.json").unlink()
    assert text_of(opened, held_out(opened, str(copy)).token_ids) == TEXT


def test_only_the_first_tokens(opened):
    assert held_out(opened, max_tokens=10).token_ids.tolist() == (
        held_out(opened).token_ids[:10].tolist()
    )
    assert len(training_ids(opened, max_tokens=10)) == 10


def test_the_report_is_plain_data(opened):
    report = measure(opened, max_tokens=200, streamed=True, baselines=True)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["num_tokens"] == 199
    assert report["context"] == 32
    assert report["loss_by_position"][-1]["last"] == 32
    kinds = report["recall"].values()
    assert sum(kind["num_tokens"] for kind in kinds) == 199
    # a random model knows less than any compressor
    assert report["bits_per_byte"] > report["baselines"]["5-gram"] > 0
    assert report["streamed_bits_per_byte"] != report["bits_per_byte"]


def test_training_and_eval_report_the_same_number(opened):
    from deltamoe.training.validation import validate

    stream = prepare(opened.config.data).validation
    ours = measure(opened)
    theirs = validate(opened.model, stream, opened.tokenizer, context=32, rows=2)
    # fp32 sums in another order
    assert ours["bits_per_byte"] == pytest.approx(theirs.bits_per_byte, rel=1e-5)
    assert ours["num_tokens"] == theirs.num_tokens


def test_the_report_without_the_training_text(opened, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("Quite another text. " * 20)
    trained_on = opened.checkpoint.path.parent.parent.parent / "text.txt"
    hidden = trained_on.rename(trained_on.with_suffix(".hidden"))
    try:
        report = measure(opened, str(other), max_tokens=50, baselines=True)
        assert report["recall"] is None
        assert set(report["baselines"]) == {"xz"}
    finally:
        hidden.rename(trained_on)


def test_wrong_wishes_are_named(opened):
    with pytest.raises(ConfigError, match="no file or folder"):
        measure(opened, "no-such-text")
    with pytest.raises(ConfigError, match="context = 0"):
        measure(opened, context=0)
