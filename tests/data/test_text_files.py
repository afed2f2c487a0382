import os

import pytest

from deltamoe.data.text_files import TextFile, TextFiles, folder, walk
from deltamoe.errors import DataError


def read(source, fraction=0.1):
    return [(d.name, d.is_validation, "".join(d.pieces)) for d in source.documents(fraction)]


def test_a_file_is_one_text_with_its_end_held_out(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("abcdefghij" * 10, encoding="utf-8")
    source = TextFile(path)
    assert read(source) == [
        (str(path), False, "abcdefghij" * 9),
        (str(path), True, "abcdefghij"),
    ]
    assert source.num_bytes == 100


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"good\xffbad" * 9, "byte 4 is not UTF-8")]
)
def test_a_file_that_holds_no_text_is_an_error(tmp_path, content, message):
    path = tmp_path / "book.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(TextFile(path))
    assert str(path) in str(caught.value)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="regular file"):
        TextFile(tmp_path / "pipe")


def test_a_folder_is_read_in_the_order_of_its_paths(corpus):
    (corpus / "a").mkdir()
    (corpus / "a" / "z.py").write_text("x = 1\n")
    (corpus / ".git").mkdir()
    (corpus / ".git" / "config").write_text("hidden")
    (corpus / ".hidden").write_text("hidden")
    os.mkfifo(corpus / "pipe")
    documents = read(folder(corpus))
    assert [name for name, _, _ in documents] == [
        *(f"{number:02d}.txt" for number in range(30)),
        "a/z.py",
    ]
    assert documents[-1][2] == "x = 1\n"


def test_a_tenth_is_held_out_by_content_wherever_the_file_stands(corpus):
    first = {text: side for _, side, text in read(folder(corpus))}
    assert sum(side for _, side, _ in read(folder(corpus))) == 3
    for path in sorted(corpus.iterdir()):
        path.rename(path.with_name(f"renamed-{99 - int(path.stem)}.txt"))
    assert {text: side for _, side, text in read(folder(corpus))} == first


def test_what_is_no_text_is_skipped_and_listed(corpus):
    (corpus / "image.png").write_bytes(b"\x89PNG\r\n")
    (corpus / "empty.txt").write_bytes(b"")
    (corpus / "gone.txt").symlink_to(corpus / "nowhere")
    source = folder(corpus)
    assert len(read(source)) == 30
    assert source.skipped == [("empty.txt", "is empty"), ("image.png", "byte 0 is not UTF-8")]


def test_a_file_that_cannot_be_read_is_skipped():
    def refused():
        raise PermissionError(13, "Permission denied")

    source = TextFiles("texts", "texts", [("a", lambda: b"words"), ("b", refused)])
    assert source.skipped == [("b", "cannot be read: Permission denied")]


def test_nothing_left_is_an_error_that_says_why(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(DataError, match=r"1 files skipped\) image.png: byte 0 is not UTF-8"):
        folder(tmp_path)


def test_a_folder_of_one_file_is_cut_by_position(tmp_path):
    (tmp_path / "book.txt").write_text("abcdefghij" * 10)
    assert [side for _, side, _ in read(folder(tmp_path))] == [False, True]


def test_duplicates_go_if_asked_and_share_a_side_if_not(corpus):
    texts = [(path.name, path.read_bytes) for path in sorted(corpus.iterdir())]
    twice = [*texts, *((f"copy of {name}", reader) for name, reader in texts)]
    alone = TextFiles("texts", "texts", twice, has_duplicates=False)
    assert [name for name, _, _ in read(alone)] == [name for name, _ in texts]
    sides = {}
    for _, side, text in read(TextFiles("texts", "texts", twice)):
        assert sides.setdefault(text, side) == side


def test_any_change_changes_the_hash(corpus):
    before = folder(corpus).sha256
    assert folder(corpus).sha256 == before
    (corpus / "00.txt").rename(corpus / "0.txt")
    renamed = folder(corpus).sha256
    (corpus / "0.txt").write_text("other words")
    assert len({before, renamed, folder(corpus).sha256}) == 3


def test_a_text_that_changes_while_being_read_is_an_error(corpus):
    source = folder(corpus)
    (corpus / "07.txt").write_text("other words")
    with pytest.raises(DataError, match=r"07\.txt: it changed while being read"):
        read(source)


def test_walk_keeps_out_of_folders_it_is_told_of(corpus):
    for name in ("tests", "__pycache__", "kept"):
        (corpus / name).mkdir()
        (corpus / name / "a.py").write_text("1")
    found = walk(corpus, ending=".py", without=frozenset({"tests"}))
    assert found == [corpus / "kept" / "a.py"]


def test_a_cache_below_the_folder_is_not_read(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "CACHEDIR.TAG").write_text(
        "Signature: 8a477f597d28d172789f06886806bc55\n"
    )
    (tmp_path / "cache" / "tokenizer.json").write_text("{}")
    assert [file.name for file in walk(tmp_path)] == ["a.txt"]
