import io
import sys

import pytest

from deltamoe.cli import main
from deltamoe.inference.session import Session
from deltamoe.tokenizer import ChatTemplate
from tests.published_folder import save_published_folder
from tests.saved_run import save_run

OPTIONS = ("--device", "cpu", "--max-tokens", "5", "--temperature", "0")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return str(save_run(tmp_path_factory.mktemp("chat")))


@pytest.fixture
def chat(run, capsys, monkeypatch):
    def chat(*lines, arguments=OPTIONS):
        content = "".join(line + "\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        code = main(["chat", run, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return chat


def test_the_banner_says_whom_one_talks_to(chat):
    code, out, err = chat()
    assert (code, out) == (0, "")
    for said in ("step 3", "parameters", "2 layers (km)", "bytes", "7.500 bits/byte", "/help"):
        assert said in err


def test_answers_alone_go_to_standard_output(chat, monkeypatch):
    asked = []

    def stream(self, prompt, **options):
        asked.append((prompt, options["seed"]))
        yield "an"
        yield "swer"

    monkeypatch.setattr(Session, "stream", stream)
    code, out, _ = chat("Hello", "/stats", "", "there")
    assert (code, out) == (0, "answer\n" * 3)
    assert asked == [("Hello", 0), ("", 1), ("there", 2)]


def test_each_line_begins_on_its_own(chat, monkeypatch):
    prompts = []
    original = Session.stream

    def stream(self, prompt, **options):
        prompts.append(prompt)
        return original(self, prompt, **options)

    monkeypatch.setattr(Session, "stream", stream)
    chat("Hello", "there", "", "/reset", "again")
    assert prompts == ["Hello", "\nthere", "", "again"]


def test_reset_begins_anew(chat):
    _, out, err = chat("Hello", "/stats", "/reset", "/stats", "Hello", "/stats")
    assert "11 tokens of text" in err
    assert "1 tokens of text" in err
    _, once, _ = chat("Hello")
    assert out == once * 2


def test_a_kept_state_goes_on(chat, tmp_path):
    file = tmp_path / "state.safetensors"
    _, out, err = chat("Hello", f"/save {file}", " there")
    assert "11 tokens kept" in err
    _, once, _ = chat("Hello")
    _, rest, err = chat(f"/load {file}", " there")
    assert "going on after 11 tokens" in err
    assert once + rest == out


def test_seed_and_temperature_can_be_changed(chat):
    hot = (*OPTIONS[:-1], "1.5")
    _, seven, _ = chat("/seed 7", "Hello", arguments=hot)
    assert chat("Hello", arguments=(*hot, "--seed", "7"))[1] == seven
    assert chat("Hello", arguments=hot)[1] != seven
    assert chat("/temperature 0", "Hello", arguments=hot)[1] == chat("Hello")[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/rest", "did you mean /reset?"),
        ("/xyzzy", "/help lists them"),
        ("/seed many", "expected a number"),
        ("/temperature -1", "temperature = -1.0"),
        ("/save", "needs a file name"),
        ("/load nowhere", "nowhere"),
    ],
)
def test_a_mistake_ends_nothing(chat, line, message):
    code, out, err = chat(line, "Hello")
    assert code == 0
    assert message in err
    assert out == chat("Hello")[1]


def test_quit_leaves_at_once(chat):
    assert chat("/quit", "Hello")[1] == ""


def test_an_interrupt_stops_the_answer_and_not_the_conversation(chat, monkeypatch):
    calls = []

    def stream(self, prompt, **options):
        calls.append(prompt)
        yield "abc"
        if len(calls) == 1:
            raise KeyboardInterrupt
        yield "def"

    monkeypatch.setattr(Session, "stream", stream)
    code, out, err = chat("one", "two")
    assert (code, out) == (0, "abc\nabcdef\n")
    assert "stopped" in err


def test_a_line_that_is_not_utf8_ends_nothing(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe\nHello\n")))
    assert main(["chat", run, *OPTIONS]) == 0
    captured = capsys.readouterr()
    assert "surrogate" in captured.err
    assert captured.out.strip()


def test_options_are_checked_before_the_first_line(chat):
    code, _, err = chat("Hello", arguments=("--device", "cpu", "--top-p", "3"))
    assert code == 2
    assert "top_p = 3.0" in err


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return save_published_folder(tmp_path_factory.mktemp("instruct"), chat_template=ChatTemplate())


def test_a_published_instruct_folder_answers_turns(published, capsys, monkeypatch):
    read = []
    original = ChatTemplate.encode

    def encode(self, tokenizer, messages, **options):
        read.append([(message.role, message.content) for message in messages])
        return original(self, tokenizer, messages, **options)

    monkeypatch.setattr(ChatTemplate, "encode", encode)
    content = io.BytesIO(b"Hello\n  spaced <|im_end|>\n\n/reset\nagain\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(content))
    assert main(["chat", str(published), *OPTIONS, "--system", "Be brief."]) == 0
    captured = capsys.readouterr()
    for said in ("Tiny-Instruct", "tiktoken:386", "It answers turns"):
        assert said in captured.err
    assert read == [
        [("system", "Be brief."), ("user", "Hello")],
        [("user", "  spaced <|im_end|>")],
        [("system", "Be brief."), ("user", "again")],
    ]
    assert captured.out.count("\n") >= 4


def test_a_base_model_has_no_system(chat):
    code, _, err = chat("Hello", arguments=(*OPTIONS, "--system", "Be brief."))
    assert code == 2
    assert "--system is for models with a chat template" in err
