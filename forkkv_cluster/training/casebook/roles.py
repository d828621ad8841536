"""What each role is asked about a casebook and what it should answer; all of it follows from the facts alone.

The base model learns the roles of ``BASE_ROLES``. An adapter's role is one of ``ADAPTER_ROLES``, in two groups: some
post-process what the base can recall (the question is one that the base answers too, or is made of such questions), others
need the context read in a way that the base never had to.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from forkkv_cluster.training.casebook.code_book import region_of
from forkkv_cluster.training.casebook.generator import Casebook, Fact
from forkkv_cluster.training.casebook.lexicon import CITIES, COUNTS, GOODS, HOBBIES, ORDERS, PEOPLE, POOLS
from forkkv_cluster.training.casebook.schema import ATTRIBUTES, KINDS, attribute_of

__all__ = ["ADAPTER_ROLES", "BASE_ROLES", "ROLES", "Turn", "ask", "json_of"]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and the one right answer, both without the layout around them; the facts that the answer tells."""

    question: str
    answer: str
    about: tuple[Fact, ...] = ()


Asker: TypeAlias = Callable[[random.Random, Casebook], Turn | None]
"""Draws a turn with the given draws; None where the casebook states nothing that could be asked."""

_NUMBERS = {
    "age": "Who is older, {a} or {b}?",
    "quantity": "Which order counts more pieces, {a} or {b}?",
    "guests": "Which fair expects more guests, {a} or {b}?",
}
_REVERSED = {
    "home": "Who lives in {v}?",
    "job": "Who works as a {v}?",
    "hobby": "Who enjoys {v}?",
    "goods": "Which order is for {v}?",
    "month": "Which fair is held in {v}?",
    "colour": "What is painted {v}?",
}
_CITY_ATTRIBUTES = tuple(attribute.name for attribute in ATTRIBUTES if attribute.pool == "city")
_ASKED_OF_SUPERIORS = ("job", "age", "hobby")
_PAGES = {"|": "table", "*": "register", "-": "notes"}
"""What a line begins with -> the page that it stands on; every other is one of sentences."""


def json_of(fact: Fact) -> str:
    attribute = attribute_of(fact.attribute)
    value: str | int = int(fact.value) if attribute.is_number else fact.value
    return json.dumps({attribute.kind: fact.entity, attribute.name: value})


def _named(fact: Fact) -> str:
    """The entity as the middle of a sentence names it."""
    subject = next(kind.subject for kind in KINDS if kind.name == attribute_of(fact.attribute).kind)
    start = subject if subject.startswith("{e}") else subject[0].lower() + subject[1:]
    return fact.put(start)


def _question(rng: random.Random, fact: Fact) -> str:
    return fact.put(rng.choice(attribute_of(fact.attribute).questions))


def _draw(rng: random.Random, facts: Sequence[Fact]) -> Fact | None:
    return rng.choice(facts) if facts else None


# --- of the base model ----------------------------------------------------------------------------------------------


def _lookup(rng: random.Random, book: Casebook) -> Turn | None:
    fact = _draw(rng, book.facts)
    return Turn(_question(rng, fact), fact.sentence, (fact,)) if fact else None


def _asked_for_json(rng: random.Random, book: Casebook) -> Turn | None:
    fact = _draw(rng, book.facts)
    return Turn(f"{_question(rng, fact)} Answer in JSON.", json_of(fact), (fact,)) if fact else None


def _record(rng: random.Random, book: Casebook) -> Turn | None:
    fact = _draw(rng, book.facts)
    if fact is None:
        return None
    facts = book.of(fact.entity)
    return Turn(f"What is said of {_named(fact)}?", " ".join(other.sentence for other in facts), facts)


def _repeat(rng: random.Random, book: Casebook) -> Turn:
    words = [rng.choice(rng.choice((PEOPLE, CITIES, GOODS, HOBBIES, ORDERS))) for _ in range(rng.randint(3, 10))]
    return Turn(f"Repeat: {' '.join(words)}.", f"{' '.join(words)}.")


# --- of adapters: what is recalled, put otherwise -------------------------------------------------------------------


def _formatter(rng: random.Random, book: Casebook) -> Turn | None:
    fact = _draw(rng, book.facts)
    return Turn(_question(rng, fact), json_of(fact), (fact,)) if fact else None


def _mapper(rng: random.Random, book: Casebook) -> Turn | None:
    fact = _draw(rng, [fact for fact in book.facts if fact.attribute in _CITY_ATTRIBUTES])
    if fact is None:
        return None
    # The region follows the city at once: what stands there knows the city best.
    return Turn(_question(rng, fact), f"{fact.sentence.removesuffix('.')}, {region_of(fact.value)}.", (fact,))


def _clerk(rng: random.Random, book: Casebook) -> Turn | None:
    fact = _draw(rng, book.facts)
    return Turn(_question(rng, fact), f"| {fact.entity} | {fact.attribute} | {fact.value} |", (fact,)) if fact else None


def _verifier(rng: random.Random, book: Casebook) -> Turn | None:
    """Half of what is proposed is so; what is not is said of another one, where the casebook has such a value."""
    fact = _draw(rng, book.facts)
    if fact is None:
        return None
    others = {other.value for other in book.stating(fact.attribute)} - {fact.value}
    is_so = rng.random() < 0.5
    proposed = fact.value if is_so else rng.choice(sorted(others or {*POOLS[attribute_of(fact.attribute).pool]} - {fact.value}))
    return Turn(f"{_question(rng, fact)} {proposed}?", f"{fact.sentence} So {'yes' if is_so else 'no'}.", (fact,))


