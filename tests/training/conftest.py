"""A run small enough to be trained dozens of times: 4 layers, bytes, a few hundred sentences."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from deltamoe.config import BalanceConfig, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from deltamoe.data import PreparedData
from deltamoe.testing import tiny_config

MakeRun = Callable[..., RunConfig]


def make_config(**changes: Any) -> RunConfig:
    """A tiny run; ``optimizer={"name": "adamw"}`` and so on change its sections."""
    sections = {
        "model": tiny_config(init_std=0.1),
        "data": DataConfig(context=24, rows=4),
        "optimizer": OptimizerConfig(warmup_steps=2, lr=1e-2, muon_lr=2e-2),
        "balance": BalanceConfig(sequence_balance_loss=1e-2, z_loss=1e-3),
        # One thread: a tiny model gains nothing from two, and a busy machine makes them wait.
        "train": TrainConfig(
            precision="fp32",
            steps=6,
            checkpoint_every=2,
            validate_every=2,
            validation_tokens=200,
            threads=1,
        ),
    }
    for name, values in changes.items():
        sections[name] = replace(sections[name], **values)
    return RunConfig(**sections)


@pytest.fixture(autouse=True)
def _threads_of_others() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def config() -> MakeRun:
    return make_config


def make_data() -> PreparedData:
    texts = [
        f"The {i}th of {n} sheep jumps over the fence. " * 2 for n in range(6) for i in range(n)
    ]
    return PreparedData.in_memory(texts, ["Sheep number one sleeps, and so does number two. "] * 5)


@pytest.fixture(scope="session")
def data() -> PreparedData:
    return make_data()
