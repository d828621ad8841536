"""What goes down to a worker (one frozen object) and what comes up (a stream of chunks)."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.ids import AdapterDigest, RequestId, WorkerId
from forkkv_cluster.core.prefix import BASE_WRITER, PrefixKey, TokenArray

if TYPE_CHECKING:
    from forkkv_cluster.core.verdict import SharingVerdict


class Sharing(enum.StrEnum):
    """How a branch uses shared KV. The table in the README says what each costs and when it is exact."""

    ISOLATED = "isolated"
    RESIDUAL = "residual"
    EAGER = "eager"
    BASE = "base"
    AUTO = "auto"


class WriterMode(enum.StrEnum):
    """Who writes the base KV of shared context: the base model, or (for comparison) the first adapter to arrive."""

    CANONICAL = "canonical"
    FIRST = "first"


class Priority(enum.IntEnum):
    """Admission order: a lower number goes first; equals go by arrival."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


@dataclass(frozen=True, slots=True)
class AdapterRef:
    """One adapter: the ``name`` that users say, the content ``digest`` that pages are keyed by.

    ``invocation_tokens`` make it an aLoRA: it is active from the first token of their last occurrence in a prompt.
    ``trained_for`` is what its metadata says, and nothing that it is known by.
    """

    name: str
    digest: AdapterDigest
    invocation_tokens: tuple[int, ...] = ()
    trained_for: Sharing | None = field(default=None, compare=False)


MAX_STOP_TOKENS = 128


class GuideKind(enum.StrEnum):
    """How a guide is written."""

    JSON_SCHEMA = "json_schema"
    REGEX = "regex"


