"""Streams side by side: order, failures and cancellation."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from forkkv_cluster.core.errors import InvalidArgument, Unavailable
from forkkv_cluster.gateway.choices import choice_commands, choice_events
from forkkv_cluster.gateway.commands import (
    BranchTarget,
    GenerateCommand,
    StatelessTarget,
    TextOrTokens,
    TurnDelta,
    TurnEvent,
    TurnStarted,
)

COMMAND = GenerateCommand(StatelessTarget(), TextOrTokens(text="x"))


class Streams:
    """Fake generations that count what is open and note the order in which they start."""

    def __init__(self, fail: int | None = None) -> None:
        self.fail = fail
        self.started: list[int] = []
        self.sent: list[int] = []
        self.num_open = 0

    async def generate(self, command: GenerateCommand) -> AsyncGenerator[TurnEvent, None]:
        choice = command.sampling.params.choice
        self.started.append(choice)
        self.num_open += 1
        try:
            yield TurnStarted("r", 1, 0, 4)
            for token in range(4):
                await asyncio.sleep(0)
                if choice == self.fail and token == 2:
                    raise Unavailable("gone")
                self.sent.append(choice)
                yield TurnDelta((token,))
        finally:
            self.num_open -= 1


async def test_the_others_start_after_the_firsts_first_token() -> None:
    streams = Streams()
    events = choice_events(choice_commands(COMMAND, 3, 7), streams.generate)
    assert [await anext(events), await anext(events)] == [(0, TurnStarted("r", 1, 0, 4)), (0, TurnDelta((0,)))]
    assert (streams.started, streams.sent) == ([0], [0])
    rest = [item async for item in events]
    assert sorted(streams.started) == [0, 1, 2]
    for choice in (1, 2):
        tokens = [event.token_ids[0] for index, event in rest if index == choice and isinstance(event, TurnDelta)]
        assert tokens == [0, 1, 2, 3]


@pytest.mark.parametrize("fail", [0, 1])
async def test_a_failure_is_raised_once_and_closes_the_rest(fail: int) -> None:
    streams = Streams(fail)
    with pytest.raises(Unavailable):
        async for _ in choice_events(choice_commands(COMMAND, 3, 7), streams.generate):
            pass
    assert streams.num_open == 0


async def test_closing_early_closes_every_stream() -> None:
    streams = Streams()
    events = choice_events(choice_commands(COMMAND, 3, 7), streams.generate)
    async for index, _ in events:
        if index == 2:
            break
    await events.aclose()
    assert streams.num_open == 0


def test_all_choices_have_one_seed_and_numbers_of_their_own() -> None:
    commands = choice_commands(COMMAND, 3, 7)
    assert [(c.sampling.seed, c.sampling.params.choice) for c in commands] == [(7, 0), (7, 1), (7, 2)]


def test_a_branch_has_one_continuation() -> None:
    command = GenerateCommand(BranchTarget("s", "b"), TextOrTokens(text="x"))
    with pytest.raises(InvalidArgument, match="n=2"):
        choice_commands(command, 2, 7)
