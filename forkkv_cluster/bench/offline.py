"""A trace against the engine in this process."""

from __future__ import annotations

import time
from collections.abc import Callable

from forkkv_cluster.bench.metrics import RunRecord
from forkkv_cluster.bench.offline_run import EngineFacade, OfflineRun
from forkkv_cluster.bench.target import WARM_UP, OnProgress, TargetFacts, check_sharing
from forkkv_cluster.bench.trace import ContextEvent, Trace
from forkkv_cluster.core.clock import Clock, SystemClock
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import ContextRequest, GenerateRequest, SamplingParams, Sharing, WriterMode
from forkkv_cluster.core.request_builder import Envelope, RequestBuilder
from forkkv_cluster.core.session import Branch, Session
from forkkv_cluster.core.status import EngineCounters


class OfflineTarget:
    """An engine of this process. ``sleep`` (seconds) is called while nothing is due and nothing runs."""

    def __init__(
        self,
        engine: EngineFacade,
        *,
        block_size: int,
        sharing: Sharing,
        writer: WriterMode = WriterMode.CANONICAL,
        seed: int = 0,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.engine = engine
        self.clock = clock or SystemClock()
        self.sleep = sleep
        self._builder = RequestBuilder(engine.model_info, block_size=block_size, namespace_of=_namespace_of)
        self._sharing = check_sharing(sharing)
        self._writer = writer
        self._seed = seed
        self._adapters = {adapter.name: adapter.ref for adapter in engine.list_adapters()}

    def facts(self) -> TargetFacts:
        info = self.engine.model_info
        return TargetFacts(
            name="offline",
            model=info.name,
            vocab_size=info.vocab_size,
            writer=str(self._writer),
            dtype=info.dtype,
            kv_bytes=self.engine.status().kv_bytes_total,
            adapters=tuple(self._adapters),
        )

    def counters(self) -> EngineCounters:
        return self.engine.status().counters

    def warm_up(self) -> None:
        OfflineRun(self, WARM_UP, lambda num_ended: None).run()

    def run(self, trace: Trace, on_progress: OnProgress) -> RunRecord:
        return OfflineRun(self, trace, on_progress).run()

    def open_session(self, event: ContextEvent, vocab_size: int) -> Session:
        return Session(
            session_id=event.id,
            tenant=event.tenant,
            context=event.source.array(vocab_size),
            adapters=tuple(self._adapters[name] for name in event.adapters),
            sharing=self._sharing,
            writer=self._writer,
            created_s=self.clock.wall(),
        )

    def context_pass(self, session: Session) -> ContextRequest:
        """Over the shared context as it is now."""
        envelope = Envelope(new_id("context"), session.tenant)
        return self._builder.context_pass(
            session.context, session.adapters, session.sharing, session.sharing_group, session.session_id, envelope
        )

    def turn(self, session: Session, branch: Branch, appended: TokenArray, max_tokens: int) -> GenerateRequest:
        """Greedy, and exactly ``max_tokens`` long. appended [k] int32."""
        sampling = SamplingParams(seed=self._seed, max_tokens=max_tokens, ignore_eos=True)
        return self._builder.turn(session, branch, appended, sampling, Envelope(new_id("turn"), session.tenant))


def _namespace_of(tenant: str, sharing_group: str) -> str:
    """Traces know tenants only; nobody else's pages are in this engine, so that no salt is needed."""
    return f"bench:{tenant}:{sharing_group}"
