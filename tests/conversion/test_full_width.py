"""Two full-width layers of the 48B, 5.5 GB in bf16: they load, run and go out and in again."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import deltamoe
from deltamoe.checkpoint.folder import CONFIG, WEIGHTS, write_new_folder
from deltamoe.checkpoint.header import TensorSpec
from deltamoe.checkpoint.tensors import DTYPES, write_pieces
from deltamoe.config import RunConfig, preset, to_json
from deltamoe.conversion import open_source, write_hf
from deltamoe.plan import weights

CUT = replace(preset("kimi-linear-48b-a3b").model, num_layers=2, mixers=("kda", "mla"))


def save_cut(folder: Path) -> None:
    """Weights of the right size, the same few million numbers again and again."""
    drawn = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    specs = [TensorSpec(w.name, "F32" if w.is_fp32 else "BF16", w.shape) for w in weights(CUT)]
    specs.sort(key=lambda spec: spec.dtype != "F32")

    def pieces(spec: TensorSpec) -> Iterator[Tensor]:
        numbers = drawn.to(DTYPES[spec.dtype])
        if spec.name.endswith("norm.weight"):
            numbers = torch.ones_like(numbers)
        left = spec.num_bytes // numbers.itemsize
        while left:
            yield numbers[: min(left, len(numbers))]
            left -= min(left, len(numbers))

    def fill(path: Path) -> None:
        (path / CONFIG).write_text(to_json(RunConfig(model=CUT)))
        write_pieces(path / WEIGHTS, specs, pieces)

    write_new_folder(folder, fill, expected_bytes=sum(spec.num_bytes for spec in specs))


@pytest.mark.slow
def test_a_full_width_cut_loads_runs_and_is_exported(tmp_path: Path) -> None:
    save_cut(tmp_path / "ours")
    ids = torch.randint(0, CUT.vocab_size, (1, 70))
    with torch.no_grad():
        expected, state = deltamoe.load(tmp_path / "ours")(ids)
    assert expected.isfinite().all()
    assert state.nbytes > 0
    write_hf(open_source(tmp_path / "ours"), tmp_path / "hf")
    folder = deltamoe.checkpoint.published.open_published(tmp_path / "hf")
    assert len(folder.header.tensors) == 3 + 2 * 2 + 15 + 3 + 5 + 2 + 3 + 3 * 256
    assert len({header.path for header, _ in folder.places.values()}) == 2
    loaded = deltamoe.load(tmp_path / "hf")
    assert loaded.config == replace(CUT, mixers=None, mla_every=2)
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], expected)
