import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from deltamoe.engine.prefix_tree import PrefixTree, common_length

IDS = st.lists(st.integers(0, 2), max_size=9).map(tuple)


def array(ids):
    return np.array(ids, np.int64)


def common(left, right):
    return next(
        (at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b),
        min(len(left), len(right)),
    )


@given(IDS, IDS)
def test_common_length(left, right):
    assert common_length(array(left), array(right)) == common(left, right)


@given(st.lists(st.tuples(st.booleans(), IDS), max_size=20), IDS)
def test_the_tree_is_a_dictionary_of_prefixes(changes, asked):
    tree, model, nodes = PrefixTree(), {}, {}
    for is_removal, ids in changes:
        if is_removal and ids in model:
            tree.remove(nodes.pop(ids))
            del model[ids]
        elif not is_removal:
            model[ids] = object()
            nodes[ids] = tree.insert(array(ids), model[ids])
    found, known = tree.match(array(asked))
    expected = sorted((ids for ids in model if asked[: len(ids)] == ids), key=len)
    assert [node.value for node in found] == [model[ids] for ids in expected]
    assert [node.length for node in found] == [len(ids) for ids in expected]
    assert known == max((common(asked, ids) for ids in model), default=0)
    assert set(tree.values()) == set(model.values())
    assert tree.is_empty == (not model)


def test_removing_leaves_no_trace():
    tree = PrefixTree()
    nodes = [tree.insert(array(ids), str(ids)) for ids in ((1, 2, 3), (1, 2, 4), (1,), ())]
    for node in nodes:
        tree.remove(node)
    assert tree.is_empty
    assert not tree._root.children
