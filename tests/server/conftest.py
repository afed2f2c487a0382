"""One engine and one server for all tests of a module; they leave no trace in each other."""

from collections.abc import Iterator

import pytest

from deltamoe.engine import Engine, EngineOptions
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer, ChatTemplate
from tests.kimi_vocabulary import kimi_tokenizer
from tests.server.serving import Running, running

MIB = 1 << 20


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    options = EngineOptions(
        max_sequences=8, max_waiting=16, context=512, state_bytes=16 * MIB, cache_bytes=8 * MIB
    )
    with Engine(tiny_model(), ByteTokenizer(), options) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    """A base model."""
    with running(engine, max_tokens=256) as running_server:
        yield running_server


@pytest.fixture(scope="module")
def chat_server() -> Iterator[Running]:
    """A model with Kimi's turns and tools."""
    options = EngineOptions(
        max_sequences=8, max_waiting=16, context=512, state_bytes=16 * MIB, cache_bytes=8 * MIB
    )
    with (
        Engine(tiny_model(vocab_size=400), kimi_tokenizer(), options) as engine,
        running(engine, chat_template=ChatTemplate(), max_tokens=256) as running_server,
    ):
        yield running_server
