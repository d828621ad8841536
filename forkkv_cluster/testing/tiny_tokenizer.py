"""A real byte-level BPE tokenizer, trained in a second on the text that this package ships."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (BOS, EOS, PAD, *_ROLES)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def demo_document() -> str:
    """The Harrow Lane casebook, about 25 kB of plain English: what the tokenizer of the tiny kit is trained on."""
    return (files("forkkv_cluster.testing") / "data" / "harrow_lane_casebook.txt").read_text(encoding="utf-8")


def train_tokenizer(max_vocab_size: int) -> Any:
    """A ``PreTrainedTokenizerFast`` of at most that many tokens; the same text and size give the same tokenizer."""
    # Imported here: transformers takes seconds, and readers of ``demo_document`` do not need it.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocab_size,
        min_frequency=1,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([demo_document()], trainer)
    fast_tokenizer: Any = PreTrainedTokenizerFast  # untyped
    return fast_tokenizer(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(_ROLES),
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(directory: Path, max_vocab_size: int) -> int:
    """Train and save into a checkpoint directory; returns the number of tokens it knows."""
    tokenizer = train_tokenizer(max_vocab_size)
    tokenizer.save_pretrained(str(directory))
    return len(tokenizer)
