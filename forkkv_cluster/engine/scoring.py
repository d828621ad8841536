"""Log probabilities of tokens that are known already: what was drawn, or what stands in a prompt."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forkkv_cluster.engine.scores import TokenScores

_MAX_CHUNK_BYTES = 64 * 2**20
"""fp32 logits that are in memory at once while a prompt is scored."""


def score_tokens(logits: Tensor, token_ids: npt.NDArray[np.int64], num_top: int, *, has_ranks: bool = True) -> TokenScores:
    """logits [n, V] fp32, a token of each row [n] -> its score, and the ``num_top`` most likely ones (at most V).

    Without ``has_ranks`` the ranks are 0: they take as long as all the rest.
    """
    chosen = logits.gather(-1, torch.from_numpy(token_ids).to(logits.device).unsqueeze(-1))
    total = torch.logsumexp(logits, dim=-1, keepdim=True)
    values, ids = logits.topk(min(num_top, logits.shape[-1]), dim=-1)
    # A sum of floats: that of booleans is three times as slow.
    ranks = (logits > chosen).float().sum(dim=-1) + 1 if has_ranks else torch.zeros(len(logits))
    return TokenScores(
        (chosen - total).squeeze(-1).cpu().numpy(),
        ranks.to(torch.int32).cpu().numpy(),
        ids.to(torch.int32).cpu().numpy(),
        (values - total).cpu().numpy(),
    )


def score_in_chunks(
    hidden: Tensor, to_logits: Callable[[Tensor], Tensor], token_ids: npt.NDArray[np.int64], num_top: int, vocab_size: int
) -> TokenScores:
    """As ``score_tokens``, of rows hidden [n, H]: their logits [n, V] are never all there at once."""
    size = max(1, _MAX_CHUNK_BYTES // (4 * vocab_size))
    parts = [
        score_tokens(to_logits(hidden[start : start + size]), token_ids[start : start + size], num_top)
        for start in range(0, len(token_ids), size)
    ]
    return TokenScores(
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.ranks for part in parts]),
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate([part.top_logprobs for part in parts]),
    )
