"""The form of a conversation survives every conversion between folders."""

from pathlib import Path

from deltamoe.conversion import convert
from deltamoe.tokenizer import ChatTemplate, load_tokenizer, read_chat_template
from tests.published_folder import save_published_folder


def test_turns_come_through_there_and_back(tmp_path: Path) -> None:
    turns = ChatTemplate(default_system="You answer in few words.")
    published = save_published_folder(tmp_path, chat_template=turns)
    native, again = tmp_path / "native", tmp_path / "again"
    convert(published, native, to="deltamoe")
    convert(native, again, to="hf")
    for folder in (published, native, again):
        assert read_chat_template(folder, load_tokenizer(folder)) == turns, folder


def test_a_base_model_has_no_turns(tmp_path: Path) -> None:
    published = save_published_folder(tmp_path)
    native = tmp_path / "native"
    convert(published, native, to="deltamoe")
    assert read_chat_template(native, load_tokenizer(native)) is None
