"""Text to tokens, once per request in the gateway, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from forkkv_cluster.core.detokenizer import Decoder, IncrementalDetokenizer
from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import token_array


class Tokenizer(Decoder, Protocol):
    """The part of a Hugging Face tokenizer that is used here."""

    def encode(self, text: str, add_special_tokens: bool = ...) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


class Tokenization:
    """The served model's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenization:
        """Load from a Hugging Face directory. Raises InvalidArgument when it holds no tokenizer."""
        from transformers import AutoTokenizer  # Here: importing it takes seconds that tests of the rest do not need.

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
            return cls(tokenizer)
        except (OSError, ValueError) as error:
            problem = f"holds no tokenizer that can be loaded ({str(error).splitlines()[0]})"
            raise InvalidArgument("model.path", str(path), problem, "Add tokenizer.json and tokenizer_config.json.") from None

    def encode(self, text: str, *, add_special_tokens: bool) -> TokenArray:
        """[n] int32. Raises InvalidArgument for half of a surrogate pair, which JSON can carry and UTF-8 cannot."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            shown = text[max(0, error.start - 20) : error.end + 20]
            raise InvalidArgument("text", shown, f"is not UTF-8 at character {error.start}", "Send whole characters.") from None
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=add_special_tokens), dtype=np.int32)

    @property
    def chat_template(self) -> str:
        """Its text; empty where there is none."""
        return str(getattr(self._tokenizer, "chat_template", None) or "")

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        is_continuation: bool = False,
        template_fields: Mapping[str, Any] | None = None,
    ) -> TokenArray:
        """A conversation through the chat template, with the header of the assistant's answer; [n] int32.

        ``is_continuation``: it follows other tokens, so a beginning-of-sequence token of the template is left out.
        ``template_fields`` are more of what the template may read. Raises InvalidArgument or Unsupported.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise Unsupported("messages", "chat", "this model's tokenizer has no chat template", "Use /v1/completions.")
        fixed: dict[str, Any] = {"tokenize": False, "add_generation_prompt": True, **({"tools": list(tools)} if tools else {})}
        if taken := [name for name in template_fields or () if name in (*fixed, "tools", "conversation", "chat_template")]:
            raise InvalidArgument(f"chat_template_kwargs.{taken[0]}", None, "is set by the server", "Leave it out.")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), **fixed, **(template_fields or {}))
        except Exception as error:  # Templates raise whatever they like: it is the conversation they do not accept.
            problem = f"the chat template refuses it ({error})"
            raise InvalidArgument("messages", messages, problem, "Change roles or order.") from None
        tokens = self.encode(str(text), add_special_tokens=False)
        has_bos = len(tokens) > 0 and tokens[0] == getattr(self._tokenizer, "bos_token_id", None)
        return tokens[1:] if is_continuation and has_bos else tokens

    def decode(self, token_ids: Sequence[int] | TokenArray) -> str:
        return self._tokenizer.decode(
            [int(t) for t in token_ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def detokenizer(self, prompt_tail: Sequence[int] = (), *, skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self._tokenizer, prompt_tail, skip_special_tokens=skip_special_tokens)

    def resolve(self, text: str | None, token_ids: object | None, *, name: str, vocab_size: int, special: bool) -> TokenArray:
        """Tokens of whichever of both was sent, checked; [n] int32. Raises InvalidArgument."""
        if text is not None:
            return self.encode(text, add_special_tokens=special)
        if token_ids is not None:
            return token_array(token_ids, name=name, vocab_size=vocab_size)
        return np.zeros(0, dtype=np.int32)
