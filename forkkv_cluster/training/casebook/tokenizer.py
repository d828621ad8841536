"""The casebook tokenizer: byte-level BPE trained from the generator until each word of its casebooks is one token.

Layout, which the engine serves as it stands:

    context   <|bos|> text
    turn      \\nQ: question\\nA:
    answer     text <|eos|>          begins with a space, ends the turn
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forkkv_cluster.training.casebook.generator import WORD, build_casebook
from forkkv_cluster.training.casebook.lexicon import COUNTS, POOLS, REGIONS
from forkkv_cluster.training.casebook.roles import ROLES, Turn, ask

__all__ = [
    "BOS",
    "CHAT_TEMPLATE",
    "EOS",
    "INVOCATION",
    "PAD",
    "Encoder",
    "answer_text",
    "load_tokenizer",
    "save_tokenizer",
    "turn_text",
]

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
INVOCATION = "\nA:"
"""Ends every question; what invokes the aLoRA adapters."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ ' ' + message.content | trim + eos_token }}"
    "{% elif message.role == 'user' %}{{ '\\nQ: ' + message.content + '\\nA:' }}"
    "{% else %}{{ message.content }}{% endif %}{% endfor %}"
)
"""A conversation in the layout above: the context is the system message, each question a user's. Answers begin with a space,
whether a client sends it back or not."""
_MAX_SIZE = 6000
_NUM_CASEBOOKS = 300


def turn_text(question: str) -> str:
    return f"\nQ: {question}{INVOCATION}"


def answer_text(answer: str) -> str:
    return f" {answer}{EOS}"


def save_tokenizer(directory: str | Path, seed: int = 0) -> int:
    """Train and write the Hugging Face files; returns the number of tokens. The same seed gives the same bytes."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD.pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_MAX_SIZE,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(seed), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL_TOKENS.index(BOS))]
    )
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return int(tokenizer.get_vocab_size())


def _corpus(seed: int) -> Iterator[str]:
    for pool in (*POOLS.values(), REGIONS, COUNTS):
        for word in pool:
            yield from (word, f" {word}") * 4
    rng = random.Random(seed)
    for _ in range(_NUM_CASEBOOKS):
        book = build_casebook(rng, 512)
        yield book.text
        for role in ROLES:
            yield from (turn_text(turn.question) + f" {turn.answer}" for turn in ask(role, rng, book, 8))


def load_tokenizer(directory: str | Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


class Encoder:
    """Text to tokens by a memory of words, many times faster than the tokenizer and, of casebooks, equal to it."""

    def __init__(self, directory: str | Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
        self._word = lru_cache(maxsize=None)(self._encode_word)
        self.pad, self.bos, self.eos = (SPECIAL_TOKENS.index(token) for token in (PAD, BOS, EOS))
        self.size = int(self._tokenizer.get_vocab_size())

    def _encode_word(self, word: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(word, add_special_tokens=False).ids)

    def words(self, text: str) -> list[int]:
        """Without special tokens."""
        ids: list[int] = []
        for word in WORD.findall(text):
            ids += self._word(word)
        return ids

    def context(self, text: str) -> NDArray[np.int32]:
        return np.array([self.bos, *self.words(text)], dtype=np.int32)

    def turn(self, turn: Turn) -> tuple[list[int], list[int]]:
        """(question with the layout around it, answer with its end)."""
        return self.words(turn_text(turn.question)), [*self.words(f" {turn.answer}"), self.eos]
