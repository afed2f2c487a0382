"""The honesty rules: what a trace shows is what the model did."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deltamoe.config import KdaConfig, MlaConfig, MoeConfig
from deltamoe.errors import ConfigError
from deltamoe.explorer import Capture, Trace, derive, trace
from deltamoe.explorer.quantities import QUANTITIES, layers_of
from deltamoe.inference import generate
from deltamoe.model import HybridLM
from deltamoe.model.quantized import quantize_model
from deltamoe.ops.experts import run_experts
from deltamoe.plan import cache_bytes_per_token, parameters, state_bytes_per_sequence
from deltamoe.testing import tiny_config, tiny_model
from deltamoe.tokenizer import ByteTokenizer
from tests.explorer.conftest import PROMPT
from tests.saved_model import drawn_model

TOKENIZER = ByteTokenizer()
MOE = tiny_config().moe
assert MOE is not None

KINDS: dict[str, dict[str, Any]] = {
    "hybrid": {},
    "all KDA": {"mixers": ("kda",) * 4},
    "all MLA, rotated": {
        "mixers": ("mla",) * 4,
        "mla": MlaConfig(
            num_heads=3,
            latent_dim=20,
            nope_dim=10,
            rope_dim=6,
            value_dim=14,
            has_rope=True,
            query_rank=7,
        ),
    },
    "no convolution, no output gate": {
        "kda": KdaConfig(num_heads=2, key_dim=8, value_dim=12, conv_size=0, output_gate="none")
    },
    "bounded decay, swish": {
        "kda": KdaConfig(
            num_heads=2, key_dim=8, value_dim=12, decay="bounded", output_gate="swish", max_beta=2.0
        )
    },
    "softmax router": {
        "moe": MoeConfig(
            num_experts=5, experts_per_token=2, expert_dim=16, scoring="softmax", renormalize=False
        )
    },
    "top-k softmax, plain experts, nothing shared": {
        "moe": MoeConfig(
            num_experts=4,
            experts_per_token=2,
            expert_dim=16,
            expert="ffn",
            scoring="topk_softmax",
            num_shared_experts=0,
            has_balance_bias=False,
        )
    },
    "groups": {
        "moe": MoeConfig(
            num_experts=6, experts_per_token=2, expert_dim=16, num_groups=3, groups_per_token=1
        )
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_check_holds(kind: str) -> None:
    """Routing times answers, memory, attention, counts, weights, bytes: found in two ways."""
    recorded = trace(drawn_model(tiny_config(**KINDS[kind])), TOKENIZER, PROMPT, max_new_tokens=3)
    checks = recorded.summary["checks"]
    assert [check for check in checks if not check["holds"]] == []
    names = {check["name"] for check in checks}
    assert {"experts", "counts", "bytes"} <= names
    assert ("memory" in names) == ("kda" in recorded.summary["layers"][0]["mixer"])


def test_a_check_can_fail(model: HybridLM) -> None:
    """A recorder that looked at other experts than the model used would be caught."""

    def wrong(module: Any, inputs: Any, output: Any) -> Any:
        answer, routing = output
        return answer, routing._replace(expert_weights=routing.expert_weights * 1.01)

    handle = model.blocks[1].get_submodule("channel").register_forward_hook(wrong)
    try:
        checks = trace(model, TOKENIZER, PROMPT).summary["checks"]
    finally:
        handle.remove()
    failed = {(check["name"], check["layer"]) for check in checks if not check["holds"]}
    assert failed == {("experts", 1), ("weights", 1)}


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 3}])
def test_recording_changes_no_token(model: HybridLM, sampling: Any) -> None:
    prompt = [TOKENIZER.end_id, *TOKENIZER.encode(PROMPT)]
    unwatched = generate(model, TOKENIZER, PROMPT, max_tokens=12, **sampling)
    for capture in (Capture(), Capture(layers=(), has_lens=False)):
        recorded = trace(model, TOKENIZER, PROMPT, max_new_tokens=12, capture=capture, **sampling)
        assert recorded.arrays["tokens.ids"].tolist() == [*prompt, *unwatched.ids]
        assert recorded.summary["text"] == unwatched.text
        assert recorded.summary["finish_reason"] == unwatched.finish_reason


def test_ids_are_a_prompt_too(model: HybridLM) -> None:
    ids = [TOKENIZER.end_id, *TOKENIZER.encode(PROMPT)]
    of_ids, of_text = (trace(model, TOKENIZER, p, max_new_tokens=5) for p in (ids, PROMPT))
    assert of_ids.arrays["tokens.ids"].tolist() == of_text.arrays["tokens.ids"].tolist()
    assert of_ids.summary["prompt"] == PROMPT


def test_a_watched_pass_is_the_pass_itself(model: HybridLM, recorded: Trace) -> None:
    """The distributions of the trace are those of the model's forward pass."""
    ids = torch.tensor([recorded.arrays["tokens.ids"].tolist()])
    with torch.inference_mode():
        log_p = model(ids)[0][0].log_softmax(dim=-1)
    best = log_p.topk(20)
    assert recorded.arrays["next.ids"].tolist() == best.indices.tolist()
    # the same kernels in the same order: only log_softmax's exp is taken once more
    np.testing.assert_allclose(
        recorded.arrays["next.probabilities"], best.values.exp(), rtol=1e-6, atol=0
    )
    surprise = -log_p[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    np.testing.assert_allclose(recorded.arrays["tokens.surprise"][1:], surprise, rtol=1e-6)
    assert recorded.arrays["tokens.surprise"][0] == 0


def test_no_hook_is_left(model: HybridLM) -> None:
    class LeftError(Exception):
        pass

    def leave(event: dict[str, Any]) -> None:
        if event["event"] == "layer_summary":
            raise LeftError

    with pytest.raises(LeftError):
        trace(model, TOKENIZER, PROMPT, on_event=leave)
    trace(model, TOKENIZER, PROMPT)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_weights_times_answers_is_the_output_of_an_unwatched_run(
    model: HybridLM, recorded: Trace
) -> None:
    """From the arrays alone: chosen ids and weights, with the experts' matrices."""
    ids = torch.tensor([recorded.arrays["tokens.ids"].tolist()])
    seen: list[Any] = []
    channel = model.blocks[2].get_submodule("channel")
    handle = channel.register_forward_hook(lambda _, inputs, output: seen.extend((inputs, output)))
    with torch.inference_mode():
        model(ids)
    handle.remove()
    (x,), (output, _) = seen
    chosen = torch.tensor(recorded.array("router.expert_ids", 2)).long()
    weights = torch.tensor(recorded.array("router.expert_weights", 2))
    experts: Any = channel.get_submodule("experts")
    with torch.inference_mode():
        total = channel.get_submodule("shared_expert")(x)[0]
        for choice in range(chosen.shape[1]):
            order = chosen[:, choice].argsort(stable=True)
            counts = torch.bincount(chosen[:, choice], minlength=5)
            matrices = experts.w_gate, experts.w_up, experts.w_down
            answers = run_experts(x[0][order], counts, *matrices, backend="reference")
            total[order] += weights[order, choice, None] * answers
    # fp32 sums over 24 channels and 2 experts, in another order
    torch.testing.assert_close(total, output[0], rtol=1e-4, atol=1e-5)
    norms = torch.tensor(recorded.array("channel.output", 2)).norm(dim=-1)
    torch.testing.assert_close(norms, output[0].norm(dim=-1), rtol=1e-5, atol=1e-6)


def test_counts_weights_and_ranks(recorded: Trace) -> None:
    config = recorded.config
    assert config.moe is not None
    tokens, choices = recorded.num_tokens, config.moe.experts_per_token
    for layer in layers_of(config, "moe"):
        assert recorded.array("experts.counts", layer).sum() == tokens * choices
        weights = recorded.array("router.expert_weights", layer)
        np.testing.assert_allclose(weights.sum(-1), config.moe.routed_scale, rtol=1e-6)
        ranks = recorded.array("router.ranks", layer)
        assert (np.sort(ranks, axis=-1) == np.arange(config.moe.num_experts)).all()
        ids = recorded.array("router.expert_ids", layer)
        assert (np.take_along_axis(ranks, ids, -1) == np.arange(choices)).all()
        biased = recorded.array("router.scores", layer) + recorded.array(
            "router.balance_bias", layer
        )
        assert (biased.argsort(-1)[:, ::-1][:, :choices] == ids).all()


def test_closed_groups_are_marked() -> None:
    recorded = trace(drawn_model(tiny_config(**KINDS["groups"])), TOKENIZER, PROMPT)
    ranks = recorded.array("router.ranks", 1)
    assert ((ranks == 65_535).sum(-1) == 4).all()
    assert (np.sort(ranks, -1)[:, :2] == [0, 1]).all()


def test_the_memory_is_what_follows_from_what_was_written(recorded: Trace) -> None:
    for layer in layers_of(recorded.config, "kda"):
        last = derive.memory(recorded, layer, recorded.num_tokens - 1)
        own = recorded.array("kda.memory", layer)
        # NumPy's fp32 recurrence against the model's kernel: rounding of some 25 steps
        np.testing.assert_allclose(last, own, rtol=1e-4, atol=1e-5 * abs(own).max())


def test_meters_are_the_tensors_own(model: HybridLM, recorded: Trace) -> None:
    found = recorded.summary["model"]
    assert found["num_stored_elements"] == sum(t.numel() for t in model.state_dict().values())
    assert found["num_stored_elements"] == parameters(model.config).total
    assert found["weight_bytes"] == sum(t.nbytes for t in model.state_dict().values())
    assert found["state_bytes"] == state_bytes_per_sequence(model.config, "fp32")
    assert found["cache_bytes_per_token"] == cache_bytes_per_token(model.config, "fp32")
    _, state = model(torch.tensor([recorded.arrays["tokens.ids"].tolist()]))
    own = recorded.summary["bytes"]
    assert own["fixed"] + own["growing"] == state.nbytes - state.lengths.nbytes
    crossover = found["crossover_tokens"]
    assert (crossover - 1) * found["cache_bytes_per_token"] < found["state_bytes"]
    assert crossover * found["cache_bytes_per_token"] >= found["state_bytes"]
    layers = found["layers"]
    assert sum(layer["state_bytes"] for layer in layers) == found["state_bytes"]
    assert sum(layer["parameters"] for layer in layers) == sum(parameters(model.config).by_layer)


def test_half_life_is_when_half_is_left(recorded: Trace) -> None:
    half_life = recorded.array("kda.half_life", 0)
    mean = recorded.array("kda.decay_mean", 0)
    np.testing.assert_allclose(np.exp(half_life * mean), 0.5, rtol=1e-5)
    low, high = recorded.array("kda.decay_p10", 0), recorded.array("kda.decay_p90", 0)
    channels = recorded.array("kda.log_decay", 0)
    assert (channels.min(-1) <= low).all()
    assert (low <= high).all()
    assert (high <= channels.max(-1)).all()


def test_what_is_asked_for_is_kept_and_the_rest_is_said(model: HybridLM) -> None:
    recorded = trace(model, TOKENIZER, PROMPT, capture=Capture(layers=(2,), has_lens=False))
    assert recorded.layers("kda.key") == (2,)
    assert recorded.layers("kda.beta") == (0, 1, 2)
    assert "lens.ids" not in recorded.arrays
    [left] = recorded.summary["left_out"]
    assert left["layers"] == [0, 1, 3]
    assert "kda.key" in left["arrays"]


def test_a_budget_lets_the_boxes_go_first(model: HybridLM) -> None:
    """Then the bulky arrays of the last layers; never those that are always kept."""
    whole = trace(model, TOKENIZER, PROMPT)
    sizes = {keep: 0 for keep in ("always", "bulky", "inner")}
    for name, array in whole.arrays.items():
        if QUANTITIES[name].over:
            sizes[QUANTITIES[name].keep] += array.nbytes
    both = sizes["always"] + sizes["bulky"]
    for most, num_bulky, num_inner in (
        (both + sizes["inner"] + 2 * len(model.blocks) * whole.num_tokens * 10, 4, 4),
        (both + sizes["inner"] // 2, 4, 2),
        (sizes["always"] + sizes["bulky"] // 2, 2, 0),
        (1, 0, 0),
    ):
        part = trace(model, TOKENIZER, PROMPT, capture=Capture(most_bytes=most))
        assert part.layers("residual.after") == (0, 1, 2, 3)
        for name, most_layers in (("mixer.output", num_bulky), ("mixer.input", num_inner)):
            kept = part.layers(name) if name in part.arrays else ()
            assert kept == tuple(range(len(kept)))
            assert abs(len(kept) - most_layers) <= 1, name
            if len(kept) < 4:
                [left] = [one for one in part.summary["left_out"] if name in one["arrays"]]
                assert left["layers"] == list(range(len(kept), 4))
                assert "bytes" in left["reason"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_box_holds_what_stands_between(kind: str) -> None:
    """From one box of a diagram to the next by the module or formula that stands between them."""
    model = drawn_model(tiny_config(**KINDS[kind]))
    recorded = trace(model, TOKENIZER, PROMPT, max_new_tokens=2)
    for layer, block in enumerate(model.blocks):
        mixer, channel = block.get_submodule("mixer"), block.get_submodule("channel")

        def get(name: str, layer: int = layer) -> torch.Tensor:
            return torch.tensor(recorded.array(name, layer))

        def agree(found: torch.Tensor, name: str) -> None:
            # fp32, sums over some dozen numbers in another order
            torch.testing.assert_close(found, get(name), rtol=1e-4, atol=1e-5)

        x, y = get("mixer.input"), get("channel.input")
        with torch.inference_mode():
            if recorded.config.mixer(layer) == "kda":
                c = recorded.config.kda
                assert c is not None
                for part, heads in (("query", c.num_heads), ("key", c.num_heads)):
                    projected = mixer.get_submodule(f"{part[0]}_proj")(x)
                    agree(projected.unflatten(-1, (heads, -1)), f"kda.{part}_projected")
                    unit = F.normalize(get(f"kda.{part}_convolved"), dim=-1)
                    agree(unit * (c.key_dim**-0.5 if part == "query" else 1), f"kda.{part}")
                if not c.conv_size:
                    agree(F.silu(get("kda.value_projected")), "kda.value")
                agree(get("kda.beta_logits").sigmoid() * c.max_beta, "kda.beta")
                answers = get("kda.answer_normed")
                if c.output_gate != "none":
                    act = torch.sigmoid if c.output_gate == "sigmoid" else F.silu
                    agree(act(get("kda.output_gate_logits")), "kda.output_gate")
                    answers = answers * get("kda.output_gate")
                agree(mixer.get_submodule("o_proj")(answers.flatten(1)), "mixer.output")
            else:
                c = recorded.config.mla
                assert c is not None
                norm = mixer.get_submodule("latent_norm")
                agree(norm(get("mla.latent_projected")), "mla.latent")
                if c.query_rank is not None:
                    query = mixer.get_submodule("q_up")(get("mla.query_latent"))
                    if not c.has_rope:
                        agree(query.unflatten(-1, (c.num_heads, -1)), "mla.query")
                for head in range(c.num_heads):
                    weights = torch.tensor(derive.attention(recorded, layer, head=head))
                    torch.testing.assert_close(
                        weights @ get("mla.value")[:, head],
                        get("mla.answer")[:, head],
                        rtol=1e-4,
                        atol=1e-5,
                    )
                answer = get("mla.answer").flatten(1)
                agree(mixer.get_submodule("o_proj")(answer), "mixer.output")
            if recorded.config.channel(layer) == "moe":
                weights = get("router.expert_weights")[..., None]
                agree((get("experts.answers") * weights).sum(dim=1), "experts.routed")
                shared = get("experts.shared") if "experts.shared" in recorded.arrays else 0.0
                agree(get("experts.routed") + shared, "channel.output")
                agree(channel.get_submodule("router")(y).logits, "router.logits")
            else:
                hidden = F.silu(get("mlp.gate")) * get("mlp.up")
                agree(channel.get_submodule("w_down")(hidden), "channel.output")


def test_the_last_token_has_no_successor(model: HybridLM) -> None:
    """A single token, the border alone, is a text too."""
    recorded = trace(model, TOKENIZER, "")
    assert recorded.num_tokens == 1
    assert recorded.arrays["tokens.surprise"].tolist() == [0.0]
    assert recorded.array("kda.memory_norm", 0).shape == (1, 4)


def test_events_come_in_order(model: HybridLM) -> None:
    events: list[dict[str, Any]] = []
    recorded = trace(model, TOKENIZER, "ab", max_new_tokens=3, on_event=events.append)
    kinds = [event["event"] for event in events]
    drawn = recorded.num_tokens - 3
    assert kinds == ["start", *["token"] * drawn, *["layer_summary"] * 4]
    assert [event["position"] for event in events[1 : 1 + drawn]] == [3, 4, 5][:drawn]
    assert events[-4:][1]["counts"] == recorded.array("experts.counts", 1).tolist()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": []}, "no token"),
        ({"prompt": "x" * 600}, "at most 512"),
        ({"prompt": "x", "max_new_tokens": -1}, "max_new_tokens"),
        ({"prompt": "x", "temperature": -1.0}, "temperature"),
        ({"prompt": "x", "capture": Capture(layers=(4,))}, "capture.layers: 4"),
    ],
)
def test_what_cannot_be_recorded(model: HybridLM, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        trace(model, TOKENIZER, **arguments)


def test_capture_has_bounds() -> None:
    with pytest.raises(ConfigError, match="2,048"):
        Capture(most_tokens=2049)
    with pytest.raises(ConfigError, match="most_bytes"):
        Capture(most_bytes=0)


def test_every_quantity_of_this_model_is_recorded(recorded: Trace) -> None:
    assert set(recorded.arrays) == set(QUANTITIES) - {"mla.query_latent"}  # it has no bottleneck


def test_a_narrow_model_is_recorded_in_its_own_precision() -> None:
    recorded = trace(tiny_model(torch.bfloat16), TOKENIZER, PROMPT, max_new_tokens=2)
    assert [check for check in recorded.summary["checks"] if not check["holds"]] == []
    assert recorded.summary["model"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_is_recorded_too(bits: Any) -> None:
    recorded = trace(quantize_model(tiny_model(), bits), TOKENIZER, PROMPT, max_new_tokens=2)
    assert [check for check in recorded.summary["checks"] if not check["holds"]] == []
    found = recorded.summary["model"]
    assert found["parameters"]["total"] == parameters(recorded.config).total
