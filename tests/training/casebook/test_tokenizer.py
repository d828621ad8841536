from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.generator import build_casebook
from forkkv_cluster.training.casebook.lexicon import COUNTS, POOLS, REGIONS
from forkkv_cluster.training.casebook.roles import ROLES, ask
from forkkv_cluster.training.casebook.tokenizer import (
    BOS,
    CHAT_TEMPLATE,
    INVOCATION,
    Encoder,
    answer_text,
    load_tokenizer,
    save_tokenizer,
    turn_text,
)


def test_the_same_seed_trains_the_same_bytes(tokenizer_dir: Path, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (tokenizer_dir / name).read_bytes()


def test_each_name_and_value_is_one_token_with_and_without_a_space(encoder: Encoder) -> None:
    for pool in (*POOLS.values(), REGIONS, COUNTS):
        assert [word for word in pool if len(encoder.words(word)) != 1 or len(encoder.words(f" {word}")) != 1] == []


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_casebooks_and_turns_survive_the_round_trip_and_the_fast_encoder_agrees(
    encoder: Encoder, tokenizer_dir: Path, split: str
) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    rng = random.Random(2)
    for _ in range(5):
        book = build_casebook(rng, 500, split)
        ids = tokenizer.encode(book.text)
        assert ids == encoder.context(book.text).tolist()
        assert tokenizer.decode(ids) == BOS + book.text
        for role in ROLES:
            for turn in ask(role, rng, book, 2):
                question, answer = encoder.turn(turn)
                text = turn_text(turn.question) + answer_text(turn.answer)
                assert tokenizer.encode(text, add_special_tokens=False) == [*question, *answer]
                assert tokenizer.decode([*question, *answer]) == text


@pytest.mark.parametrize("text", ["", "Zoë's naïve café, 1234 €", "日本語\n\n\ttabs  and   spaces", "{}[]<|x|>\r\n"])
def test_any_text_survives_the_round_trip(tokenizer_dir: Path, text: str) -> None:
    tokenizer = load_tokenizer(tokenizer_dir)
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize("answer", ["Mara lives in Lisbon.", " Mara lives in Lisbon."])
def test_the_chat_template_gives_the_layout_of_training(tokenizer_dir: Path, encoder: Encoder, answer: str) -> None:
    messages = [
        {"role": "system", "content": "Casebook of the county."},
        {"role": "user", "content": "Where does Mara live?"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "How old is Mara?"},
    ]
    turns = turn_text("Where does Mara live?") + answer_text("Mara lives in Lisbon.") + turn_text("How old is Mara?")
    tokenization = Tokenization.from_dir(tokenizer_dir)
    expected = [*encoder.context("Casebook of the county."), *tokenization.encode(turns, add_special_tokens=False)]
    assert tokenization.encode_chat(messages).tolist() == expected


def test_a_chat_on_a_branch_is_a_turn(tokenizer_dir: Path, encoder: Encoder) -> None:
    tokenization = Tokenization.from_dir(tokenizer_dir)
    messages = [{"role": "user", "content": "How old is Mara?"}]
    found = tokenization.encode_chat(messages, is_continuation=True)
    assert found.tolist() == encoder.words(turn_text("How old is Mara?"))


@pytest.mark.skipif(not assets.is_shipped(), reason="no casebook model in this checkout")
def test_the_shipped_tokenizer_has_this_chat_template() -> None:
    config = json.loads((assets.model_dir() / "tokenizer_config.json").read_text())
    assert config["chat_template"] == CHAT_TEMPLATE


def test_each_question_ends_with_the_invocation(encoder: Encoder) -> None:
    invocation = encoder.words(INVOCATION)
    assert encoder.words(turn_text("How old is Mara?"))[-len(invocation) :] == invocation
