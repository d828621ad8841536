"""Shared contexts and branches of the offline API: handles over ``core.session``, whose rules they follow."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.ids import new_id
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import AdapterRef, SamplingParams, Sharing, WriterMode
from forkkv_cluster.core.session import Branch as BranchState
from forkkv_cluster.core.session import BranchSpec, JoinWhat, Session

if TYPE_CHECKING:
    from forkkv_cluster.engine.llm import LLM, Completion, Prompt


LOCAL_TENANT = "local"


def new_session(context: TokenArray, adapters: tuple[AdapterRef, ...], sharing: Sharing | str) -> Session:
    """A session over ``context`` [n] int32. Raises InvalidArgument or Unsupported for ``sharing``."""
    return Session(
        session_id=new_id("session"),
        tenant=LOCAL_TENANT,
        context=context,
        adapters=adapters,
        sharing=parse_sharing(sharing),
        writer=WriterMode.CANONICAL,
        created_s=time.time(),
    )


def parse_sharing(value: Sharing | str) -> Sharing:
    """A policy by name. Raises InvalidArgument for an unknown one."""
    try:
        return Sharing(value)
    except ValueError:
        raise InvalidArgument("sharing", value, "is not known", "Name isolated, residual, eager, base or auto.") from None


class Context:
    """A shared context. Its pages live in the cache as long as memory allows, and are written again when they are gone."""

    def __init__(self, llm: LLM, session: Session) -> None:
        self._llm = llm
        self.session = session

    @property
    def token_ids(self) -> TokenArray:
        """The context as branches forked from now on read it, [n] int32."""
        return self.session.context

    def fork(self, name: str, adapter: str | None = None, sharing: Sharing | str | None = None) -> Branch:
        """A new branch at the end of the context; adapter None is the base model, sharing None the context's own.

        Raises InvalidArgument, Unsupported, NotFound (an adapter that the context does not declare) or AlreadyExists.
        """
        return self.fork_from(None, name, adapter, sharing)

    def fork_from(self, parent: str | None, name: str, adapter: str | None, sharing: Sharing | str | None) -> Branch:
        """As ``fork``, at the end of the branch ``parent``."""
        spec = BranchSpec(name, adapter, parse_sharing(sharing) if sharing is not None else None)
        self.session = self.session.fork((spec,), parent)
        return Branch(self._llm, self, name)

    def join(self, branch: Branch, what: JoinWhat | str = JoinWhat.ALL) -> int:
        """Append what the branch added since its fork (``output``: only what it generated); returns how many tokens.

        Branches that exist keep the context they forked from. Raises InvalidArgument for a branch of another context.
        """
        if branch.context is not self:
            raise InvalidArgument("branch", branch.name, "belongs to another context", "Join it there.")
        self.session, num_tokens = self.session.join(branch.name, JoinWhat(what))
        self._llm.run_context_pass(self.session)
        return num_tokens

    def finish_turn(self, branch: str, appended: TokenArray, generated: TokenArray) -> None:
        """A turn has ended well: the branch's history grows. appended [k] and generated [m] int32."""
        self.session = self.session.finish_turn(branch, appended, generated)


@dataclass(frozen=True, slots=True, eq=False)
class Branch:
    """One agent over a context. Its history grows by turns."""

    llm: LLM
    context: Context
    name: str

    @property
    def state(self) -> BranchState:
        """The branch as it is now. Raises NotFound when the context does not know it."""
        return self.context.session.branch(self.name)

    @property
    def token_ids(self) -> TokenArray:
        """Context and own tokens, [c + m] int32."""
        return self.state.tokens

    def generate(self, prompt: Prompt, sampling: SamplingParams | None = None, **options: Any) -> Completion:
        """One turn: append ``prompt``, generate. Raises as ``LLM.generate_turns``, which runs many branches at once."""
        return self.llm.generate_turns([(self, prompt)], sampling, **options)[0]

    def fork(self, name: str, adapter: str | None = None, sharing: Sharing | str | None = None) -> Branch:
        """A new branch at the end of this one. With the same adapter it shares this branch's pages; for another
        adapter this branch's own tokens become context."""
        return self.context.fork_from(self.name, name, adapter, sharing)
