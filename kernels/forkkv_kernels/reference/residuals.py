"""What adapters add to the keys and values of a step's sequences: the tables that every attention op over pages takes.

Symbols: N sequences, PR residual pages of a sequence, A adapter slots, R the stacks' rank, Hkv kv heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Residuals:
    """The low-rank part of each sequence's keys: its first ``lens`` [N] positions have one, under adapter ``adapters`` [N] (-1:
    base model), in ``pages`` [N, PR] of that adapter's class.

    b_k, b_v [A, R, Hkv, D] scaled, zero beyond the rank, in the KV's dtype, for decode b_k in fp16 as well; ranks [A, 2] (r_k,
    r_v; 0: not targeted), rank_class [A] (width of a residual row); cos_sin [positions, D] fp32. On a model with QK-norm
    norm_column and change_column [A] (-1: k not targeted), else None. Tables int32.
    """

    pages: Tensor
    lens: Tensor
    adapters: Tensor
    b_k: Tensor
    b_v: Tensor
    ranks: Tensor
    rank_class: Tensor
    cos_sin: Tensor
    norm_column: Tensor | None = None
    change_column: Tensor | None = None
