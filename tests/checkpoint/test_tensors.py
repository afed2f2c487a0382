"""Tensors there and back, bit for bit, and every disagreement named."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltamoe.checkpoint.durable import replace_file
from deltamoe.checkpoint.header import TensorSpec, read_header
from deltamoe.checkpoint.tensors import (
    DTYPES,
    map_tensor,
    read_tensors,
    require_finite,
    write_pieces,
    write_tensors,
)
from deltamoe.errors import CheckpointError


def some_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {f"t.{code}": torch.randint(0, 2, (3, 5)).to(dtype) for code, dtype in DTYPES.items()}
    return tensors | {
        "random": torch.randn(7, 3),
        "strided": torch.randn(6, 4).t()[::2],
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.safetensors"


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_there_and_back(path: Path) -> None:
    write_tensors(path, some_tensors(), {"format": "1"})
    assert_equal(read_tensors(path), some_tensors())
    assert_equal(read_tensors(path, expected=some_tensors()), some_tensors())


def test_the_library_reads_what_we_write_and_we_read_what_it_writes(path: Path) -> None:
    tensors = {name: tensor.detach().contiguous() for name, tensor in some_tensors().items()}
    write_tensors(path, tensors, {"b": "é", "a": '"{'})
    assert_equal(load_file(path), tensors)
    theirs = path.with_name("theirs.safetensors")
    save_file(tensors, theirs, {"a": "b"})
    assert_equal(read_tensors(theirs), tensors)


def test_the_same_tensors_give_the_same_bytes(path: Path) -> None:
    metadata = {str(i): str(i) for i in range(9)}
    write_tensors(path, some_tensors(), metadata)
    first = path.read_bytes()
    path.unlink()
    backwards = dict(reversed(some_tensors().items()))
    write_tensors(path, backwards, dict(reversed(metadata.items())))
    assert path.read_bytes() == first


def test_ordinary_permissions(path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_tensors(path, {"a": torch.zeros(1)})
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_reading_is_private_and_outlives_the_file(path: Path) -> None:
    write_tensors(path, {"a": torch.zeros(1000)})
    content = path.read_bytes()
    tensor = read_tensors(path)["a"]
    tensor += 1
    assert path.read_bytes() == content
    path.unlink()
    assert torch.equal(tensor, torch.ones(1000))


@pytest.mark.parametrize("name", ["", "a b", "../a", "a" * 201, "a\n"])
def test_a_name_that_could_not_be_read_is_not_written(name: str, path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        write_tensors(path, {name: torch.zeros(1)})
    assert not path.exists()


def test_a_file_that_exists_is_not_overwritten(path: Path) -> None:
    """A reader may have mapped it, and would die of the truncation."""
    write_tensors(path, {"a": torch.ones(1000)})
    mapped = read_tensors(path, check_finite=False)
    with pytest.raises(FileExistsError):
        write_tensors(path, {"a": torch.zeros(1)})
    replace_file(path, lambda new: write_tensors(new, {"a": torch.zeros(1)}))
    assert torch.equal(mapped["a"], torch.ones(1000))
    assert torch.equal(read_tensors(path)["a"], torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": torch.zeros(2)}, "'b' is missing"),
        ({"a": torch.zeros(3)}, r"'a' has shape \[2, 3\]; expected \[3\]"),
        ({"a": torch.zeros(3, 2)}, r"'a' has shape \[2, 3\]; expected \[3, 2\]"),
        ({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, "'a' is F32; expected BF16"),
        ({"a": torch.zeros(2, 3, dtype=torch.int32)}, "'a' is F32; expected I32"),
    ],
)
def test_a_disagreement_names_the_tensor(change: dict, message: str, path: Path) -> None:
    write_tensors(path, {"a": torch.zeros(2, 3)})
    with pytest.raises(CheckpointError, match=message) as raised:
        read_tensors(path, expected={"a": torch.zeros(2, 3)} | change)
    assert str(path) in str(raised.value)


def test_an_unknown_tensor_is_an_error(path: Path) -> None:
    write_tensors(path, {"a": torch.zeros(2), "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="'extra'"):
        read_tensors(path, expected={"a": torch.zeros(2, device="meta")})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(value: float, dtype: torch.dtype, path: Path) -> None:
    bad = torch.ones(5, 7, dtype=dtype)
    bad[3, 2] = value
    write_tensors(path, {"good": torch.ones(3), "bad": bad})
    with pytest.raises(CheckpointError, match="'bad': 1 of 35 elements are NaN or infinite"):
        read_tensors(path)
    assert len(read_tensors(path, check_finite=False)) == 2


def test_the_largest_numbers_are_finite() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
        require_finite(
            {"a": largest, "b": -largest, "c": torch.ones(2, dtype=torch.int64)}, source="x"
        )


def test_a_dtype_we_never_write_is_named(path: Path, build: Callable[..., bytes]) -> None:
    entry = {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}
    path.write_bytes(build({"a": entry}, bytes(1)))
    with pytest.raises(CheckpointError, match="'a' is F8_E4M3"):
        read_tensors(path)


def test_pieces_are_what_a_whole_tensor_would_be(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(7, 3), "b": torch.randn(5).bfloat16()}
    write_tensors(tmp_path / "whole", tensors, {"x": "y"})
    specs = [TensorSpec("a", "F32", (7, 3)), TensorSpec("b", "BF16", (5,))]
    write_pieces(tmp_path / "pieces", specs, lambda spec: tensors[spec.name].split(2), {"x": "y"})
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    "pieces",
    [[], [torch.ones(6, 3)], [torch.ones(7, 3), torch.ones(1)], [torch.ones(7, 3).double()]],
    ids=["none", "too few", "too many", "another dtype"],
)
def test_pieces_that_are_not_their_spec(pieces: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="TensorSpec"):
        write_pieces(tmp_path / "x", [TensorSpec("a", "F32", (7, 3))], lambda _: pieces)


def test_a_file_that_shrank_since_its_header_was_read(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.ones(100_000), "b": torch.ones(100_000)})
    header = read_header(tmp_path / "x")
    assert torch.equal(map_tensor(header, "b"), torch.ones(100_000))
    with (tmp_path / "x").open("r+b") as file:
        file.truncate(500_000)
    with pytest.raises(CheckpointError, match="cannot be read"):
        map_tensor(header, "b")


def test_writing_to_a_mapped_tensor_stays_in_memory(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x", {"a": torch.ones(9)})
    before = (tmp_path / "x").read_bytes()
    map_tensor(read_header(tmp_path / "x"), "a").zero_()
    assert (tmp_path / "x").read_bytes() == before
