import pytest

from deltamoe.errors import CheckpointError
from deltamoe.inference.generation import Decoding, generate
from deltamoe.inference.session import Session
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer, ChatTemplate, Message
from tests.kimi_vocabulary import kimi_tokenizer

TOKENIZER = ByteTokenizer()
GREEDY = {"temperature": 0.0, "max_tokens": 6}


@pytest.fixture(scope="module")
def model():
    return tiny_model(num_layers=2)


def say(session, prompt, **options):
    return "".join(session.stream(prompt, **{**GREEDY, **options}))


def test_two_turns_are_one_text(model):
    session = Session(model, TOKENIZER)
    say(session, "Hello. ")
    say(session, " And then?")
    first = generate(model, TOKENIZER, "Hello. ", **GREEDY)
    second = generate(model, TOKENIZER, " And then?", state=first.state, **GREEDY)
    assert session.answer == second
    assert session.text.num_tokens == 1 + len("Hello. ") + 6 + len(" And then?") + 6
    assert session.tokens_per_second > 0


def test_an_answer_left_half_way_counts_as_far_as_it_came(model):
    session = Session(model, TOKENIZER)
    pieces = session.stream("Hello", temperature=0.0, max_tokens=9)
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert session.answer.text == shown
    begun = session.answer.ids
    say(session, "")
    whole = generate(model, TOKENIZER, "Hello", temperature=0.0, max_tokens=len(begun) + 6)
    assert begun + session.answer.ids == whole.ids


def test_reset_forgets(model):
    session = Session(model, TOKENIZER)
    before = say(session, "Hello")
    session.reset()
    assert session.text.num_tokens == 1
    assert session.answer is None
    assert say(session, "Hello") == before


def test_a_session_survives_a_file(model, tmp_path):
    session = Session(model, TOKENIZER, weights_sha256="ab" * 32)
    say(session, "Hello")
    session.save(tmp_path / "s.safetensors")
    expected = say(session, " there")

    other = Session(model, TOKENIZER, weights_sha256="ab" * 32)
    other.load(tmp_path / "s.safetensors")
    assert say(other, " there") == expected


def test_a_failed_load_harms_nothing(model, tmp_path):
    session = Session(model, TOKENIZER)
    say(session, "Hello")
    before = session.text
    with pytest.raises(CheckpointError):
        session.load(tmp_path / "missing.safetensors")
    assert session.text is before


@pytest.fixture(scope="module")
def kimi():
    return tiny_model(num_layers=2, vocab_size=400)


@pytest.fixture
def read(monkeypatch):
    """What each answer continues: all ids before the first one drawn, without the state."""
    seen = []
    original = Decoding.__init__

    def noted(self, model, tokenizer, prompts, **options):
        seen.append((*options["state"].unread, *tokenizer.encode(prompts[0])))
        original(self, model, tokenizer, prompts, **options)

    monkeypatch.setattr(Decoding, "__init__", noted)
    return seen


def test_turns_are_read_as_the_template_has_them(kimi, read):
    tokenizer, template = kimi_tokenizer(), ChatTemplate(default_system="D")
    session = Session(kimi, tokenizer, chat_template=template)
    say(session, "Hello")
    say(session, "And?<|im_end|>")
    assert list(read[0]) == template.encode(tokenizer, [Message("user", "Hello")])
    # the last token drawn was not read yet; then the answer's turn ends and the user's begins
    assert read[1][1] == tokenizer.special_ids["<|im_end|>"]
    later = ChatTemplate().encode(tokenizer, [Message("user", "And?<|im_end|>")])
    assert list(read[1][2:]) == later
    assert session.text.num_tokens == sum(map(len, read)) + 5 + 6


def test_the_system_speaks_first_and_once(kimi, read):
    tokenizer, template = kimi_tokenizer(), ChatTemplate(default_system="D")
    session = Session(kimi, tokenizer, chat_template=template, system="S")
    say(session, "a")
    say(session, "b")
    first = template.encode(tokenizer, [Message("system", "S"), Message("user", "a")])
    assert list(read[0]) == first
    assert tokenizer.special_ids["<|im_system|>"] not in read[1]
    session.reset()
    assert session.text.num_tokens == 0
    say(session, "a")
    assert list(read[2]) == first


def test_an_empty_prompt_lets_the_answer_go_on(kimi):
    session = Session(kimi, kimi_tokenizer(), chat_template=ChatTemplate())
    say(session, "Hello", max_tokens=4)
    begun = session.answer.ids
    say(session, "", max_tokens=4)
    halves = begun + session.answer.ids
    session.reset()
    say(session, "Hello", max_tokens=8)
    assert halves == session.answer.ids


def test_a_conversation_in_turns_survives_a_file(kimi, tmp_path):
    def opened():
        return Session(kimi, kimi_tokenizer(), chat_template=ChatTemplate(), system="S")

    session, other = opened(), opened()
    say(session, "Hello")
    session.save(tmp_path / "s.safetensors")
    other.load(tmp_path / "s.safetensors")
    assert say(other, "there") == say(session, "there")
    assert other.text.num_tokens == session.text.num_tokens
