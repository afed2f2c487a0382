import dataclasses
import json
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from deltamoe.config import DataConfig
from deltamoe.data import document, open_prepared, preparation, prepare
from deltamoe.errors import ConfigError, DataError
from deltamoe.tokenizer import BpeTokenizer


def texts_of(data, stream):
    return [data.tokenizer.decode(document) for document in stream.documents()]


def folder_of(data):
    (source,) = data.sources
    assert source.folder is not None
    return source.folder


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_every_text_is_on_one_side_and_comes_back(config, corpus, tokenizer):
    data = prepare(dataclasses.replace(config, tokenizer=tokenizer))
    train, validation = texts_of(data, data.train), texts_of(data, data.validation)
    originals = [path.read_text() for path in sorted(corpus.iterdir())]
    assert sorted(train + validation) == sorted(originals)
    assert [text for text in originals if text in train] == train
    assert len(validation) == 3
    assert data.train.num_bytes == sum(len(text.encode()) for text in train)
    assert data.tokenizer.name == tokenizer
    assert open_prepared(folder_of(data), verify=True).fingerprint == data.fingerprint


def test_each_document_stands_behind_a_border(config):
    data = prepare(config)
    ids = data.train.tokens(0, data.train.num_tokens)
    borders = np.flatnonzero(ids == data.tokenizer.end_id)
    assert borders.tolist() == data.train.document_starts.tolist()
    assert data.train.num_tokens == data.train.num_bytes + data.train.num_documents


def test_the_second_time_nothing_is_written(config):
    calls = []
    first = prepare(config, progress=lambda *what: calls.append(what))
    assert calls[-1] == ("tokenising", calls[-1][2], calls[-1][2])
    before = {path: path.stat().st_mtime_ns for path in folder_of(first).iterdir()}
    calls.clear()
    second = prepare(config, progress=lambda *what: calls.append(what))
    assert not calls
    assert second.fingerprint == first.fingerprint
    assert before == {path: path.stat().st_mtime_ns for path in folder_of(second).iterdir()}


def test_the_number_of_workers_changes_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(document, "PIECE_BYTES", 32)
    config = dataclasses.replace(config, tokenizer="bpe:300")
    one = prepare(config, workers=1)
    many = prepare(config, workers=7, out=tmp_path / "out")
    assert one.fingerprint == many.fingerprint
    assert folder_of(one) != folder_of(many)


@pytest.mark.parametrize(
    "change",
    [
        lambda corpus, config: (corpus / "new.txt").write_text("new words"),
        lambda corpus, config: (corpus / "00.txt").write_text("other words"),
    ],
)
def test_a_changed_text_makes_a_new_folder(config, corpus, change):
    before = prepare(config)
    change(corpus, config)
    after = prepare(config)
    assert folder_of(after) != folder_of(before)
    assert after.fingerprint != before.fingerprint
    assert open_prepared(folder_of(before), verify=True).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    "changes", [{"tokenizer": "bpe:300"}, {"tokenizer": "bpe:301"}, {"validation_fraction": 0.3}]
)
def test_another_setting_makes_a_new_folder(config, changes):
    changed = prepare(dataclasses.replace(config, **changes))
    assert folder_of(changed) != folder_of(prepare(config))
    assert changed.fingerprint != prepare(config).fingerprint


def test_the_same_text_elsewhere_is_found_again(config, corpus, tmp_path):
    first = prepare(config)
    (tmp_path / "moved").mkdir()
    corpus.rename(tmp_path / "moved" / "corpus")
    moved = dataclasses.replace(config, path=str(tmp_path / "moved" / "corpus"))
    assert folder_of(prepare(moved)) == folder_of(first)


def test_a_tokenizer_file_may_be_given(config, tmp_path):
    BpeTokenizer.train(["words, and a line end.\n"], 270).save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        data = prepare(dataclasses.replace(config, tokenizer=str(path)))
        assert data.tokenizer.vocab_size == 270
    assert data.sources[0].manifest is not None
    assert data.sources[0].manifest.dtype == "uint16"


def test_a_large_vocabulary_takes_wider_ids(config, tmp_path):
    bpe = BpeTokenizer.train(["words"], 300)
    definition = json.loads(json.dumps(bpe._definition))
    definition["added_tokens"][0]["id"] = 70_000
    BpeTokenizer(definition).save(tmp_path)
    data = prepare(dataclasses.replace(config, tokenizer=str(tmp_path)))
    assert data.sources[0].manifest is not None
    assert data.sources[0].manifest.dtype == "uint32"
    assert data.train.tokens(0, 1).tolist() == [70_000]


@pytest.mark.parametrize("name", ["bpe", "bpe:", "bpe:many", "byte", "bpe:100"])
def test_an_unknown_tokenizer_is_refused(config, name):
    with pytest.raises(ConfigError, match="expected"):
        prepare(dataclasses.replace(config, tokenizer=name))


