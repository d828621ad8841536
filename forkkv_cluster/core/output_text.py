"""Text of one output as its tokens come: whole characters, cut where a stop string or token ends it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from forkkv_cluster.core.detokenizer import IncrementalDetokenizer
from forkkv_cluster.core.request import SamplingParams
from forkkv_cluster.core.stop_strings import StopStringMatcher


class OutputText:
    """``has_stopped`` once a stop string is complete: whatever comes then is no part of the output."""

    def __init__(self, detokenizer: IncrementalDetokenizer, sampling: SamplingParams) -> None:
        self._detokenizer = detokenizer
        self._includes_stop = sampling.include_stop_str_in_output
        self._stop = StopStringMatcher(sampling.stop, is_included=self._includes_stop)
        self._num_free = sampling.min_tokens
        self._has_strings = bool(sampling.stop)

    @property
    def has_stopped(self) -> bool:
        return self._stop.matched is not None

    def push(self, token_ids: Sequence[int], matched_stop: int | None = None) -> tuple[int, str]:
        """How many of the tokens belong to the output, and the text that became certain.

        ``matched_stop`` is the last of the tokens, where it ended the output; stop strings are looked for in the text of
        tokens from min_tokens on.
        """
        is_hidden = matched_stop is not None and not self._includes_stop
        shown = token_ids[:-1] if is_hidden else token_ids
        if not self._has_strings:
            return len(token_ids), self._detokenizer.push(*shown)
        text = ""
        for taken, token_id in enumerate(shown, start=1):
            self._num_free -= 1
            text += self._stop.push(self._detokenizer.push(token_id), is_armed=self._num_free < 0)
            if self.has_stopped:
                return taken, text
        return len(token_ids), text

    def finish(self) -> str:
        """What was held back, at the end of an output that no stop string ended."""
        return self._stop.push(self._detokenizer.flush(), is_armed=self._num_free < 0) + self._stop.flush()
