"""A pool of slots gives the answers that all experts in memory give, and keeps what is used."""

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deltamoe.layers.expert_cache import HALF_LIFE, CachedExperts, ExpertCache
from deltamoe.layers.moe import Experts
from deltamoe.layers.quantized import QuantizedExperts, QuantizedMatrix
from deltamoe.testing import tiny_config
from tests.layers.test_quantized import chosen

E, LAYERS = 5, 2


class Disk:
    """Experts of some layers, and what was asked of them."""

    def __init__(self, *, seconds: float = 0.0) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = []
        for _ in range(LAYERS):
            experts = Experts(24, tiny_config().moe)
            for weight in experts.parameters():
                nn.init.normal_(weight, generator=generator)
            self.layers.append(QuantizedExperts.of(experts, 4))
        self.reads: list[tuple[int, int]] = []
        self.faults: set[tuple[int, int]] = set()
        self.seconds = seconds

    def cache(self, num_slots: int) -> ExpertCache:
        def room(matrix: QuantizedMatrix) -> QuantizedMatrix:
            q = matrix.quantized
            return QuantizedMatrix(
                q._replace(
                    values=torch.zeros(num_slots, *q.values.shape[1:], dtype=torch.uint8),
                    scales=torch.full((num_slots, *q.scales.shape[1:]), torch.nan).half(),
                )
            )

        example = self.layers[0]
        assert example.w_gate is not None
        pool = QuantizedExperts(room(example.w_gate), room(example.w_up), room(example.w_down))

        def read(layer: int, expert: int, slot: int) -> int:
            self.reads.append((layer, expert))
            time.sleep(self.seconds)
            if (layer, expert) in self.faults:
                raise OSError("gone")
            for target, source in zip(pool.buffers(), self.layers[layer].buffers(), strict=True):
                target[slot] = source[expert]
            return 7

        return ExpertCache(pool, num_layers=LAYERS, num_experts=E, read=read)


def asked(cache: ExpertCache, layer: int, experts: Sequence[int]) -> list[int]:
    """Choose experts by one token and return the slots they were found in."""
    counts = np.bincount(list(experts), minlength=E)
    cache.note(layer, counts, 1)
    return [slot for _, slot in cache.places(layer, experts)]


def reads_of(disk: Disk, cache: ExpertCache, layer: int, experts: Sequence[int]) -> set[int]:
    disk.reads.clear()
    asked(cache, layer, experts)
    return {expert for _, expert in disk.reads}


@pytest.mark.parametrize("num_slots", [1, 2, 3, 5, 10])
def test_the_answers_are_those_of_all_experts_in_memory(num_slots: int) -> None:
    disk = Disk()
    cache = disk.cache(num_slots)
    generator = torch.Generator().manual_seed(3)
    for step in range(12):
        tokens = 20 if step == 4 else 1
        ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(tokens)])
        routing, x = chosen(ids.tolist(), E), torch.randn(tokens, 24, generator=generator)
        for layer in range(LAYERS):
            found: tuple[Tensor, Tensor] = CachedExperts(cache, layer)(x, routing)
            expected = disk.layers[layer](x, routing)
            assert torch.equal(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
    assert cache.num_hits + cache.num_misses == LAYERS * (11 * 2 + E)
    assert cache.num_misses == len(disk.reads)
    assert cache.bytes_read == 7 * len(disk.reads)
    if num_slots == LAYERS * E:
        assert cache.num_misses == LAYERS * E  # each was read once


def test_what_is_chosen_often_stays() -> None:
    disk = Disk()
    cache = disk.cache(3)
    for _ in range(10):
        asked(cache, 0, [0, 1])
    for other in (2, 3, 4, 2, 3, 4):
        asked(cache, 0, [other])
    assert reads_of(disk, cache, 0, [0, 1]) == set()


def test_what_was_chosen_long_ago_goes() -> None:
    disk = Disk()
    cache = disk.cache(2)
    for _ in range(10):
        asked(cache, 0, [0])
    for _ in range(8 * HALF_LIFE // 2):  # 10 uses are worth 10 / 2^8 of one by then
        asked(cache, 0, [1])
        asked(cache, 0, [2])
    assert reads_of(disk, cache, 0, [1, 2]) == set()
    assert reads_of(disk, cache, 0, [0]) == {0}


def test_layers_share_the_slots_and_not_the_experts() -> None:
    disk = Disk()
    cache = disk.cache(4)
    first, second = asked(cache, 0, [1, 2]), asked(cache, 1, [1, 2])
    assert len({*first, *second}) == 4
    assert asked(cache, 0, [1, 2]) == first


def test_the_uses_stay_finite_over_a_long_text() -> None:
    cache = Disk().cache(2)
    for _ in range(50):
        cache.note(0, np.full(E, 3000), 100_000)
        list(cache.places(0, [0, 1, 2]))
    assert np.isfinite(cache._uses).all()


def test_the_missing_ones_are_read_at_the_same_time() -> None:
    cache = Disk(seconds=0.2).cache(4)
    begin = time.perf_counter()
    asked(cache, 0, [0, 1, 2, 3])
    assert time.perf_counter() - begin < 0.6  # one after another: 0.8


def test_a_failed_read_is_told_and_the_cache_goes_on() -> None:
    disk = Disk()
    cache = disk.cache(3)
    asked(cache, 0, [0])
    disk.faults = {(0, 2)}
    with pytest.raises(OSError, match="gone"):
        asked(cache, 0, [0, 1, 2])
    disk.faults = set()
    routing, x = chosen([[2, 1], [0, 3]], E), torch.randn(2, 24)
    found, _ = CachedExperts(cache, 0)(x, routing)
    assert torch.equal(found, disk.layers[0](x, routing)[0])


def test_leaving_half_way_gives_no_slot_to_two() -> None:
    disk = Disk(seconds=0.05)
    cache = disk.cache(2)
    for _ in cache.places(0, [0, 1]):
        break
    routing, x = chosen([[2, 3]], E), torch.randn(1, 24)
    found, _ = CachedExperts(cache, 1)(x, routing)
    assert torch.equal(found, disk.layers[1](x, routing)[0])
