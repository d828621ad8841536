"""What the sampler sees of a sequence: its parameters and its tokens. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import SamplingParams


def _no_tokens() -> TokenArray:
    return np.zeros(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class SamplingRow:
    """How to sample one row; ``position`` is the absolute position of the token that is drawn.

    tokens [>= position] int32: the sequence so far, and room after it that is not looked at; tokens[:num_prompt] is
    prompt, the rest was generated, here or on an earlier worker. ``request_id`` only tells sequences apart.
    """

    params: SamplingParams
    position: int
    tokens: TokenArray = field(default_factory=_no_tokens)
    num_prompt: int = 0
    request_id: str = ""

    @property
    def prompt(self) -> TokenArray:
        return self.tokens[: self.num_prompt]

    @property
    def generated(self) -> TokenArray:
        return self.tokens[self.num_prompt : self.position]
