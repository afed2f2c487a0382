"""What is public is what is listed, and importing it is free."""

import subprocess
import sys

import deltamoe

PUBLIC = {
    *("DeltamoeError", "Engine", "HybridLM", "ModelConfig", "ModelState", "Request", "RunConfig"),
    *("__version__", "generate", "load", "load_config", "load_tokenizer", "stream", "trace"),
}


def test_the_list_is_the_truth() -> None:
    assert set(deltamoe.__all__) == PUBLIC
    assert set(dir(deltamoe)) == PUBLIC
    for name in PUBLIC:
        assert getattr(deltamoe, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(deltamoe, "train_everything")


def test_import_is_free() -> None:
    code = "import sys, deltamoe; sys.exit(any(m in sys.modules for m in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_operators_contract() -> None:
    from inspect import signature

    from deltamoe.ops.kda import kda_chunk, kda_recurrent

    tensors = ["q", "k", "v", "log_decay", "beta", "memory"]
    for function, options in (
        (kda_recurrent, {"cu_seqlens"}),
        (kda_chunk, {"cu_seqlens", "chunk_size"}),
    ):
        parameters = signature(function).parameters
        assert list(parameters)[:6] == tensors
        assert parameters["memory"].default is None
        assert options <= set(parameters)
    assert signature(kda_chunk).parameters["chunk_size"].default == 64
