"""A run folder as training leaves it, made without training."""

import json
from pathlib import Path

from deltamoe.checkpoint import write_checkpoint, write_run_config, write_tensors
from deltamoe.config import DataConfig, RunConfig, to_json
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer

TEXT = "".join(f"def f{i}(x{i}):\n    return x{i} * {i % 7}  # é🙂\n\n" for i in range(60))


def save_run(folder: Path, *, step: int = 3) -> Path:
    """A tiny model, a text file it might have been trained on, and a checkpoint at ``step``."""
    text = folder / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    model = tiny_model(num_layers=2)
    data = DataConfig(
        path=str(text), context=32, validation_fraction=0.25, cache=str(folder / "cache")
    )
    config = RunConfig(model=model.config, data=data)
    state = json.dumps({"format": 1, "step": step, "record": {"validation_bits_per_byte": 7.5}})
    run = folder / "run"
    run.mkdir()
    write_run_config(run, config)
    write_checkpoint(
        run,
        step,
        {
            "model.safetensors": lambda path: write_tensors(path, model.state_dict()),
            "train_state.json": lambda path: path.write_text(state),
            "config.json": lambda path: path.write_text(to_json(config)),
            "tokenizer.json": lambda path: ByteTokenizer().save(path.parent),
        },
        expected_bytes=1 << 20,
    )
    return run
