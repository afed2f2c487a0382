import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltamoe.tokenizer import ByteTokenizer, StreamDecoder, Tokenizer


@given(st.binary(max_size=40))
def test_streamed_pieces_join_to_the_decoded_text(data: bytes):
    tokenizer = ByteTokenizer()
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token_id) for token_id in data]
    assert "".join(pieces) + decoder.finish() == tokenizer.decode(list(data))


def test_a_character_is_held_back_until_it_is_whole():
    decoder = StreamDecoder(ByteTokenizer())
    assert [decoder.push(byte) for byte in "né🙂".encode()] == ["n", "", "é", "", "", "", "🙂"]
    assert decoder.finish() == ""


def test_a_torn_character_ends_as_a_replacement_and_the_decoder_starts_anew():
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.push("é".encode()[0]) == ""
    assert decoder.finish() == "\ufffd"
    assert decoder.push(ord("a")) == "a"


def test_the_border_shows_nothing():
    decoder = StreamDecoder(ByteTokenizer())
    assert decoder.push(256) == ""


def test_a_word_of_several_bytes_may_end_in_mid_character(bpe):
    decoder = StreamDecoder(bpe)
    text = "schnell 狐は速い 🙂"
    assert "".join(map(decoder.push, bpe.encode(text))) + decoder.finish() == text


@pytest.mark.parametrize("make", [ByteTokenizer, lambda: None])
def test_the_protocol_tells_a_tokenizer_from_something_else(make, bpe):
    assert isinstance(bpe, Tokenizer)
    assert isinstance(make(), Tokenizer) == (make is ByteTokenizer)
