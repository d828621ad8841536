"""Several answers to one prompt, and several prompts in one request: requests side by side.

The n choices of a prompt are told apart by the choice index in their sampler's key; choice c of prompt p is number
p * n + c of the response.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import reduce
from typing import TypeVar

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import FinishReason, PrefixUsage
from forkkv_cluster.gateway.commands import BranchTarget, GenerateCommand, TurnDelta, TurnEvent, TurnFinished

MAX_CHOICES = 128

Item = TypeVar("Item")
Events = AsyncGenerator[TurnEvent, None]
ChoiceEvents = AsyncGenerator[tuple[int, TurnEvent], None]


def choice_commands(command: GenerateCommand, n: int, seed: int) -> list[GenerateCommand]:
    """``command`` once for each choice, all with one seed: its own, or else ``seed``. The first alone scores the prompt.

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
    first = replace(sampling, seed=seed)
    silent = replace(sampling.params, prompt_logprobs=None)
    others = [replace(first, params=replace(silent, choice=index)) for index in range(1, n)]
    return [replace(command, sampling=choice) for choice in (first, *others)]


async def choice_events(commands: Sequence[GenerateCommand], generate: Callable[[GenerateCommand], Events]) -> ChoiceEvents:
    """(choice, event) of all of them as they come; the first failure ends them all, and so does closing the iterator.

    The others start once the first has a token: by then the prompt is in the cache, and they find it there.
    """
    async with aclosing(generate(commands[0])) as first:
        event: TurnEvent | None = None
        while not isinstance(event, TurnDelta | TurnFinished) and (event := await anext(first, None)) is not None:
            yield 0, event
        streams = [first, *(generate(command) for command in commands[1:])]
        async with aclosing(_merged(streams)) as events:
            async for numbered in events:
                yield numbered


async def prompt_events(
    prompts: Sequence[Sequence[GenerateCommand]], generate: Callable[[GenerateCommand], Events]
) -> ChoiceEvents:
    """(number of the choice, event) of all prompts, each with its n choices; it ends as ``choice_events`` does."""
    n = len(prompts[0])
    async with aclosing(_merged([choice_events(commands, generate) for commands in prompts])) as events:
        async for number, (choice, event) in events:
            yield number * n + choice, event


async def silenced(events: ChoiceEvents) -> ChoiceEvents:
    """``events`` of requests whose prompt alone is wanted: what they generate is not shown, nor counted."""
    async with aclosing(events):
        async for index, event in events:
            if isinstance(event, TurnDelta):
                yield index, TurnDelta(worker_id=event.worker_id)
            elif isinstance(event, TurnFinished):
                yield index, replace(event, num_generated_tokens=0, finish_reason=FinishReason.LENGTH)
            else:
                yield index, event


async def _merged(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[tuple[int, Item], None]:
    queue: asyncio.Queue[tuple[int, Item | BaseException | None]] = asyncio.Queue(maxsize=2 * len(streams))
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


async def _pump(
    queue: asyncio.Queue[tuple[int, Item | BaseException | None]], index: int, stream: AsyncGenerator[Item, None]
) -> None:
    """One stream into the queue: its events, then its end or its error."""
    end: BaseException | None = None
    try:
        async with aclosing(stream):
            async for event in stream:
                await queue.put((index, event))
    except Exception as error:
        end = error
    await queue.put((index, end))


def whole_usage(finished: Sequence[TurnFinished], n: int | None = None) -> TurnFinished:
    """The choices' ends, in order, as one: each prompt (of n choices; None: all are of one) counts once, what was
    generated and run counts as often as it was."""
    heads = finished[:: n or len(finished)]
    hits = reduce(_plus_hits, (end.usage for end in heads))
    return replace(
        finished[0],
        num_prompt_tokens=sum(end.num_prompt_tokens for end in heads),
        num_generated_tokens=sum(end.num_generated_tokens for end in finished),
        usage=replace(hits, prefill_tokens_run=sum(end.usage.prefill_tokens_run for end in finished)),
        worker_ids=tuple(dict.fromkeys(worker for end in finished for worker in end.worker_ids)),
        num_resumes=sum(end.num_resumes for end in finished),
    )


def _plus_hits(one: PrefixUsage, other: PrefixUsage) -> PrefixUsage:
    return replace(
        one,
        base_hit_tokens=one.base_hit_tokens + other.base_hit_tokens,
        residual_hit_tokens=one.residual_hit_tokens + other.residual_hit_tokens,
        useful_hit_tokens=one.useful_hit_tokens + other.useful_hit_tokens,
    )
