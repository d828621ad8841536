"""Fixtures that many tests share. Built once per session: the tiny kit takes a few seconds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from forkkv_cluster.testing.tiny_models import TinyKit, build_tiny_kit
from tests.fidelity_kit import FidelityKit, build_fidelity_kit

if TYPE_CHECKING:
    from forkkv_cluster.app import RunningCluster


@pytest.fixture(scope="session")
def tiny_kit(tmp_path_factory: pytest.TempPathFactory) -> TinyKit:
    """The tiny random Llama with its eight adapters."""
    return build_tiny_kit(tmp_path_factory.mktemp("tiny") / "kit")


@pytest.fixture(scope="session")
def tiny_model_dir(tiny_kit: TinyKit) -> Path:
    return tiny_kit.model_dir


@pytest.fixture(scope="session")
def tiny_adapter_dirs(tiny_kit: TinyKit) -> Mapping[str, Path]:
    """PEFT directories by adapter name."""
    return tiny_kit.adapter_dirs


@pytest.fixture(scope="session")
def fidelity_kit(tmp_path_factory: pytest.TempPathFactory) -> FidelityKit:
    """A small random model with adapters that differ in what sharing loses on them."""
    return build_fidelity_kit(tmp_path_factory.mktemp("fidelity"))


@pytest.fixture(scope="session")
def serve_cluster(tiny_kit: TinyKit, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Two workers with four adapters behind one gateway, on free ports; one for the whole run of the tests."""
    from forkkv_cluster.app import start_cluster  # Here: Ray takes seconds that most tests need not wait for.
    from forkkv_cluster.core.config import parse_config

    config = parse_config(
        {
            "model": {"path": str(tiny_kit.model_dir), "dtype": "float32"},
            "adapters": [{"name": n, "path": str(tiny_kit.adapter_dirs[n])} for n in ("planner", "critic", "coder", "tester")],
            "cache": {"kv_bytes": "32MiB", "page_size": 16},
            "gateway": {"session_store": f"sqlite:{tmp_path_factory.mktemp('sessions')}/sessions.sqlite"},
            "server": {"http_port": 0, "grpc_port": 0},
            # What most tests of sharing are about; and no worker measures adapters beside them.
            "defaults": {"session_sharing": "eager", "adapter_sharing": "isolated"},
        }
    )
    with start_cluster(config) as cluster:
        yield cluster
