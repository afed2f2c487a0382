import json

import pytest

from deltamoe.data import prepare
from deltamoe.data.manifest import MANIFEST, read_manifest, write_manifest
from deltamoe.errors import DataError


@pytest.fixture
def folder(config, tmp_path):
    prepare(config, out=tmp_path / "prepared")
    return tmp_path / "prepared"


def test_it_is_read_back(folder, tmp_path):
    manifest = read_manifest(folder)
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    assert json.loads((folder / MANIFEST).read_text())["format"] == 1


def put(*path):
    def change(data):
        *parents, key, value = path
        for parent in parents:
            data = data[parent]
        data[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", 2), "newer deltamoe: format 2"),
        (put("format", None), "format"),
        (lambda data: data.pop("train"), "KeyError"),
        (put("more", 1), "more"),
        (put("dtype", "float64"), "uint16 or uint32"),
        (put("vocab_size", 256), "end_id 256"),
        (put("vocab_size", -1), "whole number"),
        (put("validation_fraction", "a"), "no float"),
        (put("train", []), "no dict"),
        (put("train", "num_tokens", 5), "do not add up"),
        (put("train", "num_documents", 0), "0 documents"),
        (put("train", "shards", 0, "file", "../../etc/passwd"), "expected train-00000.bin"),
        (put("train", "shards", 0, "num_bytes", 0), "0 bytes"),
        (put("train", "shards", 0, "sha256", None), "no str"),
        (put("train", "document_starts", "file", "x"), "expected train.documents.npy"),
        (put("skipped", [7]), "no str"),
        (put("source", 7), "no str"),
    ],
)
def test_a_damaged_manifest_is_refused_by_name(folder, change, message):
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))
    with pytest.raises(DataError, match=message) as caught:
        read_manifest(folder)
    assert str(folder / MANIFEST) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff"])
def test_a_file_that_is_no_manifest_is_refused(folder, content):
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(DataError):
        read_manifest(folder)
