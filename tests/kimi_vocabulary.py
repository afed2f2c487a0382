"""A small vocabulary in the published format: ranks learned from a few lines, Kimi's names."""

from functools import cache

from deltamoe.tokenizer import BpeTokenizer, TiktokenTokenizer
from deltamoe.tokenizer.bpe import BYTE_OF

NAMES = {
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|im_system|>": 10,
    "<|tool_calls_section_begin|>": 11,
    "<|tool_calls_section_end|>": 12,
    "<|tool_call_begin|>": 13,
    "<|tool_call_argument_begin|>": 14,
    "<|tool_call_end|>": 15,
    "<|im_middle|>": 17,
    "[PAD]": 30,
}
TEXT = (
    "The quick brown fox doesn't mind; HTTPServer and iPhone's 12345.\n"
    "狐は速い。中文分词 English混合\n\n  def f(x):\n\treturn x + 10\n"
)


@cache
def tokens() -> tuple[bytes, ...]:
    """The bytes, and what was learned, in the order of the ranks."""
    vocab = BpeTokenizer.train([TEXT] * 4, 360).definition["model"]["vocab"]
    learned = [bytes(BYTE_OF[c] for c in t) for t in sorted(vocab, key=lambda t: vocab[t])]
    return (*(bytes([i]) for i in range(256)), *(t for t in learned if len(t) > 1))


def kimi_tokenizer() -> TiktokenTokenizer:
    first = len(tokens())
    return TiktokenTokenizer(tokens(), {name: first + place for name, place in NAMES.items()})
