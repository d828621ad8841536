"""One step's work as values: what the scheduler decided, as the model runner sees it. No device memory in here.

Rows are the tokens of a step, packed: sequence after sequence, T in all. Every array is numpy, so that a step can be
built and checked without torch.

Which KV a row reads and writes follows from the *pass* it belongs to (``engine.sequence.PassKind``):

===============  ==============  ============  ===========================  ==============================
pass             LoRA on row     writes base   writes residual              reads
===============  ==============  ============  ===========================  ==============================
context (base)   none            if missing    of every declared adapter    base
late residual    none            no            of one late adapter          base
own residual     the agent's     no            of the agent (x A)           base + the agent's residual
first writer     the writer's    yes           of the writer                base + the writer's residual
own tokens       the agent's     merged K, V   none                         shared prefix: base + residual;
                                                                            own pages: merged K, V
pre-invocation   none            base K, V     none                         base
===============  ==============  ============  ===========================  ==============================

"Pre-invocation" are the tokens that an aLoRA turn runs before its adapter's invocation: canonical, and filed as such.
Own pages are private to (adapter, sharing, history) by their hash, so they hold the adapter's full K and V
("merged"): exact, no residual page for them, and plain attention over them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from forkkv_cluster.cache.merged_keys import MergedUse
from forkkv_cluster.cache.swaps import PageSwap

IntArray = npt.NDArray[np.int64]
PageArray = npt.NDArray[np.int32]


def _no_rows() -> IntArray:
    return np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class ResidualRead:
    """The first ``num_tokens`` tokens of a span also carry this adapter's residual.

    pages [ceil(num_tokens / page_size)] int32 in the pool of the adapter's rank class. ``merged_keys``: the adapter's whole K
    over these tokens, to be read, or written and read, instead of being built.
    """

    adapter_slot: int
    pages: PageArray
    num_tokens: int
    merged_keys: MergedUse | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpan:
    """Rows [row_start, row_end) are one sequence's tokens at positions start_pos, start_pos + 1, ...

    They attend causally to tokens [0, kv_len) of ``pages`` [ceil(kv_len / page_size)] int32 (base pool), where
    kv_len = start_pos + (row_end - row_start): each row sees itself and everything before it.
    """

    row_start: int
    row_end: int
    start_pos: int
    pages: PageArray
    residual: ResidualRead | None = None

    @property
    def num_rows(self) -> int:
        return self.row_end - self.row_start

    @property
    def kv_len(self) -> int:
        return self.start_pos + self.num_rows


@dataclass(frozen=True, slots=True)
class LoraSegment:
    """Rows [row_start, row_end) run with the LoRA of this adapter slot on every module it targets."""

    adapter_slot: int
    row_start: int
    row_end: int


@dataclass(frozen=True, slots=True, eq=False)
class ResidualWrite:
    """x A_k and x A_v of ``rows`` [n] go to ``slots`` [n] of the pool of the adapter's rank class (page * P + offset).

    With QK-norm the K of these rows is that of their own x, before its norm, and ``KeyScale`` follows from it.
    """

    adapter_slot: int
    rows: IntArray
    slots: IntArray


@dataclass(frozen=True, slots=True)
class TailCopy:
    """Before the step: copy the first ``num_tokens`` of a shared, partly filled page into a private one.

    With ``adapter_slot`` the copy is merged on the way: K = base K + R(a_k B_k), V = base V + a_v B_v, with a from
    ``residual_page``. The page's first token stands at position ``start_pos``.
    """

    source_page: int
    target_page: int
    num_tokens: int
    start_pos: int
    adapter_slot: int | None = None
    residual_page: int | None = None


@dataclass(frozen=True, slots=True)
class ResidualTailCopy:
    """Before the step: copy the first ``num_tokens`` of a residual page into another of the same rank class."""

    adapter_slot: int
    source_page: int
    target_page: int
    num_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One forward pass.

    token_ids [T], positions [T]      int64
    base_rows [W], base_slots [W]     int64: rows that write K and V, and where (page * page_size + offset). A row inside
                                      a LoraSegment writes its adapter's merged K and V unless it is in ``plain_rows``
    plain_rows [n]                    int64: rows inside a LoraSegment that write the base product only (first writer)
    lora_segments                     disjoint, ascending; rows outside run the base model
    attention                         one span per sequence, ascending; covers all rows
    logit_rows [R]                    int64: rows whose logits are wanted
    scored_rows, scored_tokens [n]    int64: rows of prompts whose next token, given here, is to be scored, with the
                                      ``num_top_scores`` most likely ones
    swap_outs, swap_ins               whole pages to the host tier, then from it: before anything else of the step
    """

    token_ids: IntArray
    positions: IntArray
    base_rows: IntArray
    base_slots: IntArray
    plain_rows: IntArray
    lora_segments: tuple[LoraSegment, ...]
    residual_writes: tuple[ResidualWrite, ...]
    attention: tuple[AttentionSpan, ...]
    logit_rows: IntArray
    tail_copies: tuple[TailCopy, ...] = field(default=())
    residual_tail_copies: tuple[ResidualTailCopy, ...] = field(default=())
    scored_rows: IntArray = field(default_factory=_no_rows)
    scored_tokens: IntArray = field(default_factory=_no_rows)
    num_top_scores: int = 0
    swap_outs: tuple[PageSwap, ...] = field(default=())
    swap_ins: tuple[PageSwap, ...] = field(default=())

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)
