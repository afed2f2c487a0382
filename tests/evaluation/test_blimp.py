import json
import zipfile

import pytest
import torch

from deltamoe.errors import DataError
from deltamoe.evaluation.blimp import MinimalPair, blimp_accuracy, read_blimp
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
LINE = json.dumps({"sentence_good": "The cat sits.", "sentence_bad": "The cat sit.", "UID": "x"})


def test_a_folder_and_a_zip_hold_the_same_sets(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "agreement.jsonl").write_text(LINE + "\n" + LINE + "\n")
    (folder / "readme.txt").write_text("not a set")
    archive = tmp_path / "blimp.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(folder / "agreement.jsonl", "data/agreement.jsonl")
        file.write(folder / "readme.txt", "data/readme.txt")
        file.writestr("__MACOSX/data/._agreement.jsonl", b"\x00\xff")
    expected = {"agreement": [MinimalPair("The cat sits.", "The cat sit.")] * 2}
    assert read_blimp(folder) == read_blimp(archive) == expected


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"sentence_good": "a", "sentence_bad": 1}'])
def test_a_broken_line_is_named(tmp_path, line):
    (tmp_path / "agreement.jsonl").write_text(LINE + "\n" + line + "\n")
    with pytest.raises(DataError, match="agreement, line 2"):
        read_blimp(tmp_path)


def test_no_sets(tmp_path):
    with pytest.raises(DataError, match="found none"):
        read_blimp(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        read_blimp(tmp_path / "missing.zip")
    (tmp_path / "broken.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="neither a folder nor a whole zip"):
        read_blimp(tmp_path / "broken.zip")


def test_accuracy_by_definition():
    model = tiny_model(torch.float64, num_layers=2)
    words = ["cat", "a dog", "sits", "é", "the longest of these sentences", "x"]
    pairs = [MinimalPair(good, bad) for good in words for bad in words if good != bad]

    def total(sentence):
        ids = torch.tensor([[TOKENIZER.end_id, *TOKENIZER.encode(sentence)]])
        with torch.no_grad():
            logits, _ = model(ids[:, :-1])
        return logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().item()

    totals = {word: total(word) for word in words}
    won = sum(totals[pair.good] > totals[pair.bad] for pair in pairs[:20])
    assert 0 < won < 20
    assert blimp_accuracy(model, TOKENIZER, pairs[:20], rows=7) == won / 20
