"""A radix tree over token ids: which kept prefix does a prompt begin with?

Every node stands for a prefix, spelled by the edges that lead to it; some hold a value, and every
leaf does. Knows nothing of states: a value is whatever it is given.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ids", "Node", "PrefixTree", "common_length"]

Ids = NDArray[np.int64]
Value = TypeVar("Value")


class Node(Generic[Value]):
    """A prefix.

    Attributes:
        edge: ids between the parent's prefix and this one.
        length: ids of the whole prefix.
        value: what is kept for it, if anything.
    """

    __slots__ = ("children", "edge", "length", "parent", "value")

    def __init__(self, parent: "Node[Value] | None", edge: Ids) -> None:
        self.parent = parent
        self.edge = edge
        self.length: int = len(edge) + (parent.length if parent else 0)
        self.children: dict[int, Node[Value]] = {}
        self.value: Value | None = None


class PrefixTree(Generic[Value]):
    """The tree; the empty prefix is its root and always there."""

    def __init__(self) -> None:
        self._root: Node[Value] = Node(None, np.empty(0, np.int64))

    @property
    def is_empty(self) -> bool:
        """Whether it holds no value."""
        return not self._root.children and self._root.value is None

    def match(self, ids: Ids) -> tuple[list[Node[Value]], int]:
        """Follow ``ids`` as far as the tree knows them.

        Returns:
            The nodes with a value whose prefixes ``ids`` begins with, the shortest first; and how
            many ids are known, which may be more than the longest of them.
        """
        node, known = self._root, 0
        found = [node] if node.value is not None else []
        while known < len(ids) and (child := node.children.get(int(ids[known]))):
            same = common_length(child.edge, ids[known:])
            known += same
            if same < len(child.edge):
                break
            node = child
            if node.value is not None:
                found.append(node)
        return found, known

    def insert(self, ids: Ids, value: Value) -> Node[Value]:
        """Keep a value for a prefix, in place of the one it had."""
        node, known = self._root, 0
        while known < len(ids):
            child = node.children.get(int(ids[known]))
            if child is None:
                node = self._attach(node, ids[known:].copy())
                break
            same = common_length(child.edge, ids[known:])
            node = child if same == len(child.edge) else self._split(child, same)
            known += same
        node.value = value
        return node

    def remove(self, node: Node[Value]) -> None:
        """Forget a value, and what of the tree only led to it."""
        node.value = None
        while node.parent and not node.children and node.value is None:
            del node.parent.children[int(node.edge[0])]
            node = node.parent
        if node.parent and node.value is None and len(node.children) == 1:
            [child] = node.children.values()
            child.edge = np.concatenate([node.edge, child.edge])
            child.parent = node.parent
            node.parent.children[int(child.edge[0])] = child

    def values(self) -> Iterator[Value]:
        """Every value, in no order."""
        nodes = [self._root]
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children.values())
            if node.value is not None:
                yield node.value

    @staticmethod
    def _attach(parent: Node[Value], edge: Ids) -> Node[Value]:
        node = Node(parent, edge)
        parent.children[int(edge[0])] = node
        return node

    def _split(self, child: Node[Value], length: int) -> Node[Value]:
        """Put a node into a child's edge, ``length`` ids behind its beginning."""
        assert child.parent is not None
        node = self._attach(child.parent, child.edge[:length])
        child.parent, child.edge = node, child.edge[length:]
        node.children[int(child.edge[0])] = child
        return node


def common_length(left: Ids, right: Ids) -> int:
    """How many ids both begin with."""
    length = min(len(left), len(right))
    differing = left[:length] != right[:length]
    return int(differing.argmax()) if differing.any() else length
