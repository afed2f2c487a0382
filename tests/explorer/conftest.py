"""One recorded run of a tiny model, shared by the tests that only read it."""

import pytest

from deltamoe.explorer import Trace, trace
from deltamoe.model import HybridLM
from deltamoe.testing import tiny_model
from deltamoe.tokenizer import ByteTokenizer

PROMPT = "to be, or not to be"


@pytest.fixture(scope="session")
def model() -> HybridLM:
    return tiny_model()


@pytest.fixture(scope="session")
def recorded(model: HybridLM) -> Trace:
    return trace(model, ByteTokenizer(), PROMPT, max_new_tokens=6)
