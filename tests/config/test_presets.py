import pytest

from deltamoe.config import PRESETS, preset, rung
from deltamoe.errors import ConfigError
from deltamoe.plan import parameters

# Table 2 of the paper: activated parameters, heads, layers, width, tokens, learning rate, batch.
TABLE_2 = {
    "scaling-653m": (653e6, 16, 16, 1216, 38.8e9, 2.006e-3, 336),
    "scaling-878m": (878e6, 18, 18, 1376, 59.8e9, 1.790e-3, 432),
    "scaling-1.1b": (1.1e9, 20, 20, 1536, 85.2e9, 1.617e-3, 512),
    "scaling-1.4b": (1.4e9, 22, 22, 1632, 102.5e9, 1.486e-3, 576),
    "scaling-1.7b": (1.7e9, 24, 24, 1776, 128.0e9, 1.371e-3, 640),
}


@pytest.mark.parametrize(("name", "row"), TABLE_2.items(), ids=TABLE_2)
def test_the_ladder_is_the_papers(name, row):
    active, heads, layers, dim, tokens, lr, sequences = row
    run = preset(name)
    model = run.model
    assert (model.kda.num_heads, model.mla.num_heads) == (heads, heads)
    assert (model.num_layers, model.dim) == (layers, dim)
    assert (model.moe.experts_per_token, model.moe.num_experts) == (8, 64)
    assert (run.data.context, run.data.rows * run.train.accumulate) == (4096, sequences)
    assert (run.optimizer.name, run.optimizer.lr, run.optimizer.muon_lr) == ("muon", lr, lr)
    # 2 % is asked for; the widths are rounded to 16, which costs at most 0.4 %.
    counted = parameters(model).active_without_embeddings
    assert counted == pytest.approx(active, rel=0.004)
    assert PRESETS[name].published_active == active
    read = run.train.steps * sequences * 4096
    assert read == pytest.approx(tokens, rel=1e-4)  # half a step in 28,192 is 2e-5
    assert any("nearest" in sentence for sentence in PRESETS[name].assumptions)


def test_the_ladders_expert_width_is_the_nearest_multiple_of_16():
    """A step of 16 either way moves the count further from the table's."""
    for name, (active, *_) in TABLE_2.items():
        model = preset(name).model
        per_width = model.num_layers * 9 * 3 * model.dim
        counted = parameters(model).active_without_embeddings
        assert abs(counted - active) <= 8 * per_width


def test_the_released_geometry():
    model = preset("kimi-linear-48b-a3b").model
    # The published lists count from 1.
    assert [i + 1 for i in range(27) if model.mixer(i) == "mla"] == [4, 8, 12, 16, 20, 24, 27]
    assert [model.channel(i) for i in range(27)] == ["mlp"] + 26 * ["moe"]
    assert (model.vocab_size, model.dim, model.mlp_dim, model.norm_eps) == (
        163_840,
        2304,
        9216,
        1e-5,
    )
    assert (model.kda.num_heads, model.kda.key_dim, model.kda.conv_size) == (32, 128, 4)
    assert (model.kda.decay, model.kda.output_gate, model.kda.max_beta) == (
        "softplus",
        "sigmoid",
        1,
    )
    assert (model.mla.latent_dim, model.mla.nope_dim, model.mla.rope_dim) == (512, 128, 64)
    assert not model.mla.has_rope
    assert model.mla.query_rank is None
    assert (model.moe.num_experts, model.moe.experts_per_token) == (256, 8)
    assert (model.moe.scoring, model.moe.routed_scale, model.moe.renormalize) == (
        "sigmoid", 2.446, True,
    )  # fmt: skip
    assert not model.tie_embeddings


def test_the_textbook_layer_costs_what_nanos_costs():
    textbook, nano = preset("moe-2-of-4"), preset("nano")
    moe = textbook.model.moe
    assert (moe.num_experts, moe.experts_per_token, moe.num_shared_experts) == (4, 2, 0)
    assert (moe.scoring, moe.expert, moe.has_balance_bias) == ("topk_softmax", "ffn", False)
    assert textbook.balance.bias_update == "none"
    assert textbook.balance.load_balance_loss > 0
    active = [parameters(run.model).active for run in (textbook, nano)]
    assert active[0] == pytest.approx(active[1], rel=0.01)  # the routers differ: 4 rows, not 16


def test_one_dial_turns_everything():
    sizes = [parameters(rung(depth).model).active for depth in (4, 8, 12, 16, 24)]
    assert sizes == sorted(sizes)
    assert preset("mini").model == rung(8).model
    assert preset("small").model == rung(16).model
    assert parameters(rung(8).model).active_without_embeddings == pytest.approx(8e6, rel=0.1)
    assert parameters(rung(16).model).active == pytest.approx(1e8, rel=0.1)
    for depth in (4, 5, 13, 24):
        assert rung(depth).model.schedule.endswith("m")
        assert rung(depth).train.steps > 0
    with pytest.raises(ConfigError, match=r"rung\(3\): expected at least 4 layers"):
        rung(3)


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_tokenizer_fills_the_vocabulary(name):
    run = preset(name)
    assert run.data.tokenizer == f"bpe:{run.model.vocab_size}"
    assert len(PRESETS[name].summary) < 75


def test_a_misspelt_preset():
    with pytest.raises(ConfigError, match=r"no preset 'nanno'; did you mean nano\?"):
        preset("nanno")
