"""Text to token ids and back, exactly.

What lives here: a tokenizer of bytes, a byte-level BPE, Kimi's vocabulary of ranks, the files they
are kept and published in, the turns of a conversation, and the decoder that streams text without
breaking a character.
What it may import: errors and config, for its reader of strict JSON. No torch.
What to read first: base.py.
"""

from deltamoe.tokenizer.base import StreamDecoder, Tokenizer, check_fit
from deltamoe.tokenizer.bpe import BpeTokenizer
from deltamoe.tokenizer.byte import ByteTokenizer
from deltamoe.tokenizer.chat_template import ChatTemplate, Message, ToolCall, read_chat_template
from deltamoe.tokenizer.file import load_tokenizer
from deltamoe.tokenizer.published import published_definition, published_ids, save_published
from deltamoe.tokenizer.tiktoken import TiktokenTokenizer

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "ChatTemplate",
    "Message",
    "StreamDecoder",
    "TiktokenTokenizer",
    "Tokenizer",
    "ToolCall",
    "check_fit",
    "load_tokenizer",
    "published_definition",
    "published_ids",
    "read_chat_template",
    "save_published",
]
