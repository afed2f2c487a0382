"""Parity with mlx-lm on the folders we write; `make test-mlx` gives it its environment."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from deltamoe.conversion import open_source, write_hf
from tests.conversion.gguf.exported import GEOMETRIES, save, tiny

PYTHON = Path(__file__).parents[2] / "build" / "mlx" / "bin" / "python"
SCRIPT = Path(__file__).with_name("mlx_logits.py")
PROMPT = [256, *np.random.default_rng(5).integers(0, 256, 30).tolist()]
CONTINUED = 12
# mlx-lm asks for the keys of experts, and the published format has none to give without experts
WITH_EXPERTS = [name for name, config in GEOMETRIES.items() if config.moe is not None]

pytestmark = [
    pytest.mark.mlx,
    pytest.mark.skipif(not PYTHON.exists(), reason="needs mlx-lm in build/mlx: make test-mlx"),
]


@pytest.mark.parametrize("geometry", WITH_EXPERTS)
def test_mlx_lm_computes_the_same(geometry: str, tmp_path: Path) -> None:
    model = tiny(GEOMETRIES[geometry])
    write_hf(open_source(save(tmp_path / "run", model)), tmp_path / "hf")
    out = tmp_path / "answer.npz"
    request = [str(tmp_path / "hf"), json.dumps(PROMPT), str(CONTINUED), str(out)]
    done = subprocess.run(
        [PYTHON, SCRIPT, *request], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    answer = np.load(out)
    with torch.inference_mode():
        expected, state = model(torch.tensor([PROMPT]))
        chosen = [int(expected[0, -1].argmax())]
        while len(chosen) < CONTINUED:
            logits, state = model(torch.tensor([chosen[-1:]]), state)
            chosen.append(int(logits[0, -1].argmax()))
    print(f"{geometry}: {np.abs(answer['logits'] - expected[0].numpy()).max():.2e}")
    # fp32 on both sides, summed in another order; logits reach 5
    np.testing.assert_allclose(answer["logits"], expected[0].numpy(), rtol=0, atol=1e-4)
    assert answer["continued"].tolist() == chosen
