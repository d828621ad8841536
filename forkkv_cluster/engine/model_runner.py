"""One model on one device: runs a batch, knows nothing of requests, pages' owners or time."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import torch
from forkkv_kernels.launch import use_triton
from forkkv_kernels.ops.qk_norm import KeyScale
from forkkv_kernels.ops.residual_attention import reconstruct_k, reconstruct_v
from torch import Tensor

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.cache.host_tier import num_host_slabs
from forkkv_cluster.core.errors import FailedPrecondition, InvalidArgument, Unsupported
from forkkv_cluster.core.request import AdapterInfo, ModelInfo
from forkkv_cluster.engine.adapters import AdapterSlots, AdapterWeights, load_adapter
from forkkv_cluster.engine.attention import attention_for
from forkkv_cluster.engine.attention_plan import plan_attention
from forkkv_cluster.engine.batch import Batch, TailCopy
from forkkv_cluster.engine.gpu.device_step import DeviceStep
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.rotary import RotaryTable
from forkkv_cluster.engine.model_loader import LoadedModel, load_model, resolve_device
from forkkv_cluster.engine.models.config import ModelConfig
from forkkv_cluster.engine.page_copies import copy_in, copy_out
from forkkv_cluster.engine.scores import TokenScores
from forkkv_cluster.engine.scoring import score_in_chunks
from forkkv_cluster.engine.shard import WHOLE, Shard
from forkkv_cluster.engine.step_inputs import step_inputs
from forkkv_cluster.engine.step_lora import StepLora

_HOST = torch.device("cpu")


class ModelRunner:
    """Executes batches over paged base and residual KV. Not thread-safe: one engine thread drives it."""

    def __init__(
        self, loaded: LoadedModel, *, name: str, page_size: int, max_model_len: int = 0, device: torch.device,
        has_tables: bool | None = None,
    ) -> None:  # fmt: skip
        """``max_model_len`` tokens, 0 for the model's own limit. ``has_tables``: steps run as ``gpu.DeviceStep``; None: where
        Triton does.

        Raises InvalidArgument for one beyond it, Unsupported for one at which the rotary frequencies follow the length or a
        sliding window hides tokens.
        """
        self._whole_config = loaded.config
        self._shard = loaded.shard
        config = loaded.shard.config(loaded.config)
        _check_length(config, max_model_len or config.max_position)
        self.config = config
        self.dtype = loaded.dtype
        self.geometry = KVGeometry(config.num_layers, config.num_kv_heads, config.head_dim, page_size, loaded.dtype.itemsize)
        self.info = ModelInfo(
            name=name,
            digest=loaded.digest,
            vocab_size=config.vocab_size,
            max_model_len=max_model_len or config.max_position,
            base_bytes_per_token=self.geometry.base_bytes_per_token,
            dtype=str(loaded.dtype).removeprefix("torch."),
            eos_token_ids=config.eos_token_ids,
        )
        self._model = loaded.model
        self._device = device
        self._rotary = RotaryTable(config.rope, config.head_dim, self.info.max_model_len, loaded.dtype, device)
        self._adapters = AdapterSlots()
        self._has_tables = use_triton(torch.empty(0, dtype=self.dtype, device=device)) if has_tables is None else has_tables
        self._step: DeviceStep | None = None
        self._kv: KVBuffers | None = None
        self._host_kv: KVBuffers | None = None

    @classmethod
    def from_directory(
        cls, path: str | Path, *, name: str = "", dtype: str = "auto", device: str = "auto", page_size: int = 64,
        max_model_len: int = 0, load_format: str = "auto", shard: Shard = WHOLE, has_tables: bool | None = None,
    ) -> Self:  # fmt: skip
        """Load a checkpoint. ``name`` defaults to the directory's. Raises as ``model_loader.load_model``."""
        torch_device = resolve_device(device)
        loaded = load_model(path, dtype, torch_device, load_format, shard)
        return cls(
            loaded, name=name or Path(path).name, page_size=page_size, max_model_len=max_model_len, device=torch_device,
            has_tables=has_tables,
        )  # fmt: skip

    @property
    def uses_whole_keys(self) -> bool:
        """Whether an adapter's whole K in borrowed memory is read where it is at hand; kernels build it faster than they read
        it."""
        return not self._has_tables

    @property
    def kv(self) -> KVBuffers:
        """The arena. Raises FailedPrecondition before ``allocate``."""
        if self._kv is None:
            raise FailedPrecondition("the KV arena is not allocated. Call allocate(kv_bytes) first.")
        return self._kv

    @property
    def host_kv(self) -> KVBuffers:
        """The host tier's arena. Raises FailedPrecondition when none was allocated."""
        if self._host_kv is None:
            raise FailedPrecondition("there is no host tier. Call allocate(kv_bytes, host_bytes) with host_bytes above 0.")
        return self._host_kv

    def allocate(self, kv_bytes: int, host_bytes: int = 0) -> None:
        """Allocate the arena, and one in host memory for ``host_bytes`` > 0: as many whole slabs as fit.

        Raises InvalidArgument when not one does.
        """
        self._kv = KVBuffers(self.geometry, self.geometry.num_slabs(kv_bytes), self.dtype, self._device)
        if self._has_tables:
            self._step = DeviceStep(self._model, self._kv, self._adapters, self._rotary)
        self._host_kv = None
        if host_bytes:
            num_slabs = num_host_slabs(self.geometry, host_bytes)
            self._host_kv = KVBuffers(self.geometry, num_slabs, self.dtype, torch.device("cpu"))

    def read_adapter(self, name: str, path: str | Path) -> AdapterWeights:
        """Read a PEFT directory into host memory. Safe on any thread. Raises as ``adapters.load_adapter``."""
        return self._read_for(self._shard, name, path)

    def _read_for(self, shard: Shard, name: str, path: str | Path) -> AdapterWeights:
        norms = self._model.k_norms
        return load_adapter(name, path, self._whole_config, self.geometry, self.dtype, _HOST, norms, shard)

    def place_adapter(self, weights: Weights) -> int:
        """Copy weights that ``read_adapter`` gave to the device, into the lowest free slot; on a CPU they are shared, and where
        steps run on tables they are copied by the first step that needs them."""
        if not isinstance(weights, AdapterWeights):
            raise TypeError(f"a model runner places AdapterWeights, not {type(weights).__name__}")
        return self._adapters.add(weights if self._device == _HOST or self._has_tables else weights.to(self._device))

    def load_adapter(self, name: str, path: str | Path) -> tuple[int, AdapterInfo]:
        """Read and place in one: its slot and facts. Raises as ``read_adapter``; nothing changes then."""
        weights = self.read_adapter(name, path)
        return self.place_adapter(weights), weights.info

    def unload_adapter(self, slot: int) -> None:
        """Free the slot. Raises NotFound when it is empty."""
        self._adapters.remove(slot)
        if self._step is not None:
            self._step.release(slot)

    def residual_rank(self, slot: int) -> int:
        """Columns of the adapter's residual (``AdapterWeights``), 0 without LoRA on k and v. Raises NotFound when the slot is
        empty."""
        return self._adapters[slot].residual_rank

    def rank_class(self, slot: int) -> int | None:
        """Rank class of the adapter's residual pages, None when it has none. Raises NotFound when the slot is empty."""
        rank = self.residual_rank(slot)
        return self.geometry.rank_class(rank) if rank else None

    @torch.inference_mode()
    def swap(self, batch: Batch) -> None:
        """Make the batch's copies to the host tier, then those from it; ``execute`` comes after. Done when it returns."""
        for swap in batch.swap_outs:
            copy_out(self.kv, self.host_kv, swap)
        for swap in batch.swap_ins:
            copy_in(self.kv, self.host_kv, swap)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def execute(self, batch: Batch) -> Tensor:
        """As ``execute_scored``; only logits [R, V] fp32 of ``batch.logit_rows``."""
        return self.execute_scored(batch)[0]

    @torch.inference_mode()
    def execute_scored(self, batch: Batch) -> tuple[Tensor, TokenScores | None]:
        """Copy tails, run all rows, write their KV; returns logits [R, V] fp32 of ``batch.logit_rows`` and the scores of
        ``batch.scored_rows``, if there are any.

        Raises FailedPrecondition before ``allocate`` and NotFound for an adapter slot that is empty.
        """
        hidden = self._forward(batch)
        num_logits, num_top = len(batch.logit_rows), batch.num_top_scores
        logits = self._model.logits(hidden[:num_logits])
        if not len(batch.scored_rows):
            return logits, None
        tokens, vocab_size = batch.scored_tokens, self.info.vocab_size
        return logits, score_in_chunks(hidden[num_logits:], self._model.logits, tokens, num_top, vocab_size)

    def _forward(self, batch: Batch) -> Tensor:
        """Last hidden states [R + n, H] of logit and scored rows."""
        self._copy_tails(batch)
        if batch.num_rows == 0:
            return torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self._device)
        if self._step is not None:
            return self._step.forward(batch)
        step = step_inputs(batch, self._rotary, self._device)
        plan = plan_attention(batch.attention, self.geometry.page_size)
        attention = attention_for(plan, self.kv, self._adapters, self._rotary)
        lora = StepLora(step, self._adapters, self.kv, self.dtype, self.config.rms_norm_eps)
        return self._model.forward(step, attention, lora, self.kv)

    def _copy_tails(self, batch: Batch) -> None:
        for copy in batch.tail_copies:
            self.kv.copy_base(copy.source_page, copy.target_page, copy.num_tokens)
            if copy.adapter_slot is not None and copy.residual_page is not None:
                self._merge_tail(copy, copy.adapter_slot, copy.residual_page)
        for residual in batch.residual_tail_copies:
            rank_class = self.rank_class(residual.adapter_slot)
            if rank_class is not None:
                self.kv.copy_residual(rank_class, residual.source_page, residual.target_page, residual.num_tokens)

    def _merge_tail(self, copy: TailCopy, adapter_slot: int, residual_page: int) -> None:
        """Add the adapter's part to the copied K and V of the target page, layer by layer."""
        weights, rank_class = self._adapters[adapter_slot], self.rank_class(adapter_slot)
        if rank_class is None:
            return
        size, heads = self.geometry.page_size, (self.geometry.num_kv_heads, self.geometry.head_dim)
        target = slice(copy.target_page * size, copy.target_page * size + copy.num_tokens)
        source = slice(residual_page * size, residual_page * size + copy.num_tokens)
        cos_sin = self._rotary.rows[copy.start_pos : copy.start_pos + copy.num_tokens]
        for index, layer in enumerate(weights.layers):
            (k, v), pools = self.kv.base(index), self.kv.residual(index, rank_class)
            a_k, a_v = (pool[source] for pool in pools)
            if layer.k is not None:
                b_k = layer.k.shared_b.to(self._device).view(layer.k.rank, *heads)
                scale = KeyScale(*layer.key_scale_columns((a_k, a_v), heads[0])) if layer.has_key_scale else None
                k[target] = reconstruct_k(k[target], a_k[:, : layer.k.rank], b_k, cos_sin, scale)
            if layer.v is not None:
                b_v = layer.v.b.to(self._device).view(layer.v.rank, *heads)
                v[target] = reconstruct_v(v[target], a_v[:, : layer.v.rank], b_v)


def _check_length(config: ModelConfig, max_model_len: int) -> None:
    fixed = config.rope.max_fixed_len
    if fixed is not None and max_model_len > fixed:
        # A cached, rotated K would depend on how long the sequence was that wrote it.
        raise Unsupported("rope_type", config.rope.rope_type, f"changes with the length beyond {fixed} tokens",
                          f"Set model.max_model_len to at most {fixed} (it is {max_model_len}).")  # fmt: skip
    window = config.sliding_window
    if window is not None and max_model_len > window:
        raise Unsupported("sliding_window", window, "hides tokens of longer sequences, which is not supported",
                          f"Set model.max_model_len to at most {window} (it is {max_model_len}).")  # fmt: skip
    if max_model_len > config.max_position:
        raise InvalidArgument("model.max_model_len", max_model_len, f"is beyond the model's {config.max_position}",
                              "Lower it, or send 0 for the model's own limit.")  # fmt: skip
