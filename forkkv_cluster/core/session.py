"""Sessions and branches: a shared context, and one agent's continuation of it. The durable truth; KV is only cache.

Pure values and the rules of ``semantics``: what Fork, a turn and Join do to tokens. Storage is the gateway's.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

import numpy as np

from forkkv_cluster.core.errors import Aborted, AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterRef, Sharing, WriterMode

MAX_KEEP_S = 86_400.0
"""A day: a session that nobody closes does not keep its context for ever."""

_NO_TOKENS: TokenArray = np.zeros(0, dtype=np.int32)


class JoinWhat(enum.StrEnum):
    """ALL: everything the branch added since its fork; OUTPUT: only what it generated."""

    ALL = "all"
    OUTPUT = "output"


@dataclass(frozen=True, slots=True)
class BranchSpec:
    """What to fork: a name that is unique in the session, the adapter's name (None: the base model) and its sharing."""

    name: str
    adapter: str | None = None
    sharing: Sharing | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished turn of a branch: [start, generated_start) was appended, [generated_start, end) generated.

    Positions count the branch's own tokens (0 is the first token after the fork point). ``turn_id`` is the client's, or
    empty: a retry of a stored turn is answered from the store. ``fingerprint`` tells what was asked, so that a retry which
    asks for something else is refused; it is empty where nobody can retry, and in turns that were stored without one.
    """

    start: int
    generated_start: int
    end: int
    turn_id: str = ""
    fingerprint: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One agent. ``context`` [c] int32 is what it forked from and never changes; ``own`` [m] int32 grows by turns."""

    name: str
    adapter: AdapterRef | None
    sharing: Sharing
    context: TokenArray
    own: TokenArray = field(default_factory=lambda: _NO_TOKENS)
    turns: tuple[Turn, ...] = ()
    joined_len: int = 0

    @property
    def tokens(self) -> TokenArray:
        """Context and own tokens, [c + m] int32."""
        return np.concatenate([self.context, self.own]).astype(np.int32)

    def after_turn(self, appended: TokenArray, generated: TokenArray, turn_id: str = "", fingerprint: str = "") -> Branch:
        """The branch once a turn has ended well. A cancelled or expired turn leaves it as it was."""
        start = len(self.own)
        own = np.concatenate([self.own, appended, generated]).astype(np.int32)
        turn = Turn(start, start + len(appended), len(own), turn_id, fingerprint)
        return replace(self, own=own, turns=(*self.turns, turn))

    def check_turn(self, appended: TokenArray) -> None:
        """A branch needs one own token: an empty first turn has nothing to run."""
        if len(self.own) + len(appended) == 0:
            raise InvalidArgument(
                "append",
                [],
                "is empty on a branch without tokens of its own",
                "Append at least one token in a branch's first turn.",
            )

    def unjoined(self, what: JoinWhat) -> TokenArray:
        """Own tokens that no join has taken yet, [k] int32."""
        if what is JoinWhat.ALL:
            return self.own[self.joined_len :]
        pieces = [self.own[max(t.generated_start, self.joined_len) : t.end] for t in self.turns if t.end > self.joined_len]
        return np.concatenate(pieces).astype(np.int32) if pieces else _NO_TOKENS


