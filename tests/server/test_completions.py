"""``/v1/completions`` against what the model itself says."""

import math

import pytest
import torch

from deltamoe.engine import Engine
from deltamoe.inference import generate
from tests.server.serving import MODEL, Running

PATH = "/v1/completions"


def logprobs(engine: Engine, ids: list[int]) -> torch.Tensor:
    """[T, vocab] of what comes after each token, from a forward pass of its own."""
    with torch.inference_mode():
        logits, _ = engine.model(torch.tensor([ids]))
    return logits[0, :, : engine.tokenizer.vocab_size].log_softmax(-1)


def test_greedy_text_is_the_models(server: Running, engine: Engine) -> None:
    answer = server.post(PATH, {"prompt": "abc", "max_tokens": 24, "temperature": 0}).json
    [expected] = generate(engine.model, engine.tokenizer, ["abc"], max_tokens=24, temperature=0.0)
    [choice] = answer["choices"]
    assert choice["text"] == expected.text
    assert choice["index"] == 0
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert answer["usage"]["prompt_tokens"] == 4  # the border counts: it is read
    assert answer["usage"]["completion_tokens"] == len(expected.ids)


def test_prompts_of_every_form(server: Running, engine: Engine) -> None:
    one = server.post(PATH, {"prompt": "ab", "temperature": 0}).json["choices"][0]["text"]
    ids = [engine.tokenizer.end_id, *b"ab"]
    for prompt in (["ab"], ids, [ids]):
        [choice] = server.post(PATH, {"prompt": prompt, "temperature": 0}).json["choices"]
        assert choice["text"] == one
    many = server.post(PATH, {"prompt": ["x", "ab", "y"], "n": 2, "temperature": 0}).json
    assert [choice["index"] for choice in many["choices"]] == list(range(6))
    assert many["choices"][2]["text"] == many["choices"][3]["text"] == one


def test_more_prompts_than_places(server: Running) -> None:
    """A request of many prompts waits for itself: 8 run, 16 wait, it brings 60."""
    prompts = [f"{number}" for number in range(60)]
    asked = {"prompt": prompts, "temperature": 0, "max_tokens": 4}
    answer = server.post(PATH, asked)
    assert answer.status == 200
    alone = server.post(PATH, asked | {"prompt": "41"}).json["choices"][0]["text"]
    assert answer.json["choices"][41]["text"] == alone


