"""One small BPE for all tests of this folder."""

import pytest

from deltamoe.tokenizer import BpeTokenizer

TEXT = (
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind.\n"
    "def quick(fox):\n    return fox + 12345\n\n"
    "Die Füchse sind schnell, die Hunde sind müde. 狐は速い。\n"
)


@pytest.fixture(scope="session")
def bpe() -> BpeTokenizer:
    return BpeTokenizer.train([TEXT] * 3, 320)
