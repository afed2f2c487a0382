import json
import time

import pytest

from deltamoe.engine import Request
from deltamoe.engine.core import Core
from deltamoe.engine.grammar import GrammarCompiler
from deltamoe.errors import BackendUnavailableError, ConfigError
from deltamoe.tokenizer import BpeTokenizer
from tests.engine.harness import OPTIONS, TOKENIZER, answers, model_of, prompt, submit

pytestmark = pytest.mark.usefixtures("unchecked")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def asked(**changes):
    return Request(prompt=prompt("Who?"), max_tokens=200, temperature=1.0, seed=1, **changes)


@pytest.fixture
def core():
    return Core(model_of("hybrid"), TOKENIZER, OPTIONS)


def test_a_model_that_knows_nothing_answers_to_the_schema(core):
    [result] = answers(core, [asked(json_schema=json.dumps(PERSON), n=4)])
    for choice in result.choices:
        person = json.loads(choice.text)
        assert person.keys() == {"name", "age"}
        assert len(person["name"]) <= 6
        assert 0 <= person["age"] <= 150
        assert choice.finish_reason == "end"
    assert len({choice.text for choice in result.choices}) > 1


def test_a_schema_does_not_touch_its_neighbours(core):
    plain = asked()
    [expected] = answers(core, [plain])
    results = answers(core, [asked(json_schema=json.dumps(PERSON)), plain])
    assert results[1].choices == expected.choices


def test_preempted_within_a_schema(core):
    request = asked(json_schema=json.dumps(PERSON), reuse=False)
    [expected] = answers(core, [request])
    recorder = submit(core, request)
    while core.has_work:
        core.step()
        if len(recorder.pieces) in (3, 9, 10) and core.scheduler.running:
            core.preempt(core.scheduler.running[0])
    assert recorder.result.choices == expected.choices
    assert core.counters.num_preemptions > 0


def test_a_grammar_in_lark(core):
    [result] = answers(core, [asked(grammar='start: "yes" | "no" " way"?')])
    assert result.choices[0].text in ("yes", "no", "no way")


def test_any_json(core):
    [result] = answers(core, [asked(json_schema="{}")])
    json.loads(result.choices[0].text)


def test_tokens_of_several_bytes():
    texts = ['{"name": "Ada", "age": 36}', '{"name": "Bo", "age": 7}'] * 20
    tokenizer = BpeTokenizer.train(texts, vocab_size=300)
    compiler = GrammarCompiler(tokenizer)
    matcher = compiler.matcher(asked(json_schema=json.dumps(PERSON)))
    for token_id in tokenizer.encode(texts[0]):
        assert bool(matcher.allowed()[token_id])
        matcher.push(token_id)
    assert matcher.allowed().nonzero()[:, 0].tolist() == sorted(tokenizer.stop_ids)


@pytest.mark.parametrize(
    "bad",
    [
        {"json_schema": "{"},
        {"json_schema": '{"type": "nonsense"}'},
        {"json_schema": "[1]"},
        {"json_schema": '{"type": "integer", "minimum": 5, "maximum": 1}'},
        {"grammar": "start: nothing_of_that_name"},
    ],
    ids=str,
)
def test_what_cannot_be_understood_is_refused_at_the_door(core, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        core.prepare(asked(**bad))


def test_a_grammar_that_explodes_fails_its_request_alone_and_soon(core):
    [expected] = answers(core, [asked()])
    begin = time.monotonic()
    bad = submit(core, asked(grammar="start: /(a{1000}){1000}/"))
    good = submit(core, asked())
    while core.has_work:
        core.step()
    assert isinstance(bad.error, ConfigError)
    assert "<state>" not in str(bad.error)
    assert good.result.choices == expected.choices
    assert time.monotonic() - begin < 4.0  # 0.5 s on a quiet machine; 10 s with the limits as usual


def test_without_the_library_the_answer_is_a_sentence(core, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(BackendUnavailableError, match="pip install"):
        core.prepare(asked(json_schema="{}"))
