"""The ``openai`` package against a real socket: what its users do, and which errors they see."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from deltamoe.engine import Engine
from tests.server.serving import MODEL, Running, running, until

# not ours: what the package and its dependencies warn of
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def openai() -> Any:
    return pytest.importorskip("openai")


@pytest.fixture(scope="module")
def client(openai: Any, chat_server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{chat_server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: Any) -> None:
    asked = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 16}
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == choice.message.content
    assert chunks[-1].usage == answer.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )


def test_completions_embeddings_models(client: Any) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=4, n=2, echo=True)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[2].text.startswith("b")
    [vector] = client.embeddings.create(model=MODEL, input="hello").data
    assert sum(x * x for x in vector.embedding) == pytest.approx(1.0, abs=1e-5)  # fp32
    assert [model.id for model in client.models.list()] == [MODEL]


def test_structured_output(client: Any) -> None:
    from pydantic import BaseModel

    class Place(BaseModel):
        indoors: bool
        rooms: list[bool]

    answer = client.chat.completions.parse(
        model=MODEL, messages=HELLO, response_format=Place, max_tokens=200, temperature=0.5, seed=2
    )
    found = answer.choices[0].message.parsed
    assert found is not None or answer.choices[0].finish_reason == "length"
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        response_format={"type": "json_object"},
        max_tokens=200,
        seed=1,
        temperature=1,
        logit_bias={str(ord("}")): 12},
    )
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)


def test_errors_have_their_classes(openai: Any, client: Any, chat_server: Running) -> None:
    def ask(**changes: Any) -> None:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **changes})

    for wrong in ({"temperature": 3}, {"n": 0}, {"messages": []}, {"max_tokens": 100_000}):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(**wrong)
        assert refused.value.body["message"]
    with pytest.raises(openai.BadRequestError) as refused:
        ask(messages=[{"role": "user", "content": "x" * 2000}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        ask(model="gpt-9")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_keys(openai: Any, engine: Engine) -> None:
    with running(engine, api_keys=("the-right-key",)) as server:
        for key, fits in (("the-right-key", True), ("another-key", False)):
            with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
                if fits:
                    assert client.models.list().data
                else:
                    with pytest.raises(openai.AuthenticationError):
                        client.models.list()


def test_a_full_queue_is_a_rate_limit(openai: Any, engine: Engine) -> None:
    """8 run and 16 wait; of the rest each is told so, and a client that retries gets through."""

    async def ask_all(url: str, retries: int) -> list[Any]:
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=retries
        ) as client:
            asked = {"model": MODEL, "prompt": "a", "extra_body": {"ignore_eos": True}}
            return await asyncio.gather(
                *(client.completions.create(**asked, max_tokens=60) for _ in range(60)),
                return_exceptions=True,
            )

    with running(engine) as server:
        answers = asyncio.run(ask_all(server.url, 0))
        refused = [a for a in answers if isinstance(a, openai.RateLimitError)]
        assert refused
        assert len(refused) + sum(hasattr(a, "choices") for a in answers) == 60
        assert refused[0].response.headers["retry-after"] == "1"
        answers = asyncio.run(ask_all(server.url, 8))
        assert all(hasattr(answer, "choices") for answer in answers)


def test_async_streams_at_once(openai: Any, chat_server: Running) -> None:
    async def one(client: Any, seed: int) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=12, seed=seed, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{chat_server.url}/v1", api_key="none") as client:
            at_once = await asyncio.gather(*(one(client, seed) for seed in range(8)))
            assert [await one(client, seed) for seed in (0, 5)] == [at_once[0], at_once[5]]
            return at_once

    assert len(set(asyncio.run(all_of_them()))) > 1


def test_a_stream_left_early_and_a_timeout(openai: Any, engine: Engine) -> None:
    with running(engine, max_tokens=500) as server:
        asked = {"model": MODEL, "prompt": "a", "max_tokens": 490, "n": 8}
        asked["extra_body"] = {"ignore_eos": True}
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            with client.completions.create(**asked, stream=True) as stream:
                next(iter(stream))
            until(lambda: engine.stats().num_running == 0, seconds=2.0)
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**asked, timeout=0.05)
            until(lambda: engine.stats().num_running == 0, seconds=2.0)


def test_an_error_in_mid_stream(
    openai: Any, client: Any, chat_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deltamoe.engine import Ticket
    from deltamoe.errors import NonFiniteError

    pieces = Ticket.apieces

    async def failing(ticket: Ticket) -> Any:
        count = 0
        async for piece in pieces(ticket):
            yield piece
            count += 1
            if count == 3:
                raise NonFiniteError("damaged weights")

    monkeypatch.setattr(Ticket, "apieces", failing)
    stream = client.completions.create(model=MODEL, prompt="a", max_tokens=30, stream=True)
    with pytest.raises(openai.APIError, match=r"damaged|failed"):
        list(stream)
