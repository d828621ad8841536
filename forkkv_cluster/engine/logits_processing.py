"""What changes logits before the draw: minimum length, bias, penalties and guides, for all rows of a batch that ask at once.

Everything follows from a row's own parameters and tokens, so a resumed stream goes on as it would have. The order and
the arithmetic are vLLM's (``vllm/v1/sample/ops/penalties.py``). Only the logits of tokens that are named or were seen are
read and written: the cost is that of the histories, not of rows times vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forkkv_cluster.core.request import SamplingParams
from forkkv_cluster.engine.sampling_row import SamplingRow

_Keys = npt.NDArray[np.int64]
"""Places in the flattened logits: row * V + token."""


@dataclass(frozen=True, slots=True, eq=False)
class RowMasks:
    """Tokens that the rows ``rows`` [g] may draw, [g, V] bool; all other rows are free."""

    rows: tuple[int, ...]
    allowed: Tensor


def process_logits(
    logits: Tensor, rows: Sequence[SamplingRow], eos_token_ids: Sequence[int] = (), masks: RowMasks | None = None
) -> Tensor:
    """logits [R, V] fp32 -> [R, V]; ``logits`` itself where no row asks for anything, else a changed copy."""
    asking = [(i, row) for i, row in enumerate(rows) if is_changed(row)]
    if not asking and masks is None:
        return logits
    result = logits.clone(memory_format=torch.contiguous_format)
    flat = result.view(-1)
    if asking:
        _forbid_ends(flat, asking, eos_token_ids, logits.shape[-1])
        _add_bias(flat, asking, logits.shape[-1])
        _repeat(flat, asking, logits.shape[-1])
        _penalise(flat, asking, logits.shape[-1])
    if masks is not None:
        index = torch.tensor(masks.rows, device=logits.device)
        result[index] = result[index].masked_fill_(~masks.allowed.to(logits.device), float("-inf"))
    return result


_Asking = Sequence[tuple[int, SamplingRow]]


def is_changed(row: SamplingRow) -> bool:
    """Whether its parameters change its logits, guides aside."""
    params = row.params
    is_penalised = params.repetition_penalty != 1.0 or _counts_output(params)
    return bool(params.logit_bias) or is_penalised or len(row.generated) < params.min_tokens


def _counts_output(params: SamplingParams) -> bool:
    return params.presence_penalty != 0.0 or params.frequency_penalty != 0.0


def _keys(asking: _Asking, tokens: Sequence[npt.NDArray[np.integer]], vocab_size: int) -> tuple[_Keys, _Keys]:
    """Places of ``tokens``, one array for each of ``asking``, and which of ``asking`` each belongs to."""
    owners = np.repeat(np.arange(len(asking)), [len(part) for part in tokens])
    firsts = np.array([i for i, _ in asking], dtype=np.int64) * vocab_size
    return firsts[owners] + np.concatenate(tokens).astype(np.int64), owners


def _of_owners(asking: _Asking, owners: _Keys, name: str, like: Tensor) -> Tensor:
    """One parameter's value for each owner, as a tensor like the logits."""
    values = np.array([getattr(row.params, name) for _, row in asking])[owners]
    return torch.from_numpy(values).to(like.device, like.dtype)


def _forbid_ends(flat: Tensor, asking: _Asking, eos_token_ids: Sequence[int], vocab_size: int) -> None:
    """No token that would end the output, in rows that are too short still."""
    short = [(i, row) for i, row in asking if len(row.generated) < row.params.min_tokens]
    if short:
        ends = [np.array((*eos_token_ids, *row.params.stop_token_ids), dtype=np.int64) for _, row in short]
        keys, _ = _keys(short, [part[part < vocab_size] for part in ends], vocab_size)
        flat[torch.from_numpy(keys).to(flat.device)] = float("-inf")


@lru_cache(maxsize=1024)
def _bias_arrays(bias: tuple[tuple[int, float], ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    tokens, values = zip(*bias, strict=True)
    return np.array(tokens, dtype=np.int64), np.array(values, dtype=np.float32)


def _add_bias(flat: Tensor, asking: _Asking, vocab_size: int) -> None:
    biased = [(i, row) for i, row in asking if row.params.logit_bias]
    if biased:
        arrays = [_bias_arrays(row.params.logit_bias) for _, row in biased]
        keys, _ = _keys(biased, [tokens for tokens, _ in arrays], vocab_size)
        values = torch.from_numpy(np.concatenate([values for _, values in arrays])).to(flat.device, flat.dtype)
        flat.index_put_((torch.from_numpy(keys).to(flat.device),), values, accumulate=True)


def _repeat(flat: Tensor, asking: _Asking, vocab_size: int) -> None:
    """Repetition penalty over prompt and output. A token that stands there twice is written twice, with one value."""
    repeated = [(i, row) for i, row in asking if row.params.repetition_penalty != 1.0]
    if repeated:
        keys, owners = _keys(repeated, [row.tokens[: row.position] for _, row in repeated], vocab_size)
        at, penalty = torch.from_numpy(keys).to(flat.device), _of_owners(repeated, owners, "repetition_penalty", flat)
        before = flat[at]
        flat[at] = torch.where(before > 0, before / penalty, before * penalty)


def _penalise(flat: Tensor, asking: _Asking, vocab_size: int) -> None:
    """Frequency and presence penalties over the output."""
    counting = [(i, row) for i, row in asking if _counts_output(row.params)]
    if counting:
        keys, owners = _keys(counting, [row.generated for _, row in counting], vocab_size)
        keys, firsts, counts = np.unique(keys, return_index=True, return_counts=True)
        at, times = (torch.from_numpy(array).to(flat.device) for array in (keys, counts))
        frequency, presence = (
            _of_owners(counting, owners[firsts], name, flat) for name in ("frequency_penalty", "presence_penalty")
        )
        flat[at] = flat[at] - frequency * times - presence
