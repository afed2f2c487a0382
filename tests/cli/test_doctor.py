import importlib.metadata
import json

import pytest

from deltamoe.cli import main


def test_the_report_is_of_this_machine(capsys):
    torch = pytest.importorskip("torch")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"]["version"] == torch.__version__
    assert report["torch"]["threads"] == torch.get_num_threads()
    assert len(report["torch"]["cuda"]) == (
        torch.cuda.device_count() if torch.cuda.is_available() else 0
    )
    assert report["packages"]["click"]["version"] == importlib.metadata.version("click")
    assert report["packages"]["datasets"]["extra"] == "hub"
    assert "pytest" not in report["packages"]
    assert report["memory"]["total_bytes"] > 1 << 28
    assert report["cpu"]["usable_cores"] >= 1
    assert report["disk"]["free_bytes"] > 0
    assert report["problems"] == []


def test_the_text_has_a_line_for_each_thing(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name in ("deltamoe", "python", "cpu", "features", "memory", "disk", "torch", "cuda"):
        assert f"\n{name} " in f"\n{text}"


def test_a_missing_or_broken_package_is_a_problem_and_code_1(capsys, monkeypatch):
    real_version, real_import = importlib.metadata.version, importlib.import_module

    def version(name):
        if name in ("safetensors", "datasets"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real_version(name)

    def import_module(name):
        if name == "torch":
            raise OSError("libtorch.so: file too short")
        return real_import(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.setattr("importlib.import_module", import_module)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "problem" in text
    assert "torch cannot be imported: OSError: libtorch.so: file too short" in text
    assert "safetensors is missing: pip install 'safetensors" in text
    assert "datasets is missing" not in text
    assert "not installed (pip install 'deltamoe[hub]')" in text
