"""Lines become branches over contexts as the server would tokenise them, and a bad line is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.training.examples import BranchExample, ExampleFile, read_examples
from tests.gateway.fakes import BOS, EOS, ByteTokenizer


def read(tmp_path: Path, *rows: Any, tokenizer: Any = None, **options: Any) -> ExampleFile:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return read_examples(path, tokenizer, **{"vocab_size": 8192, "max_len": 50, "has_completions": True, **options})


def test_lines_of_equal_context_are_branches_of_one(tmp_path: Path) -> None:
    rows = [{"context": [1, c], "prompt": [p], "completion": [7, 8]} for c, p in [(1, 3), (2, 4), (1, 5)]]
    first, second = read(tmp_path, *rows, "").contexts
    assert (first.context, second.context) == ((1, 1), (1, 2))
    assert first.branches == (BranchExample((3,), (7, 8)), BranchExample((5,), (7, 8)))


class EndingTokenizer(ByteTokenizer):
    eos_token_id = EOS


def test_text_is_tokenised_as_the_server_does_it_and_ends(tmp_path: Path) -> None:
    row = {"context": "ab", "prompt": "c", "completion": "de"}
    (examples,) = read(tmp_path, row, tokenizer=EndingTokenizer()).contexts
    assert examples.context == (BOS, *b"ab")
    assert examples.branches == (BranchExample(tuple(b"c"), (*b"de", EOS)),)


def test_only_a_teacher_makes_completions_superfluous(tmp_path: Path) -> None:
    row = {"context": [1], "prompt": [2]}
    assert read(tmp_path, row, has_completions=False).contexts[0].branches == (BranchExample((2,), ()),)
    with pytest.raises(InvalidArgument, match=r"^data\.jsonl:1\.completion="):
        read(tmp_path, row)


GOOD = {"context": [1], "prompt": [2], "completion": [3]}


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**GOOD, "prompt": "text"}, r"\.prompt='text'.*no tokenizer"),
        ({**GOOD, "context": []}, r"\.context="),
        ({**GOOD, "prompt": [8192]}, r"\.prompt\[0\]=8192"),
        ({**GOOD, "answer": [3]}, r"\.answer="),
        ({**GOOD, "context": [1] * 49}, "51 tokens.*the 50"),
        ("[1]", "no JSON object"),
        ("{", "not JSON"),
    ],
)
def test_a_line_that_cannot_be_learnt_from_is_named(tmp_path: Path, row: Any, named: str) -> None:
    with pytest.raises(InvalidArgument, match=rf"data\.jsonl:2.*{named}|data\.jsonl:2{named}"):
        read(tmp_path, GOOD, row)


def test_a_file_without_lines_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no line"):
        read(tmp_path, "")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_examples(tmp_path / "none", None, vocab_size=9, max_len=9, has_completions=True)
