"""What an engine has done. Knows nothing of who counts or who asks."""

from dataclasses import dataclass

__all__ = ["Counters"]


@dataclass
class Counters:
    """What an engine has done for its callers since it began; all of it only grows.

    What audits read and draw is theirs alone, and counted nowhere; their time is.

    Attributes:
        num_steps: of the loop.
        num_prompt_tokens: read of prompts, those read again included.
        num_generated_tokens: drawn.
        num_cached_tokens: of prompts, that a kept state made it unnecessary to read.
        num_replayed_tokens: of prompts, known and read nevertheless.
        num_audits: requests that were computed again.
        num_audit_mismatches: of these, that gave another answer.
        num_preemptions: sequences that had to give way.
        num_rebuilt: sequences that had lost their state, and were read again.
        num_finished, num_cancelled, num_failed: requests.
        prefill_s, decode_s, sample_s: time spent.
    """

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    num_replayed_tokens: int = 0
    num_audits: int = 0
    num_audit_mismatches: int = 0
    num_preemptions: int = 0
    num_rebuilt: int = 0
    num_finished: int = 0
    num_cancelled: int = 0
    num_failed: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    sample_s: float = 0.0
