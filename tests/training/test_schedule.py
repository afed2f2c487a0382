"""The learning rate's three shapes."""

from itertools import pairwise

import pytest

from deltamoe.config.run import OptimizerConfig
from deltamoe.training.schedule import learning_rate_factor


def factors(steps: int = 100, **keys) -> list[float]:
    config = OptimizerConfig(**{"warmup_steps": 10, **keys})
    return [learning_rate_factor(step, steps=steps, config=config) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_warmup_is_linear_and_never_zero(schedule):
    assert factors(schedule=schedule)[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_wsd_stays_then_falls_as_one_minus_sqrt():
    values = factors(schedule="wsd", decay_fraction=0.2, final_lr_fraction=0.1)
    assert values[10:80] == [1.0] * 70
    assert values[84] == pytest.approx(0.1 + 0.9 * (1 - 0.5))  # a quarter of the way: 1 - sqrt(1/4)
    assert values[-1] == pytest.approx(0.1)
    assert all(a > b for a, b in pairwise(values[79:]))


def test_cosine_passes_half_way_and_ends_at_its_floor():
    values = factors(steps=110, schedule="cosine", final_lr_fraction=0.0)
    assert values[59] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(0.0)


def test_constant_never_falls():
    assert factors(schedule="constant")[10:] == [1.0] * 90


def test_a_run_shorter_than_its_warmup_still_has_a_schedule():
    assert factors(steps=5, warmup_steps=10) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_no_warmup_starts_at_the_peak():
    assert factors(warmup_steps=0)[0] == 1.0


def test_longer_runs_share_the_flat_part():
    assert (
        factors(steps=100, decay_fraction=0.2)[:80] == factors(steps=200, decay_fraction=0.2)[:80]
    )
