"""Kinds of entity, their attributes, and every phrase that states one or asks for it.

In a phrase, ``{e}`` stands for the entity and ``{v}`` for the value. The first of ``statements`` is the canonical one: it is
how answers put the fact. The entity comes before the value in all of them: a causal model of two layers gathers the entity
where it reads the value.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ATTRIBUTES", "KINDS", "Attribute", "Kind", "attribute_of"]


@dataclass(frozen=True, slots=True)
class Attribute:
    """``pool`` names the lexicon's pool of values; ``clause`` continues a sentence about the entity."""

    name: str
    kind: str
    pool: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    clause: str
    is_number: bool = False

    @property
    def answer(self) -> str:
        return self.statements[0]


@dataclass(frozen=True, slots=True)
class Kind:
    """``subject`` is how a sentence names the entity, ``listed`` how a list does."""

    name: str
    pool: str
    heading: str
    subject: str
    attributes: tuple[Attribute, ...]


def _kind(name: str, heading: str, subject: str, *attributes: Attribute) -> Kind:
    return Kind(name, name, heading, subject, attributes)


KINDS: tuple[Kind, ...] = (
    _kind(
        "person",
        "People",
        "{e}",
        Attribute(
            "home",
            "person",
            "city",
            ("{e} lives in {v}.", "{e} has a house in {v}.", "{e} is at home in {v}.", "{e} came here from {v}."),
            ("Where does {e} live?", "What is the home of {e}?", "In which city does {e} live?"),
            "lives in {v}",
        ),
        Attribute(
            "job",
            "person",
            "job",
            ("{e} works as a {v}.", "{e} is a {v} by trade.", "{e} earns a living as a {v}.", "{e} was hired as a {v}."),
            ("What does {e} work as?", "What is the job of {e}?", "Which trade does {e} follow?"),
            "works as a {v}",
        ),
        Attribute(
            "age",
            "person",
            "number",
            ("{e} is {v} years old.", "{e} has turned {v} this year.", "{e} gave an age of {v}."),
            ("How old is {e}?", "What is the age of {e}?"),
            "is {v} years old",
            is_number=True,
        ),
        Attribute(
            "hobby",
            "person",
            "hobby",
            ("{e} enjoys {v}.", "{e} spends free days on {v}.", "{e} is fond of {v}."),
            ("What does {e} enjoy?", "What is the hobby of {e}?"),
            "enjoys {v}",
        ),
        Attribute(
            "manager",
            "person",
            "person",
            ("{e} reports to {v}.", "{e} takes orders from {v}.", "{e} has a manager called {v}."),
            ("Who does {e} report to?", "Who is the manager of {e}?"),
            "reports to {v}",
        ),
    ),
    _kind(
        "order",
        "Orders",
        "Order {e}",
        Attribute(
            "goods",
            "order",
            "goods",
            ("Order {e} is for {v}.", "Order {e} asks for {v}.", "Order {e} was placed for {v}."),
            ("What is order {e} for?", "Which goods are in order {e}?"),
            "is for {v}",
        ),
        Attribute(
            "quantity",
            "order",
            "number",
            ("Order {e} counts {v} pieces.", "Order {e} comes to {v} pieces.", "Order {e} holds {v} pieces."),
            ("How many pieces does order {e} count?", "What is the quantity of order {e}?"),
            "counts {v} pieces",
            is_number=True,
        ),
        Attribute(
            "destination",
            "order",
            "city",
            ("Order {e} goes to {v}.", "Order {e} is shipped to {v}.", "Order {e} is awaited in {v}."),
            ("Where does order {e} go?", "What is the destination of order {e}?"),
            "goes to {v}",
        ),
    ),
    _kind(
        "event",
        "Events",
        "The {e} fair",
        Attribute(
            "month",
            "event",
            "month",
            ("The {e} fair is held in {v}.", "The {e} fair is planned for {v}.", "The {e} fair opens in {v}."),
            ("When is the {e} fair held?", "What is the month of the {e} fair?"),
            "is held in {v}",
        ),
        Attribute(
            "guests",
            "event",
            "number",
            ("The {e} fair expects {v} guests.", "The {e} fair has room for {v} guests.", "The {e} fair invited {v} guests."),
            ("How many guests does the {e} fair expect?", "What is the number of guests at the {e} fair?"),
            "expects {v} guests",
            is_number=True,
        ),
        Attribute(
            "city",
            "event",
            "city",
            ("The {e} fair takes place in {v}.", "The {e} fair was moved to {v}.", "The {e} fair comes to {v}."),
            ("Where does the {e} fair take place?", "What is the city of the {e} fair?"),
            "takes place in {v}",
        ),
    ),
    _kind(
        "place",
        "Places",
        "The {e}",
        Attribute(
            "colour",
            "place",
            "colour",
            ("The {e} is painted {v}.", "The {e} has walls of {v}.", "The {e} is all in {v}."),
            ("How is the {e} painted?", "What is the colour of the {e}?"),
            "is painted {v}",
        ),
        Attribute(
            "keeper",
            "place",
            "person",
            ("The {e} is kept by {v}.", "The {e} is looked after by {v}.", "The {e} is in the care of {v}."),
            ("Who keeps the {e}?", "Who is the keeper of the {e}?"),
            "is kept by {v}",
        ),
        Attribute(
            "opening",
            "place",
            "month",
            ("The {e} opened in {v}.", "The {e} has been open since {v}.", "The {e} was finished in {v}."),
            ("When did the {e} open?", "What is the opening of the {e}?"),
            "opened in {v}",
        ),
    ),
)
ATTRIBUTES: tuple[Attribute, ...] = tuple(attribute for kind in KINDS for attribute in kind.attributes)
_BY_NAME = {attribute.name: attribute for attribute in ATTRIBUTES}


def attribute_of(name: str) -> Attribute:
    return _BY_NAME[name]
