import io
import json
import sys

import pytest

from deltamoe.cli import main
from deltamoe.cli.sampling import DEFAULTS
from tests.saved_run import save_run


class Named(io.BytesIO):
    name = "<stdin>"  # as the process's own has it


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(save_run(tmp_path_factory.mktemp("generate")))


@pytest.fixture
def call(run, capsys, monkeypatch):
    def call(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Named(stdin.encode())))
        code = main(["generate", run, "--device", "cpu", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_options_are_those_of_the_sampler():
    from dataclasses import fields

    from deltamoe.inference.sampler import Sampler

    assert {field.name: field.default for field in fields(Sampler)} == DEFAULTS


def test_json_keeps_its_promise(call):
    code, out, _ = call("--prompt", "def é", "--max-tokens", "6", "--json")
    assert code == 0
    answer = json.loads(out)
    assert list(answer) == ["prompt", "text", "ids", "finish_reason"]
    assert answer["prompt"] == "def é"
    assert answer["finish_reason"] == "length"
    assert len(answer["ids"]) == 6
    assert answer["text"] == bytes(answer["ids"]).decode(errors="replace")


def test_the_stream_is_the_text(call):
    options = ("--prompt", "def ", "--max-tokens", "12", "--seed", "4")
    _, out, err = call(*options)
    answer = json.loads(call(*options, "--json")[1])
    assert out == answer["text"] + "\n"
    assert "12 tokens" in err


@pytest.mark.parametrize(
    "lines",
    ["def \n\nclass A:\n", '{"prompt": "def "}\n{"prompt": "class A:", "id": 7}\n'],
    ids=["plain", "json"],
)
def test_prompts_are_answered_line_by_line(call, tmp_path, lines):
    file = tmp_path / "prompts"
    file.write_text(lines)
    options = ("--max-tokens", "5", "--temperature", "0")
    code, out, _ = call("--prompts", str(file), *options)
    assert code == 0
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["def ", "class A:"]
    assert answers[0] == json.loads(call("--prompt", "def ", *options, "--json")[1])
    assert call("--prompts", "-", *options, stdin=lines)[1] == out


def test_a_stop_text_may_be_given_twice(call):
    whole = json.loads(call("--max-tokens", "12", "--json")[1])["text"]
    _, out, _ = call("--max-tokens", "12", "--json", "--stop", whole[8], "--stop", whole[4])
    answer = json.loads(out)
    assert answer["finish_reason"] == "stop"
    assert answer["text"] == whole[: min(whole.index(whole[8]), whole.index(whole[4]))]


def test_a_kept_state_goes_on(call, tmp_path):
    state = str(tmp_path / "state.safetensors")
    greedy = ("--max-tokens", "6", "--temperature", "0", "--json")
    code, out, _ = call("--prompt", "def ", "--max-tokens", "0", "--save-state", state)
    assert (code, out) == (0, "\n")
    rest = json.loads(call("--prompt", "f(x)", "--load-state", state, *greedy)[1])
    whole = json.loads(call("--prompt", "def f(x)", *greedy)[1])
    assert rest["ids"] == whole["ids"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--temperature", "-1"], 2, "temperature = -1.0"),
        (["--top-p", "0"], 2, "top_p = 0.0"),
        (["--max-tokens", "many"], 2, "'many'"),
        (["--prompt", "a", "--prompts", "-"], 2, "--prompts goes with neither"),
        (["--device", "gpu"], 2, "'gpu'"),
        (["--load-state", "missing"], 3, "missing"),
        (["--no-such-option"], 2, "--no-such-option"),
    ],
)
def test_wrong_wishes_are_named(call, arguments, code, message):
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"a\xff", "byte 1"), (b'{"prompt": "a"}\n{"text": "b"}\n', "prompt 2")],
)
def test_broken_prompts_are_named(call, tmp_path, content, message):
    file = tmp_path / "prompts"
    file.write_bytes(content)
    code, _, err = call("--prompts", str(file))
    assert code == 3
    assert message in err


def test_no_model_there(tmp_path, capsys):
    assert main(["generate", str(tmp_path)]) == 3
    assert "neither a run folder" in capsys.readouterr().err
