"""The benchmarks run in the process that the command line runs in."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted((ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize("file", PROGRAMS, ids=lambda file: file.stem)
def test_the_machine_is_imported_first(file: Path) -> None:
    names = []
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append(str(node.module))
    others = [name for name in names if name.split(".")[0] not in sys.stdlib_module_names]
    assert others[0] == "benchmarks.machine"


def test_threads_wait_asleep() -> None:
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", "import benchmarks.machine, torch"],
        cwd=ROOT,
        env={**environment, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("another OpenMP than GNU's")
    assert "GOMP_SPINCOUNT = '0'" in done.stderr  # 300,000 where nobody asked
