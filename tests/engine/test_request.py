import math

import pytest

from deltamoe.engine import EngineOptions, Request
from deltamoe.errors import ConfigError


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.nan),
        ("frequency_penalty", math.inf),
        ("seed", 2**63),
        ("n", 0),
        ("num_logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_values_out_of_range_are_named(key, value):
    with pytest.raises(ConfigError, match=rf"^{key} = "):
        Request(prompt=(1,), **{key: value})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ()}, "at least one token id"),
        ({"logit_bias": {3: math.nan}}, "logit_bias: expected finite"),
        ({"stop": ("a", "")}, "an empty stop string"),
        ({"json_schema": "{}", "grammar": "start: /a/"}, "expected one of them"),
        ({"wants_embedding": True}, "an embedding is of the prompt"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        Request(**{"prompt": (1,), **changes})


def test_the_limits_themselves_are_in_range():
    Request(prompt=(1,), max_tokens=0, temperature=100.0, top_p=1.0, min_p=1.0, seed=-(2**63), n=1)
    Request(prompt=(1,), num_logprobs=20, prompt_logprobs=0, wants_embedding=True, max_tokens=0)


@pytest.mark.parametrize(
    "key",
    ["max_sequences", "context", "state_bytes", "prefill_chunk", "step_tokens", "page_tokens"],
)
def test_options_out_of_range_are_named(key):
    with pytest.raises(ConfigError, match=rf"^{key} = 0"):
        EngineOptions(**{key: 0})


@pytest.mark.parametrize("key", ["max_waiting", "cache_bytes", "audit_every"])
def test_some_options_may_be_zero(key):
    EngineOptions(**{key: 0})
    with pytest.raises(ConfigError, match=rf"^{key} = -1"):
        EngineOptions(**{key: -1})
