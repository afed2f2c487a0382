"""One object of a foreign JSON file: typed reads that name the key, and what nobody read.

A key may have several spellings; where two stand there they must agree. Null is absent.
Knows nothing of what the keys mean. No torch.
"""

from collections.abc import Mapping
from typing import Any

from deltamoe.errors import CheckpointError

__all__ = ["Keys"]

_MISSING: Any = object()


class Keys:
    """Reads one object.

    Args:
        data: the object.
        source: what an error calls the file.
        spellings: key -> other keys that mean the same.
        prefix: what an error puts before a key.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        source: str,
        spellings: Mapping[str, tuple[str, ...]],
        prefix: str = "",
    ) -> None:
        self._data = data
        self._source = source
        self._spellings = spellings
        self._prefix = prefix
        self._read: set[str] = set()
        self._sections: dict[str, Keys] = {}

    def error(self, key: str, reason: str) -> CheckpointError:
        """The error to raise about a key."""
        return CheckpointError(f"{self._source}: {self._prefix}{key} {reason}")

    def get(self, key: str) -> Any:
        """The value under any spelling of the key; None if it is absent or null."""
        found = None
        for name in (key, *self._spellings.get(key, ())):
            self._read.add(name)
            value = self._data.get(name)
            if value is not None and found is not None and not _is_same(value, found):
                raise self.error(name, f"= {_show(value)} disagrees with {key} = {_show(found)}")
            found = value if found is None else found
        return found

    def whole(
        self, key: str, default: int = _MISSING, *, least: int = 0, most: int = 1 << 24
    ) -> int:
        """A whole number; without a default the key must be there."""
        value: Any = self._value(key, default)
        if type(value) is not int or not least <= value <= most:
            expected = f"a whole number from {least} to {most:,}"
            raise self.error(key, f"= {_show(value)}: expected {expected}")
        return value

    def number(self, key: str, default: float = _MISSING) -> float:
        """A number that a 32-bit float can hold."""
        value = self._value(key, default)
        if type(value) not in (int, float) or abs(value) > 1e30:
            raise self.error(key, f"= {_show(value)}: expected a number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value: Any = self._value(key, default)
        if type(value) is not bool:
            raise self.error(key, f"= {_show(value)}: expected true or false")
        return value

    def choice(self, key: str, choices: tuple[str, ...], default: str) -> Any:
        """One of some words."""
        value = self._value(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(key, f"= {_show(value)}: expected {' or '.join(choices)}")
        return value

    def require(self, key: str, only: object) -> None:
        """Refuse a key that is there with another value than the only one we can compute."""
        value = self.get(key)
        if key == "model_type" and value is None:
            raise self.error(key, f"is missing; expected {only!r}")
        if value is not None and not _is_same(value, only):
            raise self.error(key, f"= {_show(value)}: this program reads {_show(only)} only")

    def section(self, key: str) -> "Keys | None":
        """The object under a key; None if it is absent."""
        if key in self._sections:
            return self._sections[key]
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"= {_show(value)}: expected an object")
        inner = Keys(value, self._source, {}, f"{self._prefix}{key}.")
        return self._sections.setdefault(key, inner)

    def kinds(self, key: str, known: Mapping[str, Any], num_layers: int) -> tuple[Any, ...] | None:
        """A list with one word for each layer."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != num_layers:
            raise self.error(key, f"must be a list of {num_layers} words, one for each layer")
        for word in value:
            if not isinstance(word, str) or word not in known:
                raise self.error(key, f"holds {_show(word)}: expected {' or '.join(known)}")
        return tuple(known[word] for word in value)

    def layers(self, key: str, num_layers: int) -> list[int]:
        """A list of layers that counts from 1, counted from 0."""
        value = self.get(key)
        if not isinstance(value, list) or len(value) > num_layers:
            raise self.error(key, f"must be a list of layers, counted from 1 to {num_layers}")
        for layer in value:
            if type(layer) is not int or not 1 <= layer <= num_layers:
                raise self.error(key, f"holds {_show(layer)}: expected 1 to {num_layers}")
        return [layer - 1 for layer in value]

    def require_nothing_left(self, known: frozenset[str]) -> None:
        """Refuse keys that nobody read, unless they are null or known to change nothing."""
        for key, value in self._data.items():
            if value is not None and key not in self._read and self._prefix + key not in known:
                raise self.error(
                    _show(key)[1:-1],
                    f"= {_show(value)}: this program does not know the key, and it might change "
                    "what the model computes",
                )
        for section in self._sections.values():
            section.require_nothing_left(known)

    def _value(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            value = default
        if value is _MISSING:
            spelled = " or ".join((key, *self._spellings.get(key, ())))
            raise CheckpointError(f"{self._source}: {self._prefix}{spelled} is missing")
        return value


def _is_same(value: object, other: object) -> bool:
    """Equal, and true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _show(value: object) -> str:
    text = ascii(value) if not isinstance(value, dict | list) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
