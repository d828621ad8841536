"""A runner that can tell what one request read and computed: K and V from the KV arena, hidden states from the decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from forkkv_kernels.ops.qk_norm import KeyScale
from forkkv_kernels.ops.residual_attention import reconstruct_k, reconstruct_v
from torch import Tensor

from forkkv_cluster.engine.batch import AttentionSpan, Batch, ResidualRead
from forkkv_cluster.engine.runner import StepResult
from forkkv_cluster.engine.sampling_row import SamplingRow
from forkkv_cluster.engine.torch_runner import TorchRunner

__all__ = ["READ", "Changes", "Reading", "RecordingRunner", "changes", "relative_errors"]

READ = ("k", "v", "hidden")
"""What a reading has of each layer."""

Changes = dict[str, list[tuple[float, float]]]
"""Of each of ``READ``, by layer: the squared Frobenius norms of what changed and of the reference."""


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """Of one request, on the host in fp32, one tensor for each layer.

    k, v    [c, Hkv, D]: as the branch reads them of the shared context's c tokens, base and residual together; K rotated
    hidden  [m, H]: what the layer gave out, of the branch's own m tokens
    """

    k: list[Tensor]
    v: list[Tensor]
    hidden: list[Tensor]


class RecordingRunner(TorchRunner):
    """As ``TorchRunner``, and within ``recording`` it keeps what ``reading`` is made of."""

    _last: Batch | None = None
    _context_len = 0
    _hidden: list[list[Tensor]]

    @contextmanager
    def recording(self, context_len: int) -> Iterator[None]:
        """For one request, alone on the engine, whose own tokens stand at positions from ``context_len`` on."""
        self._context_len, self._last = context_len, None
        self._hidden = [[] for _ in range(self.config.num_layers)]
        self._model.on_layer = self._keep
        try:
            yield
        finally:
            self._model.on_layer = None

    def reading(self) -> Reading:
        """Of the request that has just ended. Raises ValueError unless it was alone in its last step."""
        if self._last is None or len(self._last.attention) != 1:
            raise ValueError("a reading needs a request that runs alone")
        span = self._last.attention[0]
        pairs = [self._context_kv(layer, span, self._context_len) for layer in range(self.config.num_layers)]
        return Reading([k for k, _ in pairs], [v for _, v in pairs], [torch.cat(parts) for parts in self._hidden])

    @torch.inference_mode()
    def run(self, batch: Batch, sampling: Sequence[SamplingRow]) -> StepResult:
        """As ``TorchRunner.run``."""
        if self._model.on_layer is not None:
            self._last = batch
        return super().run(batch, sampling)

    def _keep(self, index: int, hidden: Tensor) -> None:
        assert self._last is not None
        is_own = torch.from_numpy(self._last.positions >= self._context_len).to(hidden.device)
        self._hidden[index].append(hidden[is_own].float().cpu())

    @torch.inference_mode()
    def _context_kv(self, layer: int, span: AttentionSpan, num_tokens: int) -> tuple[Tensor, Tensor]:
        """K and V of tokens [0, num_tokens) as the span's rows read them."""
        slots = self._slots(span.pages, num_tokens)
        k, v = (pool[slots].clone() for pool in self.kv.base(layer))
        if span.residual is not None:
            end = min(num_tokens, span.residual.num_tokens)
            k[:end], v[:end] = self._with_residual(layer, k[:end], v[:end], span.residual)
        return k.float().cpu(), v.float().cpu()

    def _with_residual(self, layer: int, k: Tensor, v: Tensor, read: ResidualRead) -> tuple[Tensor, Tensor]:
        weights = self._adapters[read.adapter_slot]
        lora, heads = weights.layers[layer], (self.geometry.num_kv_heads, self.geometry.head_dim)
        slots = self._slots(read.pages, len(k))
        pools = self.kv.residual(layer, self.geometry.rank_class(weights.residual_rank))
        a_k, a_v = (pool[slots] for pool in pools)
        if lora.k is not None:
            scale = KeyScale(*lora.key_scale_columns((a_k, a_v), heads[0])) if lora.has_key_scale else None
            b_k = lora.k.shared_b.view(lora.k.rank, *heads)
            k = reconstruct_k(k, a_k[:, : lora.k.rank], b_k, self._rotary.rows[: len(k)], scale)
        if lora.v is not None:
            v = reconstruct_v(v, a_v[:, : lora.v.rank], lora.v.b.view(lora.v.rank, *heads))
        return k, v

    def _slots(self, pages: npt.NDArray[np.int32], num_tokens: int) -> Tensor:
        size = self.geometry.page_size
        slots = pages.astype(np.int64)[:, None] * size + np.arange(size)
        return torch.from_numpy(slots.reshape(-1)[:num_tokens]).to(self.kv.arena.device)


def changes(reference: Reading, other: Reading) -> Changes:
    """How far two readings of the same tokens are apart."""
    return {
        name: [_change(one, two) for one, two in zip(getattr(reference, name), getattr(other, name), strict=True)]
        for name in READ
    }


def _change(reference: Tensor, other: Tensor) -> tuple[float, float]:
    return float((other - reference).double().square().sum()), float(reference.double().square().sum())


def relative_errors(found: Sequence[Changes]) -> dict[str, list[float]]:
    """Of each of ``READ``, by layer: |other - reference| / |reference|, Frobenius over all readings together; none of none."""
    if not found:
        return {}
    return {name: [_root(layer) for layer in zip(*(each[name] for each in found), strict=True)] for name in READ}


def _root(layer: Sequence[tuple[float, float]]) -> float:
    change, norm = (sum(column) for column in zip(*layer, strict=True))
    return float((change / norm) ** 0.5) if norm else 0.0
