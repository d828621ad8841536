"""Activated LoRA (aLoRA): where in a prompt an adapter is invoked. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forkkv_cluster.core.prefix import TokenArray


def last_invocation(prompt: TokenArray, invocation_tokens: Sequence[int]) -> int | None:
    """Position of the first token of the last ``invocation_tokens`` [k >= 1] in ``prompt`` [n] int32; None without one.

    As PEFT picks it: invocations may overlap, and one that the prompt's end cuts off does not count.
    """
    num_starts = len(prompt) - len(invocation_tokens) + 1
    if num_starts <= 0:
        return None
    starts = np.flatnonzero(prompt[:num_starts] == invocation_tokens[0])
    for offset, token in enumerate(invocation_tokens[1:], start=1):
        starts = starts[prompt[starts + offset] == token]
    return int(starts[-1]) if len(starts) else None
