"""What the two wires (gRPC and OpenAI HTTP) ask of the gateway, as values, and the events that a turn answers with."""

from __future__ import annotations

from dataclasses import dataclass, field

from forkkv_cluster.core.request import (
    FinishReason,
    PrefixUsage,
    Priority,
    PromptLogprobs,
    SamplingParams,
    Sharing,
    TokenLogprob,
)


@dataclass(frozen=True, slots=True, eq=False)
class TextOrTokens:
    """Exactly one of both: text, to be tokenised here, or token ids [n] int32 (not yet checked against the vocabulary)."""

    text: str | None = None
    token_ids: object | None = None


@dataclass(frozen=True, slots=True)
class BranchTarget:
    """A turn on a session's branch."""

    session_id: str
    branch: str


@dataclass(frozen=True, slots=True)
class StatelessTarget:
    """A request of its own. ``shared_prefix_tokens`` is the fork point; None means that nothing is shared."""

    adapter: str | None = None
    sharing: Sharing | None = None
    shared_prefix_tokens: int | None = None
    sharing_group: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class SamplingChoice:
    """Sampling as the client said it. ``seed`` None: drawn by the gateway. ``max_tokens`` None: the server's default.

    ``params`` holds everything else; its own seed and max_tokens are not looked at.
    """

    params: SamplingParams = field(default_factory=SamplingParams)
    seed: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class GenerateCommand:
    """One Generate call. ``timeout_s`` None: no deadline. ``turn_id`` empty: a disconnect cancels."""

    target: BranchTarget | StatelessTarget
    input: TextOrTokens
    sampling: SamplingChoice = field(default_factory=SamplingChoice)
    timeout_s: float | None = None
    turn_id: str = ""
    num_received_tokens: int = 0
    priority: Priority = Priority.NORMAL


@dataclass(frozen=True, slots=True, eq=False)
class CreateSessionCommand:
    """``sharing`` None: the server's default."""

    context: TextOrTokens
    adapters: tuple[str, ...] = ()
    sharing: Sharing | None = None
    sharing_group: str = ""
    tenant: str = ""
    keep_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The first event of every turn."""

    request_id: str
    num_prompt_tokens: int
    seed: int
    max_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class TurnPromptLogprobs:
    """Log probabilities of consecutive tokens of the prompt. All parts come, in order, before the first delta."""

    part: PromptLogprobs


@dataclass(frozen=True, slots=True)
class TurnDelta:
    """Tokens in order. ``text`` may lag behind them: it is only what has become certain."""

    token_ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    worker_id: str = ""


@dataclass(frozen=True, slots=True)
class TurnFinished:
    """The last event of a turn that ended well; every other end is a ForkKVError.

    Times count from arrival, seconds. ``finish_reason`` is None for a turn that was replayed from the store.
    ``is_adapter_inactive``: the adapter is an aLoRA that the prompt does not invoke, so that the base model answered.
    ``sharing``: how it was served, never ``auto``; None for a replayed turn.
    ``mismatched_training``: the sharing that the adapter was trained for, where another one served it.
    """

    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_generated_tokens: int
    usage: PrefixUsage = field(default_factory=PrefixUsage)
    worker_ids: tuple[str, ...] = ()
    num_resumes: int = 0
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    is_adapter_inactive: bool = False
    sharing: Sharing | None = None
    mismatched_training: Sharing | None = None


TurnEvent = TurnStarted | TurnPromptLogprobs | TurnDelta | TurnFinished
