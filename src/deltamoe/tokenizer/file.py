"""Which tokenizer a file or a folder holds, ours or published.

Knows how large such a file may be; what is inside is checked in bpe.py and tiktoken.py. No other
file of a folder is opened, and none is run.
"""

from pathlib import Path

from deltamoe.config import check_format, read_json
from deltamoe.errors import BadFileError
from deltamoe.tokenizer.base import Tokenizer
from deltamoe.tokenizer.bpe import BpeTokenizer
from deltamoe.tokenizer.byte import ByteTokenizer
from deltamoe.tokenizer.published import is_bytes
from deltamoe.tokenizer.tiktoken import TIKTOKEN_FILE, TiktokenTokenizer, read_tiktoken

__all__ = ["load_tokenizer"]

MAX_FILE_BYTES = 64 << 20


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer from a folder, or from one of the files below.

    A folder is a run, a checkpoint or a published model. In it ``tiktoken.model`` (with
    tokenizer_config.json) goes before ``tokenizer.json``.

    Raises:
        BadFileError: there is no such file, it is larger than 64 MiB, it is none of the known
            kinds, a newer deltamoe wrote it, or what it defines cannot be trusted.
        ConfigError: the package that this kind needs is not installed.
    """
    path = Path(path)
    if path.name == TIKTOKEN_FILE or (path / TIKTOKEN_FILE).exists():
        return read_tiktoken(path.parent if path.name == TIKTOKEN_FILE else path)
    file = path / "tokenizer.json" if path.is_dir() else path
    definition = read_json(file, max_bytes=MAX_FILE_BYTES, error=BadFileError)
    kind = definition.get("type")
    if kind in ("bytes", "tiktoken"):
        check_format(definition, source=str(file), error=BadFileError)
    try:
        match kind:
            case "bytes":
                return ByteTokenizer()
            case "tiktoken":
                return TiktokenTokenizer.from_definition(definition)
        return ByteTokenizer() if is_bytes(definition) else BpeTokenizer(definition)
    except BadFileError as error:
        raise BadFileError(f"{file}: {error}") from None
