"""An engine over the fake model, and requests for it in one line."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.core.config import AdapterMemoryConfig, SchedulerConfig
from forkkv_cluster.core.errors import ForkKVError
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.invocation import last_invocation
from forkkv_cluster.core.prefix import prefix_key
from forkkv_cluster.core.request import (
    AdapterRef,
    ContextRequest,
    GenerateRequest,
    Priority,
    SamplingParams,
    Sharing,
    TokenChunk,
)
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.testing.fake_model_runner import FakeModelRunner
from forkkv_cluster.testing.manual_clock import ManualClock
from forkkv_cluster.testing.manual_loader import ManualLoader

_ids = count()


class FakeEngine:
    """``Engine`` over ``FakeModelRunner`` with five adapters: a8, b8 (rank 8), c16 (rank 16), n0 (no LoRA on k and v) and
    v8, an aLoRA that tokens 1, 2 invoke."""

    def __init__(
        self,
        *,
        page_size: int = 4,
        num_slabs: int = 64,
        num_host_slabs: int = 0,
        eos: tuple[int, ...] = (),
        max_device_adapters: int = 8,
        host_bytes: int = 1000,
        load_delay: int = 0,
        rank_classes: tuple[int, ...] = (8, 16),
        merged_share: float = 0.5,
        **scheduler: int,
    ) -> None:
        """``host_bytes`` are for adapters, of which each weighs 100, ``num_host_slabs`` for KV. ``load_delay``: steps that a
        read from disk takes. A base row is 16 elements wide, and so is a slab, or as the largest of ``rank_classes``: whole K,
        which takes 64 tokens at least, then borrows fewer slabs."""
        geometry = KVGeometry(2, 2, 8, page_size, 4, rank_classes=rank_classes)
        self.page_size = page_size
        self.runner = FakeModelRunner(geometry, eos=eos)
        self.clock = ManualClock()
        config = SchedulerConfig(**{"max_num_batched_tokens": 16, "max_num_seqs": 8, **scheduler})
        self.engine = Engine(
            self.runner,
            num_slabs * geometry.slab_bytes,
            config,
            self.clock,
            host_bytes=num_host_slabs * geometry.slab_bytes,
            merged_share=merged_share,
            adapter_memory=AdapterMemoryConfig(max_device_adapters=max_device_adapters, host_bytes=host_bytes),
            adapter_loader=ManualLoader(self.runner.read_adapter, load_delay),
        )
        self.adapters: dict[str, AdapterRef] = {}
        for name, rank in (("a8", "8"), ("b8", "8"), ("c16", "16"), ("n0", "0"), ("v8", "8:1,2")):
            self.adapters[name] = self.engine.load_adapter(name, f"fake:{name}:{rank}").ref
        self.outputs: dict[str, list[int]] = {}
        self.last: dict[str, TokenChunk] = {}
        self.first: dict[str, TokenChunk] = {}
        self.errors: dict[str, ForkKVError] = {}

    @property
    def vocab_size(self) -> int:
        return self.runner.info.vocab_size

    def request(
        self,
        context: Sequence[int],
        own: Sequence[int],
        adapter: str | None,
        sharing: str = "eager",
        *,
        max_tokens: int = 6,
        declared: Sequence[str] = (),
        writer: str | None = None,
        namespace: str = "tenant",
        tenant: str = "",
        resumed: Sequence[int] = (),
        deadline_s: float | None = None,
        priority: Priority = Priority.NORMAL,
        **sampling: object,
    ) -> GenerateRequest:
        tokens = np.array([*context, *own, *resumed], dtype=np.int32)
        ref = self.adapters[adapter] if adapter is not None else None
        writer_ref = self.adapters[writer] if writer is not None else None
        start = None
        if ref is not None and ref.invocation_tokens:
            start = last_invocation(tokens[: len(context) + len(own)], ref.invocation_tokens)
            ref, writer_ref = (ref if start is not None else None), None
        context_len = 0 if sharing == "isolated" or ref is None else len(context)
        if start is not None:
            context_len = min(context_len, start)
        key = prefix_key(
            tokens,
            block_size=self.page_size,
            context_len=context_len if start is None else start,
            model_digest=self.runner.info.digest,
            namespace=namespace,
            adapter_digest=ref.digest if ref is not None else None,
            sharing=sharing if start is None else "base",
            writer=writer_ref.digest if writer_ref is not None else "base",
        )
        return GenerateRequest(
            RequestId(f"r{next(_ids)}"),
            tokens,
            context_len,
            len(resumed),
            ref,
            tuple(self.adapters[name] for name in declared),
            Sharing(sharing),
            writer_ref,
            namespace,
            SamplingParams(max_tokens=max_tokens, **sampling),  # type: ignore[arg-type]
            key,
            deadline_s=deadline_s,
            priority=priority,
            invocation_start=start,
            tenant=tenant,
        )

    def context_request(
        self,
        context: Sequence[int],
        declared: Sequence[str],
        sharing: str = "eager",
        namespace: str = "tenant",
        **fields: Any,
    ) -> ContextRequest:
        tokens = np.array(context, dtype=np.int32)
        key = prefix_key(
            tokens,
            block_size=self.page_size,
            context_len=len(tokens),
            model_digest=self.runner.info.digest,
            namespace=namespace,
            adapter_digest=None,
            sharing=sharing,
        )
        refs = tuple(self.adapters[name] for name in declared)
        return ContextRequest(RequestId(f"r{next(_ids)}"), tokens, refs, Sharing(sharing), namespace, key, **fields)

    def add(self, request: GenerateRequest | ContextRequest) -> str:
        self.engine.add_request(request)
        self.outputs[request.request_id] = []
        return request.request_id

    def step(self) -> None:
        """One step, checked: invariants hold, and nothing is said of a request after its terminal result."""
        output = self.engine.step()
        self.engine.check_invariants()
        for chunk in output.chunks:
            assert chunk.request_id not in self.last, "a chunk after the terminal one"
            assert chunk.request_id not in self.errors, "a chunk after a failure"
            self.outputs[chunk.request_id] += chunk.token_ids
            self.first.setdefault(chunk.request_id, chunk)
            if chunk.finish_reason is not None:
                self.last[chunk.request_id] = chunk
        for failure in output.failures:
            assert failure.request_id not in self.last
            assert failure.request_id not in self.errors
            self.errors[failure.request_id] = failure.error

    def drain(self, max_steps: int = 5000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError(f"still busy after {max_steps} steps: {self.engine.status()}")

    def run(self, request: GenerateRequest | ContextRequest) -> list[int]:
        """Add, run to the end, and return the generated tokens. Raises the request's error."""
        request_id = self.add(request)
        self.drain()
        if request_id in self.errors:
            raise self.errors[request_id]
        return self.outputs[request_id]
