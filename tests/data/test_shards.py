import numpy as np
import pytest

from deltamoe.data import open_prepared, prepare, shards
from deltamoe.errors import DataError

SPLITS = ("train", "validation")


@pytest.fixture
def folder(config, tmp_path, monkeypatch):
    """A prepared folder of several shards."""
    monkeypatch.setattr(shards, "SHARD_TOKENS", 1000)
    prepare(config, out=tmp_path / "prepared")
    return tmp_path / "prepared"


def test_a_split_may_have_several_shards(folder, config):
    files = sorted(path.name for path in folder.glob("train-*.bin"))
    assert len(files) > 3
    assert files[0] == "train-00000.bin"
    assert (folder / files[0]).stat().st_size == 2000
    many = open_prepared(folder, verify=True)
    shards.SHARD_TOKENS = 1 << 28
    one = prepare(config)
    for split in SPLITS:
        a, b = getattr(many, split), getattr(one, split)
        assert a.tokens(0, a.num_tokens).tolist() == b.tokens(0, b.num_tokens).tolist()


@pytest.mark.parametrize("name", ["train-00001.bin", "train.documents.npy", "validation-00000.bin"])
@pytest.mark.parametrize("size", [0, 10, -1])
def test_a_truncated_file_is_named_with_its_size(folder, name, size):
    path = folder / name
    data = path.read_bytes()[:size]
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{name}: ends at byte {len(data):,}, expected"):
        open_prepared(folder)


def test_a_missing_or_linked_shard_is_named(folder, tmp_path):
    path = folder / "train-00001.bin"
    path.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train-00001\.bin: no such file"):
        open_prepared(folder)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="leaves its folder"):
        open_prepared(folder)


def test_an_altered_shard_is_found_on_request(folder):
    path = folder / "train-00002.bin"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    open_prepared(folder)
    with pytest.raises(DataError, match=r"train-00002\.bin: its SHA-256"):
        open_prepared(folder, verify=True)


def test_an_id_outside_the_vocabulary_is_named_when_it_is_read(folder):
    path = folder / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[100:102] = (300).to_bytes(2, "little")
    path.write_bytes(data)
    stream = open_prepared(folder).train
    with pytest.raises(DataError, match=r"train-00001\.bin: token id 300 at byte 100"):
        stream.tokens(0, stream.num_tokens)


@pytest.mark.parametrize(
    "change",
    [
        lambda starts: starts[::-1],
        lambda starts: starts + np.uint64(1),
        lambda starts: starts.astype(np.int64),
        lambda starts: np.where(np.arange(len(starts)) == 3, 1 << 60, starts).astype(np.uint64),
        lambda starts: starts.reshape(1, -1),
    ],
)
def test_wrong_document_starts_are_refused(folder, change):
    path = folder / "train.documents.npy"
    np.save(path, change(np.load(path)))
    with pytest.raises(DataError, match=r"train\.documents\.npy"):
        open_prepared(folder)


def test_a_file_of_objects_is_never_unpickled(folder):
    path = folder / "train.documents.npy"
    size = path.stat().st_size
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    path.write_bytes(path.read_bytes().ljust(size, b"\0")[:size])
    with pytest.raises(DataError, match="not an array of document starts"):
        open_prepared(folder)
