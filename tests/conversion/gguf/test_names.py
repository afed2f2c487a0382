"""The table of names is whole, and the page for people says the same."""

import re

import gguf
from tests.conversion.gguf.exported import MIXED
from tests.docs.pages import ROOT, rows

from deltamoe.config import preset
from deltamoe.conversion.gguf.names import entries
from deltamoe.plan import weights

PAGE = ROOT / "docs" / "gguf.md"


def local(name: str) -> str:
    return re.sub(r"^(blocks|blk)\.\d+\.", "", name)


def test_the_page_lists_every_tensor() -> None:
    listed = {(ours.strip("`"), theirs.strip("`")) for ours, theirs, _ in rows(PAGE, "tensors")}
    assert listed == {(local(entry.ours), local(entry.name)) for entry in entries(MIXED)}


def test_every_weight_is_written() -> None:
    assert {entry.ours for entry in entries(MIXED)} == {weight.name for weight in weights(MIXED)}


def test_the_package_knows_every_name() -> None:
    known = set()
    for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.KIMI_LINEAR]:
        known.add(local(gguf.TENSOR_NAMES[tensor].format(bid=0)))
    for entry in entries(MIXED):
        assert re.sub(r"\.(weight|bias)$", "", local(entry.name)) in known, entry.name


def test_the_published_model_has_its_610_tensors() -> None:
    assert len(list(entries(preset("kimi-linear-48b-a3b").model))) == 610
