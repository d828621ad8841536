"""seed -> Casebook: facts about people, orders, events and places, and the text that states them.

Text comes in four styles (notes, sentences, registers, tables), with sentences in between that state no fact. A casebook of
n tokens has about n / 6 facts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from forkkv_cluster.training.casebook.lexicon import POOLS
from forkkv_cluster.training.casebook.schema import KINDS, Attribute, Kind, attribute_of
from forkkv_cluster.training.casebook.split import Split, allowed_values, among

__all__ = ["WORD", "Casebook", "Fact", "Level", "build_casebook", "num_words"]

WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\n+|\s")
"""The tokenizer's words: of a casebook, each is one token. Spaces belong to the word that follows."""

_STYLES = ("notes", "sentences", "register", "table")
_FILLERS = (
    "Nothing else was noted that day.",
    "The page is worn here.",
    "This was checked twice.",
    "The weather was bad for weeks.",
    "A copy went to the office.",
    "The rest of this entry is missing.",
    "Nobody could say more.",
    "The clerk signed below.",
    "More was promised for the next week.",
    "The ink is hard to read.",
    "All of this was told by letter.",
    "No one has asked since.",
)
_TITLES = ("Casebook of the northern office.", "Casebook of the county.", "Notes of the registry.", "Casebook of the harbour.")
_DENSITY = 0.75
"""Share of its attributes that are stated of an entity."""


class Level(IntEnum):
    """How varied a casebook is; training begins with the plainest. PLAIN: homes and jobs of people in canonical sentences, so
    that only the name tells which value is meant. SAID: everything, each fact said by itself. FULL: all styles."""

    PLAIN = 0
    SAID = 1
    FULL = 2


@dataclass(frozen=True, slots=True)
class Fact:
    entity: str
    attribute: str
    value: str

    def put(self, phrase: str) -> str:
        return phrase.replace("{e}", self.entity).replace("{v}", self.value)

    @property
    def sentence(self) -> str:
        """How an answer states it."""
        return self.put(attribute_of(self.attribute).answer)


@dataclass(frozen=True, slots=True)
class Casebook:
    """``facts`` in the order of their entities; at most one for an entity and an attribute."""

    text: str
    facts: tuple[Fact, ...]

    def of(self, entity: str) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.facts if fact.entity == entity)

    def stating(self, attribute: str) -> tuple[Fact, ...]:
        return tuple(fact for fact in self.facts if fact.attribute == attribute)


def num_words(text: str) -> int:
    return len(WORD.findall(text))


def build_casebook(rng: random.Random, max_tokens: int, split: Split = "train", level: Level = Level.FULL) -> Casebook:
    """A casebook of at most ``max_tokens`` tokens (at least 32), and rarely 64 fewer. Raises ValueError below 32."""
    if max_tokens < 32:
        raise ValueError(f"max_tokens {max_tokens} is too short for a casebook: ask for at least 32.")
    return _Writer(rng, max_tokens, split, level).write()


