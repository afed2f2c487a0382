"""The whole model: embedding, blocks, norm, head. It maps token ids to logits and knows no text.

Letters: B batch, T time, D width, vocab; docs/notation.md.
Source: Kimi Linear (arXiv 2510.26692), section 4.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltamoe.config.model import ModelConfig
from deltamoe.layers import Experts, Kda, Mla, RMSNorm, Routing
from deltamoe.model.block import Block
from deltamoe.model.init import initialize
from deltamoe.model.state import ModelState

__all__ = ["Hidden", "HybridLM"]


class Hidden(NamedTuple):
    """What comes out of the blocks.

    Attributes:
        hidden: [B, T, D], normalised, ready for the head.
        state: after the last valid token of each row; None for packed sequences.
        routings: one entry a block; None where the channel is dense.
    """

    hidden: Tensor
    state: ModelState | None
    routings: tuple[Routing | None, ...]


class HybridLM(nn.Module):
    """A Kimi Linear language model: KDA and MLA mixers, dense and sparse channels.

    Parameters are created uninitialised, on the default device: call ``initialize`` or load a
    checkpoint.

    Attributes:
        config: the geometry.
        checkpoint_activations: recompute each block in the backward pass instead of keeping its
            activations.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        # Given its weight, it draws none: on the meta device that would import torch's compiler.
        weight = torch.empty(config.vocab_size, config.dim)
        self.embedding = nn.Embedding(config.vocab_size, config.dim, _weight=weight)
        self.blocks = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = None
        if not config.tie_embeddings:
            self.head = nn.Linear(config.dim, config.vocab_size, bias=False)

    def initialize(self, seed: int) -> None:
        """Draw initial weights; the same seed gives the same weights on the same device type."""
        initialize(self.state_dict(), self.config, seed)

    def initial_state(self, batch_size: int) -> ModelState:
        """Return the state before the first token."""
        layers = tuple(mixer.initial_state(batch_size) for mixer in self._mixers())
        lengths = torch.zeros(batch_size, dtype=torch.int64, device=self.embedding.weight.device)
        return ModelState(layers, lengths)

    def use_backends(self, *, kda: str = "auto", experts: str = "auto") -> None:
        """Choose the operators' backends by name; see ``deltamoe backends``."""
        for module in self.modules():
            if isinstance(module, Kda):
                module.backend = kda
            elif isinstance(module, Experts):
                module.backend = experts

    def forward(
        self,
        ids: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
    ) -> tuple[Float[Tensor, "B T vocab"], ModelState]:
        """Read tokens and score what may follow each.

        Args:
            ids: int64 token ids in [0, vocab).
            state: what an earlier call returned; None starts afresh.
            lengths: valid tokens of each row, the rest being padding on the right (any valid
                id); None means all.

        Returns:
            Logits in fp32 (fp64 for an fp64 model), and the state after each row's last token.

        Raises:
            ValueError: an id outside the vocabulary, or a state of another batch size.
        """
        self._check(ids, state, lengths)
        out = self.hidden(ids, state, lengths=lengths)
        assert out.state is not None
        return self.logits(out.hidden), out.state

    def hidden(
        self,
        ids: Int[Tensor, "B T"],
        state: ModelState | None = None,
        *,
        lengths: Int[Tensor, "B"] | None = None,
        cu_seqlens: Int[Tensor, "..."] | None = None,
    ) -> Hidden:
        """Read tokens without scoring; ``cu_seqlens`` packs sequences along T (B must be 1).

        At each border of ``cu_seqlens`` memory, convolution and attention start afresh; packed
        sequences take no state and return none.
        """
        if cu_seqlens is not None and (state is not None or lengths is not None):
            raise ValueError("packed sequences (cu_seqlens) take neither a state nor lengths")
        x = self.embedding(ids)
        past = None if state is None else state.lengths
        after, routings = [], []
        for i, block in enumerate(self.blocks):
            before = None if state is None else state.layers[i]
            if self.checkpoint_activations and torch.is_grad_enabled():
                x, layer, routing = checkpoint(
                    block, x, before, past, lengths, cu_seqlens, use_reentrant=False
                )
            else:
                x, layer, routing = block(x, before, past, lengths, cu_seqlens)
            after.append(layer)
            routings.append(routing)
        new_state = None
        if cu_seqlens is None:
            read = ids.new_full((len(ids),), ids.shape[1]) if lengths is None else lengths
            new_state = ModelState(tuple(after), read if past is None else past + read)
        return Hidden(self.norm(x), new_state, tuple(routings))

    @property
    def head_weight(self) -> Float[Tensor, "vocab D"]:
        """The head's matrix: one row a token of the vocabulary."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(self, hidden: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch vocab"]:
        """Score every token of the vocabulary, in fp32 (fp64 for an fp64 model)."""
        scores = F.linear(hidden, self.embedding.weight) if self.head is None else self.head(hidden)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def _mixers(self) -> list[Kda | Mla]:
        return [block.mixer for block in self.blocks]  # type: ignore[misc]

    def _check(self, ids: Tensor, state: ModelState | None, lengths: Tensor | None) -> None:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            raise ValueError(
                f"token ids from {int(ids.min())} to {int(ids.max())}: this model's vocabulary "
                f"has {self.config.vocab_size} entries, counted from 0"
            )
        if state is not None and len(state.lengths) != len(ids):
            raise ValueError(
                f"the state has {len(state.lengths)} rows and ids has {len(ids)}; "
                "ModelState.select picks or repeats rows"
            )
        if (
            lengths is not None
            and not 0 <= int(lengths.min()) <= int(lengths.max()) <= ids.shape[1]
        ):
            raise ValueError(f"lengths {lengths.tolist()}: expected 0 to T = {ids.shape[1]}")
