"""Where sample contexts come from, and what a bad file of them is told."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import ModelInfo
from forkkv_cluster.engine.sample_contexts import SAMPLES_FILE, FileSamples, GeneratedSamples, SampleContexts

MODEL = ModelInfo("m", "d", 200, 512, 64, "float32", (7,))


def encode(text: str, special: bool) -> list[int]:
    return [1, *text.encode()] if special else list(text.encode())


def written(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def read(path: Path) -> list[tuple[list[int], list[int], list[int] | None]]:
    return [
        (s.context.tolist(), s.prompt.tolist(), s.continuation.tolist() if s.continuation is not None else None)
        for s in FileSamples(path, encode, 200).samples()
    ]


def test_each_prompt_of_a_context_is_a_sample(tmp_path: Path) -> None:
    path = written(tmp_path / "s.jsonl", {"context": "ab", "prompts": ["c", [9, 8]]}, "", {"context": [5, 6], "prompts": ["d"]})
    assert read(path) == [([1, 97, 98], [99], None), ([1, 97, 98], [9, 8], None), ([5, 6], [100], None)]


def test_without_prompts_the_contexts_last_token_is_one(tmp_path: Path) -> None:
    assert read(written(tmp_path / "s.jsonl", {"context": "ab"})) == [([1, 97], [98], None)]


def test_continuations_are_forced_one_for_each_prompt(tmp_path: Path) -> None:
    lines = [
        {"context": [5, 6], "prompts": ["d", "e"], "continuations": ["xy", [3]]},
        {"context": [5, 6], "continuations": ["x", "y"]},
    ]
    assert read(written(tmp_path / "s.jsonl", *lines)) == [
        ([5, 6], [100], [120, 121]),
        ([5, 6], [101], [3]),
        ([5], [6], [120]),
        ([5], [6], [121]),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "is not JSON"),
        ([1, 2], "is no object with context"),
        ({"prompts": ["x"]}, "is no object with context"),
        ({"context": "x", "question": "y"}, "is no object with context"),
        ({"context": []}, "has context without a token"),
        ({"context": [4]}, "of one token and no prompts"),
        ({"context": [4, 5], "prompts": "x"}, "has prompts that are not a list"),
        ({"context": [4, 5], "prompts": [[]]}, "has prompts without a token"),
        ({"context": [4, 5], "prompts": ["x"], "continuations": ["y", "z"]}, "has 1 prompts and 2 continuations"),
        ({"context": [4, 200]}, "is not in [0, 200)"),
    ],
)
def test_a_line_that_is_no_sample_is_named(tmp_path: Path, line: object, problem: str) -> None:
    path = written(tmp_path / "s.jsonl", {"context": [4, 5]}, line)
    with pytest.raises(InvalidArgument) as caught:
        FileSamples(path, encode, 200)
    assert problem in str(caught.value)
    assert "s.jsonl:2" in str(caught.value)


@pytest.mark.parametrize("content", [None, "\n\n"])
def test_a_file_without_samples_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "s.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidArgument, match=r"calibration.samples"):
        FileSamples(path, encode, 200)


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    path = written(tmp_path / "s.jsonl", {"context": "text"})
    with pytest.raises(InvalidArgument, match="no tokenizer"):
        SampleContexts(MODEL, operator_path=str(path))


def test_generated_contexts_hold_what_is_asked_for_twice_and_are_the_same_every_time() -> None:
    ids = np.arange(50, 150, dtype=np.int32)
    source = GeneratedSamples(ids, 96, 3)
    for sample in islice(source.samples(), 20):
        context, asked = sample.context.tolist(), sample.prompt.tolist()
        assert set(context) <= set(ids.tolist())
        assert 84 <= len(context) <= 96
        assert sum(context[i : i + 2] == asked for i in range(len(context) - 1)) >= 2
    again = GeneratedSamples(ids, 96, 3)
    pairs = zip(islice(source.samples(), 5), islice(again.samples(), 5), strict=True)
    assert all(np.array_equal(one.context, other.context) for one, other in pairs)
    assert source.digest == again.digest
    first = next(source.samples()).context
    assert not np.array_equal(first, next(GeneratedSamples(ids, 96, 4).samples()).context)


def test_digests_tell_sources_apart(tmp_path: Path) -> None:
    ids = np.arange(50, 150, dtype=np.int32)
    one, other = written(tmp_path / "a", {"context": [4, 5]}), written(tmp_path / "b", {"context": [4, 6]})
    digests = {
        *(GeneratedSamples(ids, length, seed).digest for length in (96, 48) for seed in (0, 1)),
        *(FileSamples(path, encode, 200).digest for path in (one, other)),
    }
    assert len(digests) == 6


def test_the_operators_file_comes_before_the_adapters_before_the_models_before_generated_ones(tmp_path: Path) -> None:
    operator = written(tmp_path / "operator.jsonl", {"context": [4, 5]})
    adapter = written(tmp_path / "adapter" / SAMPLES_FILE, {"context": [4, 5]})
    model = written(tmp_path / "model" / SAMPLES_FILE, {"context": [4, 5]})
    directories = {"model_dir": str(tmp_path / "model"), "encode": encode}
    contexts = SampleContexts(MODEL, operator_path=str(operator), **directories)
    assert contexts.source_for(str(adapter.parent)).name == str(operator)
    contexts = SampleContexts(MODEL, **directories)
    assert contexts.source_for(str(adapter.parent)).name == str(adapter)
    assert contexts.source_for(str(tmp_path)).name == str(model)
    model.unlink()
    assert contexts.source_for(str(tmp_path)).name == "generated (seed 0, 256 tokens)"


def test_contexts_are_generated_from_what_stands_for_text_and_never_end_a_sequence() -> None:
    drawn = next(SampleContexts(MODEL, context_tokens=512).source_for("").samples()).context
    assert 7 not in drawn
    plain = np.arange(20, 30, dtype=np.int32)
    drawn = next(SampleContexts(MODEL, plain_tokens=lambda vocab_size: plain).source_for("").samples()).context
    assert set(drawn.tolist()) <= set(plain.tolist())