class _Writer:
    """Writes sections until the next one would not fit."""

    def __init__(self, rng: random.Random, max_tokens: int, split: Split, level: Level) -> None:
        self._rng, self._split, self._level = rng, split, level
        self._room = max_tokens - 2  # the beginning-of-text token, and one for the end of a section
        self._facts: list[Fact] = []
        self._used: set[str] = set()
        # A few cities that many share: there is something to count, and something to confuse.
        self._shared = rng.sample(POOLS["city"], rng.randint(2, 24))
        self._people: list[str] = []

    def write(self) -> Casebook:
        title = self._rng.choice(_TITLES)
        self._room -= num_words(title)
        parts = [title]
        weights = [3, 1, 1, 1] if self._rng.random() < 0.7 else [1, 1, 1, 1]
        misses = 0
        while misses < 3:
            kind = KINDS[0] if self._level is Level.PLAIN else self._rng.choices(KINDS, weights)[0]
            section = self._section(kind)
            if section:
                parts.append(section)
            misses = 0 if section else misses + 1
        return Casebook("\n".join(parts), tuple(self._facts))

    def _section(self, kind: Kind) -> str:
        style = self._rng.choice(_STYLES) if self._level is Level.FULL else "sentences"
        names = [
            name
            for name in self._rng.sample(POOLS[kind.pool], self._rng.randint(2, min(8, 2 + self._room // 16)))
            if name not in self._used
        ]
        self._used.update(names)
        drawn = ((name, self._facts_about(kind, name)) for name in names)
        records = [(name, facts) for name, facts in drawn if facts]
        while records:
            text = getattr(self, f"_{style}")(kind, records)
            size = num_words(text) + 1
            if size <= self._room:
                self._room -= size
                self._facts += [fact for _, facts in records for fact in facts]
                return str(text)
            records.pop()
        return ""

    def _facts_about(self, kind: Kind, name: str) -> list[Fact]:
        if kind.name == "person":
            self._people.append(name)
        attributes = kind.attributes[:2] if self._level is Level.PLAIN else kind.attributes
        stated = [a for a in attributes if self._rng.random() < _DENSITY] or [self._rng.choice(attributes)]
        return [Fact(name, a.name, value) for a in stated if (value := self._value(a, name)) is not None]

    def _value(self, attribute: Attribute, name: str) -> str | None:
        """None: nobody of this casebook may stand beside ``name`` in this split."""
        if attribute.pool == "person":
            known = among(name, "person", self._split, self._people)
            return self._rng.choice(known) if known else None
        if attribute.pool == "city" and self._rng.random() < 0.7:
            shared = among(name, "city", self._split, self._shared)
            if shared:
                return self._rng.choice(shared)
        return self._rng.choice(allowed_values(name, attribute.pool, self._split))

    # --- styles: (kind, [(name, facts)]) -> text --------------------------------------------------------------------

    def _notes(self, kind: Kind, records: Sequence[tuple[str, list[Fact]]]) -> str:
        """A line for each entity, its facts as clauses of one sentence."""
        lines = []
        for name, facts in records:
            clauses = [fact.put(attribute_of(fact.attribute).clause) for fact in facts]
            joined = clauses[0] if len(clauses) == 1 else ", ".join(clauses[:-1]) + " and " + clauses[-1]
            lines.append(f"- {kind.subject.replace('{e}', name)} {joined}.{self._filler()}")
        return "\n".join(lines)

    def _sentences(self, kind: Kind, records: Sequence[tuple[str, list[Fact]]]) -> str:
        """One paragraph, each fact a sentence, in any order."""
        facts = [fact for _, record in records for fact in record]
        self._rng.shuffle(facts)
        return f"{kind.heading}: {' '.join(self._said(fact) for fact in facts)}"

    def _said(self, fact: Fact) -> str:
        if self._level is Level.PLAIN:
            return fact.sentence
        return fact.put(self._rng.choice(attribute_of(fact.attribute).statements)) + self._filler()

    def _register(self, kind: Kind, records: Sequence[tuple[str, list[Fact]]]) -> str:
        lines = (f"* {name}: " + ", ".join(f"{fact.attribute} {fact.value}" for fact in facts) for name, facts in records)
        return f"{kind.heading} of the register:\n" + "\n".join(lines)

    def _table(self, kind: Kind, records: Sequence[tuple[str, list[Fact]]]) -> str:
        columns = [a.name for a in kind.attributes if any(fact.attribute == a.name for _, facts in records for fact in facts)]
        rows = [f"| {kind.name} | {' | '.join(columns)} |"]
        for name, facts in records:
            values = {fact.attribute: fact.value for fact in facts}
            rows.append(f"| {name} | {' | '.join(values.get(column, '-') for column in columns)} |")
        return "\n".join(rows)

    def _filler(self) -> str:
        return f" {self._rng.choice(_FILLERS)}" if self._rng.random() < 0.2 else ""
