"""Request bodies of the OpenAI-compatible API, and how each becomes a command.

Fields that OpenAI has and this server does not are refused by name when they would change the answer, and taken silently
when they would not (``user``, ``store``, ``metadata``, ``service_tier``). Unknown fields are refused, as OpenAI does.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.request import Guide, SamplingParams, Sharing
from forkkv_cluster.gateway.commands import BranchTarget, GenerateCommand, SamplingChoice, StatelessTarget, TextOrTokens
from forkkv_cluster.gateway.guided import json_guide, read_guide
from forkkv_cluster.gateway.openai_messages import ChatMessage, ToolSpec
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.gateway.tool_calls import Dialect, dialect_of, forced_call

_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Known but unsupported fields, with the values (besides null) that ask for nothing."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class BranchField(BaseModel):
    """Runs the request as a turn of a session's branch; what the body says is appended to it."""

    model_config = ConfigDict(extra="forbid")

    session: str
    branch: str
    turn_id: str = ""


class GenerationRequest(BaseModel):
    """What both endpoints share."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
    default_max_tokens: ClassVar[int | None] = None

    model: str
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int = 0
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    seed: int | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    # vLLM's, by the client's extra_body.
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    response_format: dict[str, Any] | None = None
    # Ours, by the client's extra_body.
    branch: BranchField | None = None
    sharing: Sharing | None = None
    sharing_group: str = ""
    shared_prefix_tokens: int | None = None
    timeout_s: float | None = None
    # Taken, without effect.
    user: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, harmless in _NO_EFFECT.items():
            if name in body and body[name] is not None and body[name] not in harmless:
                raise Unsupported(name, body[name], "this server does not have it", "Leave it out.")
        return {name: value for name, value in body.items() if name not in _NO_EFFECT}

    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def input(self, tokenization: Tokenization) -> TextOrTokens:
        raise NotImplementedError

    def limit(self) -> int | None:
        return self.max_tokens

    def command(self, adapter: str | None, tokenization: Tokenization) -> GenerateCommand:
        """The command; ``adapter`` is what ``model`` names, None for the base model. Raises InvalidArgument."""
        if self.stream_options is not None and not self.stream:
            raise InvalidArgument("stream_options", self.stream_options, "needs stream", "Set stream to true, or leave it out.")
        if self.branch is not None and (self.sharing is not None or self.shared_prefix_tokens is not None):
            raise InvalidArgument("sharing", self.sharing, "was chosen when the branch was forked", "Leave sharing out.")
        target = (
            BranchTarget(self.branch.session, self.branch.branch)
            if self.branch is not None
            else StatelessTarget(adapter, self.sharing, self.shared_prefix_tokens, self.sharing_group)
        )
        return GenerateCommand(
            target=target,
            input=self.input(tokenization),
            sampling=self._sampling(self.shows_special(tokenization)),
            timeout_s=self.timeout_s,
            turn_id=self.branch.turn_id if self.branch is not None else "",
        )

    def shows_special(self, tokenization: Tokenization) -> bool:
        """Whether special tokens are part of the text, for those who read it."""
        return False

    def guide(self) -> Guide | None:
        """What the output must match. Raises InvalidArgument for a malformed field, or more than one."""
        return read_guide(self.response_format, self.guided_json, self.guided_regex)

    def _sampling(self, shows_special: bool) -> SamplingChoice:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        params = SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k,
            stop=tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=self.num_logprobs(),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty,
            logit_bias=tuple(sorted((self.logit_bias or {}).items())),
            min_tokens=self.min_tokens,
            guide=self.guide(),
            skip_special_tokens=not shows_special,
        )
        return SamplingChoice(params, seed=self.seed, max_tokens=self.limit())


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. One prompt: text, token ids, or a list that holds one of them."""

    prompt: str | list[Any]
    logprobs: int | None = None

    @field_validator("prompt", mode="before")
    @classmethod
    def _text_or_list(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise InvalidArgument("prompt", value, "is neither text nor a list of token ids", "Send one of both.")
        return value

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def limit(self) -> int | None:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default for this endpoint.

    def input(self, tokenization: Tokenization) -> TextOrTokens:
        prompt: Any = self.prompt
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
            if len(prompt) > 1:
                raise Unsupported(
                    "prompt", f"{len(prompt)} prompts", "this server takes one prompt a request", "Send them one by one."
                )
            prompt = prompt[0]
        return TextOrTokens(text=prompt) if isinstance(prompt, str) else TextOrTokens(token_ids=prompt)


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions. ``max_tokens`` is the old name of ``max_completion_tokens``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolSpec] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None

    def tool_dialect(self, tokenization: Tokenization) -> Dialect | None:
        """How calls are told from text; None where there are none. Raises Unsupported or InvalidArgument."""
        if self._is_forced():
            return forced_call(self._tools(), self.tool_choice or "required")[0]
        return dialect_of(tokenization.chat_template) if self._tools() else None

    def shows_special(self, tokenization: Tokenization) -> bool:
        dialect = self.tool_dialect(tokenization)
        return dialect is not None and dialect.is_special

    def guide(self) -> Guide | None:
        if not self._is_forced():
            return super().guide()
        if super().guide() is not None:
            raise InvalidArgument("tool_choice", self.tool_choice, "and a guide exclude each other", "Send one of both.")
        return json_guide(forced_call(self._tools(), self.tool_choice or "required")[1])

    def _is_forced(self) -> bool:
        is_forced = self.tool_choice not in (None, "none", "auto")
        if is_forced and not self.tools:
            raise InvalidArgument("tool_choice", self.tool_choice, "needs tools", "Send tools, or leave it out.")
        return is_forced

    def _tools(self) -> list[dict[str, Any]]:
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools]

    def num_logprobs(self) -> int | None:
        if not self.logprobs:
            if self.top_logprobs is not None:
                raise InvalidArgument("top_logprobs", self.top_logprobs, "needs logprobs", "Set logprobs to true.")
            return None
        return self.top_logprobs or 0

    def limit(self) -> int | None:
        if (
            self.max_tokens is not None
            and self.max_completion_tokens is not None
            and self.max_tokens != self.max_completion_tokens
        ):
            raise InvalidArgument("max_tokens", self.max_tokens, "differs from max_completion_tokens", "Send one of both.")
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def input(self, tokenization: Tokenization) -> TextOrTokens:
        messages = [message.plain() for message in self.messages]
        return TextOrTokens(
            token_ids=tokenization.encode_chat(messages, self._tools(), is_continuation=self.branch is not None)
        )


class TokenizeRequest(BaseModel):
    """POST /tokenize: a prompt, or messages through the chat template."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None
    tokens: list[int]


class LoadAdapterBody(BaseModel):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_path: str


class UnloadAdapterBody(BaseModel):
    """POST /v1/unload_lora_adapter. ``lora_int_id`` is vLLM's and means nothing here."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_int_id: int | None = None
