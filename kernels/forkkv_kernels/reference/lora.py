"""y = x W + (x A) B over segments of rows; the scaling is folded into B.

Modules that read the same x share one shrink: x [A_q; A_k; A_v]. Its k and v columns *are* the residual KV.

A bias on B is a rank more: y = x A B + s b = [x A | 1] [B; s b]. The column of ones comes from a zero row of A and a bias
of one, and travels with the residual: V then gets (sum of P over residual-bearing tokens) * s b without further ado.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def lora_shrink(x: Tensor, a: Tensor, ones: Tensor | None = None) -> Tensor:
    """x [n, in], a [R, in] (the A of one or more modules, stacked) -> x A [n, R].

    ones [R]: 1 in columns that are constant (their rows of ``a`` are zero), else 0; None when there is none.
    """
    return functional.linear(x, a, ones)


def lora_expand_(out: Tensor, shrunk: Tensor, b: Tensor) -> None:
    """out += shrunk B, in place. out [n, O] (a view will do), shrunk [n, r], b [r, O] scaled."""
    out.addmm_(shrunk, b)
