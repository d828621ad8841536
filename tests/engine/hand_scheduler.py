"""Plays the scheduler for the model runner: pages by hand, one ``Batch`` per call, unused memory full of NaN."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from forkkv_cluster.cache.page_pool import PagePool
from forkkv_cluster.engine.batch import (
    AttentionSpan,
    Batch,
    LoraSegment,
    ResidualRead,
    ResidualTailCopy,
    ResidualWrite,
    TailCopy,
)
from forkkv_cluster.engine.model_runner import ModelRunner


@dataclass
class Span:
    """Tokens [start, end) of one sequence. ``writes`` is what its rows put into ``pages``: merged, plain or nothing."""

    tokens: Sequence[int]
    start: int
    end: int
    pages: list[int]
    lora: int | None = None
    writes: str = "merged"
    residual_writes: dict[int, list[int]] = field(default_factory=dict)  # adapter slot -> residual pages
    reads: tuple[int, list[int], int] | None = None  # adapter slot, residual pages, tokens


class HandScheduler:
    """Owns the arena of one runner. ``is_scattered`` hands out pages in random order instead of in runs."""

    def __init__(self, runner: ModelRunner, *, is_scattered: bool = False, num_slabs: int = 200) -> None:
        self.runner = runner
        self.page_size = runner.geometry.page_size
        runner.allocate(num_slabs * runner.geometry.slab_bytes)
        runner.kv.arena.fill_(float("nan"))
        self._pool = PagePool(runner.geometry, num_slabs)
        self._random = random.Random(0) if is_scattered else None

    def pages(self, num_tokens: int, rank_class: int | None = None) -> list[int]:
        """Fresh base pages, or residual pages of a rank class, for that many tokens."""
        num_pages = -(-num_tokens // self.page_size)
        allocated = self._pool.allocate(rank_class, 2 * num_pages)
        assert allocated is not None, "the test needs more slabs"
        if self._random is not None:
            self._random.shuffle(allocated)
        return allocated[:num_pages]

    def residual_pages(self, slot: int, num_tokens: int) -> list[int]:
        return self.pages(num_tokens, self.runner.rank_class(slot))

    def run(
        self,
        *spans: Span,
        tail_copies: Sequence[TailCopy] = (),
        residual_tail_copies: Sequence[ResidualTailCopy] = (),
        logits: bool = True,
    ) -> list[Tensor]:
        """One step; the logits [rows, V] of every row, by span."""
        batch = self._batch(spans, logits, tuple(tail_copies), tuple(residual_tail_copies))
        result = self.runner.execute(batch)
        return list(result.split([span.end - span.start for span in spans])) if logits else [result]

    def _batch(
        self,
        spans: Sequence[Span],
        logits: bool,
        tail_copies: tuple[TailCopy, ...],
        residual_tail_copies: tuple[ResidualTailCopy, ...],
    ) -> Batch:
        starts = np.cumsum([0] + [span.end - span.start for span in spans])
        rows = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
        positions = [np.arange(span.start, span.end) for span in spans]
        written = [i for i, span in enumerate(spans) if span.writes != "nothing"]
        slots = [self._slots(spans[i].pages, positions[i]) for i in written]
        plain = [rows[i] for i, span in enumerate(spans) if span.writes == "plain"]
        residual_writes: list[ResidualWrite] = []
        for i, span in enumerate(spans):
            for slot, pages in span.residual_writes.items():
                residual_writes.append(ResidualWrite(slot, rows[i], self._slots(pages, positions[i])))
        return Batch(
            token_ids=_join([np.asarray(span.tokens[span.start : span.end], dtype=np.int64) for span in spans]),
            positions=_join(positions),
            base_rows=_join([rows[i] for i in written]),
            base_slots=_join(slots),
            plain_rows=_join(plain),
            lora_segments=tuple(
                LoraSegment(span.lora, int(starts[i]), int(starts[i + 1]))
                for i, span in enumerate(spans)
                if span.lora is not None
            ),
            residual_writes=tuple(residual_writes),
            attention=tuple(self._attention(span, int(starts[i])) for i, span in enumerate(spans)),
            logit_rows=np.arange(starts[-1]) if logits else np.zeros(0, dtype=np.int64),
            tail_copies=tail_copies,
            residual_tail_copies=residual_tail_copies,
        )

    def _attention(self, span: Span, row_start: int) -> AttentionSpan:
        read = None
        if span.reads is not None:
            slot, pages, num_tokens = span.reads
            read = ResidualRead(slot, self._table(pages, num_tokens), num_tokens)
        return AttentionSpan(row_start, row_start + span.end - span.start, span.start, self._table(span.pages, span.end), read)

    def _table(self, pages: list[int], num_tokens: int) -> np.ndarray:
        return np.asarray(pages[: -(-num_tokens // self.page_size)], dtype=np.int32)

    def _slots(self, pages: list[int], positions: np.ndarray) -> np.ndarray:
        return np.asarray(pages, dtype=np.int64)[positions // self.page_size] * self.page_size + positions % self.page_size


def _join(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, dtype=np.int64)
