"""The wheel holds the page, and serves it where nothing else of this folder is."""

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

from deltamoe.explorer import trace
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer
from tests.docs.pages import ROOT

STATIC = ROOT / "src" / "deltamoe" / "explorer" / "static"
FILES = sorted(path for path in STATIC.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without a network: the build's own programs are those that are installed."""
    pytest.importorskip("hatchling", reason="the wheel is built with hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    [built] = folder.glob("deltamoe-*.whl")
    return built


def pip(*words: str) -> None:
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-index"]
    command = [sys.executable, "-m", "pip", words[0], *quiet, *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_every_file_of_the_page(wheel: Path) -> None:
    assert {path.name for path in FILES} >= {"index.html", "app.js", "style.css"}
    with zipfile.ZipFile(wheel) as archive:
        for path in FILES:
            name = f"deltamoe/explorer/static/{path.relative_to(STATIC)}"
            assert archive.read(name) == path.read_bytes(), name


def test_the_installed_wheel_serves_the_page(wheel: Path, tmp_path: Path) -> None:
    site, file = tmp_path / "site", tmp_path / "a.safetensors"
    pip("install", "--target", str(site), str(wheel))
    trace(tiny_model(), ByteTokenizer(), "to be").save(file)
    code = (
        "import sys, deltamoe; from deltamoe.cli import main; "
        "print(deltamoe.__file__, flush=True); sys.exit(main(sys.argv[1:]))"
    )
    words = ["explore", str(file), "--port", "0", "--no-browser"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(str(site))
            found = re.search(r"http://127\.0\.0\.1:\d+/", process.stdout.readline())
            assert found

            def get(path: str) -> bytes:
                with urllib.request.urlopen(found[0] + path, timeout=20) as answer:
                    content: bytes = answer.read()
                    return content

            assert get("") == (STATIC / "index.html").read_bytes()
            for path in FILES:
                name = str(path.relative_to(STATIC))
                assert get(f"static/{name}") == path.read_bytes(), name
            shown = json.loads(get("api/status"))["trace"]
            assert json.loads(get(f"api/trace/{shown}"))["prompt"] == "to be"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