@dataclass(frozen=True, slots=True)
class Guide:
    """What the output must match as a whole: ``text`` is a JSON schema (as JSON) or a regular expression."""

    kind: GuideKind
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to pick tokens and when to stop.

    temperature      0 is greedy; above it, softmax(logits / temperature)
    top_k            keep the k most likely tokens; 0 keeps all
    top_p            keep the smallest set whose probability reaches top_p; 1 keeps all
    seed             sampling is a function of (seed, choice index, absolute position) and nothing else
    max_tokens       tokens to generate at most, at least 1
    stop             strings that end the output, looked for in its text from min_tokens on
    stop_token_ids   at most 128 tokens that end the output, kept in the token stream but not in the text
    include_stop_str_in_output  leave the stop string, or the token that ended the output, in the text
    ignore_eos       do not stop at the model's end-of-sequence tokens
    logprobs         None: none; n: the chosen token's and the n most likely tokens' log probabilities (0 to 20)
    prompt_logprobs  the same of the prompt's tokens. The request reads none of the KV that is cached for tokens it scores;
                     shared context that other passes run, and the first token after it, are not scored
    min_p            drop tokens less likely than min_p times the most likely one; 0 keeps all
    presence_penalty    taken off the logit of each token generated so far (-2 to 2)
    frequency_penalty   the same, times how often the token was generated (-2 to 2)
    repetition_penalty  divides positive and multiplies negative logits of tokens in the prompt or the output (0.01 to 100);
                     1 is none
    logit_bias       (token id, number from -100 to 100) pairs added to logits
    min_tokens       no end-of-sequence and no stop token before so many were generated
    guide            only tokens that keep the output within this schema or expression; then the end of the sequence
    skip_special_tokens  leave special tokens out of the text
    choice           which of several answers to one prompt this is: part of the sampler's key

    Penalties follow from the tokens of the sequence alone, in vLLM's order: min_tokens, logit_bias, repetition, frequency
    and presence, temperature, min_p, top_k, top_p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    max_tokens: int = 16
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    choice: int = 0
    guide: Guide | None = None
    skip_special_tokens: bool = True
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False

    def validate(self, vocab_size: int | None = None) -> None:
        """Raise InvalidArgument for the first field that no request may have; ``vocab_size`` bounds token ids."""
        checks: tuple[tuple[bool, str, object, str, str], ...] = (
            (
                # Below 1e-20 a logit over the temperature is no number any more.
                self.temperature == 0.0 or 1e-20 <= self.temperature <= 100.0,
                "temperature",
                self.temperature,
                "must be 0, or a number from 1e-20 to 100",
                "Send 0 for greedy decoding.",
            ),
            (0 <= self.top_k < 2**31, "top_k", self.top_k, "must be from 0 to 2^31-1", "Send 0 to keep all tokens."),
            (0.0 < self.top_p <= 1.0, "top_p", self.top_p, "must be above 0 and at most 1", "Send 1 to keep all tokens."),
            (self.max_tokens >= 1, "max_tokens", self.max_tokens, "must be at least 1", "Ask for one token or more."),
            (
                self.logprobs is None or 0 <= self.logprobs <= 20,
                "logprobs",
                self.logprobs,
                "must be from 0 to 20",
                "Ask for at most 20 alternatives.",
            ),
            (
                self.prompt_logprobs is None or 0 <= self.prompt_logprobs <= 20,
                "prompt_logprobs",
                self.prompt_logprobs,
                "must be from 0 to 20",
                "Ask for at most 20 alternatives.",
            ),
            (0 <= self.seed < 2**63, "seed", self.seed, "must be from 0 to 2^63-1", "Send a non-negative 63-bit integer."),
            (all(self.stop), "stop", self.stop, "holds an empty string", "Remove it."),
            (0.0 <= self.min_p <= 1.0, "min_p", self.min_p, "must be from 0 to 1", "Send 0 to keep all tokens."),
            (0.01 <= self.repetition_penalty <= 100.0, "repetition_penalty", self.repetition_penalty,
             "must be from 0.01 to 100", "Send 1 for no penalty."),
            # min_tokens forbids them all: some token must be left.
            (len(self.stop_token_ids) <= MAX_STOP_TOKENS, "stop_token_ids", self.stop_token_ids,
             f"are {len(self.stop_token_ids)} tokens", f"Send at most {MAX_STOP_TOKENS}."),
            (0 <= self.min_tokens <= self.max_tokens, "min_tokens", self.min_tokens,
             f"must be from 0 to max_tokens, {self.max_tokens}", "Lower it, or raise max_tokens."),
            (self.choice >= 0, "choice", self.choice, "must not be negative", "Number choices from 0."),
        )  # fmt: skip
        for is_valid, name, value, problem, remedy in checks:
            if not is_valid:
                raise InvalidArgument(name, value, problem, remedy)
        if self.guide is not None and (self.ignore_eos or self.min_tokens):
            raise InvalidArgument(
                "ignore_eos" if self.ignore_eos else "min_tokens",
                self.ignore_eos or self.min_tokens,
                "contradicts a guide, which says where the output ends",
                "Leave one of both out.",
            )
        self._validate_penalties()
        limit = vocab_size if vocab_size is not None else 2**31
        self._validate_stop_tokens(limit)
        self._validate_bias(limit)

    def _validate_stop_tokens(self, limit: int) -> None:
        for position, token_id in enumerate(self.stop_token_ids):
            if not 0 <= token_id < limit:
                raise InvalidArgument(f"stop_token_ids[{position}]", token_id, f"is not in [0, {limit})", "Remove it.")

    def _validate_penalties(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            if not -2.0 <= value <= 2.0:
                raise InvalidArgument(name, value, "must be from -2 to 2", "Send 0 for no penalty.")

    def _validate_bias(self, limit: int) -> None:
        for token_id, bias in self.logit_bias:
            if not 0 <= token_id < limit:
                raise InvalidArgument(f"logit_bias[{token_id}]", bias, f"names no token in [0, {limit})", "Remove it.")
            if not -100.0 <= bias <= 100.0:
                raise InvalidArgument(f"logit_bias[{token_id}]", bias, "is not from -100 to 100", "Send such a number.")


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """One turn, frozen. Everything a worker needs to serve it from nothing: KV is only cache.

    tokens [n] int32 holds three spans, each rebuilt by its own writer when its pages are gone:

        tokens[:context_len]                 shared context (run by the base model, or as ``sharing`` says)
        tokens[context_len:n - num_resumed]  the branch's own tokens (run by its adapter; before ``invocation_start``,
                                             which lies in this span, by the base model)
        tokens[n - num_resumed:]             generated on another worker before it died (run by the adapter;
                                             counted by max_tokens)

    ``invocation_start`` is where an aLoRA adapter becomes active, None for every other one. ``is_adapter_inactive`` says
    that the request asks for an aLoRA which its prompt does not invoke: ``adapter`` is None then, the base model.

    ``max_tokens`` of 0 in ``sampling`` is not valid here: a pass over context alone is a ``ContextRequest``.
    ``excluded_workers`` are not to be tried while any other is there: where a stream broke that this one resumes.
    ``is_background``: an engine's own work (calibration, shadow probes), after every priority. ``is_private``: what it writes
    of its own is not left in the cache. ``scored_from``: prompt tokens before it are not scored, though ``prompt_logprobs``
    asks for scores.
    """

    request_id: RequestId
    tokens: TokenArray
    context_len: int
    num_resumed: int
    adapter: AdapterRef | None
    declared: tuple[AdapterRef, ...]
    sharing: Sharing
    writer: AdapterRef | None
    namespace: str
    sampling: SamplingParams
    prefix: PrefixKey
    deadline_s: float | None = None
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    session_id: str = ""
    branch: str = ""
    excluded_workers: tuple[WorkerId, ...] = ()
    invocation_start: int | None = None
    is_adapter_inactive: bool = False
    is_background: bool = False
    is_private: bool = False
    scored_from: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def fork_point(self) -> int:
        """Tokens whose pages are canonical or context; from there on they are the adapter's own."""
        return self.context_len if self.invocation_start is None else self.invocation_start

    @property
    def num_prompt_tokens(self) -> int:
        """Context and own tokens; what an earlier worker generated is not prompt."""
        return len(self.tokens) - self.num_resumed

    @property
    def writer_name(self) -> str:
        """The writer part of the context seed."""
        return self.writer.digest if self.writer is not None else BASE_WRITER


@dataclass(frozen=True, slots=True, eq=False)
class ContextRequest:
    """A pass over shared context that generates nothing: base pages, and residuals of ``declared`` under ``eager``.

    tokens [n] int32. Run at session creation, after a join, and as a prefetch on another worker. ``keep_s`` above 0: what
    it wrote is evicted after all else for so many seconds, or until the session's hint is released.
    """

    request_id: RequestId
    tokens: TokenArray
    declared: tuple[AdapterRef, ...]
    sharing: Sharing
    namespace: str
    prefix: PrefixKey
    deadline_s: float | None = None
    priority: Priority = Priority.NORMAL
    tenant: str = ""
    session_id: str = ""
    excluded_workers: tuple[WorkerId, ...] = ()
    keep_s: float = 0.0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


class FinishReason(enum.StrEnum):
    """Why a request ended well. Everything else is an error."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token, with the most likely alternatives (token id, logprob), best first.

    ``rank`` is 1 for the most likely token; only a prompt's tokens have it.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class PromptLogprobs:
    """Log probabilities of consecutive prompt tokens, those at positions first, first + 1, ...

    token_ids [n] int32; logprobs [n] fp32, natural; ranks [n] int32 (1: the most likely token);
    top_ids [n, k] int32 and top_logprobs [n, k] fp32 of the most likely tokens, best first.
    """

    first: int
    token_ids: TokenArray
    logprobs: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]

    @property
    def end(self) -> int:
        """Position after the last token."""
        return self.first + len(self.token_ids)

    @property
    def is_finite(self) -> bool:
        """Whether the logits that they came from were numbers."""
        return bool(np.isfinite(self.logprobs).all())

    def between(self, first: int, end: int) -> PromptLogprobs:
        """Of the tokens at positions [first, end), as far as they are here."""
        rows = slice(max(0, first - self.first), max(0, end - self.first))
        return PromptLogprobs(
            max(first, self.first),
            self.token_ids[rows],
            self.logprobs[rows],
            self.ranks[rows],
            self.top_ids[rows],
            self.top_logprobs[rows],
        )

    def entries(self) -> tuple[TokenLogprob, ...]:
        """One of each token, with its rank."""
        rows = (array.tolist() for array in (self.token_ids, self.logprobs, self.top_ids, self.top_logprobs, self.ranks))
        return tuple(
            TokenLogprob(token_id, logprob, tuple(zip(ids, values, strict=True)), rank)
            for token_id, logprob, ids, values, rank in zip(*rows, strict=True)
        )


def joined_prompt_logprobs(parts: Sequence[PromptLogprobs]) -> PromptLogprobs | None:
    """Consecutive parts as one; None for no parts."""
    if not parts:
        return None
    return PromptLogprobs(
        parts[0].first,
        np.concatenate([part.token_ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.ranks for part in parts]),
        np.concatenate([part.top_ids for part in parts]),
        np.concatenate([part.top_logprobs for part in parts]),
    )


@dataclass(frozen=True, slots=True)
class PrefixUsage:
    """What the cache saved for one request, in prompt tokens, when it came to run.

    A pass of the base model over shared context is a request of its own: a branch that had to wait for one finds the
    context in the cache like every other branch. An agent's own pass over the context (``residual``) is its own work.

    base_hit_tokens      tokens whose base KV was there
    residual_hit_tokens  context tokens whose residual for this adapter was there (or is not needed)
    useful_hit_tokens    min of both: tokens that ran through no layer
    prefill_tokens_run   prompt tokens that ran through a layer stack for this request, re-runs included
    """

    base_hit_tokens: int = 0
    residual_hit_tokens: int = 0
    useful_hit_tokens: int = 0
    prefill_tokens_run: int = 0

    def plus_run(self, num_tokens: int) -> PrefixUsage:
        return replace(self, prefill_tokens_run=self.prefill_tokens_run + num_tokens)


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Some tokens of one request. The chunk with a ``finish_reason`` is the last; errors end a stream as exceptions.

    ``usage`` comes with the first and with the last chunk. ``matched_stop`` is the token that ended the output.
    ``prompt_logprobs`` come in consecutive parts, all before the first token.
    """

    request_id: RequestId
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    usage: PrefixUsage | None = None
    worker_id: str = ""
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """A registered adapter, as lists and status show it.

    lora_rank is the largest rank of any module; residual_bytes_per_token is over all layers, 0 without a residual: without LoRA
    on k and v, or for an aLoRA, which has invocation_tokens: nothing before its invocation is adapted.
    ``trained_for``: what its metadata says (``core.adapter_semantics``). ``sharing``: what it was registered with, None for the
    server's default; ``verdict``: how ``auto`` is served on it therefore, as far as whoever made this object knows.
    """

    name: str
    digest: AdapterDigest
    path: str
    lora_rank: int
    target_modules: tuple[str, ...]
    residual_bytes_per_token: int
    is_resident: bool = True
    invocation_tokens: tuple[int, ...] = ()
    trained_for: Sharing | None = None
    sharing: Sharing | None = None
    verdict: SharingVerdict | None = None

    @property
    def ref(self) -> AdapterRef:
        return AdapterRef(self.name, self.digest, self.invocation_tokens, self.trained_for)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What clients, gateways and admission need to know of the base model."""

    name: str
    digest: str
    vocab_size: int
    max_model_len: int
    base_bytes_per_token: int
    dtype: str
    eos_token_ids: tuple[int, ...] = field(default=())


def token_array(values: object, *, name: str = "token_ids", vocab_size: int | None = None) -> TokenArray:
    """``values`` as an int32 array [n], or InvalidArgument: not integers, negative, or outside the vocabulary."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise InvalidArgument(name, values, "is not a flat list of integers", "Send token ids.") from None
    if array.shape == (0,):
        return np.zeros(0, dtype=np.int32)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InvalidArgument(name, values, "is not a flat list of integers", "Send token ids, for example from /tokenize.")
    limit = vocab_size if vocab_size is not None else 2**31
    bad = (array < 0) | (array >= limit)
    if bad.any():
        position = int(np.argmax(bad))
        raise InvalidArgument(
            f"{name}[{position}]", int(array[position]), f"is not in [0, {limit})", "Tokenise with this model's tokenizer."
        )
    return array.astype(np.int32)
