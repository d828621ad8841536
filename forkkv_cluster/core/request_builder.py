"""Frozen requests from sessions and prompts: the one place where sharing, spans and page identity of semantics meet. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.ids import RequestId, WorkerId
from forkkv_cluster.core.invocation import last_invocation
from forkkv_cluster.core.prefix import BASE_WRITER, PrefixKey, TokenArray, prefix_key
from forkkv_cluster.core.request import (
    AdapterRef,
    ContextRequest,
    GenerateRequest,
    ModelInfo,
    Priority,
    SamplingParams,
    Sharing,
)
from forkkv_cluster.core.session import Branch, Session

NamespaceOf = Callable[[str, str], str]
"""(tenant, sharing group, which may be empty) -> the namespace of the pages: what two requests must have in common to share."""

Modes = Mapping[str, Sharing]
"""How ``auto`` is served now, by adapter name; an adapter that is not in it is served ``isolated``."""

NO_MODES: Modes = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Envelope:
    """What surrounds a request: its id, deadline (wall clock, unix seconds, None: none), admission order and tenant."""

    request_id: str
    tenant: str
    deadline_s: float | None = None
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True)
class PromptSharing:
    """How a request without a session shares: ``shared_prefix_tokens`` is its fork point, None for one that shares nothing."""

    sharing: Sharing | None = None
    shared_prefix_tokens: int | None = None
    sharing_group: str = ""


def served_sharing(sharing: Sharing, adapter: AdapterRef | None, modes: Modes) -> Sharing:
    """``sharing``, or what ``auto`` comes to: ``isolated`` for an adapter that ``modes`` does not know, never a guess. The base
    model reads shared pages as they are."""
    if sharing is not Sharing.AUTO:
        return sharing
    return modes.get(adapter.name, Sharing.ISOLATED) if adapter is not None else Sharing.BASE


def context_plan(session: Session, modes: Modes) -> tuple[Sharing, tuple[AdapterRef, ...]] | None:
    """How the base model's pass over a session's context runs: its sharing, and the adapters whose residuals it writes. None
    where no adapter of an ``auto`` session would read it."""
    if session.sharing is not Sharing.AUTO:
        return session.sharing, session.adapters
    eager = _eager_ones(session.adapters, modes)
    if eager:
        return Sharing.EAGER, eager
    served = {served_sharing(Sharing.AUTO, adapter, modes) for adapter in session.adapters}
    return None if served == {Sharing.ISOLATED} else (Sharing.BASE, ())


def _eager_ones(adapters: tuple[AdapterRef, ...], modes: Modes) -> tuple[AdapterRef, ...]:
    return tuple(a for a in adapters if served_sharing(Sharing.AUTO, a, modes) is Sharing.EAGER)


def served_choice(choice: PromptSharing, adapter: AdapterRef | None, modes: Modes, num_tokens: int) -> PromptSharing:
    """``choice`` of a prompt of ``num_tokens`` with ``auto`` resolved. Without a fork point ``auto`` has nothing to share.
    Raises InvalidArgument for a fork point outside the prompt."""
    if choice.sharing is not Sharing.AUTO:
        return choice
    sharing = served_sharing(Sharing.AUTO, adapter, modes)
    if choice.shared_prefix_tokens is not None:
        fork_point(replace(choice, sharing=Sharing.BASE), num_tokens)
    if choice.shared_prefix_tokens is None or sharing is Sharing.ISOLATED:
        return PromptSharing(Sharing.ISOLATED, None, choice.sharing_group)
    return replace(choice, sharing=sharing)


def fork_point(choice: PromptSharing, num_tokens: int) -> int:
    """Tokens of a prompt of ``num_tokens`` that are shared context. Raises InvalidArgument, or Unsupported for an ``auto`` that
    nobody has resolved (``served_choice``)."""
    sharing, shared = choice.sharing or Sharing.ISOLATED, choice.shared_prefix_tokens
    if sharing is Sharing.AUTO:
        raise Unsupported("sharing", str(sharing), "auto must be resolved first", "Name isolated, residual, eager or base.")
    if sharing is Sharing.ISOLATED:
        if shared:
            raise InvalidArgument(
                "shared_prefix_tokens",
                shared,
                "means nothing under isolated sharing",
                "Name sharing residual, eager or base, or leave it out.",
            )
        return 0
    if shared is None:
        raise InvalidArgument(
            "sharing",
            str(sharing),
            "needs shared_prefix_tokens in a stateless request",
            "Send how many leading tokens of the prompt are shared, or use a session.",
        )
    if not 0 <= shared < num_tokens:
        raise InvalidArgument(
            "shared_prefix_tokens",
            shared,
            f"is not in [0, {num_tokens}): the prompt has {num_tokens} tokens",
            "Leave at least one token after the fork point.",
        )
    return shared


def is_uninvoked(adapter: AdapterRef | None, prompt: TokenArray) -> bool:
    """Whether ``adapter`` is an aLoRA that ``prompt`` [n] int32 does not invoke: the base model answers then."""
    if adapter is None or not adapter.invocation_tokens:
        return False
    return last_invocation(prompt, adapter.invocation_tokens) is None


def _spans(
    prompt: TokenArray, adapter: AdapterRef | None, sharing: Sharing, context_len: int
) -> tuple[AdapterRef | None, int, int | None]:
    """The adapter that runs (None: the base model), how long the shared context is for it, and where it is invoked.

    An aLoRA runs from its last invocation on, even where that lies in the context; without one it does not run.
    """
    invocation_start = None
    if adapter is not None and adapter.invocation_tokens:
        invocation_start = last_invocation(prompt, adapter.invocation_tokens)
        if invocation_start is None:
            return None, context_len, None
        context_len = min(context_len, invocation_start)
    # Isolated shares no context and has one span, run by the adapter; the base model's own pages are canonical anyway.
    return adapter, 0 if sharing is Sharing.ISOLATED and adapter is not None else context_len, invocation_start


class RequestBuilder:
    """Knows the model, the block size and how tenants are kept apart; keeps no state."""

    def __init__(self, model: ModelInfo, *, block_size: int, namespace_of: NamespaceOf) -> None:
        self.model = model
        self._block_size = block_size
        self._namespace_of = namespace_of

    def turn(
        self,
        session: Session,
        branch: Branch,
        appended: TokenArray,
        sampling: SamplingParams,
        envelope: Envelope,
        modes: Modes = NO_MODES,
    ) -> GenerateRequest:
        """One turn of a branch: context, own tokens, and what it appends, [c + m + k] int32; ``auto`` as ``modes`` say."""
        request = self._generate(
            np.concatenate([branch.context, branch.own, appended]).astype(np.int32),
            context_len=len(branch.context),
            adapter=branch.adapter,
            declared=_eager_ones(session.adapters, modes) if session.sharing is Sharing.AUTO else session.adapters,
            sharing=served_sharing(branch.sharing, branch.adapter, modes),
            writer=session.writer_for(branch),
            group=session.sharing_group,
            sampling=sampling,
            envelope=envelope,
        )
        return replace(request, session_id=session.session_id, branch=branch.name)

    def prompt(
        self,
        tokens: TokenArray,
        adapter: AdapterRef | None,
        choice: PromptSharing,
        sampling: SamplingParams,
        envelope: Envelope,
    ) -> GenerateRequest:
        """A request of its own, [n] int32: isolated, unless it names its fork point. Raises as ``fork_point`` does."""
        return self._generate(
            tokens,
            context_len=fork_point(choice, len(tokens)),
            adapter=adapter,
            declared=(adapter,) if adapter is not None else (),
            sharing=choice.sharing or Sharing.ISOLATED,
            writer=None,
            group=choice.sharing_group,
            sampling=sampling,
            envelope=envelope,
        )

    def resumed(
        self, request: GenerateRequest, generated: Sequence[int], num_resumes: int, lost_workers: Sequence[str] = ()
    ) -> GenerateRequest:
        """``request`` after ``generated`` tokens came from a worker that is gone: the third span grows, all else stays."""
        first = request.tokens[: request.num_prompt_tokens]
        tokens = np.concatenate([first, np.asarray(generated, dtype=np.int32)]).astype(np.int32)
        base_id = request.request_id.partition("~")[0]
        return replace(
            request,
            request_id=RequestId(f"{base_id}~{num_resumes}"),
            tokens=tokens,
            num_resumed=len(generated),
            prefix=self._prefix(
                tokens, request.fork_point, request.namespace, request.adapter, request.sharing, request.writer
            ),
            excluded_workers=tuple(dict.fromkeys((*request.excluded_workers, *map(WorkerId, lost_workers)))),
        )

    def replayed(
        self, request: GenerateRequest, tokens: TokenArray, sharing: Sharing, sampling: SamplingParams, envelope: Envelope
    ) -> GenerateRequest:
        """The whole of ``tokens`` [n] int32, which begin with what ``request`` began with, as a prompt that is served under
        ``sharing``: in the request's namespace, for an adapter that is no aLoRA, in the background."""
        context_len = 0 if sharing is Sharing.ISOLATED else request.context_len
        writer = request.writer if sharing is Sharing.RESIDUAL else None
        return replace(
            request,
            request_id=RequestId(envelope.request_id),
            tokens=tokens,
            context_len=context_len,
            num_resumed=0,
            declared=(),
            sharing=sharing,
            writer=writer,
            sampling=sampling,
            prefix=self._prefix(tokens, context_len, request.namespace, request.adapter, sharing, writer),
            deadline_s=envelope.deadline_s,
            priority=envelope.priority,
            tenant=envelope.tenant,
            session_id="",
            branch="",
            is_background=True,
        )

    def context_pass(
        self,
        context: TokenArray,
        declared: tuple[AdapterRef, ...],
        sharing: Sharing,
        group: str,
        session_id: str,
        envelope: Envelope,
    ) -> ContextRequest:
        """The base model's pass over a shared context, [n] int32. ``Session.needs_context_pass`` says whether there is one."""
        namespace = self._namespace_of(envelope.tenant, group)
        return ContextRequest(
            request_id=RequestId(envelope.request_id),
            tokens=context,
            declared=declared,
            sharing=sharing,
            namespace=namespace,
            prefix=self._prefix(context, len(context), namespace, None, sharing, None),
            deadline_s=envelope.deadline_s,
            priority=envelope.priority,
            tenant=envelope.tenant,
            session_id=session_id,
        )

    def check_context(self, context: TokenArray) -> None:
        """A shared context holds at least one token and leaves room for one of a branch and one of output."""
        if len(context) == 0:
            raise InvalidArgument("context", "", "is empty", "Send text or token_ids with at least one token.")
        if len(context) > self.model.max_model_len - 2:
            raise InvalidArgument(
                "context",
                f"{len(context)} tokens",
                f"is too long: the model takes {self.model.max_model_len} tokens, context, turns and output together",
                "Shorten it.",
            )

    def max_tokens(self, asked: int | None, num_prompt_tokens: int, default: int) -> int:
        """Tokens to generate at most: what was asked, or the default cut to what fits. Raises InvalidArgument."""
        room = self.model.max_model_len - num_prompt_tokens
        if room < 1:
            raise InvalidArgument(
                "prompt",
                f"{num_prompt_tokens} tokens",
                f"is too long: the model takes {self.model.max_model_len} tokens, prompt and output together",
                "Shorten it.",
            )
        if asked is not None and asked > room:
            raise InvalidArgument(
                "max_tokens",
                asked,
                f"does not fit: the prompt has {num_prompt_tokens} tokens and the model takes {self.model.max_model_len}",
                f"Ask for at most {room}.",
            )
        return asked if asked is not None else min(default, room)

    def _generate(
        self,
        tokens: TokenArray,
        *,
        context_len: int,
        adapter: AdapterRef | None,
        declared: tuple[AdapterRef, ...],
        sharing: Sharing,
        writer: AdapterRef | None,
        group: str,
        sampling: SamplingParams,
        envelope: Envelope,
    ) -> GenerateRequest:
        namespace = self._namespace_of(envelope.tenant, group)
        active, context_len, invocation_start = _spans(tokens, adapter, sharing, context_len)
        fork_point = context_len if invocation_start is None else invocation_start
        if invocation_start is not None:
            writer = None  # Whoever writes the context of other adapters: before an invocation the base model does.
        return GenerateRequest(
            request_id=RequestId(envelope.request_id),
            tokens=tokens,
            context_len=context_len,
            num_resumed=0,
            adapter=active,
            declared=declared,
            sharing=sharing,
            writer=writer,
            namespace=namespace,
            sampling=sampling,
            prefix=self._prefix(tokens, fork_point, namespace, active, sharing, writer),
            deadline_s=envelope.deadline_s,
            priority=envelope.priority,
            tenant=envelope.tenant,
            invocation_start=invocation_start,
            is_adapter_inactive=active is not adapter,
        )

    def _prefix(
        self,
        tokens: TokenArray,
        fork_point: int,
        namespace: str,
        adapter: AdapterRef | None,
        sharing: Sharing,
        writer: AdapterRef | None,
    ) -> PrefixKey:
        # What an aLoRA writes after its invocation is the same under every sharing, as it reads no residual.
        is_invoked = adapter is not None and bool(adapter.invocation_tokens)
        return prefix_key(
            tokens,
            block_size=self._block_size,
            context_len=fork_point,
            model_digest=self.model.digest,
            namespace=namespace,
            adapter_digest=adapter.digest if adapter is not None else None,
            sharing=str(Sharing.BASE if is_invoked else sharing),
            writer=writer.digest if writer is not None else BASE_WRITER,
        )
