"""Text to token ids and back, exactly.

What lives here: a tokenizer of bytes, a byte-level BPE, the file both are kept in, and the decoder
that streams text without breaking a character.
What it may import: errors and config, for its reader of strict JSON. No torch.
What to read first: base.py.
"""

from deltamoe.tokenizer.base import StreamDecoder, Tokenizer
from deltamoe.tokenizer.bpe import BpeTokenizer
from deltamoe.tokenizer.byte import ByteTokenizer
from deltamoe.tokenizer.file import load_tokenizer

__all__ = ["BpeTokenizer", "ByteTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer"]
