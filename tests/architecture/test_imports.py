"""Imports point one way: what stands left in ORDER never imports what stands right."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src" / "deltamoe"
ORDER = [
    *("version", "errors", "config", "plan", "ops", "layers", "model", "testing", "checkpoint"),
    *("tokenizer", "conversion", "data", "training", "inference", "engine", "server", "explorer"),
    *("evaluation", "cli"),
]
APART = [
    {"training", "inference"},
    {"training", "evaluation"},
    {"model", "tokenizer"},
    {"model", "data"},
    {"ops", "config"},
    {"ops", "plan"},
]
FILES = sorted(f for f in SRC.rglob("*.py") if not f.relative_to(SRC).parts[0].startswith("__"))
# Python files that must work without torch, so that `--help`, `plan` and a header answer at once.
TORCH_FREE = [
    *("errors", "config", "plan", "tokenizer", "cli", "checkpoint.header", "data.source"),
    *("checkpoint.published", "conversion", "explorer", "explorer.app"),
]


def imported_parts(file: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
            if node.module == "deltamoe":
                names = [f"deltamoe.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            raise AssertionError(f"{file} has a relative import; this project writes them out")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        parts |= {name.split(".")[1] for name in names if name.startswith("deltamoe.")}
    return parts


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(SRC)))
def test_imports_point_left(file: Path) -> None:
    part = file.relative_to(SRC).parts[0].removesuffix(".py")
    for other in imported_parts(file) - {part}:
        assert ORDER.index(other) < ORDER.index(part), f"{part} imports {other}: wrong direction"
        assert {part, other} not in APART, f"{part} and {other} must not know each other"


def test_nothing_unpickles() -> None:
    """No file of ours is read with pickle, nor by a function that may fall back to it."""
    for file in SRC.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                assert not {"pickle", "dill", "joblib"} & {a.name for a in node.names}, file
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec"), file
                if called in ("np.load", "numpy.load"):
                    assert "allow_pickle=True" not in ast.unparse(node), file


@pytest.mark.parametrize("module", TORCH_FREE)
def test_torch_stays_out(module: str) -> None:
    code = f"import sys, deltamoe.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
