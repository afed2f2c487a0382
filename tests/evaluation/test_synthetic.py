import pytest
import torch

from deltamoe.evaluation.synthetic import IGNORED, accuracy, mqar, palindrome, stack


def test_palindrome_reads_backwards():
    ids, targets = palindrome(3, 5, vocab_size=9, seed=1)
    assert ids.shape == targets.shape == (3, 11)
    assert (ids[:, 5] == 8).all()
    assert ((ids == 8).sum(1) == 1).all()
    assert torch.equal(ids[:, :5], ids[:, 6:].flip(1))


def test_palindrome_scores_all_but_the_first_answer():
    ids, targets = palindrome(3, 5, vocab_size=9, seed=1)
    scored = [6, 7, 8, 9]  # the separator at 5 and the last position are not scored
    assert (targets != IGNORED).nonzero()[:, 1].tolist() == scored * 3
    assert torch.equal(targets[:, 6:10], ids[:, 7:11])


@pytest.mark.parametrize("num_queries", [None, 2])
def test_mqar_answers_are_the_values_of_the_queried_keys(num_queries):
    ids, targets = mqar(20, 6, num_queries=num_queries, vocab_size=16, seed=1)
    queries = 6 if num_queries is None else num_queries
    assert ids.shape == targets.shape == (20, 13 + queries)
    assert (ids[:, 12] == 15).all()
    assert (targets[:, :13] == IGNORED).all()
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        keys, values = row[:12:2], row[1:12:2]
        assert len(set(keys)) == 6
        assert all(key < 7 for key in keys)
        assert all(7 <= value < 15 for value in values)
        assert len(set(row[13:])) == queries
        table = dict(zip(keys, values, strict=True))
        assert wanted[13:] == [table[key] for key in row[13:]]


def test_mqar_asks_in_random_order():
    ids, _ = mqar(50, 6, vocab_size=16, seed=1)
    assert not torch.equal(ids[:, 13:], ids[:, :12:2])
    assert len(set(ids[:, 13].tolist())) > 1


def test_stack_pops_what_was_pushed_last():
    num_stacks, vocab_size = 4, 12
    ids, targets = stack(30, 25, num_stacks=num_stacks, vocab_size=vocab_size, seed=1)
    assert ids.shape == targets.shape == (30, 75)
    num_pops = 0
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        stacks = [[] for _ in range(num_stacks)]
        for t in range(0, 75, 3):
            operation, which, element = row[t : t + 3]
            assert 0 <= which < num_stacks <= element < vocab_size - 2
            assert wanted[t] == wanted[t + 2] == IGNORED
            if operation == vocab_size - 2:
                stacks[which].append(element)
                assert wanted[t + 1] == IGNORED
            else:
                assert operation == vocab_size - 1
                assert stacks[which].pop() == element == wanted[t + 1]
                num_pops += 1
    # 30 * 24 fair coins, a few of them spoilt by empty stacks: 360 on average
    assert 250 < num_pops < 400


def test_stack_uses_every_stack_and_element():
    ids, _ = stack(100, 40, num_stacks=4, vocab_size=12, seed=1)
    operations = ids.view(100, 40, 3)
    assert set(operations[..., 1].flatten().tolist()) == set(range(4))
    assert set(operations[..., 2].flatten().tolist()) == set(range(4, 10))


@pytest.mark.parametrize("task", [palindrome, mqar, stack])
def test_the_seed_decides(task):
    assert torch.equal(task(4, 6, seed=1).ids, task(4, 6, seed=1).ids)
    assert not torch.equal(task(4, 6, seed=1).ids, task(4, 6, seed=2).ids)


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match="7 keys"):
        mqar(1, 8, vocab_size=16)
    with pytest.raises(ValueError, match="queries <= pairs"):
        mqar(1, 4, num_queries=5, vocab_size=16)
    with pytest.raises(ValueError, match="push and pop"):
        stack(1, 4, num_stacks=10, vocab_size=12)
    with pytest.raises(ValueError, match="separator"):
        palindrome(1, 0)


def test_accuracy_counts_scored_positions_alone():
    targets = torch.tensor([[IGNORED, 2, 0], [1, IGNORED, IGNORED]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 2, 1], [1, 0, 0]]), 3).float()
    assert accuracy(logits, targets) == pytest.approx(2 / 3)
