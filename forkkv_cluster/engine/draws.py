"""Draws from rows of logits: temperature, min-p, top-k, top-p, and one uniform number a row.

What a row draws follows from its own logits, parameters and number: never from its batch. The work is a softmax and a few
passes over [n, V]; the order that filters need is taken of a few candidates, and of the whole vocabulary only for a row
whose filters keep more than those.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forkkv_cluster.core.request import SamplingParams

_BLOCK = 256
"""Weights that are summed first: the inverse of the CDF looks for the block, then inside it."""
_CANDIDATES = (64, 1024, 16384)
"""How many of the most likely tokens are put in order, at first and then, before the whole vocabulary is."""
_MIN_TEMPERATURE = 1e-30
"""fp32 can divide by it: anything colder draws the most likely token just the same."""


def draw(logits: Tensor, params: Sequence[SamplingParams], numbers: npt.NDArray[np.float64]) -> Tensor:
    """logits [n, V] fp32 (-inf: never drawn), one SamplingParams and one number in [0, 1) each -> tokens [n] int64."""
    probs = _softmax(logits, params)
    targets = torch.from_numpy(numbers).to(logits.device)
    is_filtered = np.array([_is_filtered(p) for p in params])
    if not is_filtered.any():
        return _invert_blocks(probs, targets)
    tokens = torch.empty(len(params), dtype=torch.int64, device=logits.device)
    plain, filtered = np.flatnonzero(~is_filtered), np.flatnonzero(is_filtered)
    if len(plain):
        index = torch.from_numpy(plain).to(logits.device)
        tokens[index] = _invert_blocks(probs[index], targets[index])
    _draw_filtered(tokens, filtered, logits, probs, params, targets)
    return tokens


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _softmax(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """softmax(logits / temperature): [n, V] fp32, V made a multiple of the block by tokens of probability zero."""
    temperature = torch.tensor([max(p.temperature, _MIN_TEMPERATURE) for p in params], device=logits.device).unsqueeze(-1)
    num_rows, vocab_size = logits.shape
    scaled = logits.new_full((num_rows, -(-vocab_size // _BLOCK) * _BLOCK), float("-inf"))
    # Before the division: a tiny temperature must sharpen the distribution, not overflow it.
    torch.sub(logits, logits.amax(dim=-1, keepdim=True), out=scaled[:, :vocab_size])
    return torch.softmax(scaled.div_(temperature), dim=-1)


def _invert_blocks(probs: Tensor, targets: Tensor) -> Tensor:
    """First index whose cumulative probability exceeds the target: [n]; never one of probability zero."""
    blocks = probs.view(len(probs), -1, _BLOCK)
    cumulative = blocks.sum(dim=-1).double().cumsum(dim=-1)
    threshold = _below(targets * cumulative[:, -1], cumulative[:, -1]).unsqueeze(-1)
    block = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0.0)
    weights = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1)
    return block.squeeze(-1) * _BLOCK + _invert(weights.double().cumsum(dim=-1), (threshold - before).squeeze(-1))


def _invert(cumulative: Tensor, thresholds: Tensor) -> Tensor:
    """First index at which ``cumulative`` [n, m] exceeds the threshold [n], or else where it last grew."""
    threshold = _below(thresholds, cumulative[:, -1]).unsqueeze(-1)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).clamp_(max=cumulative.shape[-1] - 1)


def _below(thresholds: Tensor, totals: Tensor) -> Tensor:
    """Rounding can lift a threshold up to the total itself: stay below it."""
    return torch.minimum(thresholds, torch.nextafter(totals, torch.zeros_like(totals)))


def _draw_filtered(
    tokens: Tensor,
    filtered: npt.NDArray[np.int64],
    logits: Tensor,
    probs: Tensor,
    params: Sequence[SamplingParams],
    targets: Tensor,
) -> None:
    """Fill ``tokens`` at ``filtered``: what the filters keep of few candidates, and of more for rows that need more."""
    vocab_size = logits.shape[-1]
    for num_candidates in (*(count for count in _CANDIDATES if count < vocab_size), vocab_size):
        if not len(filtered):
            return
        index = torch.from_numpy(filtered).to(logits.device)
        values, ids = _ordered(logits[index], num_candidates)
        kept, is_cut = _keep(probs[index].gather(-1, ids).double(), [params[i] for i in filtered.tolist()])
        cumulative = kept.cumsum(dim=-1)
        chosen = _invert(cumulative, targets[index] * cumulative[:, -1])
        tokens[index] = ids.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        # What was kept is all there is to keep when it ends before the candidates do, and not among equals of the last.
        last_kept = values.gather(-1, ((kept > 0).sum(dim=-1, keepdim=True) - 1).clamp_(min=0)).squeeze(-1)
        is_done = is_cut & (last_kept > values[:, -1])
        filtered = filtered[~is_done.cpu().numpy()]


def _ordered(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row, values and ids [n, count]: descending, equals by id."""
    if count == logits.shape[-1]:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    values, ids = logits.topk(count, dim=-1)
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)


def _keep(ordered: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """Zero what is below min_p of the first, all but the top k, then all but the smallest set that reaches top_p of what
    is left. ordered [n, m] fp64 descends: the beginning, or all, of a distribution.

    Also whether min_p or top_k, where a row has one, cut inside: else the total that top_p is a share of is not known.
    """
    device = ordered.device
    top_k = torch.tensor([p.top_k or 2**31 for p in params], device=device).unsqueeze(-1)
    top_p = torch.tensor([p.top_p for p in params], device=device, dtype=torch.float64).unsqueeze(-1)
    min_p = torch.tensor([p.min_p for p in params], device=device, dtype=torch.float64).unsqueeze(-1)
    is_whole = torch.tensor([p.top_k == 0 and p.min_p == 0.0 for p in params], device=device).unsqueeze(-1)
    is_out = (torch.arange(ordered.shape[-1], device=device) >= top_k) | (ordered < min_p * ordered[:, :1])
    kept = ordered.masked_fill(is_out, 0.0)
    cumulative = kept.cumsum(dim=-1)
    # Where nothing was dropped the total is that of the distribution, of which these may be the beginning.
    total = torch.where(is_whole, 1.0, cumulative[:, -1:])
    # The first token that reaches top_p is kept: the set is never empty.
    kept = kept.masked_fill((cumulative - kept >= top_p * total) & (top_p < 1.0), 0.0)
    return kept, is_whole.squeeze(-1) | is_out[:, -1]