def test_a_prepared_folder_is_a_source_with_its_own_tokenizer(config, tmp_path):
    out = tmp_path / "out"
    first = prepare(dataclasses.replace(config, tokenizer="bpe:300"), out=out)
    again = prepare(DataConfig(path=str(out)))
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert again.fingerprint == first.fingerprint


def test_a_place_that_is_taken_is_refused(config, tmp_path):
    out = tmp_path / "out"
    prepare(config, out=out)
    assert prepare(config, out=out).train.num_documents == 27
    with pytest.raises(ConfigError, match="holds other data"):
        prepare(dataclasses.replace(config, validation_fraction=0.2), out=out)
    with pytest.raises(ConfigError, match="not empty"):
        prepare(config, out=tmp_path)
    with pytest.raises(ConfigError, match="one source"):
        prepare(DataConfig(path=str(out)), out=tmp_path / "other")


def test_a_mixture_keeps_its_sources_apart_and_shares_a_tokenizer(config, corpus, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("A book of one text. " * 200)
    mixture = {str(book): 1.0, str(corpus): 3.0}
    data = prepare(dataclasses.replace(config, mixture=mixture, tokenizer="bpe:300"))
    assert [(source.name, source.weight) for source in data.sources] == list(mixture.items())
    assert data.train.num_documents == 1 + 27
    assert data.train.num_tokens == sum(source.train.num_tokens for source in data.sources)
    assert data.tokenizer.encode("A book of one text.") != list(b"A book of one text.")
    assert [part["weight"] for part in data.manifest["sources"]] == [1.0, 3.0]
    json.dumps(data.manifest)
    reweighted = {str(book): 1.0, str(corpus): 2.0}
    other = prepare(dataclasses.replace(config, mixture=reweighted, tokenizer="bpe:300"))
    assert other.fingerprint != data.fingerprint


def test_prepared_folders_of_different_tokenizers_do_not_mix(config, corpus, tmp_path):
    prepare(config, out=tmp_path / "a")
    prepare(dataclasses.replace(config, tokenizer="bpe:300"), out=tmp_path / "b")
    mixture = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0}
    with pytest.raises(ConfigError, match="bpe:300 and bytes"):
        prepare(dataclasses.replace(config, mixture=mixture))
    with_text = {str(tmp_path / "b"): 1.0, str(corpus): 1.0}
    data = prepare(dataclasses.replace(config, mixture=with_text))
    assert data.tokenizer.name == "bpe:300"


def test_what_was_skipped_is_counted_and_told(config, corpus, caplog):
    (corpus / "empty.txt").write_text("")
    for number in range(5):
        (corpus / f"image{number}.png").write_bytes(b"\x89PNG")
    with caplog.at_level(logging.WARNING, "deltamoe"):
        (source,) = prepare(config).sources
    assert source.manifest is not None
    assert source.manifest.num_skipped == 6
    assert "image0.png: byte 0 is not UTF-8" in source.manifest.skipped
    assert [record.getMessage() for record in caplog.records] == [
        *(f"{corpus}: skipped image{n}.png: byte 0 is not UTF-8" for n in range(3)),
        f"{corpus}: skipped 2 more files; see its manifest",
    ]


def test_equal_documents_alone_cannot_be_split(tmp_path, config):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' * 5)
    with pytest.raises(DataError, match="all documents are equal"):
        prepare(dataclasses.replace(config, path=str(path)))
    assert os.listdir(tmp_path / "cache" / "data") == []


def test_a_broken_text_leaves_nothing_behind(tmp_path, config):
    path = tmp_path / "book.txt"
    path.write_bytes(b"words " * 100 + b"\xff")
    with pytest.raises(DataError, match=r"book\.txt: byte 600 is not UTF-8"):
        prepare(dataclasses.replace(config, path=str(path)))
    assert os.listdir(tmp_path / "cache" / "data") == []


def test_the_bpe_learns_from_the_training_text_alone(tmp_path, config, monkeypatch):
    path = tmp_path / "book.txt"
    path.write_text("abcabc " * 900 + "xyzxyz " * 100)
    seen = []
    train = BpeTokenizer.train
    monkeypatch.setattr(
        preparation.BpeTokenizer, "train", lambda texts, size: train(seen_of(texts, seen), size)
    )
    prepare(dataclasses.replace(config, path=str(path), tokenizer="bpe:260"))
    assert "".join(seen) == "abcabc " * 900


def seen_of(texts, seen):
    for text in texts:
        seen.append(text)
        yield text


def test_the_bpe_learns_from_a_bounded_text(config, monkeypatch):
    monkeypatch.setattr(preparation, "BPE_TRAINING_BYTES", 1000)
    done = []
    prepare(
        dataclasses.replace(config, tokenizer="bpe:300"),
        progress=lambda what, num_bytes, total: done.append((what, num_bytes)),
    )
    trained = [num_bytes for what, num_bytes in done if what == "training the tokenizer"]
    assert 1000 <= trained[-1] < 1500  # the document that crosses the bound is read to its end


def test_no_torch_is_imported():
    program = "import sys, deltamoe.data, deltamoe.cli.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
