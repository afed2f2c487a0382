import pytest
import torch

from deltamoe.errors import BackendUnavailableError, ConfigError
from deltamoe.model.device import choose_device


def test_a_name_is_a_device() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_what_is_no_device_is_said() -> None:
    with pytest.raises(ConfigError, match=r"'tpu-or-so': expected auto, cpu, cuda or cuda:N"):
        choose_device("tpu-or-so")
    with pytest.raises(BackendUnavailableError, match=r"torch finds \d+ CUDA devices"):
        choose_device("cuda:99")
