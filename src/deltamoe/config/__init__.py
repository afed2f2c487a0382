"""What a model and a run are, as frozen facts, and every way to write them down.

Lives here: the configuration classes, the presets, the strict readers of TOML, JSON and dotted
overrides. No torch.
May import: ``deltamoe.errors``.
Read first: ``model.py`` (the geometry), then ``presets.py`` (geometries with names).
"""

from deltamoe.config.model import Channel, KdaConfig, Mixer, MlaConfig, ModelConfig, MoeConfig
from deltamoe.config.parse import (
    FORMAT,
    fingerprint,
    from_dict,
    from_json,
    read_config,
    to_dict,
    to_json,
    whole_number,
)
from deltamoe.config.presets import PRESETS, Preset, preset, rung
from deltamoe.config.resolve import overridden, resolve
from deltamoe.config.run import BalanceConfig, DataConfig, OptimizerConfig, RunConfig, TrainConfig
from deltamoe.config.strict_json import check_format, open_regular, parse_json, read_json

__all__ = [
    "FORMAT",
    "PRESETS",
    "BalanceConfig",
    "Channel",
    "DataConfig",
    "KdaConfig",
    "Mixer",
    "MlaConfig",
    "ModelConfig",
    "MoeConfig",
    "OptimizerConfig",
    "Preset",
    "RunConfig",
    "TrainConfig",
    "check_format",
    "fingerprint",
    "from_dict",
    "from_json",
    "open_regular",
    "overridden",
    "parse_json",
    "preset",
    "read_config",
    "read_json",
    "resolve",
    "rung",
    "to_dict",
    "to_json",
    "whole_number",
]
