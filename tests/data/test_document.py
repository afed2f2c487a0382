import hashlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamoe.data import document
from deltamoe.data.document import hash_cut, hash_prefix, read_pieces, split_by_position
from deltamoe.errors import DataError
from deltamoe.tokenizer import BpeTokenizer

texts = st.text(alphabet=st.sampled_from("ab é狐🙂\n\t "), max_size=200)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(document, "PIECE_BYTES", 16)


@given(text=texts)
def test_pieces_join_to_the_text_and_are_small(text):
    data = text.encode()
    pieces = list(read_pieces(io.BytesIO(data), 0, len(data), "text"))
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= 16 for piece in pieces)


def test_a_line_without_end_is_read_in_pieces():
    data = "é".encode() * 1000
    pieces = list(read_pieces(io.BytesIO(data), 0, len(data), "text"))
    assert "".join(pieces) == "é" * 1000
    assert max(len(piece.encode()) for piece in pieces) <= 16


def test_a_cut_after_a_line_leaves_the_tokens_as_they_are():
    text = "def quick(fox):\n    return fox\n\nwords, words.\nmore words 12345\n" * 5
    bpe = BpeTokenizer.train([text] * 3, 300)
    data = text.encode()
    document.PIECE_BYTES = 64
    pieces = list(read_pieces(io.BytesIO(data), 0, len(data), "text"))
    assert len(pieces) > 4
    assert [token for piece in pieces for token in bpe.encode(piece)] == bpe.encode(text)


@pytest.mark.parametrize("offset", [0, 5, 15, 16, 100])
def test_bytes_that_are_no_text_are_named_by_file_and_offset(offset):
    data = bytearray(b"abcdefg\n" * 20)
    data[offset] = 0xFF
    with pytest.raises(DataError, match=rf"book\.txt: byte {offset} is not UTF-8"):
        list(read_pieces(io.BytesIO(data), 0, len(data), "book.txt"))


def test_a_character_torn_at_the_end_of_the_file_is_named():
    data = b"abc" + "é".encode()[:1]
    with pytest.raises(DataError, match="byte 3 "):
        list(read_pieces(io.BytesIO(data), 0, len(data), "book.txt"))


def test_a_file_that_became_shorter_is_an_error():
    with pytest.raises(DataError, match="ended at byte 20, expected 40"):
        list(read_pieces(io.BytesIO(b"x" * 20), 0, 40, "book.txt"))


def split(data, fraction):
    return [
        (part.is_validation, "".join(part.pieces))
        for part in split_by_position(io.BytesIO(data), len(data), "text", fraction)
    ]


def test_a_file_is_cut_where_nano_gpt_cuts_it():
    data = bytes(range(32, 127)) * 50
    n = len(data)
    assert split(data, 0.1) == [
        (False, data[: int(n * 0.9)].decode()),
        (True, data[int(n * 0.9) :].decode()),
    ]


@given(text=texts, fraction=st.floats(0.01, 0.99))
def test_the_cut_falls_between_characters(text, fraction):
    data = text.encode()
    try:
        parts = split(data, fraction)
    except DataError:
        assert len(data) < 200
        return
    (_, train), (_, validation) = parts
    assert train + validation == text
    # never more than the three bytes by which a character can reach across the cut
    assert 0 <= int(len(data) * (1 - fraction)) - len(train.encode()) <= 3


def test_a_text_too_short_to_cut_is_an_error():
    with pytest.raises(DataError, match="too few"):
        split(b"a", 0.5)


@given(
    hashes=st.lists(st.integers(0, 50), min_size=2).filter(lambda hashes: len(set(hashes)) > 1),
    fraction=st.floats(0.01, 0.99),
)
def test_both_sides_of_a_split_by_hash_hold_something(hashes, fraction):
    cut = hash_cut(hashes, fraction)
    held_out = {value for value in hashes if value <= cut}
    assert 0 < len(held_out) < len(set(hashes))
    assert abs(len(held_out) - fraction * len(set(hashes))) <= 1


def test_a_hash_is_compared_by_its_first_bits():
    digest = hashlib.sha256(b"text").digest()
    assert hash_prefix(digest) == int(digest.hex()[:16], 16)
