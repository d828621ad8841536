"""Decode state: what an engine knows of a request while it lives.

A request waits until its shared context is here (``ContextNeeds``), then opens a lease and runs as a ``Turn``. What is
missing of the context runs before, as ``ContextPass``es that concurrent requests share.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeAlias

import numpy as np

from forkkv_cluster.cache.leases import ContextLease, ContextMatch, SequenceLease
from forkkv_cluster.cache.tree_nodes import ResidualKey
from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.prefix import PrefixKey, TokenArray
from forkkv_cluster.core.request import ContextRequest, GenerateRequest, PrefixUsage, Priority
from forkkv_cluster.engine.adapter_tiers import LoadedAdapter

BACKGROUND = max(Priority) + 1
"""The first part of the order of an engine's own work, which goes after every priority."""


class PassKind(enum.Enum):
    """Whose forward pass writes shared context; the table in ``engine.batch`` says what each reads and writes."""

    BASE = "base"
    OWN_RESIDUAL = "own_residual"
    FIRST_WRITER = "first_writer"


@dataclass(frozen=True, slots=True)
class ResidualTarget:
    """One adapter's residual as pages are keyed, and the adapter that projects it."""

    key: ResidualKey
    adapter: LoadedAdapter


@dataclass(frozen=True, slots=True, eq=False)
class ContextNeeds:
    """What a request wants to find of tokens[:context_len] before it can run.

    required  residuals that must be there; optional: projected in the same pass of the base model when one runs anyway
    own       the adapter whose own pass writes its residual (sharing ``residual``), else None
    writer    the adapter that writes base KV (writer ``first``), else None: the base model
    """

    key: PrefixKey
    tokens: TokenArray
    context_len: int
    required: tuple[ResidualTarget, ...] = ()
    optional: tuple[ResidualTarget, ...] = ()
    own: LoadedAdapter | None = None
    writer: ResidualTarget | None = None
    writer_adapter: LoadedAdapter | None = None


@dataclass(slots=True, eq=False)
class Place:
    """What a request holds and has been through on its way to run.

    claim           adapters whose slots are held for it: while it waits, until their weights are here; of a turn, its
                    own adapter's while it runs
    flight          the pass of somebody else that it waits for, if any
    num_overtaken   later requests that took a slot while this one waited for one
    emptied         the adapter whose slot is run empty for it, once it has been overtaken too often
    """

    claim: tuple[LoadedAdapter, ...] = ()
    flight: tuple[object, ...] | None = None
    num_overtaken: int = 0
    emptied: LoadedAdapter | None = None

    @property
    def is_ready(self) -> bool:
        """Whether all weights that it waits for are on the device."""
        return all(adapter.device_slot is not None for adapter in self.claim)


@dataclass(slots=True, eq=False)
class ContextPass:
    """A pass over shared context under way. Tokens [lease.run_start, lease.num_tokens) run.

    owner is the request that came first to need it; ``is_charged`` says that its usage counts the pass, which otherwise
    is a request of its own that only the engine's counters count. claim: the adapters whose slots it holds, those that
    it runs with and whose residuals it writes. order: that of the first of those who wait for it.
    """

    kind: PassKind
    flight: tuple[object, ...]
    lease: ContextLease
    adapter: LoadedAdapter | None
    targets: dict[ResidualKey, LoadedAdapter]
    owner: Waiting
    is_charged: bool
    interested: set[RequestId]
    num_computed: int
    order: tuple[int, int]
    claim: tuple[LoadedAdapter, ...] = ()

    @property
    def tenant(self) -> str:
        return self.owner.tenant

    @property
    def is_cold(self) -> bool:
        """Whether nobody will want what it writes: sample contexts."""
        return is_background(self) and self.owner.is_cold

    @property
    def num_tokens(self) -> int:
        return self.lease.num_tokens

    def join(self, entry: Waiting) -> None:
        """One more waits for it."""
        self.interested.add(entry.request_id)
        self.order = min(self.order, entry.order)

    @property
    def active_slot(self) -> int | None:
        return self.adapter.slot if self.adapter is not None else None


