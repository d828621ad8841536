"""What an adapter learns from: branches over contexts, read from JSON lines.

    {"context": "...", "prompt": "...", "completion": "..."}

Each is text or a list of token ids. Text is tokenised as the server does it: a context as a text of its own, a prompt as what a
turn appends to it; a completion ends with the end-of-sequence token. Lines of equal context become branches of one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import token_array

FIELDS = ("context", "prompt", "completion")


@dataclass(frozen=True, slots=True)
class BranchExample:
    """One agent's own tokens: what its turn appends, at least one, and what it is to answer (empty: not known yet)."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.completion


@dataclass(frozen=True, slots=True)
class ContextExamples:
    """A shared context and the branches over it, in the order of their lines."""

    context: tuple[int, ...]
    branches: tuple[BranchExample, ...]


@dataclass(frozen=True, slots=True)
class ExampleFile:
    """A file as read. ``digest`` is of its bytes."""

    contexts: tuple[ContextExamples, ...]
    digest: str

    @property
    def num_branches(self) -> int:
        return sum(len(context.branches) for context in self.contexts)


def read_examples(path: str | Path, tokenizer: Any, *, vocab_size: int, max_len: int, has_completions: bool) -> ExampleFile:
    """Read JSON lines; ``tokenizer`` None takes token ids alone.

    ``max_len`` tokens bound context, prompt and completion together. Raises InvalidArgument that names line and field.
    """
    by_context: dict[tuple[int, ...], list[BranchExample]] = {}
    content = _content(Path(path))
    for where, row in _rows(Path(path), content):
        encode = _Encoder(where, row, tokenizer, vocab_size)
        context, prompt = encode("context", special=True), encode("prompt")
        completion = encode("completion", end=True) if has_completions or "completion" in row else ()
        if len(context) + len(prompt) + len(completion) > max_len:
            raise InvalidArgument(where, f"{len(context) + len(prompt) + len(completion)} tokens",
                                  f"are more than the {max_len} that the model takes", "Shorten the line.")  # fmt: skip
        by_context.setdefault(context, []).append(BranchExample(prompt, completion))
    if not by_context:
        raise InvalidArgument("data", str(path), "holds no line", 'Write {"context", "prompt", "completion"}, one a line.')
    contexts = tuple(ContextExamples(context, tuple(branches)) for context, branches in by_context.items())
    return ExampleFile(contexts, hashlib.sha256(content.encode()).hexdigest())


class _Encoder:
    """The fields of one line as token ids."""

    def __init__(self, where: str, row: dict[str, Any], tokenizer: Any, vocab_size: int) -> None:
        self._where, self._row = where, row
        self._tokenizer, self._vocab_size = tokenizer, vocab_size

    def __call__(self, field: str, *, special: bool = False, end: bool = False) -> tuple[int, ...]:
        """Not empty. ``special`` adds what the tokenizer puts before a text, ``end`` the end of the sequence, to text alone."""
        name, value = f"{self._where}.{field}", self._row.get(field)
        if isinstance(value, str):
            value = self._encoded(name, value, special, end)
        if not isinstance(value, list) or not value:
            raise InvalidArgument(name, value, "is neither text nor a list of token ids, or is empty", "Fill it in.")
        return tuple(token_array(value, name=name, vocab_size=self._vocab_size).tolist())

    def _encoded(self, name: str, text: str, special: bool, end: bool) -> Sequence[int]:
        if self._tokenizer is None:
            raise InvalidArgument(name, text, "is text, and the model has no tokenizer", "Write token ids.")
        ids = list(self._tokenizer.encode(text, add_special_tokens=special))
        return [*ids, self._tokenizer.eos_token_id] if end and self._tokenizer.eos_token_id is not None else ids


def _content(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("data", str(path), f"cannot be read as text ({error})", "Name a file of JSON lines.") from None


def _rows(path: Path, content: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, object) of every line that is not empty."""
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidArgument(where, line, f"is not JSON ({error})", "Write one JSON object a line.") from None
        if not isinstance(row, dict):
            raise InvalidArgument(where, line, "is no JSON object", "Write one JSON object a line.")
        unknown = sorted(set(row) - set(FIELDS))
        if unknown:
            raise InvalidArgument(f"{where}.{unknown[0]}", row[unknown[0]], "is no field", f"Known: {', '.join(FIELDS)}.")
        yield where, row
