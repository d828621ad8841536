"""Content digests."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.engine.digest import digest_files


def write(directory: Path, **contents: str) -> list[Path]:
    directory.mkdir()
    for name, content in contents.items():
        (directory / name).write_text(content)
    return [directory / name for name in contents]


def test_the_same_content_has_the_same_digest_anywhere(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", x="1", y="2"), write(tmp_path / "b", x="1", y="2")
    assert digest_files(first) == digest_files(reversed(second))
    assert len(digest_files(first)) == 32


def test_content_and_names_both_count(tmp_path: Path) -> None:
    contents = ({"x": "1", "y": "2"}, {"x": "2", "y": "1"}, {"x": "12", "y": ""}, {"x": "1", "z": "2"})
    assert len({digest_files(write(tmp_path / str(i), **c)) for i, c in enumerate(contents)}) == 4


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="nowhere"):
        digest_files([tmp_path / "nowhere"])
