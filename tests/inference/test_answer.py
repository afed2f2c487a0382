import itertools

import pytest

from deltamoe.errors import ConfigError
from deltamoe.inference.answer import Answer, StopFilter
from deltamoe.tokenizer import ByteTokenizer
from tests.kimi_vocabulary import kimi_tokenizer

TOKENIZER = ByteTokenizer()


def write(text, *, max_tokens=1000, stop=()):
    """The answer and its pieces, when the model draws the bytes of ``text`` and then the border."""
    answer = Answer(TOKENIZER, max_tokens=max_tokens, stop=stop)
    pieces = []
    for token_id in [*text.encode(), TOKENIZER.end_id]:
        if answer.finish_reason is None:
            pieces.append(answer.push(token_id))
    return answer, pieces


def test_the_border_ends_the_text_and_is_no_part_of_it():
    answer, pieces = write("abc")
    assert (answer.text, answer.finish_reason) == ("abc", "end")
    assert answer.ids == list(b"abc")
    assert "".join(pieces) == "abc"


def test_length_ends_the_text():
    answer, _ = write("abcdef", max_tokens=4)
    assert (answer.text, answer.finish_reason) == ("abcd", "length")
    assert Answer(TOKENIZER, max_tokens=0, stop=()).finish_reason == "length"


def test_characters_come_whole():
    answer, pieces = write("é🙂e\N{COMBINING ACUTE ACCENT}")
    assert [piece for piece in pieces if piece] == ["é", "🙂", "e", "\N{COMBINING ACUTE ACCENT}"]
    assert answer.text == "é🙂e\N{COMBINING ACUTE ACCENT}"


def test_a_character_cut_off_is_marked():
    answer, _ = write("ab🙂", max_tokens=4)
    assert (answer.text, answer.finish_reason) == ("ab�", "length")


def test_a_stop_string_across_tokens_is_held_back_and_left_out():
    answer, pieces = write("yes.\nUser: no", stop=("\nUser:",))
    assert (answer.text, answer.finish_reason) == ("yes.", "stop")
    assert "".join(pieces) == "yes."
    assert bytes(answer.ids) == b"yes.\nUser:"


def test_text_held_back_in_vain_is_let_go():
    answer, pieces = write("a\nUse it\nUs", stop=("\nUser:",))
    assert answer.text == "".join(pieces) == "a\nUse it\nUs"
    assert answer.finish_reason == "end"


def test_a_stop_string_of_split_characters():
    answer, _ = write("ab🙂cd", stop=("🙂",))
    assert (answer.text, answer.finish_reason) == ("ab", "stop")


@pytest.mark.parametrize(
    ("stop", "before"),
    [
        (("cd",), "ab"),
        (("cd", "de"), "ab"),
        (("abcdefgh", "cd"), "ab"),  # completed first, though the other began earlier
        (("bcd", "cd", "d"), "a"),  # completed together: the longest
        (("xyz",), "abcdef"),
        (("ab",), ""),
        (("aab", "abb"), "abcdef"),
    ],
)
def test_stop_does_not_depend_on_how_the_text_is_cut(stop, before):
    text = "abcdef"
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        stop_filter, shown, piece = StopFilter(stop), "", ""
        for character, is_cut in zip(text, [*cuts, True], strict=True):
            piece += character
            if is_cut and not stop_filter.is_stopped:
                shown, piece = shown + stop_filter.push(piece), ""
                assert before.startswith(shown)  # nothing is ever taken back
        assert shown + stop_filter.finish() == before


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="stop"):
        StopFilter(("x", ""))


@pytest.mark.parametrize("name", ["<|im_end|>", "[EOS]", "[BOS]"])
def test_each_stop_id_ends_the_text_unseen(name):
    tokenizer = kimi_tokenizer()
    answer = Answer(tokenizer, max_tokens=10, stop=())
    answer.push(ord("a"))
    answer.push(tokenizer.special_ids[name])
    assert (answer.text, answer.ids, answer.finish_reason) == ("a", [97], "end")
