"""What an adapter was trained for is read from its directory, and never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forkkv_cluster.core.adapter_semantics import (
    FORMAT,
    SEMANTICS_FILE,
    TRAINABLE,
    mismatched_training,
    read_trained_for,
    write_trained_for,
)
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterRef, Sharing


@pytest.mark.parametrize("sharing", TRAINABLE)
def test_what_was_written_is_read_again(tmp_path: Path, sharing: Sharing) -> None:
    write_trained_for(tmp_path, sharing, {"steps": 3})
    assert read_trained_for(tmp_path) is sharing


def test_an_ordinary_directory_says_nothing(tmp_path: Path) -> None:
    assert read_trained_for(tmp_path) is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "not JSON"),
        ("[]", FORMAT),
        (json.dumps({"format": "forkkv-adapter/2", "trained_for": "eager"}), FORMAT),
        (json.dumps({"format": FORMAT}), "trained_for"),
        (json.dumps({"format": FORMAT, "trained_for": "auto"}), "auto"),  # a choice among sharings, no semantics
        (json.dumps({"format": FORMAT, "trained_for": ["eager"]}), "trained_for"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_the_files_name(tmp_path: Path, text: str, named: str) -> None:
    (tmp_path / SEMANTICS_FILE).write_text(text)
    with pytest.raises(InvalidArgument, match=named) as caught:
        read_trained_for(tmp_path)
    assert SEMANTICS_FILE in str(caught.value)


def test_only_an_adapter_that_says_otherwise_is_served_unlike_its_training() -> None:
    trained = AdapterRef("planner", AdapterDigest("p"), (), Sharing.EAGER)
    assert mismatched_training(trained, Sharing.ISOLATED) is Sharing.EAGER
    assert mismatched_training(trained, Sharing.EAGER) is None
    assert mismatched_training(trained, Sharing.AUTO) is None
    assert mismatched_training(AdapterRef("planner", AdapterDigest("p")), Sharing.EAGER) is None
    assert mismatched_training(None, Sharing.EAGER) is None


def test_what_it_was_trained_for_is_nothing_that_an_adapter_is_known_by() -> None:
    assert AdapterRef("planner", AdapterDigest("p"), (), Sharing.EAGER) == AdapterRef("planner", AdapterDigest("p"))
