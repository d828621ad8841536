"""Random agents of a soak run: sessions over documents that share prefixes, forks in every sharing mode, turns and joins."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import count

import numpy as np

from forkkv_cluster.bench.soak_adapters import AdapterChurn
from forkkv_cluster.bench.soak_ledger import Ask, Flight
from forkkv_cluster.bench.soak_plan import SoakPlan
from forkkv_cluster.core.clock import Clock
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import (
    AdapterRef,
    ContextRequest,
    GenerateRequest,
    Priority,
    SamplingParams,
    Sharing,
    WriterMode,
)
from forkkv_cluster.core.request_builder import Envelope, PromptSharing, RequestBuilder
from forkkv_cluster.core.session import Branch, BranchSpec, JoinWhat, Session

SHARINGS = (Sharing.ISOLATED, Sharing.RESIDUAL, Sharing.EAGER, Sharing.BASE)
_SHARED = SHARINGS[1:]


class Agents:
    """What to ask next. Keeps sessions and branches as a gateway would; knows nothing of pages."""

    def __init__(
        self, plan: SoakPlan, builder: RequestBuilder, adapters: AdapterChurn, clock: Clock, rng: random.Random
    ) -> None:
        self._plan = plan
        self._builder = builder
        self._adapters = adapters
        self._clock = clock
        self._rng = rng
        self._ids = count()
        self._sessions: dict[str, Session] = {}
        self._busy: set[tuple[str, str]] = set()
        self._documents = [self._tokens(plan.max_context) for _ in range(plan.num_documents)]

    # --- sessions ---------------------------------------------------------------------------------------------------

    def open_session(self) -> Ask | None:
        """A session over the start of a document; its context pass where it has one."""
        if len(self._sessions) >= self._plan.max_sessions:
            self.close_session()
        refs = self._adapters.refs
        session = Session(
            session_id=f"s{next(self._ids)}",
            tenant=self._tenant(),
            context=self._document(),
            adapters=tuple(self._rng.sample(refs, self._rng.randint(1, len(refs)))),
            sharing=self._rng.choice(SHARINGS),
            writer=self._rng.choice((WriterMode.CANONICAL, WriterMode.CANONICAL, WriterMode.FIRST)),
            created_s=self._clock.wall(),
        )
        self._sessions[session.session_id] = session
        return self._context_pass(session)

    def close_session(self) -> None:
        """Its turns run on; what they bring is nobody's history any more."""
        if self._sessions:
            self.forget(self._rng.choice(list(self._sessions)))

    def forget(self, session_id: str) -> None:
        self._sessions.pop(session_id, None)

    def fork(self) -> None:
        """A branch of a session's context, or of another branch."""
        if not self._sessions:
            return
        session = self._rng.choice(list(self._sessions.values()))
        adapter = self._rng.choice([None, *(ref.name for ref in session.adapters)])
        sharing = self._rng.choice([None, None, *SHARINGS])
        idle = [name for name in session.branches if (session.session_id, name) not in self._busy]
        parent = self._rng.choice(idle) if idle and self._rng.random() < 0.25 else None
        if parent is not None and len(session.branch(parent).tokens) > self._plan.max_context:
            parent = None
        spec = BranchSpec(f"b{next(self._ids)}", adapter, sharing)
        self._sessions[session.session_id] = session.fork((spec,), parent)

    def join(self) -> Ask | None:
        """A branch's new tokens become context of the session, as far as it may grow."""
        found = self._idle_branch()
        if found is None or not found[1].own.size:
            return None
        session, branch = found
        joined, num_new = session.join(branch.name, self._rng.choice((JoinWhat.ALL, JoinWhat.OUTPUT)))
        if num_new == 0 or len(joined.context) > self._plan.max_context:
            return None
        self._sessions[session.session_id] = joined
        return self._context_pass(joined)

    # --- requests ---------------------------------------------------------------------------------------------------

    def turn(self) -> Ask | None:
        """The next turn of an idle branch."""
        found = self._idle_branch()
        if found is None:
            return None
        session, branch = found
        appended = self._input(branch.adapter)
        if len(branch.tokens) + len(appended) + self._plan.max_tokens > self._plan.max_branch:
            return None
        request = self._builder.turn(session, branch, appended, self._sampling(), self._envelope(session.tenant))
        key = (session.session_id, branch.name)
        self._busy.add(key)
        return Ask(request, key, appended)

    def prompt(self) -> Ask:
        """A request without a session, isolated or with its own fork point."""
        adapter = self._rng.choice([None, *self._adapters.refs])
        tokens = np.concatenate([self._document(), self._input(adapter)]).astype(np.int32)
        choice = PromptSharing()
        if self._rng.random() < 0.5:
            choice = PromptSharing(self._rng.choice(_SHARED), self._rng.randint(0, len(tokens) - 1), "team")
        return Ask(self._builder.prompt(tokens, adapter, choice, self._sampling(), self._envelope(self._tenant())))

    def sound_request(self) -> GenerateRequest:
        """One that any engine would take, to be spoiled."""
        request = self._builder.prompt(
            self._tokens(20), self._rng.choice(self._adapters.refs), PromptSharing(Sharing.EAGER, 12), SamplingParams(),
            Envelope(f"r{next(self._ids)}", self._tenant()),
        )  # fmt: skip
        return replace(request, sharing=self._rng.choice(_SHARED))

    def resumed(self, flight: Flight) -> Ask | None:
        """The rest of an interrupted turn, as another worker would be asked for it; None when there is none."""
        request = flight.request
        if isinstance(request, ContextRequest) or len(flight.generated) >= request.sampling.max_tokens:
            return None
        again = self._builder.resumed(request, flight.generated, next(self._ids))
        return Ask(again, flight.ask.branch, flight.ask.appended)

    # --- ends -------------------------------------------------------------------------------------------------------

    def finish(self, flight: Flight) -> None:
        """A turn that ended well becomes history; any other leaves the branch as it was."""
        self.release(flight.ask)
        ask, branch = flight.ask, flight.ask.branch
        if flight.error is not None or branch is None or ask.appended is None:
            return
        session = self._sessions.get(branch[0])
        if session is not None:
            generated = np.asarray(flight.generated, dtype=np.int32)
            self._sessions[branch[0]] = session.finish_turn(branch[1], ask.appended, generated)

    def release(self, ask: Ask) -> None:
        if ask.branch is not None:
            self._busy.discard(ask.branch)

    def check_idle(self) -> int:
        """Branches that still wait for a turn; 0 when nothing is under way."""
        return len(self._busy)

    # --- random parts -----------------------------------------------------------------------------------------------

    def _context_pass(self, session: Session) -> Ask | None:
        if not session.needs_context_pass:
            return None
        envelope = self._envelope(session.tenant)
        return Ask(
            self._builder.context_pass(
                session.context, session.adapters, session.sharing, session.sharing_group, session.session_id, envelope
            )
        )

    def _idle_branch(self) -> tuple[Session, Branch] | None:
        idle = [
            (session, branch)
            for session in self._sessions.values()
            for branch in session.branches.values()
            if (session.session_id, branch.name) not in self._busy
        ]
        return self._rng.choice(idle) if idle else None

    def _input(self, adapter: AdapterRef | None) -> TokenArray:
        """What a request says. An aLoRA is invoked somewhere in it, now and then only by what came before, or not at all."""
        tokens = self._tokens(self._rng.randint(1, self._plan.max_append))
        if adapter is None or not adapter.invocation_tokens or self._rng.random() < 0.2:
            return tokens
        return np.insert(tokens, self._rng.randint(0, len(tokens)), adapter.invocation_tokens)

    def _tokens(self, num_tokens: int) -> TokenArray:
        limit = self._builder.model.vocab_size
        return np.asarray([self._rng.randrange(limit) for _ in range(num_tokens)], dtype=np.int32)

    def _document(self) -> TokenArray:
        """The first tokens of a document: sessions over the same one share pages up to the shorter's end."""
        return self._rng.choice(self._documents)[: self._rng.randint(1, self._plan.max_context * 3 // 4)]

    def _tenant(self) -> str:
        return f"t{self._rng.randrange(self._plan.num_tenants)}"

    def _envelope(self, tenant: str) -> Envelope:
        deadline_s = self._clock.wall() + self._rng.uniform(0.05, 3.0) if self._rng.random() < 0.15 else None
        return Envelope(f"r{next(self._ids)}", tenant, deadline_s, self._rng.choice(list(Priority)))

    def _sampling(self) -> SamplingParams:
        rng, limit = self._rng, self._builder.model.vocab_size
        most = self._plan.max_tokens
        max_tokens = rng.randint(1, most if rng.random() < 0.3 else most // 4)
        styles: list[Callable[[], SamplingParams]] = [
            *[lambda: SamplingParams(max_tokens=max_tokens)] * 6,
            lambda: SamplingParams(max_tokens=max_tokens, stop_token_ids=tuple(rng.sample(range(limit), min(limit, 40)))),
            lambda: SamplingParams(0.8, 40, 0.95, rng.randrange(2**31), max_tokens, logprobs=rng.choice((None, 0, 5))),
            lambda: SamplingParams(1.0, seed=rng.randrange(2**31), max_tokens=max_tokens, min_p=0.05, presence_penalty=0.5),
            lambda: SamplingParams(max_tokens=max_tokens, prompt_logprobs=rng.choice((0, 3))),
            lambda: SamplingParams(max_tokens=max_tokens, repetition_penalty=1.1, logit_bias=((rng.randrange(limit), 5.0),)),
        ]
        if self._plan.guides:
            styles.append(lambda: SamplingParams(max_tokens=max_tokens, guide=rng.choice(self._plan.guides)))
        return rng.choice(styles)()
