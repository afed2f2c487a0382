"""A published instruct folder as other programs have it, made without training."""

from dataclasses import replace
from pathlib import Path

from deltamoe.checkpoint import write_checkpoint, write_tensors
from deltamoe.config import RunConfig, to_json
from deltamoe.conversion.hf import write_hf
from deltamoe.conversion.source import open_source
from deltamoe.model import HybridLM
from deltamoe.testing import tiny_config
from deltamoe.tokenizer import ChatTemplate
from tests.kimi_vocabulary import kimi_tokenizer


def save_published_folder(
    folder: Path,
    *,
    vocab_size: int = 400,
    chat_template: ChatTemplate | None = None,
    files: int = 1,
) -> Path:
    """A tiny model with Kimi's vocabulary, in one file or in several with an index.

    ``vocab_size`` is larger than the tokenizer's 386 ids, as tables of embeddings often are.
    """
    config = tiny_config(vocab_size=vocab_size, num_layers=2, mixers=("kda", "mla"))
    config = replace(
        config, kda=replace(config.kda, num_heads=3, num_value_heads=3, value_dim=8, decay_rank=8)
    )
    model = HybridLM(config)
    model.initialize(0)
    run = folder / "run"
    run.mkdir()
    contents = {
        "model.safetensors": lambda path: write_tensors(path, model.state_dict()),
        "config.json": lambda path: path.write_text(to_json(RunConfig(model=config))),
    }
    checkpoint = write_checkpoint(run, 7, contents, expected_bytes=1 << 20)
    source = replace(open_source(checkpoint.path), tokenizer=kimi_tokenizer(), turns=chat_template)
    out = folder / "Tiny-Instruct"
    write_hf(source, out, file_bytes=(1 << 40) if files == 1 else 60_000)
    return out
