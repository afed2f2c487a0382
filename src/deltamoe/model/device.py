"""Which device a name means."""

import torch

from deltamoe.errors import BackendUnavailableError, ConfigError

__all__ = ["choose_device"]


def choose_device(name: str) -> torch.device:
    """The device a person named; "auto" is CUDA where there is one.

    Raises:
        ConfigError: no such name.
        BackendUnavailableError: CUDA was asked for by name and is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device = {name!r}: expected auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BackendUnavailableError(
            f"device = {name!r}, but torch finds {torch.cuda.device_count()} CUDA devices; "
            "use auto or cpu"
        )
    return device
