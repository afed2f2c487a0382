"""Libraries are built once, all at once or not at all; without a compiler PyTorch takes over."""

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deltamoe.ops import native
from deltamoe.ops.native import build


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sources and an empty cache, with nothing remembered."""
    monkeypatch.setattr(build, "_SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "one.cpp").write_text(
        'extern "C" __attribute__((visibility("default"))) int answer() { return 42; }\n'
    )
    (tmp_path / "wrong.cpp").write_text("this is no C++\n")
    for remembered in (build.open_library, native.why_not):
        remembered.cache_clear()
    yield tmp_path
    for remembered in (build.open_library, native.why_not):
        remembered.cache_clear()


needs_compiler = pytest.mark.skipif(
    native.why_not("kda") is not None, reason=f"native: {native.why_not('kda')}"
)


@needs_compiler
def test_built_once_and_again_when_the_source_changes(sources: Path) -> None:
    assert build.open_library("one").answer() == 42
    (made,) = build.cache_folder().glob("*.so")
    before = made.stat().st_mtime_ns
    build.open_library.cache_clear()
    build.open_library("one")
    assert made.stat().st_mtime_ns == before
    (sources / "one.cpp").write_text((sources / "one.cpp").read_text().replace("42", "43"))
    build.open_library.cache_clear()
    assert build.open_library("one").answer() == 43
    assert len(list(build.cache_folder().glob("*.so"))) == 2


@needs_compiler
def test_a_failing_build_leaves_nothing_and_is_said_once(
    sources: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "deltamoe"):
        reasons = [native.why_not("wrong") for _ in range(3)]
    assert "failed on wrong.cpp" in str(reasons[0])
    assert len(caplog.records) == 1
    assert [f.name for f in build.cache_folder().iterdir()] == ["wrong.lock"]


def test_no_compiler(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(sources))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(build.BuildError, match="no C\\+\\+ compiler was found"):
        build.open_library("one")


def test_an_unwritable_cache(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (sources / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(sources / "file"))
    assert native.why_not("one") is not None


@needs_compiler
def test_a_library_that_is_none(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.open_library("one")
    (made,) = build.cache_folder().glob("*.so")
    elsewhere = sources / "elsewhere" / "deltamoe" / "native"  # the loader knows the first path
    elsewhere.mkdir(parents=True)
    (elsewhere / made.name).write_bytes(b"not a library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(sources / "elsewhere"))
    build.open_library.cache_clear()
    with pytest.raises(build.BuildError, match="one-"):
        build.open_library("one")


def test_a_model_runs_without_a_compiler(tmp_path: Path) -> None:
    """In a process of its own: PyTorch's forms take over, with one warning a library."""
    code = """
import torch, deltamoe.ops.kda as kda
x = torch.rand(1, 20, 1, 4)
out, memory = kda.kda_chunk(x, x, x, -x, x[..., 0])
print(out.shape)
"""
    environment = {
        **{n: v for n, v in os.environ.items() if n != "CXX"},
        "PATH": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert "torch.Size([1, 20, 1, 4])" in done.stdout
    assert done.stderr.count("no C++ compiler was found") == 1


@needs_compiler
def test_the_threads_are_pytorchs() -> None:
    """One pool: a second copy of OpenMP's runtime would fight with the first for the cores."""
    ctypes.CDLL(build.open_library("kda")._name)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell which libraries are loaded")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "gomp" in line}
    assert len(loaded) == 1