def test_scored_prompts(server: Running, engine: Engine) -> None:
    """What evaluations of likelihood rely on, position by position."""
    prompts = [list(b"the king"), list(b"q")]
    asked = {"prompt": prompts, "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    for number, choice in enumerate(server.post(PATH, asked).json["choices"]):
        prompt, found = prompts[number], choice["logprobs"]
        assert len(found["token_logprobs"]) == len(prompt) + 1
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert found["tokens"][: len(prompt)] == [chr(byte) for byte in prompt]
        expected = logprobs(engine, prompt)
        for at in range(1, len(prompt)):
            value, top = found["token_logprobs"][at], found["top_logprobs"][at]
            # fp32 in two ways of reading: chunks here, one forward pass there
            assert value == pytest.approx(float(expected[at - 1, prompt[at]]), abs=1e-4)
            assert max(top.values()) == pytest.approx(float(expected[at - 1].max()), abs=1e-4)
            is_greedy = int(expected[at - 1].argmax()) == prompt[at]
            assert (value == max(top.values())) is is_greedy


def test_a_scored_prompt_lists_the_end_of_the_document(server: Running, engine: Engine) -> None:
    """Even where the model would end there: clients drop the last entry unseen."""
    end = engine.tokenizer.end_id
    asked = {"prompt": [list(b"abc")], "max_tokens": 1, "logprobs": 1, "echo": True}
    [choice] = server.post(PATH, asked | {"logit_bias": {str(end): 100}}).json["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == 4
    assert choice["logprobs"]["tokens"][-1] == "<|end|>"
    assert choice["text"] == "abc"
    assert choice["finish_reason"] == "stop"


def test_echo_of_a_text_leaves_the_border_out(server: Running) -> None:
    asked = {"prompt": "ab", "max_tokens": 2, "logprobs": 0, "echo": True, "temperature": 0}
    [choice] = server.post(PATH, asked).json["choices"]
    assert choice["text"].startswith("ab")
    assert choice["logprobs"]["tokens"][:2] == ["a", "b"]
    assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]
    assert choice["logprobs"]["token_logprobs"][0] is None
    asked |= {"max_tokens": 0}
    assert server.post(PATH, asked).json["choices"][0]["text"] == "ab"


def test_drawn_logprobs(server: Running, engine: Engine) -> None:
    asked = {"prompt": list(b"hello"), "max_tokens": 3, "logprobs": 4, "temperature": 0}
    found = server.post(PATH, asked).json["choices"][0]["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == 3
    assert found["token_logprobs"][0] == pytest.approx(
        float(logprobs(engine, list(b"hello"))[-1].max()), abs=1e-4
    )
    for value, top in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        assert len(top) == 4
        assert value == max(top.values())
        assert math.isfinite(value)


def test_the_seed_decides(server: Running) -> None:
    asked = {"prompt": "a", "max_tokens": 20, "temperature": 1.5, "seed": 7}
    one, two = (server.post(PATH, asked).json["choices"][0]["text"] for _ in range(2))
    other = server.post(PATH, asked | {"seed": 8}).json["choices"][0]["text"]
    assert one == two != other


def test_the_least_top_p_keeps_the_likeliest(server: Running) -> None:
    asked = {"prompt": "ab", "max_tokens": 20, "temperature": 1.5}
    likeliest = server.post(PATH, asked | {"temperature": 0}).json["choices"][0]["text"]
    drawn = server.post(PATH, asked | {"top_p": 1e-46}).json["choices"][0]["text"]  # 0 in fp32
    assert drawn == likeliest


def test_a_stop_text_is_left_out(server: Running) -> None:
    asked = {"prompt": "ab", "max_tokens": 40, "temperature": 0}
    whole = server.post(PATH, asked).json["choices"][0]["text"]
    stop = whole[5:7]
    cut = server.post(PATH, asked | {"stop": [stop, "never so"]}).json["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)]
    assert cut["finish_reason"] == "stop"


def test_a_stream_is_the_answer_in_pieces(server: Running) -> None:
    asked = {"prompt": "ab", "max_tokens": 30, "temperature": 0, "logprobs": 2}
    whole = server.post(PATH, asked).json
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = server.post(PATH, asked | options)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, last, done = answer.events
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in events)
    assert {event["id"] for event in events} == {last["id"]}
    pieces = [event["choices"][0] for event in events]
    [expected] = whole["choices"]
    assert "".join(piece["text"] for piece in pieces) == expected["text"]
    tokens = [token for piece in pieces for token in (piece["logprobs"] or {}).get("tokens", [])]
    assert tokens == expected["logprobs"]["tokens"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_a_stream_echoes(server: Running) -> None:
    asked = {"prompt": ["ab", "cd"], "max_tokens": 3, "temperature": 0, "echo": True, "n": 2}
    whole = [choice["text"] for choice in server.post(PATH, asked).json["choices"]]
    texts = [""] * 4
    for event in server.post(PATH, asked | {"stream": True}).events[:-1]:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == whole


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"n": 0}, "n"),
        ({"n": 10**6}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 257}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_completion_tokens": 5}, "max_completion_tokens"),
        ({"guided_json": {}}, "guided_json"),
        ({"service_tier": "priority"}, "service_tier"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [300]}, "300"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": 4}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"400": 1}}, "400"),
        ({"seed": 2**70}, "seed"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_wrong_requests_say_what_is_wrong(server: Running, wrong: dict, says: str) -> None:
    answer = server.post(PATH, {"prompt": "a"} | wrong)
    assert answer.status == 400, answer.body
    error = answer.json["error"]
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_labels_and_what_asks_for_nothing_pass(server: Running) -> None:
    asked = {"prompt": "a", "max_tokens": 3, "temperature": 0}
    plain = server.post(PATH, asked).json["choices"]
    more = {"suffix": None, "best_of": 1, "response_format": {"type": "text"}, "tools": []}
    labels = {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "c", "unheard_of": 1}
    assert server.post(PATH, asked | more | labels).json["choices"] == plain


def test_numbers_that_json_does_not_have(server: Running) -> None:
    for body in (
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": ' + b"[" * 100_000,
        b"{",
        b"\xff",
        b"[]",
    ):
        answer = server.ask("POST", PATH, body=body)
        assert answer.status == 400, body[:40]
        assert answer.json["error"]["message"]


def test_a_text_beyond_the_context(server: Running) -> None:
    answer = server.post(PATH, {"prompt": "a" * 600, "max_tokens": 1})
    assert answer.status == 400
    assert answer.json["error"]["code"] == "context_length_exceeded"


def test_products_are_bounded_too(server: Running) -> None:
    many = {"prompt": ["a"] * 256, "n": 8, "max_tokens": 256}
    answer = server.post(PATH, many)
    assert answer.status == 400
    assert answer.json["error"]["param"] == "max_tokens"
    long = {"prompt": ["a" * 400] * 64, "max_tokens": 1, "echo": True, "logprobs": 20}
    answer = server.post(PATH, long)
    assert answer.status == 400
    assert answer.json["error"]["param"] == "logprobs"


def test_another_model(server: Running) -> None:
    answer = server.post(PATH, {"model": "gpt-9", "prompt": "a"})
    assert answer.status == 404
    assert answer.json["error"]["code"] == "model_not_found"


def test_what_nobody_has_heard_of_is_ignored(server: Running) -> None:
    assert server.post(PATH, {"prompt": "a", "flux": {"x": [1]}, "user": "me"}).status == 200


def test_characters_are_never_broken(server: Running) -> None:
    """A random model writes broken UTF-8; what is sent is text all the same."""
    asked = {"prompt": "🙂é\x00‮", "max_tokens": 200, "temperature": 2, "seed": 1}
    whole = server.post(PATH, asked).json["choices"][0]["text"]
    events = server.post(PATH, asked | {"stream": True}).events[:-1]
    assert "".join(event["choices"][0]["text"] for event in events) == whole
