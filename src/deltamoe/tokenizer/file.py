"""tokenizer.json: which tokenizer a file holds.

Knows how large such a file may be; what is inside a BPE is checked in bpe.py.
"""

from pathlib import Path

from deltamoe.config import check_format, read_json
from deltamoe.errors import BadFileError
from deltamoe.tokenizer.base import Tokenizer
from deltamoe.tokenizer.bpe import BpeTokenizer
from deltamoe.tokenizer.byte import ByteTokenizer

__all__ = ["load_tokenizer"]

MAX_FILE_BYTES = 64 << 20


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read a tokenizer from a ``tokenizer.json`` or from the folder that holds one.

    Raises:
        BadFileError: there is no such file, it is larger than 64 MiB, it is neither of the two
            kinds, a newer deltamoe wrote it, or what it defines cannot be trusted.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    definition = read_json(file, max_bytes=MAX_FILE_BYTES, error=BadFileError)
    if definition.get("type") == "bytes":
        check_format(definition, source=str(file), error=BadFileError)
        return ByteTokenizer()
    try:
        return BpeTokenizer(definition)
    except BadFileError as error:
        raise BadFileError(f"{file}: {error}") from None
