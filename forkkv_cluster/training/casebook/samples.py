"""The data API of training: an endless, seeded stream of samples in the layout in which the engine serves them.

    for sample in samples(encoder, {"mapper": 1.0}, seed=0, context_tokens=(256, 1024), num_turns=8): ...

The context is a casebook alone, with nothing of a role in it: what agents share. The branch is what one agent owns: questions
and answers. One branch holds several turns, so that a context is paid for once and supervised often.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forkkv_cluster.training.casebook.generator import Fact, Level, build_casebook
from forkkv_cluster.training.casebook.roles import Turn, ask
from forkkv_cluster.training.casebook.split import Split
from forkkv_cluster.training.casebook.tokenizer import Encoder

__all__ = ["Example", "Sample", "encode_turns", "examples", "samples"]


@dataclass(frozen=True, slots=True)
class Sample:
    """context_ids [n] int32, begins with the beginning-of-text token. branch_ids [m] int32. is_answer [m] bool: the tokens
    that the model must learn to write, each turn's end-of-text token among them."""

    context_ids: NDArray[np.int32]
    branch_ids: NDArray[np.int32]
    is_answer: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one casebook, as text: what evaluation reads."""

    role: str
    context: str
    question: str
    answer: str


def samples(
    encoder: Encoder,
    roles: Mapping[str, float],
    *,
    seed: int,
    context_tokens: tuple[int, int],
    num_turns: int,
    split: Split = "train",
    level: Level = Level.FULL,
) -> Iterator[Sample]:
    """Endless. ``roles`` are weights; a branch's turns are of one role each, drawn anew for every few.

    ``context_tokens`` (least, most): lengths are drawn evenly by their logarithm, at least 32.
    """
    rng = random.Random(seed)
    while True:
        low, high = context_tokens
        book = build_casebook(rng, round(low * (high / low) ** rng.random()), split, level)
        turns: list[Turn] = []
        told: set[Fact] = set()
        for role, count in _shares(rng, roles, num_turns).items():
            turns += ask(role, rng, book, count, told)
        if turns:
            rng.shuffle(turns)
            branch_ids, is_answer = encode_turns(encoder, turns)
            yield Sample(encoder.context(book.text), branch_ids, is_answer)


def _shares(rng: random.Random, roles: Mapping[str, float], num_turns: int) -> dict[str, int]:
    drawn = rng.choices(tuple(roles), tuple(roles.values()), k=num_turns)
    return {role: drawn.count(role) for role in roles if role in drawn}


def encode_turns(encoder: Encoder, turns: list[Turn]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    ids: list[int] = []
    is_answer: list[bool] = []
    for turn in turns:
        question, answer = encoder.turn(turn)
        ids += [*question, *answer]
        is_answer += [False] * len(question) + [True] * len(answer)
    return np.array(ids, dtype=np.int32), np.array(is_answer, dtype=np.bool_)


def examples(
    role: str, *, seed: int, context_tokens: int, count: int, split: Split = "held_out", level: Level = Level.FULL
) -> list[Example]:
    """``count`` examples, each about a casebook of its own of at most ``context_tokens`` tokens."""
    rng = random.Random(f"{role}/{seed}/{context_tokens}")
    found: list[Example] = []
    while len(found) < count:
        book = build_casebook(rng, context_tokens, split, level)
        found += [Example(role, book.text, turn.question, turn.answer) for turn in ask(role, rng, book, 1)]
    return found
