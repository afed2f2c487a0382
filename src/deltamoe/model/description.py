"""A model as ``ops/native/decode.cpp`` is told of it: sizes, and where its weights lie.

Large matrices are used where they are, in fp32, bf16 or quantised; norms, taps and biases, which
are small, as fp32 copies. Knows nothing of states.
"""

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor, nn

from deltamoe.layers import Experts, Kda, Mla, Mlp, Moe
from deltamoe.layers.quantized import QuantizedExperts, QuantizedMatrix, QuantizedMlp
from deltamoe.model.block import Block
from deltamoe.model.model import HybridLM
from deltamoe.ops.quantized import QuantizedWeight, dequantize
from deltamoe.ops.quantized.native import Matrix, matrix_of

__all__ = ["Batch", "Description", "LayerState", "Model", "UnsupportedError", "describe"]

_OUTPUT_GATES = {"none": 0, "sigmoid": 1, "swish": 2}
_SCORINGS = {"sigmoid": 0, "softmax": 1, "topk_softmax": 2}

Weight = Tensor | QuantizedWeight


class UnsupportedError(Exception):
    """The decoder cannot read this model; the message says why."""


def _fields(**groups: str) -> list[tuple[str, type]]:
    kinds = {"whole": c_int64, "real": c_double, "pointers": c_void_p, "matrices": Matrix}
    return [(name, kinds[kind]) for kind, names in groups.items() for name in names.split()]


class _Kda(ctypes.Structure):
    _fields_ = _fields(
        whole="heads value_heads key_dim value_dim conv_size is_bounded output_gate",
        real="lower_bound max_beta norm_eps",
        matrices="q k v decay_down decay_up beta gate_down gate_up o",
        pointers="taps rate dt_bias norm",
    )


class _Mla(ctypes.Structure):
    _fields_ = _fields(
        whole="heads latent_dim nope_dim rope_dim value_dim has_rope",
        real="norm_eps latent_eps",
        matrices="q q_up latent latent_up o",
        pointers="query_norm latent_norm frequencies",
    )


class _Channel(ctypes.Structure):
    _fields_ = (
        *_fields(
            matrices="gate up down",
            whole="num_experts experts_per_token scoring renormalizes num_groups groups_per_token "
            "weighs_with_bias",
            real="routed_scale",
            pointers="bias",
        ),
        *_fields(matrices="router w_gate w_up w_down"),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *_fields(whole="is_mla", pointers="mixer_norm channel_norm"),
        ("kda", _Kda),
        ("mla", _Mla),
        ("channel", _Channel),
    )


class Model(ctypes.Structure):
    """``Model`` of decode_model.h."""

    _fields_ = (
        *_fields(
            whole="dim vocab num_layers state_kind",
            real="norm_eps",
            pointers="norm",
            matrices="embedding head",
        ),
        ("layers", ctypes.POINTER(_Layer)),
    )


class LayerState(ctypes.Structure):
    """``LayerState`` of decode_model.h."""

    _fields_ = _fields(
        pointers="conv conv_after memory memory_after latent rope_key",
        whole="conv_stride memory_stride latent_stride rope_key_stride",
    )


class Batch(ctypes.Structure):
    """``Batch`` of decode_model.h."""

    _fields_ = (
        *_fields(whole="rows", pointers="ids past slots_before slots_after pages"),
        *_fields(whole="max_pages page_tokens", pointers="expert_ids"),
    )


class Description:
    """What ``describe`` returns.

    Attributes:
        model: for C++.
        sizes: bytes of the structs, in the order of ``decoder_sizes``.
        bytes_per_token: of the weights that one token reads.
    """

    sizes = tuple(map(ctypes.sizeof, (Model, _Layer, LayerState, Batch)))

    def __init__(self) -> None:
        self.model = Model()
        self.bytes_per_token = 0
        self._kept: list[object] = []

    def matrix(self, weight: Weight, share: float = 1.0) -> Matrix:
        """Point at a weight, of which a token reads ``share``."""
        try:
            matrix = matrix_of(weight)
        except (KeyError, ValueError) as error:
            raise UnsupportedError(
                f"a matrix is neither fp32, bf16 nor quantised: {error}"
            ) from error
        self._kept.append(weight)
        self.bytes_per_token += int(weight.nbytes * share)
        return matrix

    def numbers(self, tensor: Tensor) -> int:
        """Point at an fp32 copy."""
        copy = tensor.detach().to(torch.float32, copy=True).contiguous()
        self._kept.append(copy)
        return copy.data_ptr()

    def keep(self, thing: object) -> None:
        """Hold on to what was pointed at."""
        self._kept.append(thing)


def describe(model: HybridLM) -> Description:
    """Describe a model whose tensors are on the CPU.

    Raises:
        UnsupportedError: a part of it is of a kind the decoder does not know.
    """
    made, config = Description(), model.config
    layers = (_Layer * config.num_layers)()
    for layer, block in zip(layers, model.blocks, strict=True):
        assert isinstance(block, Block)
        layer.is_mla = isinstance(block.mixer, Mla)
        layer.mixer_norm = made.numbers(block.mixer_norm.weight)
        layer.channel_norm = made.numbers(block.channel_norm.weight)
        if isinstance(block.mixer, Mla):
            layer.mla = _mla(made, block.mixer, model.embedding.weight.dtype)
        else:
            layer.kda = _kda(made, block.mixer)
        layer.channel = _channel(made, block.channel)
    made.keep(layers)
    head = made.matrix(model.embedding.weight if model.head is None else _weight(model.head))
    made.model = Model(
        dim=config.dim,
        vocab=config.vocab_size,
        num_layers=config.num_layers,
        state_kind=matrix_of(model.embedding.weight).kind,
        norm_eps=config.norm_eps,
        norm=made.numbers(model.norm.weight),
        embedding=made.matrix(model.embedding.weight, 1 / config.vocab_size),
        head=head,
        layers=layers,
    )
    return made


