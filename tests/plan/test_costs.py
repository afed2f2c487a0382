"""What a token and a sequence cost, by hand."""

import dataclasses

from deltamoe.config import preset
from deltamoe.plan import (
    activation_bytes,
    cache_bytes_per_token,
    flops_per_token,
    state_bytes_per_sequence,
    weights,
)
from tests.plan.small import small

KIMI = preset("kimi-linear-48b-a3b").model


def test_state_and_cache_by_hand():
    # 3 KDA layers: memory [4, 3, 5] fp32 and 3 inputs of 6 + 6 + 20 channels.
    assert state_bytes_per_sequence(small(), "bf16") == 3 * (4 * 60 + 2 * 3 * 32)
    assert state_bytes_per_sequence(small(), "fp32") == 3 * (4 * 60 + 4 * 3 * 32)
    assert cache_bytes_per_token(small(), "fp32") == 4 * (11 + 2)
    no_conv = dataclasses.replace(small().kda, conv_size=0)
    assert state_bytes_per_sequence(small(kda=no_conv)) == 3 * 4 * 60
    assert state_bytes_per_sequence(small(mla_every=1, kda=None)) == 0
    assert cache_bytes_per_token(small(mla_every=0, mla=None)) == 0


def test_a_part_that_no_layer_uses_costs_nothing():
    assert state_bytes_per_sequence(small(mla_every=1)) == 0
    assert cache_bytes_per_token(small(mla_every=0)) == 0
    assert flops_per_token(small(mla_every=0), context=10**6) == flops_per_token(
        small(mla_every=0, mla=None), context=0
    )


def test_flops_by_hand():
    matrices = 0
    for w in weights(small()):
        if len(w.shape) > 1 and w.name != "embedding.weight":
            matrices += 2 * w.active
    heads, K, V, C = 4, 3, 5, 64
    kda = 3 * heads * (6 * K * V + C * (2 * K + V) + C * C)
    # A token attends to 1 to 100 positions, 50.5 on average.
    mla = 3 * 2 * (6 + 2 + 9) * 50.5
    assert flops_per_token(small(), context=100) == matrices + kda + mla
    absorbed = 3 * 2 * (2 * 11 + 2) * 101
    next_token = matrices + 3 * heads * 6 * K * V + absorbed
    assert flops_per_token(small(), context=100, form="recurrent") == next_token
    # A tied matrix works as the head all the same.
    assert flops_per_token(small(tie_embeddings=True), context=9) == flops_per_token(
        small(), context=9
    )


def test_flops_of_the_chunk_form_are_the_papers():
    d, C = 128, 64
    chunk, recurrent = (flops_per_token(KIMI, context=0, form=f) for f in ("chunk", "recurrent"))
    expanded, absorbed = 192 + 128, 2 * (2 * 512 + 64)  # of one head and one position
    kda = 20 * 32 * (3 * C * d + C * C)  # beyond the 6 d^2 that both forms have
    assert chunk - recurrent == kda + 7 * 32 * (expanded - absorbed)


def test_activations_grow_with_tokens_and_shrink_by_recomputing():
    nano = preset("nano")
    longer = dataclasses.replace(nano, data=dataclasses.replace(nano.data, rows=16))
    assert activation_bytes(longer) == 2 * activation_bytes(nano)
    saving = dataclasses.replace(nano.train, checkpoint_activations=True)
    assert activation_bytes(dataclasses.replace(nano, train=saving)) < activation_bytes(nano)
    in_bf16 = dataclasses.replace(nano.train, precision="bf16")
    assert activation_bytes(dataclasses.replace(nano, train=in_bf16)) < activation_bytes(nano)
