"""What could never be answered is refused before it waits. Knows nothing of what runs."""

from deltamoe.engine.errors import ContextTooLongError
from deltamoe.engine.request import Request
from deltamoe.errors import ConfigError
from deltamoe.model import HybridLM, KdaState, ModelState
from deltamoe.tokenizer import Tokenizer

__all__ = ["check_answerable"]


def check_answerable(request: Request, model: HybridLM, tokenizer: Tokenizer, context: int) -> None:
    """Refuse a request that this model, or a sequence of ``context`` tokens, cannot answer.

    Raises:
        ContextTooLongError: prompt and answer do not fit into a sequence.
        ConfigError: an id outside the vocabulary, or a state that is not of this model.
    """
    before = 0 if request.state is None else request.state.num_tokens
    length = before + len(request.prompt) + request.max_tokens
    if length > context:
        raise ContextTooLongError(
            f"a text of {before + len(request.prompt)} tokens and {request.max_tokens} more: "
            f"this engine's context is {context} tokens; shorten the prompt or lower "
            "max_tokens"
        )
    if request.state is not None and request.state.state is not None:
        _check_state(request.state.state, model)
    vocab_size = tokenizer.vocab_size
    for name, ids in (
        ("prompt", request.prompt),
        ("logit_bias", request.logit_bias),
        ("stop_ids", request.stop_ids),
    ):
        if any(not 0 <= token_id < vocab_size for token_id in ids):
            raise ConfigError(f"{name}: expected token ids from 0 to {vocab_size - 1}")


def _check_state(state: ModelState, model: HybridLM) -> None:
    own = model.initial_state(1)
    fits = len(state.layers) == len(own.layers) and len(state.lengths) == 1
    for given, layer in zip(state.layers, own.layers, strict=False):
        sizes = [
            # of latents the second dimension is the text's length
            [part.shape[1 if isinstance(layer, KdaState) else 2 :] for part in each]
            for each in (given, layer)
        ]
        fits = fits and type(given) is type(layer) and sizes[0] == sizes[1]
    if not fits:
        raise ConfigError("state: expected the state of one text that this model has read")
