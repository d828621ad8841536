"""Logits to tokens. What a row draws depends on its logits, its parameters and (seed, choice index, position) alone.

No generator state: the uniform number of a draw is a hash of its key, so a stream that is resumed on another worker, or
batched with other rows, goes on as it would have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forkkv_cluster.core.errors import Internal
from forkkv_cluster.core.request import TokenLogprob
from forkkv_cluster.engine.draws import draw
from forkkv_cluster.engine.logits_processing import RowMasks, is_changed, process_logits
from forkkv_cluster.engine.sampling_row import SamplingRow
from forkkv_cluster.engine.scoring import score_tokens

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """One token; ``logprob`` is set when the row's parameters ask for log probabilities."""

    token_id: int
    logprob: TokenLogprob | None = None


def sample(
    logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int] = (), masks: RowMasks | None = None
) -> list[SampledToken]:
    """logits [R, V] fp32, one ``SamplingRow`` each -> R tokens. Raises Internal when logits are not numbers.

    ``eos_token_ids`` are what min_tokens holds back, ``masks`` the tokens that guides leave. Log probabilities are those
    of ``logits`` as they came.
    """
    if not rows:
        return []
    if torch.isnan(logits.sum(dim=-1)).any():
        raise Internal("the model's logits hold NaN. Check the weights, or run it in float32.")
    token_ids = _pick(process_logits(logits, rows, eos_token_ids, masks), rows).tolist()
    logprobs = _logprobs(logits, rows, token_ids)
    return [SampledToken(token_id, logprobs.get(i)) for i, token_id in enumerate(token_ids)]


def is_plain_greedy(rows: Sequence[SamplingRow]) -> bool:
    """Whether every row takes its largest logit as it came, and asks for nothing else."""
    return all(
        row.params.temperature == 0 and row.params.logprobs is None and row.params.guide is None and not is_changed(row)
        for row in rows
    )


def uniform(seeds: Sequence[int], choices: Sequence[int], positions: Sequence[int]) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1) that are a pure function of their keys (splitmix64 over the three words): [n] fp64."""
    state = np.zeros(len(seeds), dtype=np.uint64)
    for words in (seeds, choices, positions):
        state = _splitmix64((state + _GOLDEN) ^ np.array(words, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele, Lea, Flood 2014): 64 bits in, 64 well-mixed bits out; arrays wrap silently."""
    values = values + _GOLDEN
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _pick(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Greedy rows take their largest logit, the others draw: [R] int64. Neither kind pays for the other."""
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    if not drawn:
        return logits.argmax(dim=-1)
    asking = [rows[i] for i in drawn]
    params = [row.params for row in asking]
    numbers = uniform([p.seed for p in params], [p.choice for p in params], [row.position for row in asking])
    if len(drawn) == len(rows):
        return draw(logits, params, numbers)
    index = torch.tensor(drawn, device=logits.device)
    tokens = logits.argmax(dim=-1)
    tokens[index] = draw(logits[index], params, numbers)
    return tokens


def _logprobs(logits: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]) -> dict[int, TokenLogprob]:
    """Natural logs of the unmodified softmax, for the rows that ask."""
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asking:
        return {}
    wanted = [rows[i].params.logprobs or 0 for i in asking]
    chosen = np.array([token_ids[i] for i in asking], dtype=np.int64)
    part = logits if len(asking) == len(rows) else logits[asking]
    scores = score_tokens(part, chosen, max(wanted), has_ranks=False)
    values, top = scores.logprobs.tolist(), scores.top()
    return {i: TokenLogprob(token_ids[i], values[number], top[number][: wanted[number]]) for number, i in enumerate(asking)}
