import pytest

from deltamoe.errors import CheckpointError
from deltamoe.inference.generation import generate
from deltamoe.inference.session import Session
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer

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
