"""Which tensor of ours is which tensor of a GGUF file, and how it is laid out there.

One table, read in both directions. Four rows are more than a new name:

    taps        [C, W] -> [1, C, 1, W]               the short convolution's
    rate        [H] -> [1, 1, H, 1], -exp(A_log)     the factor the decay is multiplied with
    key_up      rows of latent_up -> [H, L, nope]    absorbed into the query, hence transposed
    value_up    rows of latent_up -> [H, V, L]

Shapes here are in NumPy's order, slowest axis first; the file lists them the other way round.
Knows nothing of files and of metadata. No torch at import.
Source: gguf's MODEL_ARCH.KIMI_LINEAR (names); llama.cpp's src/models/kimi-linear.cpp (layouts).
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from deltamoe.config import MlaConfig, ModelConfig
from deltamoe.plan import Weight, weights

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Entry", "entries", "from_entry", "join_latent_up", "to_entry"]

Form = Literal["same", "taps", "rate", "key_up", "value_up"]


class _Row(NamedTuple):
    ours: str
    theirs: str
    form: Form = "same"


_ROWS = (
    _Row("embedding.weight", "token_embd.weight"),
    _Row("norm.weight", "output_norm.weight"),
    _Row("head.weight", "output.weight"),
    _Row("mixer_norm.weight", "attn_norm.weight"),
    _Row("channel_norm.weight", "ffn_norm.weight"),
    # KDA, and what MLA calls by the same name
    _Row("mixer.q_proj.weight", "attn_q.weight"),
    _Row("mixer.k_proj.weight", "attn_k.weight"),
    _Row("mixer.v_proj.weight", "attn_v.weight"),
    _Row("mixer.o_proj.weight", "attn_output.weight"),
    _Row("mixer.q_conv.weight", "ssm_conv1d_q.weight", "taps"),
    _Row("mixer.k_conv.weight", "ssm_conv1d_k.weight", "taps"),
    _Row("mixer.v_conv.weight", "ssm_conv1d_v.weight", "taps"),
    _Row("mixer.A_log", "ssm_a", "rate"),
    _Row("mixer.dt_bias", "ssm_dt.bias"),
    _Row("mixer.decay_down.weight", "ssm_f_a.weight"),
    _Row("mixer.decay_up.weight", "ssm_f_b.weight"),
    _Row("mixer.beta_proj.weight", "ssm_beta.weight"),
    _Row("mixer.output_gate_down.weight", "ssm_g_a.weight"),
    _Row("mixer.output_gate_up.weight", "ssm_g_b.weight"),
    _Row("mixer.output_norm.weight", "ssm_norm.weight"),
    # MLA
    _Row("mixer.latent_proj.weight", "attn_kv_a_mqa.weight"),
    _Row("mixer.latent_norm.weight", "attn_kv_a_norm.weight"),
    _Row("mixer.latent_up.weight", "attn_k_b.weight", "key_up"),
    _Row("mixer.latent_up.weight", "attn_v_b.weight", "value_up"),
    # the channels
    _Row("channel.w_gate.weight", "ffn_gate.weight"),
    _Row("channel.w_up.weight", "ffn_up.weight"),
    _Row("channel.w_down.weight", "ffn_down.weight"),
    _Row("channel.router.weight", "ffn_gate_inp.weight"),
    _Row("channel.router.balance_bias", "exp_probs_b.bias"),
    _Row("channel.experts.w_gate", "ffn_gate_exps.weight"),
    _Row("channel.experts.w_up", "ffn_up_exps.weight"),
    _Row("channel.experts.w_down", "ffn_down_exps.weight"),
    _Row("channel.shared_expert.w_gate.weight", "ffn_gate_shexp.weight"),
    _Row("channel.shared_expert.w_up.weight", "ffn_up_shexp.weight"),
    _Row("channel.shared_expert.w_down.weight", "ffn_down_shexp.weight"),
)

# Matrices that llama.cpp wants whole: its router is fp32, its convolution knows no other type.
_WHOLE = (
    "ffn_gate_inp.weight",
    "ssm_conv1d_q.weight",
    "ssm_conv1d_k.weight",
    "ssm_conv1d_v.weight",
)


class Entry(NamedTuple):
    """One tensor of the file.

    Attributes:
        name: as in the file.
        ours: the name of the tensor in the model's state_dict that it is made of.
        shape: in NumPy's order.
        form: how it is laid out.
        is_fp32: kept in fp32 whatever the file's dtype.
    """

    name: str
    ours: str
    shape: tuple[int, ...]
    form: Form
    is_fp32: bool


def entries(config: ModelConfig) -> Iterator[Entry]:
    """Every tensor of the file of a model that ``check_expressible`` accepts."""
    for weight in weights(config):
        rows = [row for row in _ROWS if row.ours == _local(weight)]
        if not rows:
            raise KeyError(f"tensor {weight.name!r} has no name in a GGUF file")
        for row in rows:
            yield _entry(row, weight, config)
    if config.tie_embeddings:
        shape = (config.vocab_size, config.dim)
        yield Entry("output.weight", "embedding.weight", shape, "same", False)


def to_entry(entry: Entry, tensor: "Tensor", mla: MlaConfig | None) -> "Tensor":
    """Lay one of our tensors out as the file has it: a view, unless the numbers change.

    Of a stack of experts a part [1, F, D] will do.
    """
    if entry.form == "rate":
        tensor = -tensor.float().exp()
    elif entry.form in ("key_up", "value_up"):
        assert mla is not None
        heads = tensor.view(mla.num_heads, mla.nope_dim + mla.value_dim, mla.latent_dim)
        if entry.form == "key_up":
            return heads[:, : mla.nope_dim].transpose(1, 2)
        return heads[:, mla.nope_dim :]
    return tensor.reshape(-1, *entry.shape[1:])


def from_entry(entry: Entry, tensor: "Tensor", weight: Weight) -> "Tensor":
    """Undo ``to_entry`` for every form but the halves of latent_up."""
    if entry.form == "rate":
        tensor = (-tensor).log()
    return tensor.reshape(weight.shape)


def join_latent_up(halves: Mapping[Form, "Tensor"]) -> "Tensor":
    """The halves "key_up" and "value_up" as one matrix, head by head."""
    import torch

    joined = torch.cat([halves["key_up"].transpose(1, 2), halves["value_up"]], dim=1)
    return joined.flatten(0, 1)


def _entry(row: _Row, weight: Weight, config: ModelConfig) -> Entry:
    shape = weight.shape
    if row.form == "taps":
        shape = (1, shape[0], 1, shape[1])
    elif row.form == "rate":
        shape = (1, 1, *shape, 1)
    elif row.form in ("key_up", "value_up"):
        mla = config.mla
        assert mla is not None
        is_key = row.form == "key_up"
        per_head = (mla.latent_dim, mla.nope_dim) if is_key else (mla.value_dim, mla.latent_dim)
        shape = (mla.num_heads, *per_head)
    prefix = "" if weight.layer is None else f"blk.{weight.layer}."
    is_fp32 = weight.is_fp32 or len(weight.shape) == 1 or row.theirs in _WHOLE
    return Entry(prefix + row.theirs, weight.name, shape, row.form, is_fp32)


def _local(weight: Weight) -> str:
    return weight.name if weight.layer is None else weight.name.split(".", 2)[2]
