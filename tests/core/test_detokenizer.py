"""Detokenisation piece by piece is the decode of the whole, on real tokenizers of both families."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forkkv_cluster.core.detokenizer import REPLACEMENT, IncrementalDetokenizer

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=REPLACEMENT), max_size=40) | st.lists(
    st.sampled_from(["👩‍👩‍👧‍👦", "🇩🇪", "e\u0301", "漢字", "の", "한국", " ", "  ", "\n", "naïve", "🙂", "العربية", "a"]),
    max_size=12,
).map("".join)


def byte_level() -> Any:
    """As Llama 3 and Qwen have it: a token is some bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<eos>"], initial_alphabet=alphabet, min_frequency=1, show_progress=False
    )
    # Trained on these, some tokens end, and others begin, in the middle of a character.
    tokenizer.train_from_iterator(["🙂🙃🙂 漢漢字字 naïve naïf のの the then"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def sentence_piece() -> Any:
    """As Llama 2 and Mistral have it: a space begins a word, and unknown characters fall back to bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "th", "▁th"]
    vocab = {word: number for number, word in enumerate(words)}
    merges = [("t", "h"), ("▁", "th")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(scope="module", params=[byte_level, sentence_piece], ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.param()


def cut(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    """``tokens`` in chunks of these sizes, over and over."""
    chunks, start = [], 0
    while start < len(tokens):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(tokens[start : start + size])
        start += size
    return chunks


@given(text=TEXTS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
@example(text="👩‍👩‍👧‍👦", sizes=[1])
@example(text="  x", sizes=[1])
def test_pieces_add_up_to_the_whole_and_none_holds_half_a_character(tokenizer: Any, text: str, sizes: list[int]) -> None:
    tokens = tokenizer.encode(text, add_special_tokens=False)
    detokenizer = IncrementalDetokenizer(tokenizer)
    pieces = [detokenizer.push(*chunk) for chunk in cut(tokens, sizes)]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


@given(prompt=TEXTS, text=TEXTS)
def test_output_after_a_prompt_is_what_the_prompt_lacks_of_the_whole(tokenizer: Any, prompt: str, text: str) -> None:
    first, rest = (tokenizer.encode(part, add_special_tokens=False) for part in ("a" + prompt + "b", text))
    detokenizer = IncrementalDetokenizer(tokenizer, first)
    found = "".join(detokenizer.push(token) for token in rest) + detokenizer.flush()
    whole = tokenizer.decode(first + rest, clean_up_tokenization_spaces=False)
    assert found == whole.removeprefix(tokenizer.decode(first, clean_up_tokenization_spaces=False))


@given(text=TEXTS, is_skipped=st.booleans(), data=st.data())
def test_special_tokens_in_between_leave_no_trace_unless_they_are_shown(
    tokenizer: Any, text: str, is_skipped: bool, data: st.DataObject
) -> None:
    tokens = tokenizer.encode("a" + text, add_special_tokens=False)
    # Shown inside a character they make it none.
    places = [i for i in range(1, len(tokens) + 1) if is_skipped or REPLACEMENT not in tokenizer.decode(tokens[:i])]
    chosen = data.draw(st.lists(st.sampled_from(places), max_size=3, unique=True))
    mixed = [t for i, token in enumerate(tokens, start=1) for t in [token, tokenizer.eos_token_id][: 1 + (i in chosen)]]
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=is_skipped)
    found = "".join(detokenizer.push(token) for token in mixed) + detokenizer.flush()
    assert found == tokenizer.decode(mixed, skip_special_tokens=is_skipped, clean_up_tokenization_spaces=False)


def test_bytes_that_are_no_character_do_not_hold_the_text_back_for_ever(tokenizer: Any) -> None:
    byte = tokenizer.encode("é", add_special_tokens=False)[-1]  # a byte that only continues a character
    detokenizer = IncrementalDetokenizer(tokenizer, tokenizer.encode("a", add_special_tokens=False))
    pieces = [detokenizer.push(byte) for _ in range(200)]
    assert sum(map(len, pieces)) > 100


def test_a_stream_of_special_tokens_costs_no_more_and_more(tokenizer: Any) -> None:
    class Counting:
        longest = 0

        def decode(self, token_ids: list[int], **options: Any) -> str:
            self.longest = max(self.longest, len(token_ids))
            return str(tokenizer.decode(token_ids, **options))

    counting = Counting()
    detokenizer = IncrementalDetokenizer(counting, tokenizer.encode("abc", add_special_tokens=False))
    assert {detokenizer.push(tokenizer.eos_token_id) for _ in range(300)} == {""}
    assert counting.longest < 20
