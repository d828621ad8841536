"""Page identity, attacked on purpose: one branch fills the cache, another says the same tokens with one thing changed.

The fake model's tokens depend on how every KV value was made, so that one page of the wrong origin changes the answer; the
usage says besides that nothing but the shared context was found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from tests.engine.harness import FakeEngine
from tests.engine.recurrence import expected_tokens

PAGE_SIZE = 4
TOKENS = [(7 * i + 3) % 97 for i in range(40)]
SHARINGS = ("isolated", "residual", "eager", "base")


@dataclass(frozen=True)
class Way:
    """How 40 tokens come to be: the first ``context_len`` shared, the rest the branch's own."""

    adapter: str | None = "a8"
    sharing: str = "eager"
    context_len: int = 18  # inside a page
    namespace: str = "tenant"
    writer: str | None = None
    tokens: tuple[int, ...] = tuple(TOKENS)

    @property
    def span(self) -> tuple[list[int], list[int]]:
        return list(self.tokens[: self.context_len]), list(self.tokens[self.context_len :])

    def expected(self) -> list[int]:
        context, own = self.span
        has_residual = self.adapter not in ("n0", None)
        return expected_tokens(
            context, own, self.adapter, self.sharing, 6, vocab_size=97, has_residual=has_residual, writer=self.writer
        )


def answer(fake: FakeEngine, way: Way) -> tuple[list[int], int]:
    """The output, and how many prompt tokens ran through no layer for it."""
    context, own = way.span
    request = fake.request(
        context, own, way.adapter, way.sharing, namespace=way.namespace, writer=way.writer, declared=["a8", "b8", "c16"]
    )
    request_id = fake.add(request)
    fake.drain()
    usage = fake.last[request_id].usage
    assert usage is not None
    return fake.outputs[request_id], usage.useful_hit_tokens


def changed(token: int) -> tuple[int, ...]:
    tokens = list(TOKENS)
    tokens[token] = (tokens[token] + 1) % 97
    return tuple(tokens)


FIRST = Way()
WHOLE = len(TOKENS) // PAGE_SIZE * PAGE_SIZE

ATTACKS: Mapping[str, tuple[Way, Way, int]] = {
    # the way that fills the cache, the way that comes after it, and the most that the second may find
    "other-adapter": (FIRST, replace(FIRST, adapter="b8"), 18),
    "other-rank": (FIRST, replace(FIRST, adapter="c16"), 18),
    "no-lora-on-k-and-v": (FIRST, replace(FIRST, adapter="n0"), 18),
    "the-base-model": (FIRST, replace(FIRST, adapter=None), 18),
    "after-the-base-model": (replace(FIRST, adapter=None), FIRST, 18),
    **{
        f"{one}-then-{other}": (replace(FIRST, sharing=one), replace(FIRST, sharing=other), 18)
        for one in SHARINGS
        for other in SHARINGS
        if one != other
    },
    "fork-earlier-in-the-page": (FIRST, replace(FIRST, context_len=17), 17),
    "fork-later-in-the-page": (FIRST, replace(FIRST, context_len=19), 19),
    "fork-a-page-earlier": (FIRST, replace(FIRST, context_len=14), 14),
    "fork-a-page-later": (FIRST, replace(FIRST, context_len=22), 22),
    "fork-at-the-first-token": (FIRST, replace(FIRST, context_len=0), 0),
    "other-tenant": (FIRST, replace(FIRST, namespace="other"), 18),
    "other-history-in-the-context": (FIRST, replace(FIRST, tokens=changed(2)), 18),
    "other-history-in-the-tail-of-the-context": (FIRST, replace(FIRST, tokens=changed(17)), 18),
    "other-history-in-its-own-tokens": (FIRST, replace(FIRST, tokens=changed(19)), 19),
    "isolated-other-adapter": (replace(FIRST, sharing="isolated"), replace(FIRST, sharing="isolated", adapter="b8"), 0),
    "isolated-other-tenant": (replace(FIRST, sharing="isolated"), replace(FIRST, sharing="isolated", namespace="other"), 0),
    "first-writer-then-canonical": (
        replace(FIRST, sharing="residual", writer="a8"),
        replace(FIRST, sharing="residual"),
        18,
    ),
    "canonical-then-first-writer": (
        replace(FIRST, sharing="residual"),
        replace(FIRST, sharing="residual", writer="a8"),
        18,
    ),
    "other-first-writer": (
        replace(FIRST, sharing="residual", writer="a8"),
        replace(FIRST, sharing="residual", writer="b8"),
        18,
    ),
    "eager-then-first-writer": (FIRST, replace(FIRST, sharing="residual", writer="b8"), 18),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_same_tokens_made_another_way_are_never_served(attack: str) -> None:
    first, second, most = ATTACKS[attack]
    fake = FakeEngine(page_size=PAGE_SIZE, num_slabs=400)
    assert answer(fake, first)[0] == first.expected()
    output, found = answer(fake, second)
    assert output == second.expected()
    assert found <= most, "own tokens of another branch were found"


@pytest.mark.parametrize("attack", ATTACKS)
def test_two_ways_at_once_do_not_mix(attack: str) -> None:
    ways = ATTACKS[attack][:2]
    fake = FakeEngine(page_size=PAGE_SIZE, num_slabs=400, max_num_batched_tokens=9)
    ids = [
        fake.add(fake.request(*w.span, w.adapter, w.sharing, namespace=w.namespace, writer=w.writer)) for w in (*ways, *ways)
    ]
    fake.drain()
    assert [fake.outputs[i] for i in ids] == [w.expected() for w in (*ways, *ways)]


def test_the_attacks_would_show() -> None:
    """Of two ways that only differ in origin, the answers differ: serving one's pages to the other cannot go unseen."""
    hidden = {"other-tenant", "isolated-other-tenant"}  # the same tokens made the same way: only the usage tells
    for name, (first, second, _) in ATTACKS.items():
        assert (first.expected() == second.expected()) == (name in hidden), name


def test_the_same_way_finds_all_that_can_be_found() -> None:
    for way in (FIRST, replace(FIRST, sharing="isolated"), replace(FIRST, sharing="residual", writer="b8")):
        fake = FakeEngine(page_size=PAGE_SIZE, num_slabs=400)
        first, _ = answer(fake, way)
        again, found = answer(fake, way)
        assert again == first
        assert found >= WHOLE - PAGE_SIZE


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_name_loaded_again_with_other_content_finds_nothing_of_the_old(sharing: str) -> None:
    fake, way = FakeEngine(page_size=PAGE_SIZE, num_slabs=400), replace(FIRST, sharing=sharing)
    answer(fake, way)
    fake.engine.unload_adapter("a8")
    info = fake.engine.load_adapter("a8", "fake:a8-retrained:8")
    fake.adapters["a8"] = replace(fake.adapters["a8"], digest=info.digest)
    context, own = way.span
    output, found = answer(fake, way)
    assert output == expected_tokens(context, own, "a8-retrained", sharing, 6, vocab_size=97)
    assert found <= (0 if sharing == "isolated" else 18)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_the_old_content_under_another_name_is_the_same_adapter(sharing: str) -> None:
    fake, way = FakeEngine(page_size=PAGE_SIZE, num_slabs=400), replace(FIRST, sharing=sharing)
    first, _ = answer(fake, way)
    info = fake.engine.load_adapter("a8-again", "fake:a8:8")
    fake.engine.unload_adapter("a8")
    fake.adapters["a8"] = replace(fake.adapters["a8"], name="a8-again", digest=info.digest)
    again, found = answer(fake, way)
    assert again == first
    assert found >= WHOLE - PAGE_SIZE
