"""Turns with an id outlive the connection that asked for them: a retry gets the rest.

A turn runs in a task of its own and keeps its events; connections read them from any point. When the last one leaves, the
turn goes on for ``grace_s``; when it has ended, its events stay as long for a retry.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncGenerator, Callable, Hashable
from contextlib import aclosing
from dataclasses import dataclass, field

from forkkv_cluster.core.errors import Cancelled, ForkKVError, unexpected
from forkkv_cluster.gateway.commands import TurnEvent
from forkkv_cluster.gateway.replay import check_same_turn

logger = logging.getLogger(__name__)

StartTurn = Callable[[], AsyncGenerator[TurnEvent, None]]


@dataclass(eq=False)
class _KeptTurn:
    fingerprint: str
    events: list[TurnEvent] = field(default_factory=list)
    error: ForkKVError | None = None
    is_over: bool = False
    num_readers: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None
    timer: asyncio.TimerHandle | None = None

    def notify(self) -> None:
        # Every waiter holds the old event; whoever comes later waits on the new one.
        self.changed.set()
        self.changed = asyncio.Event()


class TurnHub:
    """Keeps running and just-ended turns by key."""

    def __init__(self, grace_s: float) -> None:
        self._grace_s = grace_s
        self._turns: dict[Hashable, _KeptTurn] = {}

    def knows(self, key: Hashable) -> bool:
        """Whether the turn runs, or ended a moment ago."""
        return key in self._turns

    async def follow(self, key: Hashable, fingerprint: str, start: StartTurn) -> AsyncGenerator[TurnEvent, None]:
        """Events of the turn from its beginning; starts it unless it is known.

        Raises what the turn raised, and FailedPrecondition when ``fingerprint`` says that the retry asks for something else.
        """
        turn = self._turns.get(key)
        if turn is None:
            turn = self._turns[key] = _KeptTurn(fingerprint)
            # An empty context: the turn must not die with the connection that happened to start it.
            turn.task = asyncio.create_task(self._run(key, turn, start), context=contextvars.Context())
        else:
            check_same_turn(fingerprint, turn.fingerprint)
        turn.num_readers += 1
        self._stop_timer(turn)
        try:
            position = 0
            while True:
                changed = turn.changed
                for event in turn.events[position:]:
                    position += 1
                    yield event
                if position < len(turn.events):
                    continue
                if turn.error is not None:
                    raise turn.error
                if turn.is_over:
                    return
                await changed.wait()
        finally:
            turn.num_readers -= 1
            if turn.num_readers == 0:
                self._start_timer(key, turn)

    async def _run(self, key: Hashable, turn: _KeptTurn, start: StartTurn) -> None:
        try:
            async with aclosing(start()) as events:
                async for event in events:
                    turn.events.append(event)
                    turn.notify()
        except ForkKVError as error:
            turn.error = error
        except asyncio.CancelledError:
            turn.error = Cancelled("nobody came back for the turn in time; its branch is as it was.")
        except Exception as error:
            # Without it the readers would take the end of the events for the end of the turn.
            logger.exception("unexpected error in a turn")
            turn.error = unexpected(error)
        finally:
            turn.is_over = True
            turn.notify()
            if turn.error is not None:
                # A failed turn left no trace: a retry starts anew.
                self._turns.pop(key, None)

    def _start_timer(self, key: Hashable, turn: _KeptTurn) -> None:
        turn.timer = asyncio.get_running_loop().call_later(self._grace_s, self._expire, key, turn)

    @staticmethod
    def _stop_timer(turn: _KeptTurn) -> None:
        if turn.timer is not None:
            turn.timer.cancel()
            turn.timer = None

    def _expire(self, key: Hashable, turn: _KeptTurn) -> None:
        if self._turns.get(key) is turn:
            del self._turns[key]
        if turn.task is not None and not turn.is_over:
            turn.task.cancel()
