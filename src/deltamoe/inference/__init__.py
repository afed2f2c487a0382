"""From a trained model to text: sampling, generation, and a conversation that keeps its state.

Lives here: the sampling rules, prefill and decode, stop strings and streaming, opening a run.
May import: errors, config, model, checkpoint, tokenizer, data; never training.
Read first: ``generation.py``, then ``sampler.py``.
"""

from deltamoe.inference.answer import FinishReason
from deltamoe.inference.generation import Decoding, Generation, generate, stream
from deltamoe.inference.opened import OpenedModel, open_model
from deltamoe.inference.sampler import Sampler
from deltamoe.inference.session import Session
from deltamoe.inference.text_state import TextState, load_text_state, read, save_text_state

__all__ = [
    "Decoding",
    "FinishReason",
    "Generation",
    "OpenedModel",
    "Sampler",
    "Session",
    "TextState",
    "generate",
    "load_text_state",
    "open_model",
    "read",
    "save_text_state",
    "stream",
]
