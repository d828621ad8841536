"""Logits to tokens. What a row draws depends on its logits, its parameters and (seed, choice index, position) alone.

No generator state: the uniform number of a draw is a hash of its key, so a stream that is resumed on another worker, or
batched with other rows, goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.request import SamplingParams, TokenLogprob
from forkkv_cluster.engine.logits_processing import process_logits
from forkkv_cluster.engine.sampling_row import SamplingRow

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token; ``logprob`` is set when the row's parameters ask for log probabilities."""

    token_id: int
    logprob: TokenLogprob | None = None


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int] = (), allowed: Tensor | None = None
) -> list[SampledToken]:
    """logits [R, V] fp32, one ``SamplingRow`` each -> R tokens. Raises Internal when logits are not numbers.

    ``eos_token_ids`` are what min_tokens holds back, ``allowed`` [R, V] bool the tokens that guides leave. Log
    probabilities are those of ``logits`` as they came.
    """
    if not rows:
        return []
    if torch.isnan(logits).any():
        raise Internal("the model's logits hold NaN. Check the weights, or run it in float32.")
    processed = process_logits(logits, rows, eos_token_ids)
    if allowed is not None:
        processed = processed.masked_fill(~allowed.to(processed.device), float("-inf"))
    tokens = processed.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        tokens[index] = _draw(processed[index], [rows[i] for i in drawn])
    token_ids = tokens.tolist()
    logprobs = _logprobs(logits, rows, token_ids)
    return [SampledToken(token_id, logprobs.get(i)) for i, token_id in enumerate(token_ids)]


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its key (splitmix64 over the three words)."""
    state = 0
    for word in (seed, choice, position):
        state = _splitmix64((state + _GOLDEN) & _MASK ^ (word & _MASK))
    return (state >> 11) * 2.0**-53


def _splitmix64(value: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out."""
    value = (value + _GOLDEN) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Inverse CDF of softmax(logits / temperature) after min-p, top-k and top-p, one uniform number a row: [n] int64."""
    device = logits.device
    temperature = torch.tensor([row.params.temperature for row in rows], device=device, dtype=torch.float64)
    # fp64: a tiny temperature must sharpen the distribution, not overflow it.
    probs = torch.softmax(logits.double() / temperature.unsqueeze(-1), dim=-1)
    targets = torch.tensor([_uniform(row) for row in rows], device=device, dtype=torch.float64)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
    # Which order the CDF runs in is part of what a row draws, so it follows from the row's own parameters, not its batch.
    is_filtered = np.array([_is_filtered(row.params) for row in rows])
    plain, filtered = (torch.from_numpy(np.flatnonzero(mask)).to(device) for mask in (~is_filtered, is_filtered))
    if len(plain):
        tokens[plain] = _invert(probs[plain], targets[plain])
    if len(filtered):
        ordered, order = probs[filtered].sort(dim=-1, descending=True, stable=True)
        kept = _keep(ordered, [rows[i].params for i in filtered.tolist()])
        tokens[filtered] = order.gather(-1, _invert(kept, targets[filtered]).unsqueeze(-1)).squeeze(-1)
    return tokens


def _uniform(row: SamplingRow) -> float:
    return uniform(row.params.seed, row.params.choice, row.position)


def _is_filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def _keep(ordered: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Zero what is below min_p of the first, all but the top k, then all but the smallest set that reaches top_p of what
    is left. ordered [n, V] descends."""
    vocab_size = ordered.shape[-1]
    top_k = torch.tensor([p.top_k or vocab_size for p in params], device=ordered.device).unsqueeze(-1)
    top_p = torch.tensor([p.top_p for p in params], device=ordered.device, dtype=ordered.dtype).unsqueeze(-1)
    min_p = torch.tensor([p.min_p for p in params], device=ordered.device, dtype=ordered.dtype).unsqueeze(-1)
    is_out = (torch.arange(vocab_size, device=ordered.device) >= top_k) | (ordered < min_p * ordered[:, :1])
    kept = ordered.masked_fill(is_out, 0.0)
    before = kept.cumsum(dim=-1) - kept
    # The first token that reaches top_p is kept: the set is never empty.
    return kept.masked_fill((before >= top_p * kept.sum(dim=-1, keepdim=True)) & (top_p < 1.0), 0.0)


def _invert(weights: Tensor, targets: Tensor) -> Tensor:
    """First index whose cumulative weight exceeds target * total: [n]; never one of weight zero."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    # Rounding can lift target * total up to the total itself: stay below it.
    threshold = torch.minimum(targets.unsqueeze(-1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1)


def _logprobs(logits: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]) -> dict[int, TokenLogprob]:
    """Natural logs of the unmodified softmax, for the rows that ask."""
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asking:
        return {}
    logs = torch.log_softmax(logits[asking], dim=-1)
    most = max(rows[i].params.logprobs or 0 for i in asking)
    values, ids = logs.topk(min(most, logs.shape[-1]), dim=-1)
    result = {}
    for number, i in enumerate(asking):
        wanted = rows[i].params.logprobs or 0
        top = tuple(zip(ids[number, :wanted].tolist(), values[number, :wanted].tolist(), strict=True))
        result[i] = TokenLogprob(token_ids[i], float(logs[number, token_ids[i]]), top)
    return result
