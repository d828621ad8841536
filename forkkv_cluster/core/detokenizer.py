"""Text of a growing token stream, never half a character.

The scheme is that of Hugging Face's text-generation-inference: decode a short window of earlier tokens with and without
the new ones, and send the difference once it ends in a whole character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_WINDOW = 8
"""Tokens of earlier text that a decode sees: enough for every tokenizer whose pieces depend on what stands before."""
_MAX_PENDING = 64
"""Tokens that may wait for the rest of a character, of which none has more than four: these are no characters."""


class Decoder(Protocol):
    """The part of a Hugging Face tokenizer that makes text."""

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = ..., **kwargs: Any) -> str: ...


class IncrementalDetokenizer:
    """Text of a token stream, piece by piece. ``prompt_tail`` are the tokens before it: they are context, not output."""

    def __init__(self, tokenizer: Decoder, prompt_tail: Sequence[int] = (), *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._tokens = [int(token) for token in prompt_tail][-_WINDOW:]
        self._num_sent = len(self._tokens)
        self._before = self._decode(self._tokens)

    def push(self, *token_ids: int) -> str:
        """Text that the stream gained for certain; empty in the middle of a character."""
        self._tokens += token_ids
        return self._take(is_end=len(self._tokens) - self._num_sent > _MAX_PENDING)

    def flush(self) -> str:
        """What is left at the end, half characters as U+FFFD."""
        return self._take(is_end=True)

    def _take(self, *, is_end: bool) -> str:
        text = self._decode(self._tokens)
        if text == self._before and self._num_sent and not text.endswith(REPLACEMENT):
            # Tokens without text, as special ones are: forgotten, or a stream of them would be decoded ever again.
            del self._tokens[self._num_sent :]
        if len(text) <= len(self._before) or (text.endswith(REPLACEMENT) and not is_end):
            return ""
        new = text[len(self._before) :]
        # The tokens just sent are the context of the next ones; what stood before them is not needed any more.
        del self._tokens[: self._num_sent]
        self._num_sent = len(self._tokens)
        self._before = self._decode(self._tokens)
        return new

    def _decode(self, tokens: Sequence[int]) -> str:
        if not tokens:
            return ""
        skip = self._skip_special_tokens
        return self._tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
