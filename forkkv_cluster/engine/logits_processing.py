"""What changes logits before the draw: minimum length, bias and penalties, for all rows of a batch that ask at once.

Everything follows from a row's own parameters and tokens, so a resumed stream goes on as it would have. The order and
the arithmetic are vLLM's (``vllm/v1/sample/ops/penalties.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import SamplingParams
from forkkv_cluster.engine.sampling_row import SamplingRow


def process_logits(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int] = ()) -> Tensor:
    """logits [R, V] fp32 -> [R, V]; ``logits`` itself where no row asks for anything, else a changed copy."""
    changed = [i for i, row in enumerate(rows) if _is_changed(row)]
    if not changed:
        return logits
    asking = [rows[i] for i in changed]
    index = torch.tensor(changed, device=logits.device)
    part = logits[index]
    _forbid_ends(part, asking, eos_token_ids)
    _add_bias(part, asking)
    part = _penalise(part, asking)
    result = logits.clone()
    result[index] = part
    return result


def _is_changed(row: SamplingRow) -> bool:
    params = row.params
    return bool(params.logit_bias) or _is_penalised(params) or len(row.generated) < params.min_tokens


def _is_penalised(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _forbid_ends(logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int]) -> None:
    """No token that would end the output, in rows that are too short still."""
    for i, row in enumerate(rows):
        if len(row.generated) < row.params.min_tokens:
            ends = [token for token in (*eos_token_ids, *row.params.stop_token_ids) if token < logits.shape[-1]]
            logits[i, ends] = float("-inf")


def _add_bias(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    pairs = [(i, token, bias) for i, row in enumerate(rows) for token, bias in row.params.logit_bias]
    if pairs:
        at, tokens, biases = zip(*pairs, strict=True)
        where = (torch.tensor(at, device=logits.device), torch.tensor(tokens, device=logits.device))
        logits.index_put_(where, torch.tensor(biases, device=logits.device, dtype=logits.dtype), accumulate=True)


def _penalise(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Repetition over prompt and output, then frequency and presence over the output."""
    if not any(_is_penalised(row.params) for row in rows):
        return logits
    repetition, frequency, presence = (
        torch.tensor([getattr(row.params, name) for row in rows], device=logits.device, dtype=logits.dtype).unsqueeze(-1)
        for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
    )
    counts = _counts(logits, [row.generated for row in rows])
    if any(row.params.repetition_penalty != 1.0 for row in rows):
        prompts = [row.prompt if row.params.repetition_penalty != 1.0 else row.prompt[:0] for row in rows]
        is_seen = (counts > 0) | (_counts(logits, prompts) > 0)
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(is_seen, repeated, logits)
    return logits - frequency * counts - presence * (counts > 0)


def _counts(logits: Tensor, histories: Sequence[TokenArray]) -> Tensor:
    """[R, V]: how often each token stands in each row's history."""
    flat = torch.zeros(logits.numel(), dtype=logits.dtype, device=logits.device)
    offsets = np.repeat(np.arange(len(histories), dtype=np.int64) * logits.shape[-1], [len(h) for h in histories])
    at = torch.from_numpy(offsets + np.concatenate(histories).astype(np.int64)).to(logits.device)
    flat.index_add_(0, at, torch.ones(len(at), dtype=logits.dtype, device=logits.device))
    return flat.view(logits.shape)
