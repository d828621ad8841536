"""Errors cross process borders whole, and each says what it becomes on the wire."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator

import grpc
import pytest

from forkkv_cluster.core import errors
from forkkv_cluster.core.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    ForkKVError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unsupported,
    WorkerStopped,
)

EXAMPLES: tuple[ForkKVError, ...] = (
    InvalidArgument("top_p", 2, "is too large", "Send 1."),
    Unsupported("sharing", "auto", "is not there", "Name another."),
    Unauthenticated("who are you?"),
    NotFound("branch", "b", "Fork it."),
    AlreadyExists("branch", "b", "Choose another."),
    FailedPrecondition("not now"),
    Aborted("lost a race"),
    ResourceExhausted("full", 1.5),
    DeadlineExceeded("too late"),
    Cancelled("gone"),
    Unavailable("away"),
    WorkerStopped("its engine failed", is_fault=True),
    Internal("a bug"),
)


def subclasses(of: type[ForkKVError]) -> Iterator[type[ForkKVError]]:
    for kind in of.__subclasses__():
        yield kind
        yield from subclasses(kind)


def test_every_error_of_the_module_has_an_example_here() -> None:
    public = {kind for kind in subclasses(ForkKVError) if kind.__module__ == errors.__name__}
    assert {type(e) for e in EXAMPLES} == public


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_an_error_survives_pickling(error: ForkKVError) -> None:
    for made in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):
        assert type(made) is type(error)
        assert (str(made), made.message, made.attributes, made.args) == (
            str(error),
            error.message,
            error.attributes,
            error.args,
        )
        assert (made.code, made.http_status) == (error.code, error.http_status)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_every_code_is_a_grpc_status_and_every_status_an_http_error(error: ForkKVError) -> None:
    assert error.code in grpc.StatusCode.__members__
    assert 400 <= error.http_status < 600


def test_attributes_are_typed_after_pickling_too() -> None:
    assert pickle.loads(pickle.dumps(ResourceExhausted("full", 1.5))).retry_after_s == 1.5
    assert pickle.loads(pickle.dumps(InvalidArgument("top_p", 2, "is too large", "Send 1."))).field == "top_p"


def test_an_invalid_argument_names_field_value_problem_and_remedy() -> None:
    assert str(InvalidArgument("top_p", 2, "is too large", "Send 1.")) == "top_p=2: is too large. Send 1."


def test_a_long_value_is_shortened() -> None:
    error = InvalidArgument("tokens", list(range(10_000)), "is bad", "Mend it.")
    assert len(error.attributes["value"]) == 120
    assert error.attributes["value"].endswith("...")


def test_what_is_unsupported_is_also_an_invalid_argument() -> None:
    with pytest.raises(InvalidArgument, match="is not there"):
        raise EXAMPLES[1]
