"""Turns of branches: one at a time on each, stored when they end well, and picked up again by their id.

A turn leaves its branch as it was until it has ended well; then it is stored before its last event is sent.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

import numpy as np

from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.errors import Aborted
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.session import Branch, BusyBranches, Session
from forkkv_cluster.gateway.commands import BranchTarget, GenerateCommand, TurnEvent, TurnFinished
from forkkv_cluster.gateway.replay import check_same_turn, find_turn, fingerprint_of, skip_received, stored_turn
from forkkv_cluster.gateway.request_builder import Envelope, RequestBuilder
from forkkv_cluster.gateway.session_store import SessionStore
from forkkv_cluster.gateway.sharing_view import SharingView
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.gateway.turn_hub import TurnHub
from forkkv_cluster.gateway.turns import TurnRunner


def draw_seed() -> int:
    """A seed for a client that named none, in [0, 2^62)."""
    return secrets.randbits(62)


def new_envelope(clock: Clock, tenant: str, command: GenerateCommand) -> Envelope:
    deadline_s = None if command.timeout_s is None else clock.wall() + command.timeout_s
    return Envelope(new_id("request"), tenant, deadline_s, command.priority)


class BranchTurns:
    """``busy`` is shared with whoever else must know which branches run a turn."""

    def __init__(
        self,
        runner: TurnRunner,
        builder: RequestBuilder,
        store: SessionStore,
        tokenization: Tokenization,
        clock: Clock,
        busy: BusyBranches,
        sharing: SharingView,
        *,
        resume_grace_s: float,
    ) -> None:
        self._runner = runner
        self._builder = builder
        self._store = store
        self._tokenization = tokenization
        self._clock = clock
        self._busy = busy
        self._sharing = sharing
        self._hub = TurnHub(resume_grace_s)

    async def events(
        self, target: BranchTarget, appended: TokenArray, command: GenerateCommand
    ) -> AsyncGenerator[TurnEvent, None]:
        """The turn's events, from where the client says it was. appended [k] int32.

        Raises InvalidArgument, FailedPrecondition (a known turn_id with another request), Aborted, or what the turn raises.
        """
        events = await self._find_or_start(target, appended, command)
        async with aclosing(skip_received(events, command.num_received_tokens)) as rest:
            async for event in rest:
                yield event

    async def _find_or_start(
        self, target: BranchTarget, appended: TokenArray, command: GenerateCommand
    ) -> AsyncGenerator[TurnEvent, None]:
        asked = fingerprint_of(appended, command.sampling)
        turn = _Turn(target, appended, command, asked)
        if not command.turn_id:
            return self._run(turn)
        key = (target.session_id, target.branch, command.turn_id)
        if not self._hub.knows(key):
            branch = (await self._store.get(target.session_id)).branch(target.branch)
            stored = find_turn(branch, command.turn_id)
            if stored is not None:
                check_same_turn(asked, stored.fingerprint)
                return stored_turn(branch, stored, self._tokenization)
        return self._hub.follow(key, asked, lambda: self._run(turn))

    async def _run(self, turn: _Turn) -> AsyncGenerator[TurnEvent, None]:
        session_id, name = turn.target.session_id, turn.target.branch
        self._busy.start_turn(session_id, name)
        try:
            # Read under the claim: until it was made, another turn may have ended, whose tokens this one goes on from.
            session = await self._store.get(session_id)
            async with aclosing(self._run_on(session, session.branch(name), turn)) as events:
                async for event in events:
                    yield event
        finally:
            self._busy.end_turn(session_id, name)

    async def _run_on(self, session: Session, branch: Branch, turn: _Turn) -> AsyncGenerator[TurnEvent, None]:
        turn.check_not_stored(branch)
        branch.check_turn(turn.appended)
        num_prompt_tokens = len(branch.context) + len(branch.own) + len(turn.appended)
        sampling = self._builder.sampling(turn.command.sampling, num_prompt_tokens, draw_seed())
        envelope = new_envelope(self._clock, session.tenant, turn.command)
        modes = await self._sharing.modes_of(session, branch.sharing)
        request = self._builder.turn(session, branch, turn.appended, sampling, envelope, modes)
        output = self._runner.output_of(request)
        async with aclosing(self._runner.run(request, output)) as events:
            async for event in events:
                if isinstance(event, TurnFinished):
                    await self._store_turn(session, branch, turn, output.token_ids)
                yield event

    async def _store_turn(self, session: Session, branch: Branch, turn: _Turn, generated: list[int]) -> None:
        turn_id = turn.command.turn_id
        fingerprint = turn.fingerprint if turn_id else ""

        def change(current: Session) -> Session:
            if len(current.branch(branch.name).own) != len(branch.own):
                # Another gateway ran a turn of this branch meanwhile: each knows only its own running turns.
                raise Aborted(f"branch {branch.name!r} of session {session.session_id} ran another turn meanwhile. Try again.")
            tokens = np.asarray(generated, dtype=np.int32)
            return current.finish_turn(branch.name, turn.appended, tokens, turn_id, fingerprint)

        await self._store.update(session.session_id, change)


@dataclass(frozen=True, slots=True, eq=False)
class _Turn:
    """What is asked of a branch. appended [k] int32."""

    target: BranchTarget
    appended: TokenArray
    command: GenerateCommand
    fingerprint: str

    def check_not_stored(self, branch: Branch) -> None:
        """Raises Aborted when the turn was stored since it was looked for: the next call finds it there."""
        if self.command.turn_id and find_turn(branch, self.command.turn_id) is not None:
            raise Aborted(f"turn {self.command.turn_id!r} of branch {branch.name!r} ended just now. Call again to get it.")