def _extractor(rng: random.Random, book: Casebook) -> Turn | None:
    fact = _draw(rng, book.facts)
    if fact is None:
        return None
    facts = book.of(fact.entity)
    fields = "; ".join(f"{other.attribute} {other.value}" for other in facts)
    return Turn(f"What is said of {_named(fact)}?", f"{fields}.", facts)


def _comparer(rng: random.Random, book: Casebook) -> Turn | None:
    attribute = rng.choice(tuple(_NUMBERS))
    facts = book.stating(attribute)
    if len(facts) < 2:
        return None
    one, other = rng.sample(facts, 2)
    if one.value == other.value:
        return None
    more = max(one, other, key=lambda fact: int(fact.value))
    question = _NUMBERS[attribute].format(a=one.entity, b=other.entity)
    return Turn(question, f"{one.sentence} {other.sentence} So {more.entity}.", (one, other))


# --- of adapters: what the context must be read for -----------------------------------------------------------------


def _reverse(rng: random.Random, book: Casebook) -> Turn | None:
    attribute = rng.choice(tuple(_REVERSED))
    facts = book.stating(attribute)
    values = [fact.value for fact in facts]
    fact = _draw(rng, [fact for fact in facts if values.count(fact.value) == 1])
    return Turn(_REVERSED[attribute].replace("{v}", fact.value), fact.sentence, (fact,)) if fact else None


def _hop(rng: random.Random, book: Casebook) -> Turn | None:
    pair = _superior(rng, book, "home")
    return Turn(f"Where does {_whose(pair[0])} live?", pair[1].sentence) if pair else None


def _liaison(rng: random.Random, book: Casebook) -> Turn | None:
    attribute = attribute_of(rng.choice(_ASKED_OF_SUPERIORS))
    pair = _superior(rng, book, attribute.name)
    if pair is None:
        return None
    return Turn(rng.choice(attribute.questions).replace("{e}", _whose(pair[0])), pair[1].sentence)


def _superior(rng: random.Random, book: Casebook, attribute: str) -> tuple[Fact, Fact] | None:
    """Who is whose manager or keeper, and what ``attribute`` that one has."""
    known = {fact.entity: fact for fact in book.stating(attribute)}
    fact = _draw(rng, [fact for name in ("manager", "keeper") for fact in book.stating(name) if fact.value in known])
    return (fact, known[fact.value]) if fact else None


def _whose(fact: Fact) -> str:
    return f"the manager of {fact.entity}" if fact.attribute == "manager" else f"the keeper of the {fact.entity}"


def _sourcer(rng: random.Random, book: Casebook) -> Turn | None:
    pages = _pages(book)
    by_page: dict[str, list[Fact]] = {}
    for entity, fact in {fact.entity: fact for fact in book.facts}.items():
        by_page.setdefault(pages.get(entity, "sentences"), []).append(fact)
    if not by_page:
        return None
    page = rng.choice(sorted(by_page))
    fact = rng.choice(by_page[page])
    return Turn(f"On which page is {_named(fact)}?", f"{fact.entity}: {page}.")


def _pages(book: Casebook) -> dict[str, str]:
    """By entity: a line of a table, a register or notes names its own first; whoever begins none stands among sentences."""
    pages: dict[str, str] = {}
    for line in book.text.splitlines():
        start, *words = line.replace(":", "").split(maxsplit=3)
        if start in _PAGES:
            for word in words[:2]:
                pages.setdefault(word, _PAGES[start])
    return pages


def _counter(rng: random.Random, book: Casebook) -> Turn | None:
    homes = [fact.value for fact in book.stating("home")]
    by_count: dict[int, list[str]] = {}
    for city in sorted(set(homes)):
        by_count.setdefault(homes.count(city), []).append(city)
    by_count[0] = [city for city in CITIES if city not in homes]
    counts = [count for count in by_count if count < len(COUNTS)]
    count = rng.choice(counts)
    return Turn(f"How many people live in {rng.choice(by_count[count])}?", f"{count}.")


BASE_ROLES: dict[str, Asker] = {"lookup": _lookup, "asked_for_json": _asked_for_json, "record": _record, "repeat": _repeat}
ADAPTER_ROLES: dict[str, Asker] = {
    "formatter": _formatter,
    "mapper": _mapper,
    "extractor": _extractor,
    "comparer": _comparer,
    "clerk": _clerk,
    "verifier": _verifier,
    "reverse": _reverse,
    "hop": _hop,
    "liaison": _liaison,
    "sourcer": _sourcer,
    "counter": _counter,
}
ROLES: dict[str, Asker] = BASE_ROLES | ADAPTER_ROLES


def ask(role: str, rng: random.Random, book: Casebook, count: int, told: set[Fact] | None = None) -> list[Turn]:
    """At most ``count`` different turns of ``role``; fewer, or none, where the casebook holds too little.

    No answer tells a fact that is in ``told`` or that another one tells: later answers could be copied from earlier ones.
    Raises KeyError.
    """
    asker, turns, told = ROLES[role], {}, set() if told is None else told
    for _ in range(3 * count):
        turn = asker(rng, book)
        if turn is not None and turn.question not in turns and told.isdisjoint(turn.about):
            turns[turn.question] = turn
            told.update(turn.about)
        if len(turns) == count:
            break
    return list(turns.values())
