import json

import pytest

from deltamoe.data import PreparedData, is_prepared, open_prepared, prepare
from deltamoe.errors import DataError
from deltamoe.tokenizer import BpeTokenizer


def test_texts_in_memory():
    data = PreparedData.in_memory(["hello", "wörld"], ["held out"])
    assert data.train.tokens(0, 6).tolist() == [256, *b"hello"]
    assert data.train.num_bytes == 11
    assert data.validation.num_documents == 1
    assert json.loads(json.dumps(data.manifest)) == data.manifest
    other = PreparedData.in_memory(["hello", "world"], ["held out"])
    assert other.fingerprint != data.fingerprint


def test_a_folder_tells_what_it_is(config, corpus, tmp_path):
    prepare(config, out=tmp_path / "out")
    assert is_prepared(tmp_path / "out")
    assert not is_prepared(corpus)
    assert not is_prepared(tmp_path / "nowhere")


def test_another_tokenizer_in_the_folder_is_noticed(config, tmp_path):
    prepare(config, out=tmp_path / "out")
    BpeTokenizer.train(["a"], 300).save(tmp_path / "out")
    with pytest.raises(DataError, match="not the tokenizer that made these shards"):
        open_prepared(tmp_path / "out")
