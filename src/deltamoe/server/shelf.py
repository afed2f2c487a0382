"""The shelf of texts that were read once and are gone on from often.

A kept text belongs to the API key that made it. Its cost is what the model carries of it: a fixed
part for KDA, a latent a token for MLA. The longest unused goes when the shelf is full. Texts the
server's owner offers stand beside, for everybody, under their names. Knows nothing of requests.
"""

import secrets
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltamoe.errors import ConfigError
from deltamoe.inference import TextState
from deltamoe.server.errors import ApiError
from deltamoe.server.settings import MAX_STATE_NAME

__all__ = ["KeptState", "StateShelf"]


@dataclass(frozen=True)
class KeptState:
    """One text on the shelf.

    Attributes:
        id: unguessable; of an offered text its name.
        name: whatever its maker calls it.
        state: the text.
        created: seconds since 1970.
    """

    id: str
    name: str
    state: TextState
    created: int = field(default_factory=lambda: int(time.time()))

    def to_dict(self) -> dict[str, Any]:
        """What is said about it."""
        return {
            "id": self.id,
            "object": "state",
            "name": self.name,
            "created": self.created,
            "num_tokens": self.state.num_tokens,
            "bytes": self.state.nbytes,
        }


class StateShelf:
    """Kept texts by scope and id.

    Args:
        max_states, max_bytes: beyond these the longest unused is dropped.
        offered: texts for everybody, by name; they stay, and do not count.

    Raises:
        ConfigError: a name that no request could give.
    """

    def __init__(
        self, *, max_states: int, max_bytes: int, offered: Mapping[str, TextState]
    ) -> None:
        if bad := [name for name in offered if not 1 <= len(name) <= MAX_STATE_NAME]:
            raise ConfigError(
                f"state {bad[0][:80]!r}: expected a name of 1 to {MAX_STATE_NAME} characters"
            )
        self._max_states = max_states
        self._max_bytes = max_bytes
        self._offered = {name: KeptState(name, name, text) for name, text in offered.items()}
        self._kept: OrderedDict[tuple[str, str], KeptState] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Of all texts that were kept together."""
        return sum(kept.state.nbytes for kept in self._kept.values())

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, scope: str, state: TextState, name: str) -> KeptState:
        """Put a text on the shelf.

        Raises:
            ApiError: 400, it alone is larger than the shelf.
        """
        if state.nbytes > self._max_bytes:
            raise ApiError(
                400,
                f"the state takes {state.nbytes:,} bytes; this server keeps {self._max_bytes:,} "
                "in all",
                code="does_not_fit",
            )
        kept = KeptState(f"state-{secrets.token_hex(16)}", name, state)
        self._kept[scope, kept.id] = kept
        while len(self._kept) > self._max_states or self.nbytes > self._max_bytes:
            self._kept.popitem(last=False)
        return kept

    def find(self, scope: str, state_id: str) -> KeptState:
        """Look a text up, which counts as use.

        Raises:
            ApiError: 404.
        """
        if state_id in self._offered:
            return self._offered[state_id]
        kept = self._kept.get((scope, state_id))
        if kept is None:
            raise ApiError(
                404,
                f"no state {state_id!r}: it was never kept under this key, or dropped for others",
                code="state_not_found",
                param="state",
            )
        self._kept.move_to_end((scope, state_id))
        return kept

    def drop(self, scope: str, state_id: str) -> None:
        """Forget a text.

        Raises:
            ApiError: 404; 403 for one that is offered to everybody.
        """
        self.find(scope, state_id)
        if state_id in self._offered:
            raise ApiError(403, f"state {state_id!r} is the server's own", code="state_not_yours")
        del self._kept[scope, state_id]

    def of(self, scope: str) -> list[KeptState]:
        """The texts that are offered, and those of a scope, the longest unused first."""
        own = [kept for (owner, _), kept in self._kept.items() if owner == scope]
        return [*self._offered.values(), *own]