@dataclass(slots=True, eq=False)
class Turn:
    """A ``GenerateRequest`` in an engine.

    tokens [num_prompt + max_tokens] int32: append-only; the first ``num_tokens`` are known, the KV of the first
    ``num_computed`` is written. ``next_scored`` is the position of the next prompt token whose log probability is
    wanted, None when no more are.
    """

    request: GenerateRequest
    order: tuple[int, int]
    adapter: LoadedAdapter | None
    residual: ResidualKey | None
    held: tuple[LoadedAdapter, ...]
    needs: ContextNeeds | None
    tokens: TokenArray
    num_tokens: int
    num_computed: int = 0
    lease: SequenceLease | None = None
    usage: PrefixUsage = field(default_factory=PrefixUsage)
    is_usage_known: bool = False
    is_usage_sent: bool = False
    num_passes: int = 0
    next_scored: int | None = None
    place: Place = field(default_factory=Place)

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def tenant(self) -> str:
        """Who pays for its tokens."""
        return self.request.tenant or self.request.namespace

    @property
    def num_generated(self) -> int:
        """Generated tokens, those of an earlier worker included: what max_tokens counts."""
        return self.num_tokens - self.request.num_prompt_tokens

    @property
    def fork_point(self) -> int:
        """Tokens before the adapter's own: shared context, and all before an aLoRA's invocation; 0 where nothing is shared."""
        if self.request.invocation_start is not None:
            return self.request.invocation_start
        return self.needs.context_len if self.needs is not None else 0

    @property
    def active_slot(self) -> int | None:
        return self.adapter.slot if self.adapter is not None else None

    @property
    def lora_start(self) -> int:
        """Tokens before it, if this turn runs them, run without the adapter: where an aLoRA is invoked, else 0."""
        return self.request.invocation_start or 0

    @property
    def is_cold(self) -> bool:
        """Whether nobody will want what it leaves in the cache."""
        return is_background(self) and not self.request.is_private

    @property
    def num_left(self) -> int:
        """Tokens to generate yet, at most."""
        return self.request.sampling.max_tokens - self.num_generated

    @property
    def claim(self) -> tuple[LoadedAdapter, ...]:
        """Adapters whose slots it holds."""
        return self.place.claim

    @property
    def num_uncomputed(self) -> int:
        """Tokens that have no KV yet; 1 while decoding."""
        return self.num_tokens - self.num_computed

    def open(self, lease: SequenceLease) -> None:
        """The turn has its pages: it runs from where the cache ends."""
        self.lease = lease
        self.num_computed = lease.num_computed
        found = min(lease.num_computed, self.request.num_prompt_tokens)
        note_match(self, ContextMatch(found, found))

    @property
    def max_cached(self) -> int | None:
        """Tokens whose KV may come from the cache at most: the row before a token that is scored has to run."""
        return self.next_scored - 1 if self.next_scored is not None else None

    def append(self, token_id: int) -> None:
        self.tokens[self.num_tokens] = token_id
        self.num_tokens += 1


@dataclass(slots=True, eq=False)
class Demand:
    """A ``ContextRequest`` in an engine: done as soon as nothing is missing."""

    request: ContextRequest
    order: tuple[int, int]
    held: tuple[LoadedAdapter, ...]
    needs: ContextNeeds
    usage: PrefixUsage = field(default_factory=PrefixUsage)
    is_usage_known: bool = False
    num_passes: int = 0
    place: Place = field(default_factory=Place)
    is_cold: ClassVar[bool] = False

    @property
    def request_id(self) -> RequestId:
        return self.request.request_id

    @property
    def tenant(self) -> str:
        """Who pays for its tokens."""
        return self.request.tenant or self.request.namespace


Waiting: TypeAlias = Turn | Demand
Runnable: TypeAlias = Turn | ContextPass


def is_background(item: Waiting | Runnable) -> bool:
    """Whether it is the engine's own work, for which no client waits."""
    return item.order[0] == BACKGROUND


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens [start, end) of one runnable in this step."""

    item: Runnable
    start: int
    end: int

    @property
    def num_rows(self) -> int:
        return self.end - self.start

    @property
    def lora_start(self) -> int:
        """First of the tokens that runs with the item's adapter; ``end`` where none does."""
        if self.item.active_slot is None:
            return self.end
        first = self.item.lora_start if isinstance(self.item, Turn) else 0
        return min(max(first, self.start), self.end)

    @property
    def scored(self) -> range:
        """Positions of the prompt tokens whose log probabilities this step's rows give: each by the row before it."""
        if not isinstance(self.item, Turn) or self.item.next_scored is None:
            return range(0)
        return range(max(self.start + 1, self.item.next_scored), min(self.end + 1, self.item.request.num_prompt_tokens))


def note_match(entry: Waiting, match: ContextMatch) -> None:
    """Record what the cache had when the request came to run: its own pass over the context, or its own tokens."""
    if entry.is_usage_known:
        return
    entry.is_usage_known = True
    useful = min(match.base_len, match.residual_len)
    entry.usage = replace(
        entry.usage, base_hit_tokens=match.base_len, residual_hit_tokens=match.residual_len, useful_hit_tokens=useful
    )


def token_buffer(request: GenerateRequest) -> TokenArray:
    """The turn's own append-only buffer: prompt, resumed tokens, room for the rest of max_tokens."""
    capacity = request.num_prompt_tokens + request.sampling.max_tokens
    buffer = np.zeros(max(capacity, request.num_tokens), dtype=np.int32)
    buffer[: request.num_tokens] = request.tokens
    return buffer
