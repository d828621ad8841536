"""One tokenizer for all tests of casebooks: training it takes a second."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkkv_cluster.training.casebook.tokenizer import Encoder, save_tokenizer


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("casebook-tokenizer")
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def encoder(tokenizer_dir: Path) -> Encoder:
    return Encoder(tokenizer_dir)
