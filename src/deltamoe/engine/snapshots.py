"""The states that are kept: of prefixes that may come again, of sequences that had to give way,
of prompts whose choices have not all begun.

All live under one budget, and the one that was not used for longest goes first; a sequence whose
snapshot is gone reads its text again. Prefixes are found within a scope only.
Knows nothing of requests or of what is running.
"""

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

from deltamoe.engine.prefix_tree import Ids, Node, PrefixTree
from deltamoe.engine.state_pool import Handle, Snapshot, StatePool

__all__ = ["Cuts", "Found", "Kept", "Snapshots"]

Cuts = tuple[int, ...]


class Kept:
    """A snapshot in the store.

    Attributes:
        snapshot: None once it has been evicted.
        cuts: how its text was read, see ``Sequence.cuts``; two states of one text that were cut
            alike are equal to the last bit.
        is_cold: whether a text of which nothing was known would have been cut alike.
    """

    __slots__ = ("cuts", "is_cold", "node", "scope", "snapshot")

    def __init__(self, snapshot: Snapshot, cuts: Cuts, *, is_cold: bool) -> None:
        self.snapshot: Snapshot | None = snapshot
        self.cuts = cuts
        self.is_cold = is_cold
        self.scope: Hashable = None
        self.node: Node[Kept] | None = None


class Found(NamedTuple):
    """What is known of a prompt.

    Attributes:
        kept: the longest usable prefix, None if there is none.
        num_known: ids that some earlier text began with; never less than those of ``kept``.
    """

    kept: Kept | None
    num_known: int


class Snapshots:
    """The store.

    Args:
        pool: where the states are; its size has the budget.

    Attributes:
        num_evicted: snapshots that made room for others.
    """

    def __init__(self, pool: StatePool) -> None:
        self._pool = pool
        self._by_use: OrderedDict[Kept, None] = OrderedDict()  # the least recently used first
        self._trees: dict[Hashable, PrefixTree[Kept]] = {}
        self.num_evicted = 0

    def __len__(self) -> int:
        return len(self._by_use)

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots, each shared page counted once."""
        pool = self._pool
        return pool.cached_slot_bytes + pool.num_cached_pages * pool.size.page_bytes

    def find(self, scope: Hashable, ids: Ids, *, limit: int, cuts: Cuts | None) -> Found:
        """Look for the longest kept prefix of at most ``limit`` ids.

        Args:
            scope: of the request.
            ids: the prompt.
            limit: ids that may be skipped.
            cuts: take only states of texts that were cut like this; None takes any.
        """
        tree = self._trees.get(scope)
        if tree is None:
            return Found(None, 0)
        nodes, num_known = tree.match(ids)
        for node in reversed(nodes):
            kept = node.value
            assert kept is not None
            if node.length > limit:
                continue
            if cuts is not None and kept.cuts != cuts[: len(kept.cuts)]:
                continue
            self._by_use.move_to_end(kept)
            return Found(kept, num_known)
        return Found(None, num_known)

    def keep(self, scope: Hashable, ids: Ids, handle: Handle, cuts: Cuts, *, is_cold: bool) -> None:
        """Keep the state of a prefix, if it fits; ``handle`` has just read it, cut like this.

        Of two states of one prefix the first stays, unless the second is the cold one.
        """
        tree = self._trees.setdefault(scope, PrefixTree())
        nodes, _ = tree.match(ids)
        there = nodes[-1].value if nodes and nodes[-1].length == len(ids) else None
        if there is not None:
            self._by_use.move_to_end(there)
            if there.is_cold or not is_cold:
                return
            self.drop(there)
        if (kept := self.hold(handle, cuts, is_cold=is_cold)) is not None:
            tree = self._trees.setdefault(scope, PrefixTree())
            kept.scope, kept.node = scope, tree.insert(ids, kept)
        elif tree.is_empty:
            self._trees.pop(scope, None)

    def hold(self, handle: Handle, cuts: Cuts, *, is_cold: bool = False) -> Kept | None:
        """Put a sequence's state aside, if it fits; under no name, for whoever keeps the answer."""
        if not self._make_room(handle):
            return None
        kept = Kept(self._pool.snapshot(handle), cuts, is_cold=is_cold)
        self._by_use[kept] = None
        return kept

    def drop(self, kept: Kept) -> None:
        """Forget a snapshot; nothing happens if that was done already."""
        if kept.snapshot is None:
            return
        del self._by_use[kept]
        self._pool.drop(kept.snapshot)
        kept.snapshot = None
        if kept.node is not None:
            tree = self._trees[kept.scope]
            tree.remove(kept.node)
            kept.node = None
            if tree.is_empty:
                del self._trees[kept.scope]

    def clear(self) -> None:
        """Forget everything."""
        while self._by_use:
            self.drop(next(iter(self._by_use)))

    def _make_room(self, handle: Handle) -> bool:
        pool, size = self._pool, self._pool.size
        if size.slot_bytes > size.cached_slot_bytes:
            return False
        if pool.pages_for(handle.length) > size.num_cached_pages:
            return False
        while (
            pool.cached_slot_bytes + size.slot_bytes > size.cached_slot_bytes
            or pool.num_cached_pages + pool.pages_to_cache(handle) > size.num_cached_pages
        ):
            self.drop(next(iter(self._by_use)))
            self.num_evicted += 1
        return True
