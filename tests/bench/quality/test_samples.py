from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forkkv_cluster.bench.quality.casebook import casebook_samples, lengths_of, roles_of
from forkkv_cluster.bench.quality.samples import QualitySample, length_of, parse_samples, read_samples
from forkkv_cluster.core.errors import InvalidArgument

LINE: dict[str, Any] = {"context": "C", "question": "Q", "answer": "A"}


def parse(**changes: Any) -> list[QualitySample]:
    entry = {key: value for key, value in {**LINE, **changes}.items() if value is not None}
    return parse_samples([json.dumps(entry)], "f", ["planner"])


def test_a_line_is_a_sample_and_blank_ones_are_none():
    lines = [json.dumps(LINE), "", json.dumps({**LINE, "adapter": "planner", "role": "hop", "context_tokens": 9})]
    assert parse_samples(lines, "f", ["planner"]) == [
        QualitySample("C", "Q", "A"),
        QualitySample("C", "Q", "A", "planner", "hop", 9),
    ]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"answer": None}, "f:1 answer"),
        ({"context": 5}, "f:1 context"),
        ({"contxt": "C"}, "f:1 contxt"),
        ({"adapter": "critic"}, "f:1 adapter"),
        ({"context_tokens": -1}, "f:1 context_tokens"),
        ({"context_tokens": True}, "f:1 context_tokens"),
    ],
)
def test_a_wrong_line_is_refused_by_place_and_field(changes: dict[str, Any], named: str):
    with pytest.raises(InvalidArgument, match=named):
        parse(**changes)


@pytest.mark.parametrize("line", ["{", "[]"])
def test_a_line_that_is_no_object_is_refused(line: str):
    with pytest.raises(InvalidArgument, match="f:1"):
        parse_samples([line], "f", [])


def test_a_file_that_is_not_there_or_empty_is_refused(tmp_path: Path):
    (tmp_path / "empty").write_text("\n")
    for name in ("none", "empty"):
        with pytest.raises(InvalidArgument, match="--samples"):
            read_samples(tmp_path / name, [])


@pytest.mark.parametrize(("num_tokens", "length"), [(1, 1), (64, 64), (65, 128)])
def test_a_sample_is_listed_under_the_next_power_of_two(num_tokens: int, length: int):
    assert length_of(QualitySample("C", "Q", "A"), num_tokens) == length
    assert length_of(QualitySample("C", "Q", "A", context_tokens=300), num_tokens) == 300


def test_an_adapters_role_is_given_or_the_longest_that_its_name_begins_with():
    assert roles_of(["mapper-alora", "asked_for_json-2", "p"], {"p": "hop"}) == {
        "mapper-alora": "mapper",
        "asked_for_json-2": "asked_for_json",
        "p": "hop",
    }


@pytest.mark.parametrize("given", [{}, {"other": "hop"}, {"p": "poet"}])
def test_a_role_that_nothing_tells_is_refused(given: dict[str, str]):
    with pytest.raises(InvalidArgument, match="role"):
        roles_of(["p"], given)


def test_casebook_samples_are_of_each_adapter_and_length_and_follow_from_the_seed():
    found = casebook_samples({"mapper": "mapper", "hop": "hop"}, {128: 2, 256: 1}, 5)
    assert [(s.adapter, s.role, s.context_tokens) for s in found] == [
        (name, name, length) for name in ("mapper", "hop") for length in (128, 128, 256)
    ]
    assert found == casebook_samples({"mapper": "mapper", "hop": "hop"}, {128: 2, 256: 1}, 5)
    assert found != casebook_samples({"mapper": "mapper", "hop": "hop"}, {128: 2, 256: 1}, 6)
    with pytest.raises(InvalidArgument, match="--length"):
        casebook_samples({"hop": "hop"}, {16: 1}, 0)


def test_a_length_may_name_its_own_count():
    assert lengths_of(["256", "1024:20"], 50) == {256: 50, 1024: 20}
    for wrong in (["x"], ["256:"], ["256:0"], ["1:2:3"], ["256", "256:9"]):
        with pytest.raises(InvalidArgument, match="--length"):
            lengths_of(wrong, 50)
