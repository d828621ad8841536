"""What the client hands out: plain values, with the vocabulary of ``core``."""

from __future__ import annotations

from dataclasses import dataclass, field

from forkkv_cluster.core.errors import NotFound
from forkkv_cluster.core.request import AdapterInfo, FinishReason, ModelInfo, PrefixUsage, Sharing, TokenLogprob
from forkkv_cluster.core.status import ClusterStatus


@dataclass(frozen=True, slots=True)
class Started:
    """First event of a stream: the request's id, the length of its prompt, the seed and the limit in use."""

    request_id: str
    num_prompt_tokens: int
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log probabilities of the prompt's tokens at ``first_position``, first_position + 1, ...; before the first delta."""

    first_position: int
    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """Tokens in order. ``text`` may lag behind them: it is only what has become certain."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    worker_id: str = ""


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of a stream that ended well. ``finish_reason`` is None for a turn replayed from the store; times are the
    server's, seconds from arrival. ``is_adapter_inactive``: the adapter is an aLoRA that the prompt does not invoke, so that
    the base model answered. ``sharing``: how it was served, which under ``auto`` is the server's choice.
    ``mismatched_training``: the sharing that the adapter was trained for, where it was served under another one, which its
    training does not vouch for; None everywhere else."""

    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_generated_tokens: int
    usage: PrefixUsage
    worker_ids: tuple[str, ...]
    num_resumes: int
    ttft_s: float
    e2e_s: float
    is_adapter_inactive: bool = False
    sharing: Sharing | None = None
    mismatched_training: Sharing | None = None


Event = Started | PromptLogprobs | Delta | Finished


@dataclass(frozen=True, slots=True)
class Generation:
    """A whole answer.

    ``prompt_logprobs``, where they were asked for, has an entry for each token of the prompt: None for the first, and for
    shared context that the request did not run and the token after it.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    started: Started
    finished: Finished
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.finished.finish_reason

    @property
    def usage(self) -> PrefixUsage:
        return self.finished.usage

    @property
    def is_adapter_inactive(self) -> bool:
        return self.finished.is_adapter_inactive

    @property
    def mismatched_training(self) -> Sharing | None:
        return self.finished.mismatched_training


@dataclass(frozen=True, slots=True)
class BranchInfo:
    """A branch as the server has it. ``adapter`` None is the base model; ``own_token_ids`` only when asked for."""

    name: str
    adapter: str | None
    sharing: Sharing
    num_context_tokens: int
    num_own_tokens: int
    num_turns: int
    own_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session as the server has it; ``context_token_ids`` only when asked for."""

    session_id: str
    tenant: str
    sharing_group: str
    sharing: Sharing
    writer: str
    created_s: float
    num_context_tokens: int
    adapters: tuple[str, ...]
    branches: tuple[BranchInfo, ...] = ()
    context_token_ids: tuple[int, ...] | None = None
    keep_s: float = 0.0

    def branch(self, name: str) -> BranchInfo:
        """Raises NotFound."""
        for branch in self.branches:
            if branch.name == name:
                return branch
        known = ", ".join(branch.name for branch in self.branches) or "none"
        raise NotFound("branch", name, f"Session {self.session_id} had: {known}. Refresh the session, or fork it first.")


@dataclass(frozen=True, slots=True)
class JoinResult:
    """Tokens that the join appended, and the length of the shared context now."""

    num_joined_tokens: int
    num_context_tokens: int


@dataclass(frozen=True, slots=True)
class Status:
    """The cluster, and the model that it serves."""

    cluster: ClusterStatus
    model: ModelInfo


@dataclass(slots=True)
class GenerationBuilder:
    """Collects a stream's events into a ``Generation``."""

    deltas: list[Delta] = field(default_factory=list)
    prompt: list[PromptLogprobs] = field(default_factory=list)
    started: Started | None = None
    finished: Finished | None = None

    def add(self, event: Event) -> None:
        if isinstance(event, Started):
            self.started = event
        elif isinstance(event, Delta):
            self.deltas.append(event)
        elif isinstance(event, PromptLogprobs):
            self.prompt.append(event)
        else:
            self.finished = event

    def build(self) -> Generation:
        """Raises ValueError before the stream's last event."""
        if self.started is None or self.finished is None:
            raise ValueError("the stream has not ended")
        return Generation(
            text="".join(delta.text for delta in self.deltas),
            token_ids=tuple(token for delta in self.deltas for token in delta.token_ids),
            logprobs=tuple(logprob for delta in self.deltas for logprob in delta.logprobs),
            started=self.started,
            finished=self.finished,
            prompt_logprobs=self._prompt_logprobs(),
        )

    def _prompt_logprobs(self) -> tuple[TokenLogprob | None, ...]:
        if not self.prompt:
            return ()
        return (*[None] * self.prompt[0].first_position, *(entry for part in self.prompt for entry in part.tokens))


__all__ = [
    "AdapterInfo",
    "BranchInfo",
    "Delta",
    "Event",
    "Finished",
    "Generation",
    "GenerationBuilder",
    "JoinResult",
    "PromptLogprobs",
    "SessionInfo",
    "Started",
    "Status",
]
