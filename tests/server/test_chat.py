"""``/v1/chat/completions`` with and without turns, tools and JSON."""

import json

import pytest

from deltamoe.engine import Request
from deltamoe.server.tools import answer_parts
from deltamoe.tokenizer import ChatTemplate, Message, ToolCall
from tests.kimi_vocabulary import kimi_tokenizer
from tests.server.serving import Running

PATH = "/v1/chat/completions"
WIDE = ["x" * 100 + str(number) for number in range(1000)]
HELLO = [{"role": "user", "content": "hello"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def test_the_prompt_is_the_template(chat_server: Running) -> None:
    tokenizer = kimi_tokenizer()
    turns = [Message("system", "be brief"), Message("user", "hello")]
    prompt = tuple(ChatTemplate().encode(tokenizer, turns))
    [expected] = chat_server.service.engine.generate([Request(prompt=prompt, max_tokens=12)])
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}],
        },
    ]
    answer = chat_server.post(
        PATH, {"messages": messages, "max_completion_tokens": 12, "temperature": 0}
    ).json
    [choice] = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": expected.choices[0].text,
        "refusal": None,
    }
    assert answer["usage"]["prompt_tokens"] == len(prompt)


def test_a_base_model_goes_on_writing(server: Running) -> None:
    asked = {"messages": HELLO, "max_tokens": 12, "temperature": 0}
    chat = server.post(PATH, asked).json["choices"][0]["message"]["content"]
    text = server.post("/v1/completions", {"prompt": "hello", "max_tokens": 12, "temperature": 0})
    assert chat == text.json["choices"][0]["text"]
    turns = [*HELLO, {"role": "assistant", "content": "a\n"}, {"role": "user", "content": "b"}]
    assert (
        server.post("/tokenize", {"messages": turns}).json["tokens"]
        == server.post("/tokenize", {"prompt": "hello\na\nb"}).json["tokens"]
    )


def test_a_base_model_has_no_tools(server: Running) -> None:
    answer = server.post(PATH, {"messages": HELLO, "tools": [TOOL]})
    assert answer.status == 400
    assert "chat template" in answer.json["error"]["message"]


def test_a_stream_is_the_answer_in_pieces(chat_server: Running) -> None:
    asked = {
        "messages": HELLO,
        "max_tokens": 20,
        "temperature": 1,
        "seed": 3,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    }
    whole = chat_server.post(PATH, asked).json["choices"]
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *events, last, done = chat_server.post(PATH, asked | options).events
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] > 0
    for index, expected in enumerate(whole):
        deltas = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(delta["delta"].get("content", "") for delta in deltas)
        assert text == expected["message"]["content"]
        logprobs = [
            entry for delta in deltas for entry in (delta["logprobs"] or {}).get("content", [])
        ]
        assert logprobs == expected["logprobs"]["content"]
        assert [delta["finish_reason"] for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1]["finish_reason"] == expected["finish_reason"]
    entry = whole[0]["logprobs"]["content"][0]
    assert len(entry["top_logprobs"]) == 2
    assert isinstance(entry["bytes"], list)


def test_an_answer_that_fits_a_schema(chat_server: Running) -> None:
    schema = TOOL["function"]["parameters"]
    form = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    asked = {"messages": HELLO, "max_tokens": 60, "temperature": 1, "seed": 1}
    for seed in range(3):
        answer = chat_server.post(PATH, asked | {"response_format": form, "seed": seed}).json
        content = json.loads(answer["choices"][0]["message"]["content"])
        assert content["city"] in ("Oslo", "Rome")
        assert answer["choices"][0]["finish_reason"] == "stop"


def test_a_named_tool_is_called(chat_server: Running) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    asked = {"messages": HELLO, "tools": [TOOL], "tool_choice": choice, "max_tokens": 60}
    [whole] = chat_server.post(PATH, asked | {"seed": 5}).json["choices"]
    [call] = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    events = chat_server.post(PATH, asked | {"seed": 5, "stream": True}).events[:-1]
    streamed = [
        e["choices"][0]["delta"]["tool_calls"]
        for e in events
        if "tool_calls" in e["choices"][0]["delta"]
    ]
    assert streamed == [[{"index": 0} | call]]


def test_calls_are_found_by_their_marks() -> None:
    template, tokenizer = ChatTemplate(), kimi_tokenizer()
    calls = (
        ToolCall("functions.weather:0", '{"city": "Oslo"}'),
        ToolCall("functions.time:1", "{}"),
    )
    turn = Message("assistant", "let me see", tool_calls=calls)
    ids = template.encode(tokenizer, [turn], is_answered=False)
    body = ids[ids.index(tokenizer.special_ids[template.middle]) + 1 : -1]
    text, found = answer_parts(template, tokenizer, body, tokenizer.decode(body))
    assert text == "let me see"
    assert [call["id"] for call in found] == ["functions.weather:0", "functions.time:1"]
    assert [call["function"]["name"] for call in found] == ["weather", "time"]
    assert found[0]["function"]["arguments"] == '{"city": "Oslo"}'
    spelled = tokenizer.encode(tokenizer.decode(body))  # the same text without a mark
    assert answer_parts(template, tokenizer, spelled, "as it was") == ("as it was", [])


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": [{"role": "king", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
        {"tool_choice": "required"},
        {"tools": [{"type": "function", "function": TOOL["function"] | {"strict": True}}]},
        {"prompt": "a"},
        {"echo": True},
        {"best_of": 2},
        {"store": True},
        {"messages": [{"role": "assistant", "content": "", "function_call": {"name": "f"}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": WIDE}}}},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "other"}}},
        {"tools": [TOOL, TOOL], "tool_choice": "required"},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "soup"}}}},
    ],
)
def test_wrong_requests(chat_server: Running, wrong: dict) -> None:
    answer = chat_server.post(PATH, {"messages": HELLO, "max_tokens": 4} | wrong)
    assert answer.status == 400, answer.body
    assert answer.json["error"]["message"]


def test_conversations_without_turns_to_read(server: Running) -> None:
    """An empty conversation of a base model is a new document."""
    answer = server.post(PATH, {"messages": [{"role": "user", "content": ""}], "max_tokens": 2})
    assert answer.status == 200
