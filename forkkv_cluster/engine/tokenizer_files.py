"""The tokenizer of a model directory, loaded when it is first needed: it takes seconds that token ids need not wait for."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.prefix import TokenArray

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


class TokenizerFiles:
    """Of one model directory, which may hold none."""

    def __init__(self, model_dir: str | Path) -> None:
        self._model_dir = str(model_dir)

    @cached_property
    def tokenizer(self) -> Any:
        """None where the directory holds none. Raises InvalidArgument for one that cannot be loaded."""
        if not any((Path(self._model_dir) / name).exists() for name in _TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self._model_dir, local_files_only=True)
        except (OSError, ValueError) as error:
            problem = f"holds no tokenizer that can be loaded ({str(error).splitlines()[0]})"
            raise InvalidArgument("model", self._model_dir, problem, "Add tokenizer.json and tokenizer_config.json.") from None

    def encode(self, text: str, special: bool) -> list[int]:
        """Token ids of ``text``; ``special`` adds what stands before a text of its own. Raises InvalidArgument."""
        if self.tokenizer is None:
            raise InvalidArgument("prompt", text, "is text, and the model has no tokenizer", "Send token ids.")
        return list(self.tokenizer.encode(text, add_special_tokens=special))

    def plain_tokens(self, vocab_size: int) -> TokenArray | None:
        """Token ids that stand for text, [n] int32; None without a tokenizer."""
        if self.tokenizer is None:
            return None
        known = np.arange(min(vocab_size, len(self.tokenizer)), dtype=np.int32)
        return np.setdiff1d(known, np.asarray(self.tokenizer.all_special_ids, dtype=np.int32))
