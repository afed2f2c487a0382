"""One block: a mixer, then a channel, each behind a norm and added to the stream."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from deltamoe.config.model import ModelConfig
from deltamoe.layers import Kda, KdaState, Mla, MlaState, Mlp, Moe, Routing, StreamNorm

__all__ = ["Block"]


class Block(nn.Module):
    """``x + mixer(norm(x))``, then ``x + channel(norm(x))``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.mixer_norm = StreamNorm(dim, eps)
        self.mixer: Kda | Mla
        if config.mixer(layer) == "kda":
            assert config.kda is not None
            self.mixer = Kda(dim, config.kda, eps)
        else:
            assert config.mla is not None
            self.mixer = Mla(dim, config.mla, eps)
        self.channel_norm = StreamNorm(dim, eps)
        self.channel: Mlp | Moe
        if config.channel(layer) == "mlp":
            self.channel = Mlp(dim, config.mlp_dim)
        else:
            assert config.moe is not None
            self.channel = Moe(dim, config.moe)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        state: KdaState | MlaState | None = None,
        past: Int[Tensor, "B"] | None = None,
        lengths: Int[Tensor, "B"] | None = None,
        cu_seqlens: Int[Tensor, "..."] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], KdaState | MlaState, Routing | None]:
        """Advance the residual stream by one block."""
        x, normed = self.mixer_norm(x)  # x comes back so that its two gradients meet in the norm
        after: KdaState | MlaState
        if isinstance(self.mixer, Kda):
            assert state is None or isinstance(state, KdaState)
            mixed, after = self.mixer(normed, state, lengths=lengths, cu_seqlens=cu_seqlens)
        else:
            assert state is None or isinstance(state, MlaState)
            mixed, after = self.mixer(
                normed, state, past=past, lengths=lengths, cu_seqlens=cu_seqlens
            )
        x, normed = self.channel_norm(x, mixed)
        answer = self.channel(normed)
        routing = None
        if isinstance(self.channel, Moe):
            answer, routing = answer
        return x + answer, after, routing
