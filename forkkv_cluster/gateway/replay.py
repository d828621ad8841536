"""A turn that somebody asks for again: what is stored of it, and only what they do not hold yet. Pure but for the stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import fields
from typing import Any

import xxhash

from forkkv_cluster.core.adapter_semantics import mismatched_training
from forkkv_cluster.core.errors import FailedPrecondition, InvalidArgument
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import SamplingParams
from forkkv_cluster.core.request_builder import is_uninvoked
from forkkv_cluster.core.session import Branch, Turn
from forkkv_cluster.gateway.commands import (
    BranchTarget,
    GenerateCommand,
    SamplingChoice,
    TurnDelta,
    TurnEvent,
    TurnFinished,
    TurnStarted,
)
from forkkv_cluster.gateway.tokenization import Tokenization


def check_pick_up(command: GenerateCommand) -> None:
    """Only a turn with an id can be picked up, and only a branch has turns. Raises InvalidArgument."""
    if command.turn_id and not isinstance(command.target, BranchTarget):
        raise InvalidArgument("turn_id", command.turn_id, "needs a branch", "Only a branch's turn can be picked up.")
    if command.num_received_tokens and not command.turn_id:
        raise InvalidArgument(
            "num_received_tokens", command.num_received_tokens, "needs a turn_id", "Only a turn with an id can be picked up."
        )


def fingerprint_of(appended: TokenArray, choice: SamplingChoice) -> str:
    """What a turn asks for, 32 hex characters: its tokens [k] int32 and its sampling, not its deadline or priority.

    Values that are the default do not count, so that a field which a later version adds leaves stored fingerprints valid.
    """
    params = _not_default(choice.params, SamplingParams(), skipped=("seed", "max_tokens"))
    rest = _not_default(choice, SamplingChoice(), skipped=("params",))
    return xxhash.xxh3_128_hexdigest(f"{params} {rest} ".encode() + appended.astype("<i4").tobytes())


def _not_default(value: Any, default: Any, skipped: tuple[str, ...]) -> list[tuple[str, Any]]:
    names = sorted(field.name for field in fields(value) if field.name not in skipped)
    return [(name, getattr(value, name)) for name in names if getattr(value, name) != getattr(default, name)]


def check_same_turn(asked: str, known: str) -> None:
    """Raises FailedPrecondition for a retry that asks for something else; an unknown fingerprint (empty) fits all."""
    if known and asked != known:
        raise FailedPrecondition(
            "turn_id names a turn with another input or other sampling. Send what you sent first, or a new turn_id."
        )


def find_turn(branch: Branch, turn_id: str) -> Turn | None:
    """The stored turn that a client gave this id."""
    return next((turn for turn in branch.turns if turn.turn_id == turn_id), None)


async def stored_turn(branch: Branch, turn: Turn, tokenization: Tokenization) -> AsyncGenerator[TurnEvent, None]:
    """A turn of the branch as events, one delta a token, from the store alone.

    Seed, usage, times and finish reason are not stored: they are 0 and None.
    """
    num_prompt = len(branch.context) + turn.generated_start
    generated = branch.own[turn.generated_start : turn.end].tolist()
    is_inactive = is_uninvoked(branch.adapter, branch.tokens[:num_prompt])
    yield TurnStarted("", num_prompt, 0, len(generated))
    detokenizer = tokenization.detokenizer(branch.tokens[max(0, num_prompt - 16) : num_prompt].tolist())
    for token_id in generated:
        yield TurnDelta((token_id,), detokenizer.push(token_id))
    rest = detokenizer.flush()
    if rest:
        yield TurnDelta(text=rest)
    yield TurnFinished(
        None,
        num_prompt,
        len(generated),
        is_adapter_inactive=is_inactive,
        mismatched_training=None if is_inactive else mismatched_training(branch.adapter, branch.sharing),
    )


async def skip_received(events: AsyncGenerator[TurnEvent, None], num_received: int) -> AsyncGenerator[TurnEvent, None]:
    """``events`` without the deltas of the first ``num_received`` tokens; what the client holds ended with a delta."""
    skipped = 0
    async with aclosing(events):
        async for event in events:
            if not isinstance(event, TurnDelta) or skipped >= num_received:
                if isinstance(event, TurnFinished) and skipped < num_received:
                    raise InvalidArgument(
                        "num_received_tokens", num_received, f"is more than the turn has ({skipped})", "Send 0."
                    )
                yield event
                continue
            skipped += len(event.token_ids)
            if skipped > num_received:
                raise InvalidArgument("num_received_tokens", num_received, "is not where a delta ended", "Send 0.")
