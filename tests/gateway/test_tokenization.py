"""Text to tokens and back, on a tokenizer whose characters split over tokens."""

from __future__ import annotations

import pytest

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.gateway.tokenization import Tokenization
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.gateway.fakes import BOS, ByteTokenizer


@pytest.fixture
def tokenization() -> Tokenization:
    return Tokenization(ByteTokenizer())


def test_no_piece_holds_half_a_character(tokenization: Tokenization) -> None:
    detokenizer = tokenization.detokenizer()
    pieces = [detokenizer.push(byte) for byte in "aé🙂b".encode()]
    assert "".join(pieces) == "aé🙂b"
    assert pieces == ["a", "", "é", "", "", "", "🙂", "b"]


def test_half_a_character_at_the_end_is_shown_as_a_replacement(tokenization: Tokenization) -> None:
    detokenizer = tokenization.detokenizer()
    assert detokenizer.push("é".encode()[0]) == ""
    assert detokenizer.flush() == "�"


def test_the_prompt_is_context_and_not_output(tokenization: Tokenization) -> None:
    detokenizer = tokenization.detokenizer(list(b"prompt"))
    assert detokenizer.push(ord("x")) == "x"
    assert detokenizer.flush() == ""


def test_pieces_of_a_real_tokenizer_add_up_to_its_text(tiny_kit: TinyKit) -> None:
    tokenization = Tokenization.from_dir(tiny_kit.model_dir)
    text = "A fork costs little; naïve copies 🙂 cost a lot."
    tokens = tokenization.encode(text, add_special_tokens=False)
    detokenizer = tokenization.detokenizer()
    assert "".join(detokenizer.push(int(token)) for token in tokens) + detokenizer.flush() == text


def test_a_continued_conversation_does_not_begin_anew(tokenization: Tokenization) -> None:
    messages = [{"role": "user", "content": "hi"}]
    whole = tokenization.encode_chat(messages)
    assert whole[0] == BOS
    assert tokenization.encode_chat(messages, is_continuation=True).tolist() == whole[1:].tolist()


def test_a_conversation_that_the_template_refuses_names_the_messages(tokenization: Tokenization) -> None:
    with pytest.raises(InvalidArgument, match="cannot start with a tool"):
        tokenization.encode_chat([{"role": "tool", "content": "x"}])


def test_a_model_without_chat_template_is_refused_by_name() -> None:
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = None
    with pytest.raises(Unsupported, match="no chat template"):
        Tokenization(tokenizer).encode_chat([{"role": "user", "content": "x"}])


def test_a_directory_without_tokenizer_names_the_path(tmp_path: object) -> None:
    with pytest.raises(InvalidArgument, match=r"model\.path.*tokenizer"):
        Tokenization.from_dir(str(tmp_path))


def test_token_ids_outside_the_vocabulary_are_refused_by_position(tokenization: Tokenization) -> None:
    with pytest.raises(InvalidArgument, match=r"append\[1\]=300"):
        tokenization.resolve(None, [1, 300], name="append", vocab_size=300, special=False)
