"""What the gateway does, in the words of ``core``: sessions, forks, turns, joins, adapters, status. Both wires call this.

``caller`` is the tenant that authentication found; another tenant's session does not exist for it. None is a caller of an
open server, who may act for anybody.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.config import ClusterConfig
from forkkv_cluster.core.errors import AlreadyExists, ForkKVError, InvalidArgument
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterInfo, AdapterRef, ModelInfo, Sharing
from forkkv_cluster.core.request_builder import context_plan
from forkkv_cluster.core.session import Branch, BranchSpec, BusyBranches, JoinWhat, Session
from forkkv_cluster.core.status import ClusterStatus, DirectoryStatus, WorkerStatus
from forkkv_cluster.gateway.adapters import AdapterRegistry
from forkkv_cluster.gateway.branch_turns import BranchTurns, draw_seed, new_envelope
from forkkv_cluster.gateway.commands import (
    BranchTarget,
    CreateSessionCommand,
    GenerateCommand,
    StatelessTarget,
    TextOrTokens,
    TurnEvent,
)
from forkkv_cluster.gateway.identity import acting_tenant
from forkkv_cluster.gateway.metered import metered
from forkkv_cluster.gateway.replay import check_pick_up
from forkkv_cluster.gateway.request_builder import Envelope, RequestBuilder
from forkkv_cluster.gateway.session_store import SessionStore, unknown_session
from forkkv_cluster.gateway.sharing_view import SharingView, merged_verdicts
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.gateway.turns import TurnRunner
from forkkv_cluster.gateway.worker_pool import WorkerLost, WorkerPool
from forkkv_cluster.observability.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

DirectoryStatusSource = Callable[[], Awaitable[DirectoryStatus | None]]


class GatewayService:
    """One gateway. ``start`` once before anything else: it waits for the first worker."""

    def __init__(
        self,
        config: ClusterConfig,
        pool: WorkerPool,
        store: SessionStore,
        tokenization: Tokenization,
        clock: Clock,
        *,
        version: str,
        directory_status: DirectoryStatusSource,
    ) -> None:
        self.config = config
        self.tokenization = tokenization
        self.version = version
        self._pool = pool
        self._store = store
        self._clock = clock
        self._directory_status = directory_status
        self.metrics = GatewayMetrics()
        self._adapters = AdapterRegistry(pool, store)
        self._sharing = SharingView(pool, clock)
        self._busy = BusyBranches()
        self._background: set[asyncio.Task[None]] = set()
        self._started: asyncio.Task[None] | None = None
        self._model: ModelInfo | None = None

    # Start and identity of the model

    async def start(self) -> None:
        """Wait for a worker and learn the model from it; later calls return at once. Raises Unavailable."""
        if self._started is None or (self._started.done() and self._started.exception() is not None):
            self._started = asyncio.create_task(self._start(), context=contextvars.Context())
        await asyncio.shield(self._started)

    async def _start(self) -> None:
        model = await self._pool.model_info()
        self._builder = RequestBuilder(
            model, block_size=self.config.cache.page_size, salt=self.config.gateway.salt, defaults=self.config.defaults
        )
        self._runner = TurnRunner(
            self._pool,
            self._builder,
            self.tokenization,
            self._clock,
            max_resumes=self.config.gateway.max_resumes,
            restore_adapter=self._adapters.restore,
        )
        self._turns = BranchTurns(
            self._runner,
            self._builder,
            self._store,
            self.tokenization,
            self._clock,
            self._busy,
            self._sharing,
            resume_grace_s=self.config.gateway.resume_grace_s,
        )
        await self._adapters.refresh()
        self._model = model

    @property
    def is_started(self) -> bool:
        return self._model is not None

    @property
    def model(self) -> ModelInfo:
        """Of the started gateway."""
        return self._builder.model

    # Sessions

    async def create_session(self, caller: str | None, command: CreateSessionCommand) -> Session:
        """Stores the session and starts its context pass; returns without waiting for it."""
        await self.start()
        sharing = command.sharing or self.config.defaults.session_sharing
        context = self._tokens(command.context, "token_ids", special=True)
        self._builder.check_context(context)
        adapters = [await self._adapters.resolve(name) for name in dict.fromkeys(command.adapters)]
        session = Session(
            session_id=new_id("session"),
            tenant=acting_tenant(caller, command.tenant),
            context=context,
            adapters=tuple(adapter for adapter in adapters if adapter is not None),
            sharing=sharing,
            writer=self.config.defaults.writer,
            created_s=self._clock.wall(),
            sharing_group=command.sharing_group,
            keep_s=command.keep_s,
        )
        session.check_keep()
        await self._store.add(session)
        self._start_context_pass(session, session.context)
        return session

    async def get_session(self, caller: str | None, session_id: str) -> Session:
        session = await self._store.get(session_id)
        if caller is not None and session.tenant != caller:
            raise unknown_session(session_id)
        return session

    async def list_sessions(self, caller: str | None, tenant: str = "") -> list[Session]:
        """Of the caller; on an open server of ``tenant``, or of everybody when it is empty. Oldest first."""
        sessions = await self._store.list()
        if caller is None and not tenant:
            return sessions
        wanted = acting_tenant(caller, tenant)
        return [session for session in sessions if session.tenant == wanted]

    async def close_session(self, caller: str | None, session_id: str) -> None:
        session = await self.get_session(caller, session_id)
        self._busy.check_session_idle(session_id)
        await self._store.remove(session_id)
        if session.keep_s:
            self._in_background(self._release_hint(session_id))

    async def fork(
        self, caller: str | None, session_id: str, specs: tuple[BranchSpec, ...], parent: str | None
    ) -> list[Branch]:
        """All branches or none; a branch's own tokens become context when another adapter forks it."""
        await self.get_session(caller, session_id)
        if parent is not None:
            self._busy.check_idle(session_id, parent)
        session = await self._store.update(session_id, lambda session: session.fork(specs, parent))
        branches = [session.branch(spec.name) for spec in specs]
        if parent is not None and any(len(b.context) > len(session.branch(parent).context) for b in branches):
            self._start_context_pass(session, session.branch(parent).tokens)
        return branches

    async def join(self, caller: str | None, session_id: str, branch: str, what: JoinWhat) -> tuple[int, Session]:
        """Tokens that were appended, and the session as it is now."""
        await self.start()
        await self.get_session(caller, session_id)
        self._busy.check_idle(session_id, branch)
        joined = 0

        def change(session: Session) -> Session:
            nonlocal joined
            session, joined = session.join(branch, what)
            self._builder.check_context(session.context)
            return session

        session = await self._store.update(session_id, change)
        if joined:
            self._start_context_pass(session, session.context)
        return joined, session

    # Turns

    async def generate(self, caller: str | None, command: GenerateCommand) -> AsyncGenerator[TurnEvent, None]:
        """Events of one turn or stateless request; closing the iterator cancels it (a turn with an id: after a grace)."""
        await self.start()
        async with aclosing(metered(self._events(caller, command), self.metrics, self._clock)) as events:
            async for event in events:
                yield event

    async def _events(self, caller: str | None, command: GenerateCommand) -> AsyncGenerator[TurnEvent, None]:
        if command.timeout_s is not None and not command.timeout_s > 0:
            raise InvalidArgument("timeout_s", command.timeout_s, "is not above 0", "Send seconds, or leave it out.")
        check_pick_up(command)
        if isinstance(command.target, BranchTarget):
            events = self._branch_events(caller, command, command.target)
        else:
            events = self._stateless_events(caller, command, command.target)
        async with aclosing(events):
            async for event in events:
                yield event

    async def _branch_events(
        self, caller: str | None, command: GenerateCommand, target: BranchTarget
    ) -> AsyncGenerator[TurnEvent, None]:
        await self.get_session(caller, target.session_id)
        appended = self._tokens(command.input, "append", special=False)
        async with aclosing(self._turns.events(target, appended, command)) as events:
            async for event in events:
                yield event

    async def _stateless_events(
        self, caller: str | None, command: GenerateCommand, target: StatelessTarget
    ) -> AsyncGenerator[TurnEvent, None]:
        tokens = self._tokens(command.input, "prompt", special=True)
        if len(tokens) == 0:
            raise InvalidArgument("prompt", "", "is empty", "Send text or token ids with at least one token.")
        adapter = await self._adapters.resolve(target.adapter)
        sampling = self._builder.sampling(command.sampling, len(tokens), draw_seed())
        envelope = new_envelope(self._clock, acting_tenant(caller, target.tenant), command)
        modes = await self._sharing.modes([adapter] if adapter is not None and target.sharing is Sharing.AUTO else [])
        request = self._builder.stateless(tokens, adapter, target, sampling, envelope, modes)
        async with aclosing(self._runner.run(request, self._runner.output_of(request))) as events:
            async for event in events:
                yield event

    # Adapters and status

    async def load_adapter(self, name: str, path: str, sharing: Sharing | None = None) -> AdapterInfo:
        """Raises AlreadyExists for the base model's name, and what ``AdapterRegistry.load`` raises."""
        await self.start()
        if name == self.model.name:
            raise AlreadyExists("model", name, "It is the base model: choose another name for the adapter.")
        try:
            return await self._adapters.load(name, path, sharing)
        finally:
            self._sharing.forget()

    async def unload_adapter(self, name: str) -> None:
        await self.start()
        await self._adapters.unload(name)
        self._sharing.forget()

    async def list_adapters(self) -> tuple[AdapterInfo, ...]:
        """By name, each with how ``auto`` is served on it now."""
        await self.start()
        return self._sharing.described(await self._adapters.list(), await self._sharing.verdicts())

    async def resolve_adapter(self, name: str | None) -> AdapterRef | None:
        """None, the base model, for None. Raises NotFound."""
        await self.start()
        return await self._adapters.resolve(name)

    async def status(self) -> ClusterStatus:
        """Workers that do not answer are left out; an absent directory is None."""
        await self.start()
        results = await self._pool.broadcast("status")
        workers = sorted((r for r in results if isinstance(r, WorkerStatus)), key=lambda worker: worker.worker_id)
        sessions = await self._store.list()
        return ClusterStatus(
            version=self.version,
            workers=tuple(workers),
            directory=await self._directory_status(),
            num_sessions=len(sessions),
            num_branches=sum(len(session.branches) for session in sessions),
            adapters=self._sharing.described(
                await self._adapters.list(), merged_verdicts(worker.engine.adapters for worker in workers)
            ),
        )

    # Helpers

    def _tokens(self, value: TextOrTokens, name: str, *, special: bool) -> TokenArray:
        return self.tokenization.resolve(
            value.text, value.token_ids, name=name, vocab_size=self.model.vocab_size, special=special
        )

    def _start_context_pass(self, session: Session, context: TokenArray) -> None:
        """Write shared pages ahead of the branches, which find them or wait for them; under other policies, nothing.

        Best effort: a branch whose context pages are missing has them written by its own request.
        """
        if not session.needs_context_pass:
            return

        async def run() -> None:
            plan = context_plan(session, await self._sharing.modes_of(session, session.sharing))
            if plan is None:
                return
            sharing, declared = plan
            envelope = Envelope(new_id("context"), session.tenant)
            request = self._builder.context_pass(
                context, declared, sharing, session.sharing_group, session.session_id, envelope
            )
            if context is session.context:  # not a branch's own tokens, which another adapter forked
                request = replace(request, keep_s=session.keep_s)
            try:
                await self._pool.run_context(request)
            except (ForkKVError, WorkerLost) as error:
                logger.warning("context pass of %s failed: %s; its branches will run it", session.session_id, error)

        self._in_background(run())

    async def _release_hint(self, session_id: str) -> None:
        """Best effort: a worker that does not hear of it keeps the context until the hint runs out."""
        try:
            await self._pool.broadcast("release_hint", session_id)
        except (ForkKVError, WorkerLost) as error:
            logger.warning("workers keep the context of closed session %s until its hint runs out: %s", session_id, error)

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, context=contextvars.Context())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
