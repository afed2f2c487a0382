import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest


def safetensors_bytes(header: Mapping[str, object] | bytes | str, data: bytes = b"") -> bytes:
    """A file with a truthful header length; everything else as given."""
    if isinstance(header, Mapping):
        header = json.dumps(header)
    text = header.encode() if isinstance(header, str) else header
    return len(text).to_bytes(8, "little") + text + data


@pytest.fixture
def build() -> Callable[..., bytes]:
    return safetensors_bytes


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder
