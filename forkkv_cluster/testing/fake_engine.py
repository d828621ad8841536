"""An engine without a model: the facade of ``engine.engine.Engine``, its bookkeeping reduced to sets of blocks.

Tokens are a function of (previous token, position, adapter), so a stream resumed elsewhere goes on as it would have.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from forkkv_cluster.core.clock import Clock, SystemClock
from forkkv_cluster.core.config import ClusterConfig
from forkkv_cluster.core.errors import AlreadyExists, Cancelled, DeadlineExceeded, InvalidArgument, NotFound
from forkkv_cluster.core.events import AdapterLoaded, AdapterUnloaded, BaseStored, CacheEvent, ResidualStored
from forkkv_cluster.core.ids import AdapterDigest, BlockHash, RequestId
from forkkv_cluster.core.placement import WorkerLoad
from forkkv_cluster.core.request import (
    AdapterInfo,
    AdapterRef,
    ContextRequest,
    FinishReason,
    GenerateRequest,
    ModelInfo,
    PrefixUsage,
    Sharing,
    TokenChunk,
)
from forkkv_cluster.core.status import EngineCounters, EngineStatus
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.outputs import Failure, StepOutput
from forkkv_cluster.testing.fake_model_runner import FakeWeights

VOCAB_SIZE = 1024


def fake_token(previous: int, position: int, adapter: AdapterDigest | None) -> int:
    """The token at ``position`` after ``previous``; adapters differ."""
    voice = sum((adapter or "").encode())
    return 5 + (31 * previous + 17 * position + voice) % (VOCAB_SIZE - 5)


@dataclass(slots=True)
class _Running:
    request: GenerateRequest | ContextRequest
    tokens: list[int]
    num_generated: int = 0
    usage: PrefixUsage | None = None


@dataclass(slots=True)
class _Blocks:
    base: dict[BlockHash, None] = field(default_factory=dict)
    residual: dict[tuple[AdapterDigest, str], dict[BlockHash, None]] = field(default_factory=dict)


class FakeEngine:
    """Set ``step_error`` and the next step raises it. ``num_steps`` counts steps that had work."""

    def __init__(self, clock: Clock | None = None, *, name: str = "fake", max_model_len: int = 4096) -> None:
        self.model_info = ModelInfo(name, "f" * 32, VOCAB_SIZE, max_model_len, 256, "float32")
        self.step_error: Exception | None = None
        self.num_steps = 0
        self.released_hints: list[str] = []
        self._clock = clock or SystemClock()
        self._running: dict[RequestId, _Running] = {}
        self._failures: list[Failure] = []
        self._events: list[CacheEvent] = []
        self._blocks = _Blocks()
        self._adapters: dict[str, AdapterInfo] = {}
        self._num_finished = 0
        self._num_failed = 0

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._failures or self._events)

    def add_request(self, request: GenerateRequest | ContextRequest) -> None:
        if request.num_tokens == 0:
            raise InvalidArgument("tokens", [], "is empty", "Send at least one token.")
        if request.num_tokens > self.model_info.max_model_len:
            raise InvalidArgument("tokens", request.num_tokens, "exceeds max_model_len", "Send a shorter prompt.")
        adapter = request.adapter if isinstance(request, GenerateRequest) else None
        for ref in (*request.declared, *([adapter] if adapter else [])):
            if ref.digest not in {info.digest for info in self._adapters.values()}:
                raise NotFound("adapter", ref.name, "Load it first.")
        self._running[request.request_id] = _Running(request, [int(token) for token in request.tokens])

    def abort(self, request_id: RequestId) -> None:
        if self._running.pop(request_id, None) is not None:
            self._fail(request_id, Cancelled("the client cancelled."))

    def step(self) -> StepOutput:
        if self.step_error is not None:
            raise self.step_error
        self.num_steps += bool(self._running)
        for request_id, running in list(self._running.items()):
            deadline_s = running.request.deadline_s
            if deadline_s is not None and self._clock.wall() > deadline_s:
                del self._running[request_id]
                self._fail(request_id, DeadlineExceeded("the deadline has passed."))
        chunks = tuple(self._advance(running) for running in list(self._running.values()))
        failures, events = tuple(self._failures), tuple(self._events)
        self._failures, self._events = [], []
        return StepOutput(chunks, failures, events)

    def load_adapter(self, name: str, path: str) -> AdapterInfo:
        return self.register_adapter(name, self.read_adapter(name, path))

    def read_adapter(self, name: str, path: str, sharing: Sharing | None = None) -> FakeWeights:
        digest = AdapterDigest(name.encode().hex().ljust(32, "0")[:32])
        return FakeWeights(AdapterInfo(name, digest, path, 8, ("k_proj", "v_proj"), 16), 8)

    def register_adapter(self, name: str, weights: Weights, sharing: Sharing | None = None) -> AdapterInfo:
        if name in self._adapters:
            raise AlreadyExists("adapter", name, "Unload it first.")
        self._adapters[name] = replace(weights.info, sharing=sharing)
        self._events.append(AdapterLoaded(weights.info.digest))
        return weights.info

    def unload_adapter(self, name: str) -> None:
        info = self._adapters.pop(name, None)
        if info is None:
            raise NotFound("adapter", name, "List the adapters.")
        self._events.append(AdapterUnloaded(info.digest))

    def list_adapters(self) -> tuple[AdapterInfo, ...]:
        return tuple(self._adapters.values())

    def release_hint(self, session_id: str) -> None:
        self.released_hints.append(session_id)

    def status(self) -> EngineStatus:
        counters = EngineCounters(num_steps=self.num_steps, num_finished=self._num_finished, num_failed=self._num_failed)
        held = 256 * len(self._blocks.base)
        return EngineStatus(len(self._running), 0, 0, 2**20, held, 0, (), counters, self.list_adapters())

    def load(self) -> WorkerLoad:
        queued = sum(1.0 for running in self._running.values() if running.num_generated == 0)
        return WorkerLoad(queued, float(len(self._running)), len(self._running), 2**20, 2**20)

    def snapshot_events(self) -> tuple[CacheEvent, ...]:
        events: list[CacheEvent] = [AdapterLoaded(info.digest) for info in self._adapters.values()]
        events.append(BaseStored(tuple(self._blocks.base)))
        for (adapter, semantics), blocks in self._blocks.residual.items():
            events.append(ResidualStored(adapter, semantics, tuple(blocks)))
        return tuple(events)

    def check_invariants(self) -> None:
        for key, blocks in self._blocks.residual.items():
            orphans = blocks.keys() - self._blocks.base.keys()
            if orphans:
                raise AssertionError(f"{len(orphans)} residual blocks of {key} have no base block")

    def _fail(self, request_id: RequestId, error: Cancelled | DeadlineExceeded) -> None:
        self._num_failed += 1
        self._failures.append(Failure(request_id, error))

    def _advance(self, running: _Running) -> TokenChunk:
        """One token of one request; a context pass ends in its first step."""
        request = running.request
        is_first = running.usage is None
        if is_first:
            self._prefill(running)
        if isinstance(request, ContextRequest):
            return self._finish(running, (), FinishReason.STOP)
        adapter = request.adapter.digest if request.adapter is not None else None
        token = fake_token(running.tokens[-1], len(running.tokens), adapter)
        running.tokens.append(token)
        running.num_generated += 1
        if running.num_generated + request.num_resumed >= request.sampling.max_tokens:
            return self._finish(running, (token,), FinishReason.LENGTH)
        return TokenChunk(request.request_id, (token,), usage=running.usage if is_first else None)

    def _finish(self, running: _Running, tokens: tuple[int, ...], reason: FinishReason) -> TokenChunk:
        self._num_finished += 1
        del self._running[running.request.request_id]
        return TokenChunk(running.request.request_id, tokens, finish_reason=reason, usage=running.usage)

    def _prefill(self, running: _Running) -> None:
        request = running.request
        chain, block_size = request.prefix.all_hashes, request.prefix.block_size
        num_hit = 0
        while num_hit < len(chain) and chain[num_hit] in self._blocks.base:
            num_hit += 1
        hit_tokens = num_hit * block_size
        running.usage = PrefixUsage(hit_tokens, hit_tokens, hit_tokens, request.num_tokens - hit_tokens)
        if chain[num_hit:]:
            self._blocks.base.update(dict.fromkeys(chain))
            self._events.append(BaseStored(chain[num_hit:]))
        if request.sharing is Sharing.EAGER:
            self._store_residuals(request.declared, request.prefix.context)

    def _store_residuals(self, adapters: tuple[AdapterRef, ...], context: tuple[BlockHash, ...]) -> None:
        for adapter in adapters:
            held = self._blocks.residual.setdefault((adapter.digest, str(Sharing.EAGER)), {})
            new = tuple(block for block in context if block not in held)
            if new:
                held.update(dict.fromkeys(new))
                self._events.append(ResidualStored(adapter.digest, str(Sharing.EAGER), new))


def make_fake_engine(config: ClusterConfig) -> tuple[FakeEngine, str]:
    """An ``EngineFactory`` for ``ForkKVWorker``; importable, so that a worker in another process finds it."""
    return FakeEngine(), "cpu"
