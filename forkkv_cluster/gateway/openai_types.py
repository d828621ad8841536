"""Request bodies of the OpenAI-compatible API, and how each becomes a command.

Fields that OpenAI or vLLM has and this server does not are refused by name when they would change the answer, and taken
silently when they would not. Unknown fields are refused, as OpenAI does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.request import Guide, SamplingParams, Sharing, token_array
from forkkv_cluster.gateway.commands import BranchTarget, GenerateCommand, SamplingChoice, StatelessTarget, TextOrTokens
from forkkv_cluster.gateway.guided import json_guide, read_guide
from forkkv_cluster.gateway.openai_format import EchoedPrompt
from forkkv_cluster.gateway.openai_messages import ChatMessage, ToolSpec
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.gateway.tool_calls import Dialect, dialect_of, forced_call

_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    # vLLM's.
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_embeds": (),
    "logits_processors": ([],),
    "guided_grammar": (),
    "guided_whitespace_pattern": (),
    "structural_tag": (),
    "priority": (0,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "mm_processor_kwargs": (),
    "include_reasoning": (True,),
    "return_token_ids": (False,),
    "cache_salt": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
}
"""Known but unsupported fields, with the values (besides null) that ask for nothing."""

_IGNORED = frozenset(
    (
        *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("request_id", "guided_decoding_backend"),
    )
)
"""Fields that change no answer, whatever they hold."""


MAX_PROMPTS = 1024


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
    prompt_logprobs: int | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_tokens_as_token_ids: bool = False
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    structured_outputs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    # Ours, by the client's extra_body.
    branch: BranchField | None = None
    sharing: Sharing | None = None
    sharing_group: str = ""
    shared_prefix_tokens: int | None = None
    timeout_s: float | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        for name, harmless in _UNSUPPORTED.items():
            if name in body and body[name] is not None and body[name] not in harmless:
                raise Unsupported(name, body[name], "this server does not have it", "Leave it out.")
        return {name: value for name, value in body.items() if name not in _UNSUPPORTED and name not in _IGNORED}

    def num_logprobs(self) -> int | None:
        raise NotImplementedError

    def num_prompt_logprobs(self) -> int | None:
        """Raises InvalidArgument on a stream, which, as vLLM's, has no place for them."""
        if self.prompt_logprobs is not None and self.stream:
            problem = "are not available in a stream"
            raise InvalidArgument("prompt_logprobs", self.prompt_logprobs, problem, "Set stream to false.")
        return self.prompt_logprobs

    def inputs(self, tokenization: Tokenization) -> list[TextOrTokens]:
        """The prompts, at least one."""
        raise NotImplementedError

    def limit(self) -> int | None:
        return self.max_tokens

    def commands(self, adapter: str | None, tokenization: Tokenization) -> list[GenerateCommand]:
        """One for each prompt; ``adapter`` is what ``model`` names, None for the base model. Raises InvalidArgument."""
        if self.stream_options is not None and not self.stream:
            raise InvalidArgument("stream_options", self.stream_options, "needs stream", "Set stream to true, or leave it out.")
        if self.branch is not None and (self.sharing is not None or self.shared_prefix_tokens is not None):
            raise InvalidArgument("sharing", self.sharing, "was chosen when the branch was forked", "Leave sharing out.")
        target = (
            BranchTarget(self.branch.session, self.branch.branch)
            if self.branch is not None
            else StatelessTarget(adapter, self.sharing, self.shared_prefix_tokens, self.sharing_group)
        )
        sampling = self._sampling(self.shows_special(tokenization))
        turn_id = self.branch.turn_id if self.branch is not None else ""
        return [
            GenerateCommand(target, prompt, sampling, timeout_s=self.timeout_s, turn_id=turn_id)
            for prompt in self.inputs(tokenization)
        ]

    def shows_special(self, tokenization: Tokenization) -> bool:
        """Whether special tokens are part of the text, for those who read it."""
        return not self.skip_special_tokens

    def guide(self) -> Guide | None:
        """What the output must match. Raises InvalidArgument for a malformed field, or more than one."""
        return read_guide(
            self.response_format, self.guided_json, self.guided_regex, self.guided_choice, self.structured_outputs
        )

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
            prompt_logprobs=self.num_prompt_logprobs(),
            include_stop_str_in_output=self.include_stop_str_in_output,
        )
        return SamplingChoice(params, seed=self.seed, max_tokens=self.limit())


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. A prompt is text or token ids; there may be a list of either.

    ``echo`` puts the prompt before the answer, with its log probabilities where ``logprobs`` asks for some; with it
    ``max_tokens`` may be 0.
    """

    prompt: str | list[Any]
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @property
    def is_silent(self) -> bool:
        """Whether only the prompt is wanted: one token is generated, and not shown."""
        return self.echo and self.max_tokens == 0

    @field_validator("prompt", mode="before")
    @classmethod
    def _text_or_list(cls, value: Any) -> Any:
        if not isinstance(value, str | list):
            raise InvalidArgument("prompt", value, "is neither text nor a list of token ids", "Send one of both.")
        return value

    def num_logprobs(self) -> int | None:
        return self.logprobs

    def num_prompt_logprobs(self) -> int | None:
        asked = super().num_prompt_logprobs()
        if not self.echo or self.logprobs is None:
            return asked
        return max(self.logprobs, asked or 0)

    def limit(self) -> int | None:
        if self.is_silent:
            return 1
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default for this endpoint.

    def inputs(self, tokenization: Tokenization) -> list[TextOrTokens]:
        prompts: Any = self.prompt
        if not isinstance(prompts, list) or not prompts or not isinstance(prompts[0], str | list):
            prompts = [prompts]
        if len(prompts) > MAX_PROMPTS:
            raise InvalidArgument("prompt", f"{len(prompts)} prompts", f"are more than {MAX_PROMPTS}", "Send fewer at once.")
        if self.branch is not None and (len(prompts) > 1 or self.echo):
            name, value = ("echo", True) if self.echo else ("prompt", f"{len(prompts)} prompts")
            raise InvalidArgument(name, value, "means nothing on a branch", "Leave branch out, or read the branch's tokens.")
        return [self._input(prompt, tokenization) for prompt in prompts]

    def _input(self, prompt: Any, tokenization: Tokenization) -> TextOrTokens:
        if not isinstance(prompt, str):
            return TextOrTokens(token_ids=prompt)
        # An echo needs the tokens here; a branch's text has no special ones anyway.
        if (self.echo or not self.add_special_tokens) and self.branch is None:
            return TextOrTokens(token_ids=tokenization.encode(prompt, add_special_tokens=self.add_special_tokens))
        return TextOrTokens(text=prompt)

    def echoed(self, commands: Sequence[GenerateCommand], tokenization: Tokenization, vocab_size: int) -> list[EchoedPrompt]:
        """The prompts of ``commands`` as they are shown before the answers; none without ``echo``."""
        if not self.echo:
            return []
        texts = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        echoes = []
        for command, text in zip(commands, texts, strict=False):
            tokens = token_array(command.input.token_ids, name="prompt", vocab_size=vocab_size)
            shown = text if isinstance(text, str) else tokenization.decode(tokens)
            echoes.append(EchoedPrompt(shown, tuple(tokens.tolist()), self.logprobs))
        return echoes


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions. ``max_tokens`` is the old name of ``max_completion_tokens``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[ToolSpec] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    # vLLM's, by the client's extra_body: what the chat template reads besides messages and tools.
    chat_template_kwargs: dict[str, Any] | None = None

    def tool_dialect(self, tokenization: Tokenization) -> Dialect | None:
        """How calls are told from text; None where there are none. Raises Unsupported or InvalidArgument."""
        if self._is_forced():
            return self._forced_call()[0]
        return dialect_of(tokenization.chat_template) if self._tools() else None

    def shows_special(self, tokenization: Tokenization) -> bool:
        dialect = self.tool_dialect(tokenization)
        return super().shows_special(tokenization) or (dialect is not None and dialect.is_special)

    def guide(self) -> Guide | None:
        if not self._is_forced():
            return super().guide()
        if super().guide() is not None:
            raise InvalidArgument("tool_choice", self.tool_choice, "and a guide exclude each other", "Send one of both.")
        return json_guide(self._forced_call()[1])

    def _forced_call(self) -> tuple[Dialect, dict[str, Any]]:
        return forced_call(self._tools(), self.tool_choice or "required", is_single=self.parallel_tool_calls is False)

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

    def inputs(self, tokenization: Tokenization) -> list[TextOrTokens]:
        messages = [message.plain() for message in self.messages]
        tokens = tokenization.encode_chat(
            messages, self._tools(), is_continuation=self.branch is not None, template_fields=self.chat_template_kwargs
        )
        return [TextOrTokens(token_ids=tokens)]


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
    """POST /v1/load_lora_adapter. ``sharing``: how requests with ``auto`` are served on it; ``auto`` measures it."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_path: str
    sharing: Sharing | None = None


class UnloadAdapterBody(BaseModel):
    """POST /v1/unload_lora_adapter. ``lora_int_id`` is vLLM's and means nothing here."""

    model_config = ConfigDict(extra="forbid")

    lora_name: str
    lora_int_id: int | None = None
