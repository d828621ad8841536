"""Samples to rows of equal length, drawn by worker processes so that the accelerator never waits for text."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from forkkv_cluster.training.casebook.generator import Level
from forkkv_cluster.training.casebook.samples import Sample, samples
from forkkv_cluster.training.casebook.tokenizer import Encoder

__all__ = ["BUCKETS", "FIRST_FULL", "Batch", "Bucket", "CasebookBatches", "batch_of", "loader"]


@dataclass(frozen=True, slots=True)
class Bucket:
    """Rows of ``row_len`` tokens: contexts of at most ``context_tokens``, then as many turns as fit."""

    context_tokens: int
    num_turns: int
    row_len: int
    level: Level

    @property
    def passing_loss(self) -> float:
        """Training loss below which most of what is asked is recalled; guessing among the values of a casebook costs twice."""
        return 0.08 if self.level is Level.FULL else 0.05


BUCKETS = (
    Bucket(40, 2, 96, Level.PLAIN),
    Bucket(64, 6, 192, Level.PLAIN),
    Bucket(128, 10, 320, Level.PLAIN),
    Bucket(128, 8, 320, Level.SAID),
    Bucket(192, 10, 448, Level.FULL),
    Bucket(384, 16, 768, Level.FULL),
    Bucket(768, 20, 1280, Level.FULL),
    Bucket(1408, 24, 1984, Level.FULL),
    Bucket(2304, 28, 2944, Level.FULL),
)
"""The curriculum, from half a dozen facts to several hundred."""
FIRST_FULL = next(index for index, bucket in enumerate(BUCKETS) if bucket.level is Level.FULL)
_MAX_ROWS = 64
"""Many small steps find recall sooner than few large ones, and short rows are slow to draw."""


@dataclass(frozen=True, slots=True)
class Batch:
    """input_ids [num_rows, row_len] int64, padded at the end; answer_at [k] int64, positions of the answers' tokens in the
    flattened input_ids, which are found here and not where it would hold up an accelerator; the bucket's index."""

    input_ids: torch.Tensor
    answer_at: torch.Tensor
    bucket: int


def batch_of(rows: list[Sample], row_len: int, pad: int, bucket: int) -> Batch:
    """A sample that is longer than a row loses the end of its branch."""
    ids: NDArray[np.int64] = np.full((len(rows), row_len), pad, dtype=np.int64)
    is_answer = np.zeros((len(rows), row_len), dtype=np.bool_)
    for row, sample in enumerate(rows):
        start = min(len(sample.context_ids), row_len)
        end = min(start + len(sample.branch_ids), row_len)
        ids[row, :start] = sample.context_ids[:start]
        ids[row, start:end] = sample.branch_ids[: end - start]
        is_answer[row, start:end] = sample.is_answer[: end - start]
    return Batch(torch.from_numpy(ids), torch.from_numpy(np.flatnonzero(is_answer)), bucket)


class CasebookBatches(IterableDataset[Batch]):
    """Endless batches of about ``batch_tokens`` tokens. ``stage`` may be raised while workers run: most batches come from its
    bucket, the others from those between it and ``lowest``, so that what was learned stays."""

    def __init__(
        self,
        tokenizer_dir: str | Path,
        roles: Mapping[str, float],
        *,
        seed: int,
        batch_tokens: int,
        stage: int,
        share_of_stage: float = 0.5,
        lowest: int = 0,
    ) -> None:
        self._tokenizer_dir, self._roles, self._seed = Path(tokenizer_dir), dict(roles), seed
        self._batch_tokens, self._share = batch_tokens, share_of_stage
        self._lowest = lowest
        self._stage: Any = multiprocessing.Value("i", stage)

    @property
    def stage(self) -> int:
        return int(self._stage.value)

    @stage.setter
    def stage(self, value: int) -> None:
        self._stage.value = value

    def reseed(self, step: int) -> None:
        """Draw other casebooks than those of a run that was broken off before ``step``."""
        self._seed += 7919 * step

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        seed = self._seed * 1000 + (worker.id if worker else 0)
        rng = random.Random(f"batches/{seed}")
        encoder = Encoder(self._tokenizer_dir)
        streams = [self._stream(encoder, index, seed) for index in range(len(BUCKETS))]
        while True:
            index = self.stage if rng.random() < self._share else rng.randint(self._lowest, self.stage)
            row_len = BUCKETS[index].row_len
            rows = [next(streams[index]) for _ in range(min(_MAX_ROWS, max(1, self._batch_tokens // row_len)))]
            yield batch_of(rows, row_len, encoder.pad, index)

    def _stream(self, encoder: Encoder, index: int, seed: int) -> Iterator[Sample]:
        bucket = BUCKETS[index]
        return samples(
            encoder,
            {"lookup": 1.0} if bucket.level is Level.PLAIN else self._roles,
            seed=seed * len(BUCKETS) + index,
            context_tokens=(max(32, bucket.context_tokens // 2), bucket.context_tokens),
            num_turns=bucket.num_turns,
            level=bucket.level,
        )


def loader(batches: CasebookBatches, num_workers: int) -> Iterator[Batch]:
    """Batches as they are, drawn ahead by ``num_workers`` processes; none: drawn here."""
    drawn = DataLoader(batches, batch_size=None, num_workers=num_workers, prefetch_factor=8 if num_workers else None)
    return iter(drawn)