def _weight(layer: nn.Module) -> Weight:
    if isinstance(layer, QuantizedMatrix):
        return layer.quantized
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _kda(made: Description, mixer: Kda) -> _Kda:
    c = mixer.config
    described = _Kda(
        heads=c.num_heads,
        value_heads=c.value_heads,
        key_dim=c.key_dim,
        value_dim=c.value_dim,
        conv_size=c.conv_size,
        is_bounded=c.decay == "bounded",
        output_gate=_OUTPUT_GATES[c.output_gate],
        lower_bound=c.decay_lower_bound,
        max_beta=c.max_beta,
        norm_eps=mixer.output_norm.eps,
        q=made.matrix(_weight(mixer.q_proj)),
        k=made.matrix(_weight(mixer.k_proj)),
        v=made.matrix(_weight(mixer.v_proj)),
        decay_down=made.matrix(_weight(mixer.decay_down)),
        decay_up=made.matrix(_weight(mixer.decay_up)),
        beta=made.matrix(_weight(mixer.beta_proj)),
        o=made.matrix(_weight(mixer.o_proj)),
        rate=made.numbers(mixer.A_log.exp()),
        dt_bias=made.numbers(mixer.dt_bias),
        norm=made.numbers(mixer.output_norm.weight),
    )
    if c.output_gate != "none":
        described.gate_down = made.matrix(_weight(mixer.output_gate_down))
        described.gate_up = made.matrix(_weight(mixer.output_gate_up))
    if c.conv_size:
        taps = [conv.weight.float() for conv in (mixer.q_conv, mixer.k_conv, mixer.v_conv)]
        described.taps = made.numbers(torch.cat(taps).t())
    return described


def _mla(made: Description, mixer: Mla, dtype: torch.dtype) -> _Mla:
    c = mixer.config
    latent_up = _weight(mixer.latent_up)  # read row by row and column by column
    if isinstance(latent_up, QuantizedWeight):
        latent_up = dequantize(latent_up, dtype)
    described = _Mla(
        heads=c.num_heads,
        latent_dim=c.latent_dim,
        nope_dim=c.nope_dim,
        rope_dim=c.rope_dim,
        value_dim=c.value_dim,
        has_rope=c.has_rope,
        norm_eps=0.0,
        latent_eps=mixer.latent_norm.eps,
        latent=made.matrix(_weight(mixer.latent_proj)),
        latent_up=made.matrix(latent_up),
        o=made.matrix(_weight(mixer.o_proj)),
        latent_norm=made.numbers(mixer.latent_norm.weight),
    )
    if c.query_rank is None:
        described.q = made.matrix(_weight(mixer.q_proj))
    else:
        described.q = made.matrix(_weight(mixer.q_down))
        described.q_up = made.matrix(_weight(mixer.q_up))
        described.query_norm = made.numbers(mixer.q_norm.weight)
        described.norm_eps = mixer.q_norm.eps
    if c.has_rope:
        half = torch.arange(0, c.rope_dim, 2, dtype=torch.float32)
        described.frequencies = made.numbers(c.rope_theta ** (-half / c.rope_dim))
    return described


def _channel(made: Description, channel: nn.Module) -> _Channel:
    if not isinstance(channel, Moe):
        return _mlp(made, channel)
    c = channel.config
    everyones = channel.shared_expert
    described = _Channel() if everyones is None else _mlp(made, everyones)
    experts = channel.experts
    if not isinstance(experts, Experts | QuantizedExperts):
        raise UnsupportedError(f"its experts are {type(experts).__name__}")
    share = c.experts_per_token / c.num_experts
    if experts.w_gate is not None:
        described.w_gate = made.matrix(_stack(experts.w_gate), share)
    described.w_up = made.matrix(_stack(experts.w_up), share)
    described.w_down = made.matrix(_stack(experts.w_down), share)
    described.router = made.matrix(channel.router.weight.detach())
    if c.has_balance_bias:
        described.bias = made.numbers(channel.router.balance_bias)
    described.num_experts = c.num_experts
    described.experts_per_token = c.experts_per_token
    described.scoring = _SCORINGS[c.scoring]
    described.renormalizes = c.renormalize
    described.num_groups = c.num_groups
    described.groups_per_token = c.groups_per_token
    described.weighs_with_bias = c.has_biased_weights
    described.routed_scale = c.routed_scale
    return described


def _stack(weight: Tensor | QuantizedMatrix) -> Weight:
    return weight.quantized if isinstance(weight, QuantizedMatrix) else weight.detach()


def _mlp(made: Description, mlp: nn.Module) -> _Channel:
    if not isinstance(mlp, Mlp | QuantizedMlp):
        raise UnsupportedError(f"a channel is {type(mlp).__name__}")
    described = _Channel(up=made.matrix(_weight(mlp.w_up)), down=made.matrix(_weight(mlp.w_down)))
    if mlp.w_gate is not None:
        described.gate = made.matrix(_weight(mlp.w_gate))
    return described