@dataclass(frozen=True, slots=True, eq=False)
class Session:
    """A shared context, its tenant and the adapters that may fork it. Immutable: each method returns the next state.

    ``keep_s``: seconds for which workers evict its context after all others, counted from each of its passes.
    """

    session_id: str
    tenant: str
    context: TokenArray
    adapters: tuple[AdapterRef, ...]
    sharing: Sharing
    writer: WriterMode
    created_s: float
    sharing_group: str = ""
    branches: dict[str, Branch] = field(default_factory=dict)
    first_writer: AdapterRef | None = None
    keep_s: float = 0.0

    def check_keep(self) -> None:
        """Raises InvalidArgument for a ``keep_s`` out of range, or one that has no shared context to keep."""
        if not 0.0 <= self.keep_s <= MAX_KEEP_S:
            raise InvalidArgument(
                "keep_s", self.keep_s, f"is not from 0 to {MAX_KEEP_S:.0f} seconds", "Send 0 to keep nothing longer."
            )
        if self.keep_s and not self.needs_context_pass:
            raise InvalidArgument(
                "keep_s", self.keep_s, "has no shared context to keep", "Leave it out, or name sharing eager, residual or base."
            )

    def branch(self, name: str) -> Branch:
        try:
            return self.branches[name]
        except KeyError:
            known = ", ".join(sorted(self.branches)) or "none"
            raise NotFound("branch", name, f"Session {self.session_id} has: {known}. Fork it first.") from None

    def adapter(self, name: str | None) -> AdapterRef | None:
        """The declared adapter of that name; a session serves only adapters that it declared."""
        if name is None:
            return None
        for adapter in self.adapters:
            if adapter.name == name:
                return adapter
        known = ", ".join(a.name for a in self.adapters) or "none"
        raise NotFound("adapter", name, f"Session {self.session_id} declares: {known}. Declare it at CreateSession.")

    def fork(self, specs: tuple[BranchSpec, ...], parent: str | None = None) -> Session:
        """All branches or none. ``parent`` names the branch to fork from; None forks the session's context."""
        if not specs:
            raise InvalidArgument("branches", [], "is empty", "Name at least one branch to fork.")
        branches = dict(self.branches)
        for spec in specs:
            if not spec.name:
                raise InvalidArgument("branches.name", spec.name, "is empty", "Give every branch a name.")
            if spec.name in branches:
                raise AlreadyExists("branch", spec.name, "Names are unique in a session: choose another.")
            branches[spec.name] = self._new_branch(spec, parent)
        forked = replace(self, branches=branches)
        if self.writer is WriterMode.FIRST and self.first_writer is None:
            forked_now = (branches[spec.name] for spec in specs)
            first = next((b.adapter for b in forked_now if _writes_context(b)), None)
            forked = replace(forked, first_writer=first)
        return forked

    @property
    def is_written_by_branches(self) -> bool:
        """Whether the first branch writes the shared context: then no pass of the base model runs before it."""
        return self.writer is WriterMode.FIRST and self.sharing is Sharing.RESIDUAL

    @property
    def needs_context_pass(self) -> bool:
        """Whether the base model runs the shared context by itself: not under isolated, nor where the first agent writes it."""
        return self.sharing is not Sharing.ISOLATED and not self.is_written_by_branches

    def writer_for(self, branch: Branch) -> AdapterRef | None:
        """The adapter that wrote the base KV that ``branch`` reads, None for the base model.

        Only ``residual`` knows another writer: what the other modes share is made from the base model's hidden states.
        """
        return self.first_writer if branch.sharing is Sharing.RESIDUAL else None

    def _new_branch(self, spec: BranchSpec, parent: str | None) -> Branch:
        adapter = self.adapter(spec.adapter)
        sharing = spec.sharing if spec.sharing is not None else self.sharing
        if parent is None:
            return Branch(spec.name, adapter, sharing, self.context)
        origin = self.branch(parent)
        if origin.adapter == adapter and (spec.sharing is None or sharing == origin.sharing):
            # Same adapter: the same pages, so the same history with the same fork point. Turn ids stay the parent's.
            # A join takes what was added since this fork; the parent's tokens are the parent's to join.
            turns = tuple(replace(t, turn_id="", fingerprint="") for t in origin.turns)
            return replace(origin, name=spec.name, joined_len=len(origin.own), turns=turns)
        # Another adapter: the parent's own tokens become context, run again as a join would run them.
        return Branch(spec.name, adapter, sharing, origin.tokens)

    def join(self, name: str, what: JoinWhat) -> tuple[Session, int]:
        """Append the branch's new own tokens to the shared context; also returns how many."""
        branch = self.branch(name)
        new = branch.unjoined(what)
        branches = dict(self.branches)
        branches[name] = replace(branch, joined_len=len(branch.own))
        context = np.concatenate([self.context, new]).astype(np.int32)
        return replace(self, context=context, branches=branches), len(new)

    def finish_turn(
        self, name: str, appended: TokenArray, generated: TokenArray, turn_id: str = "", fingerprint: str = ""
    ) -> Session:
        branches = dict(self.branches)
        branches[name] = self.branch(name).after_turn(appended, generated, turn_id, fingerprint)
        return replace(self, branches=branches)


def _writes_context(branch: Branch) -> bool:
    """Whether the branch's own pass writes shared context: an aLoRA leaves all before its invocation to the base model."""
    return branch.adapter is not None and not branch.adapter.invocation_tokens and branch.sharing is Sharing.RESIDUAL


class BusyBranches:
    """Which branches run a turn right now: one turn at a time each, and no join meanwhile."""

    def __init__(self) -> None:
        self._busy: set[tuple[str, str]] = set()

    def start_turn(self, session_id: str, branch: str) -> None:
        key = (session_id, branch)
        if key in self._busy:
            raise Aborted(f"branch {branch!r} of session {session_id} runs a turn already. Wait for it to end, or fork anew.")
        self._busy.add(key)

    def end_turn(self, session_id: str, branch: str) -> None:
        self._busy.discard((session_id, branch))

    def check_idle(self, session_id: str, branch: str) -> None:
        if (session_id, branch) in self._busy:
            raise FailedPrecondition(f"branch {branch!r} of session {session_id} runs a turn. Join it when the turn has ended.")

    def check_session_idle(self, session_id: str) -> None:
        busy = sorted(name for sid, name in self._busy if sid == session_id)
        if busy:
            raise FailedPrecondition(f"session {session_id} runs turns on: {', '.join(busy)}. Close it when they have ended.")
