"""From drawn ids to text that may be shown.

``Answer`` follows one row: it decodes ids without breaking a character, holds back what may still
become a stop string, and knows when and why the row is finished. Knows nothing of models.
"""

from collections.abc import Sequence
from typing import Literal

from deltamoe.errors import ConfigError
from deltamoe.tokenizer import StreamDecoder, Tokenizer

__all__ = ["Answer", "FinishReason", "StopFilter"]

FinishReason = Literal["stop", "length", "end"]


class StopFilter:
    """Lets text through up to the first stop string, however the text is cut into pieces.

    The first stop string is the one completed first; of two completed by the same character, the
    longer. Nothing from its beginning on is ever let through.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        if "" in stop:
            raise ConfigError(
                "stop = '': expected text; an empty stop string stops before it began"
            )
        self.stop = tuple(stop)
        self.matched: str | None = None
        self._held = ""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came."""
        return self.matched is not None

    def push(self, text: str) -> str:
        """Take more text; return what is certain to stand before any stop string."""
        if not self.stop:
            return text
        self._held += text
        found = [
            (start + len(stop), start, stop)
            for stop in self.stop
            if (start := self._held.find(stop)) >= 0
        ]
        if found:
            _, start, self.matched = min(found)
            return self._release(start)
        return self._release(len(self._held) - self._num_undecided())

    def finish(self) -> str:
        """Return what was held back; no more text will come."""
        return self._release(len(self._held))

    def _num_undecided(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        return max(
            (
                length
                for stop in self.stop
                for length in range(1, len(stop))
                if self._held.endswith(stop[:length])
            ),
            default=0,
        )

    def _release(self, length: int) -> str:
        certain, self._held = self._held[:length], "" if self.is_stopped else self._held[length:]
        return certain


class Answer:
    """What one row has written so far.

    Args:
        tokenizer: decodes the ids.
        max_tokens: most ids that may be drawn.
        stop: strings that end the row.
        stop_ids: ids that end it, beside the tokenizer's own.
        ignores_end: go on behind the tokenizer's own.

    Attributes:
        ids: every id drawn, the stop id that ended it left out; it includes the ids whose text a
            stop string cut off.
        text: the text let through so far.
        finish_reason: None while the row goes on; "stop" (a stop string came, or one of
            ``stop_ids``), "length" (``max_tokens`` are reached) or "end" (the model drew one of the
            tokenizer's own).
        matched_stop: the stop string or stop id behind "stop" and "end"; None otherwise.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        stop: Sequence[str],
        stop_ids: Sequence[int] = (),
        ignores_end: bool = False,
    ) -> None:
        self.ids: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = "length" if max_tokens == 0 else None
        self.matched_stop: str | int | None = None
        self._stop_ids = frozenset(stop_ids)
        self._end_ids = frozenset() if ignores_end else tokenizer.stop_ids
        self._max_tokens = max_tokens
        self._decoder = StreamDecoder(tokenizer)
        self._stop_filter = StopFilter(stop)

    def push(self, token_id: int) -> str:
        """Take one drawn id; return the text that has become certain."""
        if token_id in self._stop_ids or token_id in self._end_ids:
            piece = self._finish("stop" if token_id in self._stop_ids else "end")
            self.matched_stop = token_id
        else:
            self.ids.append(token_id)
            piece = self._stop_filter.push(self._decoder.push(token_id))
            if self._stop_filter.is_stopped:
                self.finish_reason = "stop"
                self.matched_stop = self._stop_filter.matched
            elif len(self.ids) == self._max_tokens:
                piece += self._finish("length")
        self.text += piece
        return piece

    def _finish(self, reason: FinishReason) -> str:
        self.finish_reason = reason
        return self._stop_filter.push(self._decoder.finish()) + self._stop_filter.finish()
