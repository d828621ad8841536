"""What adapters are calibrated on: contexts, what a branch appends to them, and perhaps what it answers.

The first of these that is there: the operator's file (``calibration.samples``), ``calibration_samples.jsonl`` in the adapter's
directory, the same in the model's, and contexts generated from the vocabulary. A file holds one JSON object a line:

    {"context": TEXT, "prompts": [TEXT, ...], "continuations": [TEXT, ...]}

``prompts`` are what branches append, each a sample of its own; without them the context's last token is one. ``continuations``,
one for each prompt, are forced instead of the adapter's own greedy output. Every TEXT may be a list of token ids.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.prefix import TokenArray
from forkkv_cluster.core.request import ModelInfo, token_array

SAMPLES_FILE = "calibration_samples.jsonl"
_FIELDS = ("context", "prompts", "continuations")
_NAME_LEN, _VALUE_LEN = 2, 4

Encode = Callable[[str, bool], list[int]]
"""(text, whether with the special tokens before it) -> token ids."""


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """context [c >= 1], prompt [p >= 1], continuation [k >= 1] int32; None: the adapter's own greedy output."""

    context: TokenArray
    prompt: TokenArray
    continuation: TokenArray | None = None


class SampleSource(Protocol):
    """Samples in an order that is the same every time."""

    @property
    def name(self) -> str:
        """For people: it stands in verdicts."""
        ...

    @property
    def digest(self) -> str:
        """Of all that the samples follow from."""
        ...

    def samples(self) -> Iterator[Sample]: ...


class FileSamples:
    """The samples of a JSONL file, read and checked at once.

    Raises InvalidArgument that names file and line for what cannot be read, is no sample, or holds no sample.
    """

    def __init__(self, path: str | Path, encode: Encode, vocab_size: int) -> None:
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise InvalidArgument(
                "calibration.samples", str(path), f"cannot be read ({error.strerror})", "Name a JSONL file."
            ) from None
        self.name = str(path)
        self.digest = xxhash.xxh3_128_hexdigest(data)
        self._encode = encode
        self._vocab_size = vocab_size
        self._samples = [
            sample
            for number, line in enumerate(data.splitlines(), start=1)
            if line.strip()
            for sample in self._parse(f"{path}:{number}", line)
        ]
        if not self._samples:
            raise InvalidArgument("calibration.samples", str(path), "holds no sample", "Write one JSON object a line.")

    def samples(self) -> Iterator[Sample]:
        return iter(self._samples)

    def _parse(self, where: str, line: bytes) -> Iterator[Sample]:
        try:
            value = json.loads(line)
        except ValueError as error:
            raise _bad(where, f"is not JSON ({error})") from None
        if not isinstance(value, dict) or "context" not in value or set(value) - set(_FIELDS):
            raise _bad(where, f"is no object with context and, if any, {' and '.join(_FIELDS[1:])}")
        context = self._tokens(where, "context", value["context"], special=True)
        prompts = [self._tokens(where, "prompts", text) for text in _list(where, "prompts", value)]
        forced = [self._tokens(where, "continuations", text) for text in _list(where, "continuations", value)]
        if not prompts:
            if len(context) < 2:
                raise _bad(where, "has a context of one token and no prompts")
            context, prompts = context[:-1], [context[-1:]] * max(1, len(forced))
        if forced and len(forced) != len(prompts):
            raise _bad(where, f"has {len(prompts)} prompts and {len(forced)} continuations")
        for index, prompt in enumerate(prompts):
            yield Sample(context, prompt, forced[index] if forced else None)

    def _tokens(self, where: str, name: str, value: Any, *, special: bool = False) -> TokenArray:
        tokens = token_array(
            self._encode(value, special) if isinstance(value, str) else value,
            name=f"{where} {name}",
            vocab_size=self._vocab_size,
        )
        if not len(tokens):
            raise _bad(where, f"has {name} without a token")
        return tokens


def _list(where: str, name: str, value: dict[str, Any]) -> list[Any]:
    found = value.get(name, [])
    if not isinstance(found, list):
        raise _bad(where, f"has {name} that are not a list")
    return found


