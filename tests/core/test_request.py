"""Requests: what is refused, by which name, and what the spans of a prompt mean."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.ids import AdapterDigest, RequestId
from forkkv_cluster.core.prefix import BASE_WRITER, prefix_key
from forkkv_cluster.core.request import (
    AdapterRef,
    GenerateRequest,
    PrefixUsage,
    Priority,
    SamplingParams,
    Sharing,
    token_array,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_p", float("nan")),
        ("max_tokens", 0),
        ("logprobs", -1),
        ("logprobs", 21),
        ("seed", -1),
        ("seed", 2**63),
        ("stop", ("end", "")),
        ("temperature", 5e-324),
        ("top_k", 10**20),
        ("repetition_penalty", 1e-45),
        ("stop_token_ids", tuple(range(129))),
    ],
)
def test_bad_sampling_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgument, match=name) as caught:
        replace(SamplingParams(), **{name: value}).validate()
    assert caught.value.field == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 100.0),
        ("top_k", 0),
        ("top_p", 1e-9),
        ("max_tokens", 1),
        ("logprobs", 0),
        ("logprobs", 20),
        ("seed", 2**63 - 1),
        ("stop", ()),
        ("temperature", 1e-20),
        ("top_k", 2**31 - 1),
        ("repetition_penalty", 0.01),
        ("stop_token_ids", tuple(range(128))),
    ],
)
def test_the_ends_of_every_range_are_accepted(name: str, value: Any) -> None:
    replace(SamplingParams(), **{name: value}).validate()


@pytest.mark.parametrize("token_id", [-1, -1_000_000, 10**30, 100])
def test_a_stop_token_outside_the_vocabulary_is_refused(token_id: int) -> None:
    with pytest.raises(InvalidArgument, match=r"stop_token_ids\[1\]"):
        SamplingParams(stop_token_ids=(5, token_id), min_tokens=1).validate(vocab_size=100)


# --- token ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [[1, 2, 3], (1, 2, 3), np.array([1, 2, 3], dtype=np.uint8), range(1, 4)])
def test_token_ids_become_int32(values: object) -> None:
    array = token_array(values)
    assert array.dtype == np.int32
    assert array.tolist() == [1, 2, 3]


def test_no_token_ids_are_an_empty_array() -> None:
    array = token_array([])
    assert array.dtype == np.int32
    assert array.shape == (0,)


@pytest.mark.parametrize(
    "values",
    [
        [[1, 2]],
        [[1], [2, 3]],
        [[]],
        [1.0, 2.0],
        ["1"],
        [None],
        "12",
        7,
        None,
        {},
        [True, False],
        [2**80],
        np.zeros((0, 3), np.int32),
    ],
    ids=repr,
)
def test_what_is_not_a_flat_list_of_integers_is_refused(values: object) -> None:
    with pytest.raises(InvalidArgument, match=r"prompt=.* is not a flat list of integers") as caught:
        token_array(values, name="prompt")
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("values", "vocab_size", "field"),
    [
        ([5, -1], None, "token_ids[1]"),
        ([2**31], None, "token_ids[0]"),
        ([2**63], None, "token_ids[0]"),
        ([1, 2, 100], 100, "token_ids[2]"),
        ([0, 200, 300], 100, "token_ids[1]"),
    ],
)
def test_a_token_outside_the_vocabulary_is_named_by_its_position(values: list[int], vocab_size: int | None, field: str) -> None:
    with pytest.raises(InvalidArgument, match="is not in") as caught:
        token_array(values, vocab_size=vocab_size)
    assert caught.value.field == field


def test_small_integer_types_are_checked_against_large_vocabularies() -> None:
    assert token_array(np.array([127], dtype=np.int8), vocab_size=128256).tolist() == [127]
    with pytest.raises(InvalidArgument):
        token_array(np.array([-1], dtype=np.int8), vocab_size=128256)


def test_the_last_token_of_the_vocabulary_is_accepted() -> None:
    assert token_array([99], vocab_size=100).tolist() == [99]


# --- requests ---------------------------------------------------------------------------------------------------------


def request(**changes: Any) -> GenerateRequest:
    tokens = np.arange(10, dtype=np.int32)
    adapter = AdapterRef("planner", AdapterDigest("p"))
    key = prefix_key(tokens, block_size=4, context_len=6, model_digest="m", namespace="t", adapter_digest="p", sharing="eager")
    made = GenerateRequest(RequestId("r"), tokens, 6, 2, adapter, (adapter,), Sharing.EAGER, None, "t", SamplingParams(), key)
    return replace(made, **changes)


def test_resumed_tokens_are_not_prompt() -> None:
    assert (request().num_tokens, request().num_prompt_tokens) == (10, 8)


def test_the_writer_is_the_base_model_unless_an_adapter_is_named() -> None:
    assert request().writer_name == BASE_WRITER
    assert request(writer=AdapterRef("critic", AdapterDigest("c"))).writer_name == "c"


def test_a_request_crosses_processes() -> None:
    copy = pickle.loads(pickle.dumps(request()))
    assert copy.tokens.tolist() == list(range(10))
    assert (copy.prefix, copy.sharing, copy.sampling) == (request().prefix, Sharing.EAGER, SamplingParams())


def test_high_priority_goes_before_low() -> None:
    assert sorted([Priority.LOW, Priority.HIGH, Priority.NORMAL]) == [Priority.HIGH, Priority.NORMAL, Priority.LOW]


def test_prefill_tokens_add_up_beside_the_hits() -> None:
    usage = PrefixUsage(base_hit_tokens=5).plus_run(3).plus_run(4)
    assert usage == PrefixUsage(base_hit_tokens=5, prefill_tokens_run=7)
