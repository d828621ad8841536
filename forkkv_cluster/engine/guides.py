"""Output that keeps to a JSON schema or a regular expression: which tokens may come next, by llguidance.

What is allowed follows from the guide and the generated tokens alone. Matchers are kept between steps to save work; one
that is missing or behind (a resumed or preempted sequence, an evicted matcher) reads the tokens again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.request import Guide, GuideKind
from forkkv_cluster.engine.logits_processing import RowMasks
from forkkv_cluster.engine.sampling_row import SamplingRow

_MAX_MATCHERS = 512
_NO_TOKEN = "NoExtensionBias"  # llguidance: no token can come next, and the output may not end here either
# Spaces as json.dumps writes them. Whitespace at will would let a model write it without end.
_JSON_OPTIONS: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(slots=True, eq=False)
class _Progress:
    """A matcher of ``guide`` that has read the first ``num_read`` generated tokens."""

    guide: Guide
    matcher: LLMatcher
    num_read: int = 0


class Guides:
    """Token masks of the sequences that have a guide. The tokenizer is read on first use."""

    def __init__(self, directory: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._directory = str(directory)
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._tokenizer: LLTokenizer | None = None
        self._progress: OrderedDict[str, _Progress] = OrderedDict()

    def check(self, guide: Guide) -> None:
        """Raises Unsupported, with the reason, for a guide or a tokenizer that llguidance does not take, and InvalidArgument
        for a guide that no text satisfies."""
        tokenizer = self._load_tokenizer()
        try:
            grammar = _grammar(guide)
            problem = LLMatcher.validate_grammar(grammar, tokenizer) or _first_token_problem(
                LLMatcher(tokenizer, grammar, log_level=0)
            )
        except ValueError as error:
            problem = str(error)
        if problem == _NO_TOKEN:
            raise InvalidArgument(guide.kind.value, guide.text, "matches no text", "Mend it, or leave it out.")
        if problem:
            reason = " ".join(problem.split())
            raise Unsupported(guide.kind.value, guide.text, f"cannot be followed ({reason})", "Simplify it.")

    def masks(self, rows: Sequence[SamplingRow]) -> tuple[RowMasks | None, list[int]]:
        """What the rows with a guide may draw, and those of them whose matcher gave up (its limits).

        None when no row has a guide; a row that failed may draw anything.
        """
        guided = tuple(i for i, row in enumerate(rows) if row.params.guide is not None)
        if not guided:
            return None, []
        masks, failed = [], []
        for i in guided:
            matcher = self._matcher(rows[i])
            mask = matcher.compute_bitmask()
            if matcher.is_error():
                failed.append(i)
                mask = b"\xff" * len(mask)
            masks.append(mask)
        bits = np.frombuffer(b"".join(masks), dtype=np.uint8).reshape(len(guided), -1)
        allowed = np.unpackbits(bits, axis=1, bitorder="little")[:, : self._vocab_size]
        return RowMasks(guided, torch.from_numpy(allowed.astype(bool))), failed

    def _matcher(self, row: SamplingRow) -> LLMatcher:
        generated = row.generated
        progress = self._progress.pop(row.request_id, None)
        guide = row.params.guide
        if guide is None:
            raise TypeError("a row without a guide has no matcher")
        # An id may come again, with another guide or from the beginning.
        if progress is None or progress.num_read > len(generated) or progress.guide != guide:
            progress = _Progress(guide, LLMatcher(self._load_tokenizer(), _grammar(guide), log_level=0))
        if progress.num_read < len(generated):
            progress.matcher.consume_tokens(generated[progress.num_read :].tolist())
            progress.num_read = len(generated)
        self._progress[row.request_id] = progress
        if len(self._progress) > _MAX_MATCHERS:
            self._progress.popitem(last=False)
        return progress.matcher

    def _load_tokenizer(self) -> LLTokenizer:
        if self._tokenizer is None:
            from transformers import AutoTokenizer  # Here: importing it takes seconds that most engines do not need.

            if not self._eos_token_ids:
                raise Unsupported("guide", None, "needs an end-of-sequence token, and this model names none", "Leave it out.")
            try:
                tokenizer: Any = AutoTokenizer.from_pretrained(self._directory, local_files_only=True)
                self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, self._vocab_size, self._eos_token_ids)
            except (OSError, ValueError) as error:
                problem = f"has no fast tokenizer, which guides need ({str(error).splitlines()[0]})"
                raise Unsupported("guide", self._directory, problem, "Add tokenizer.json.") from None
        return self._tokenizer


def _first_token_problem(matcher: LLMatcher) -> str:
    """Why no output can begin, as one line; empty when one can. Grammars are built lazily: an expression that matches nothing
    (a class without characters) is valid, and shows only when its first token is asked for."""
    matcher.compute_bitmask()
    return matcher.get_error().splitlines()[0] if matcher.is_error() else ""


def _grammar(guide: Guide) -> str:
    """In llguidance's own notation. Raises ValueError for text that is not JSON."""
    if guide.kind is GuideKind.REGEX:
        return LLMatcher.grammar_from_regex(guide.text)
    return LLMatcher.grammar_from_json_schema(guide.text, _JSON_OPTIONS)