def _bad(where: str, problem: str) -> InvalidArgument:
    return InvalidArgument("calibration.samples", where, problem, f"Write {{{', '.join(_FIELDS)}}}, the last two if any.")


class GeneratedSamples:
    """Contexts for a model of which nothing is known: records of random tokens, two that name one and four that it holds, told
    about twice each in random order. A prompt is the name of one of them.

    ``token_ids`` [n] int32: what to draw from.
    """

    def __init__(self, token_ids: TokenArray, context_tokens: int, seed: int) -> None:
        self._token_ids = token_ids
        self._context_tokens = context_tokens
        self._seed = seed
        self.name = f"generated (seed {seed}, {context_tokens} tokens)"
        self.digest = xxhash.xxh3_128_hexdigest(f"{context_tokens} {seed} ".encode() + token_ids.tobytes())

    def samples(self) -> Iterator[Sample]:
        """Without end."""
        index = 0
        while True:
            yield self._sample(np.random.default_rng([self._seed, index]))
            index += 1

    def _sample(self, rng: np.random.Generator) -> Sample:
        length = _NAME_LEN + _VALUE_LEN
        num_records = max(1, self._context_tokens // (2 * length))
        records = rng.choice(self._token_ids, size=(num_records, length)).astype(np.int32)
        told = np.concatenate([rng.permutation(records), rng.permutation(records)]).reshape(-1)
        asked = records[rng.integers(num_records)]
        return Sample(told[: self._context_tokens], asked[:_NAME_LEN])


class SampleContexts:
    """Which source an adapter is measured on. ``encode`` None: there is no tokenizer, and files hold token ids.

    ``plain_tokens`` gives what contexts are generated from, [n] int32; None, or none given: all but the ends of a sequence.
    """

    def __init__(
        self,
        model: ModelInfo,
        *,
        operator_path: str = "",
        model_dir: str = "",
        context_tokens: int = 256,
        seed: int = 0,
        encode: Encode | None = None,
        plain_tokens: Callable[[int], TokenArray | None] = lambda vocab_size: None,
    ) -> None:
        """Raises InvalidArgument for an ``operator_path`` that cannot be used."""
        self._model = model
        self._encode = encode or _no_tokenizer
        self._plain_tokens = plain_tokens
        self._context_tokens, self._seed = context_tokens, seed
        self._operator = self._file(operator_path) if operator_path else None
        self._model_file = Path(model_dir) / SAMPLES_FILE if model_dir else None
        self._prepared: dict[str, SampleSource] = {}

    def prepare(self, adapter_dir: str) -> None:
        """Do the reading of the next ``source_for`` of that adapter. Safe on any thread. Raises as it does."""
        self._prepared[adapter_dir] = self._read(adapter_dir)

    def source_for(self, adapter_dir: str) -> SampleSource:
        """Raises InvalidArgument for a file that is there and cannot be used."""
        return self._prepared.pop(adapter_dir, None) or self._read(adapter_dir)

    def _read(self, adapter_dir: str) -> SampleSource:
        if self._operator is not None:
            return self._operator
        for path in (Path(adapter_dir) / SAMPLES_FILE, self._model_file):
            if path is not None and path.is_file():
                return self._file(path)
        return self._generated

    @cached_property
    def _generated(self) -> GeneratedSamples:
        tokens = self._plain_tokens(self._model.vocab_size)
        if tokens is None:
            everything = np.arange(self._model.vocab_size, dtype=np.int32)
            tokens = np.setdiff1d(everything, np.asarray(self._model.eos_token_ids, dtype=np.int32))
        return GeneratedSamples(tokens, self._context_tokens, self._seed)

    def _file(self, path: str | Path) -> FileSamples:
        return FileSamples(path, self._encode, self._model.vocab_size)


def _no_tokenizer(text: str, special: bool) -> list[int]:
    raise InvalidArgument("calibration.samples", text, "is text, and the model has no tokenizer", "Write token ids.")
