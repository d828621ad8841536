"""Log probabilities of known tokens as arrays. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """Natural logs of softmax(logits), before temperature and all else that changes logits.

    logprobs [n] fp32 of the known tokens, ranks [n] int32 (1: the most likely);
    top_ids [n, k] int32 and top_logprobs [n, k] fp32 of the most likely tokens, best first.
    """

    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]

    def top(self) -> list[tuple[tuple[int, float], ...]]:
        """(token id, logprob) pairs of each row, best first."""
        return [
            tuple(zip(ids, values, strict=True))
            for ids, values in zip(self.top_ids.tolist(), self.top_logprobs.tolist(), strict=True)
        ]
