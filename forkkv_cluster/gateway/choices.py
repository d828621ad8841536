"""Several answers to one prompt: n requests side by side, told apart by the choice index in their sampler's key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.gateway.commands import BranchTarget, GenerateCommand, TurnEvent, TurnFinished

MAX_CHOICES = 128

Events = AsyncGenerator[TurnEvent, None]
ChoiceEvents = AsyncGenerator[tuple[int, TurnEvent], None]


def choice_commands(command: GenerateCommand, n: int, seed: int) -> list[GenerateCommand]:
    """``command`` once for each choice, all with one seed: its own, or else ``seed``.

    Raises InvalidArgument for a bad n, and on a branch, whose turn has one continuation.
    """
    if not 1 <= n <= MAX_CHOICES:
        raise InvalidArgument("n", n, f"is not from 1 to {MAX_CHOICES}", "Ask for one choice or more.")
    if n == 1:
        return [command]
    if isinstance(command.target, BranchTarget):
        raise InvalidArgument("n", n, "means nothing on a branch: its turn has one continuation", "Fork more branches.")
    sampling = command.sampling
    seed = sampling.seed if sampling.seed is not None else seed
    return [
        replace(command, sampling=replace(sampling, seed=seed, params=replace(sampling.params, choice=index)))
        for index in range(n)
    ]


async def choice_events(commands: Sequence[GenerateCommand], generate: Callable[[GenerateCommand], Events]) -> ChoiceEvents:
    """(choice, event) of all of them as they come; the first failure ends them all, and so does closing the iterator.

    The others start once the first has a token: by then the prompt is in the cache, and they find it there.
    """
    async with aclosing(generate(commands[0])) as first:
        for _ in range(2):  # The start, and the first token.
            if (event := await anext(first, None)) is not None:
                yield 0, event
        streams = [first, *(generate(command) for command in commands[1:])]
        async with aclosing(_merged(streams)) as events:
            async for numbered in events:
                yield numbered


async def _merged(streams: Sequence[Events]) -> ChoiceEvents:
    queue: asyncio.Queue[tuple[int, TurnEvent | BaseException | None]] = asyncio.Queue(maxsize=2 * len(streams))
    tasks = [asyncio.create_task(_pump(queue, index, stream)) for index, stream in enumerate(streams)]
    num_open = len(tasks)
    try:
        while num_open:
            index, event = await queue.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                num_open -= 1
            else:
                yield index, event
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(queue: asyncio.Queue[tuple[int, TurnEvent | BaseException | None]], index: int, stream: Events) -> None:
    """One stream into the queue: its events, then its end or its error."""
    end: BaseException | None = None
    try:
        async with aclosing(stream):
            async for event in stream:
                await queue.put((index, event))
    except Exception as error:
        end = error
    await queue.put((index, end))


def whole_usage(finished: Sequence[TurnFinished]) -> TurnFinished:
    """The choices' ends as one: the prompt counts once, what was generated and run counts as often as it was."""
    first, *others = finished
    return replace(
        first,
        num_generated_tokens=sum(end.num_generated_tokens for end in finished),
        usage=first.usage.plus_run(sum(end.usage.prefill_tokens_run for end in others)),
        worker_ids=tuple(dict.fromkeys(worker for end in finished for worker in end.worker_ids)),
        num_resumes=sum(end.num_resumes for end in finished),
    )
