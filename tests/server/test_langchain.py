"""LangChain's OpenAI chat model: answers, streams with usage, JSON by schema and by tool."""

from typing import Any

import pytest

from tests.server.serving import MODEL, Running

# not ours: what the package and its dependencies warn of
pytestmark = pytest.mark.filterwarnings("ignore")

SCHEMA = {
    "title": "place",
    "description": "where",
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def chat(chat_server: Running) -> Any:
    langchain_openai = pytest.importorskip("langchain_openai")
    return langchain_openai.ChatOpenAI(
        model=MODEL,
        base_url=f"{chat_server.url}/v1",
        api_key="none",
        temperature=0.8,
        seed=4,
        max_tokens=60,
        max_retries=0,
        stream_usage=True,
    )


def test_answers(chat: Any) -> None:
    whole = chat.invoke([("system", "be brief"), ("user", "hello")])
    chunks = list(chat.stream([("system", "be brief"), ("user", "hello")]))
    assert "".join(chunk.content for chunk in chunks) == whole.content
    total = sum((chunk.usage_metadata or {}).get("total_tokens", 0) for chunk in chunks)
    assert total == whole.usage_metadata["total_tokens"] > 0


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: Any, method: str) -> None:
    found = chat.with_structured_output(SCHEMA, method=method).invoke("where?")
    assert found["city"] in ("Oslo", "Rome")


def test_tools_that_the_model_may_call(chat: Any) -> None:
    tool = {"type": "function", "function": {"name": "place", "parameters": SCHEMA}}
    answer = chat.bind_tools([tool]).invoke("where?")
    assert answer.response_metadata["finish_reason"] in ("stop", "length", "tool_calls")
