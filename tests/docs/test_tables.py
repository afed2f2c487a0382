"""What the guides list of the code: arrows, tensors, metrics, optimizer rules, keys."""

import ast
import re
from dataclasses import replace

import pytest

from deltamoe.config import preset
from deltamoe.plan import weights
from deltamoe.training.optimizer import rule_for
from deltamoe.training.run import CHANGEABLE
from tests.architecture.test_imports import FILES, imported_parts
from tests.docs.pages import ROOT, SRC, blocks, rows, table

TRAINING = ROOT / "docs" / "training.md"
CHECKPOINTS = ROOT / "docs" / "checkpoints.md"


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_the_arrows_are_the_imports() -> None:
    (diagram,) = (b for b in blocks(ROOT / "docs" / "architecture.md") if b.language == "mermaid")
    drawn = set(re.findall(r"(\w+) --> (\w+)", diagram.text))
    found = set()
    for file in FILES:
        part = file.relative_to(SRC).parts[0].removesuffix(".py")
        found |= {(part, other) for other in imported_parts(file) - {part, "version"}}
    found = {(part, other) for part, other in found if part != "testing"}
    assert drawn <= found, f"no such import: {drawn - found}"
    follows = set(drawn)
    while more := {(a, d) for a, b in follows for c, d in drawn if b == c} - follows:
        follows |= more
    assert found <= follows, f"not drawn: {found - follows}"


@pytest.mark.parametrize("name", ["nano", "moe-2-of-4", "kimi-linear-48b-a3b"])
def test_every_tensor_of_a_model_has_a_row(name: str) -> None:
    listed = {name for ours, *_ in rows(CHECKPOINTS, "parameter names") for name in names_in(ours)}
    found = {re.sub(r"^blocks\.\d+\.", "", weight.name) for weight in weights(preset(name).model)}
    assert found <= listed


def test_every_row_is_a_tensor_of_some_model() -> None:
    kimi = preset("kimi-linear-48b-a3b").model
    assert kimi.mla is not None
    assert kimi.moe is not None
    models = [
        kimi,
        replace(kimi, mla=replace(kimi.mla, query_rank=8)),
        replace(kimi, moe=replace(kimi.moe, has_noisy_topk=True)),
    ]
    known = {
        re.sub(r"^blocks\.\d+\.", "", weight.name) for model in models for weight in weights(model)
    }
    for ours, *_ in rows(CHECKPOINTS, "parameter names"):
        for name in names_in(ours):
            assert name in known, f"no model has a tensor {name}"


def test_the_optimizer_rules_are_those_of_the_code() -> None:
    for names, method, decay in rows(TRAINING, "optimizer rules"):
        for name in names_in(names):
            is_in_block = re.match(r"(embedding|head|norm)\.weight", name) is None
            rule = rule_for(f"blocks.3.{name}" if is_in_block else name)
            assert (rule.method, rule.has_weight_decay) == (method.lower(), decay == "yes"), name


def test_every_weight_has_a_row_in_the_optimizer_rules() -> None:
    listed = {name for names, *_ in rows(TRAINING, "optimizer rules") for name in names_in(names)}
    for weight in weights(preset("kimi-linear-48b-a3b").model):
        name = re.sub(r"^blocks\.\d+\.", "", weight.name)
        assert weight.optimizer == "none" or name in listed, name


def test_the_metrics_are_those_that_are_written() -> None:
    """Read from the source: the record's own keys, and what is added to it."""
    written = {"format"}
    tree = ast.parse((SRC / "training" / "loop.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "_record":
            returned = next(n.value for n in node.body if isinstance(n, ast.Return))
            assert isinstance(returned, ast.Dict)
            written |= {key.value for key in returned.keys if isinstance(key, ast.Constant)}
        match node:
            case ast.Assign(targets=[ast.Subscript(ast.Name("record"), ast.Constant(name))]):
                written.add(name)
    listed = [name for names, *_ in rows(TRAINING, "metrics") for name in names_in(names)]
    assert sorted(listed) == sorted(written)


def test_the_keys_a_resumed_run_may_change_are_named() -> None:
    assert sorted(names_in(table(CHECKPOINTS, "changeable keys"))) == sorted(CHANGEABLE)
