import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamoe.errors import DataError
from deltamoe.tokenizer import ByteTokenizer, load_tokenizer

TOKENIZER = ByteTokenizer()


@given(st.text())
def test_every_text_comes_back(text: str):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode_bytes(ids) == text.encode()
    assert TOKENIZER.encode_array(text).tolist() == ids
    assert TOKENIZER.encode_batch([text, text]) == [ids, ids]
    assert TOKENIZER.end_id not in ids


def test_the_border_decodes_to_nothing():
    assert TOKENIZER.decode([256, 104, 256, 105, 256]) == "hi"
    assert TOKENIZER.decode([]) == ""


@pytest.mark.parametrize("ids", [[257], [-1], [104, 1 << 40], np.array([300])])
def test_an_unknown_id_is_named(ids):
    with pytest.raises(DataError, match=str(ids[-1])):
        TOKENIZER.decode_bytes(ids)


def test_a_lone_surrogate_is_no_text():
    with pytest.raises(DataError, match=r"U\+D800\) at character 2"):
        TOKENIZER.encode("ab\ud800")


def test_it_is_read_back(tmp_path):
    TOKENIZER.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteTokenizer)
    assert again.fingerprint == TOKENIZER.fingerprint
