"""Starts that must fail do so at once, with the cause, and without Ray. Through ``start_cluster``, as ``forkkv serve`` does."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from forkkv_cluster.app import root_cause, start_cluster
from forkkv_cluster.core.config import parse_config
from forkkv_cluster.core.errors import FailedPrecondition, ForkKVError, InvalidArgument
from forkkv_cluster.gateway.sqlite_store import SqliteSessionStore
from forkkv_cluster.testing.tiny_models import TinyKit


def refused(raw: dict[str, object]) -> ForkKVError:
    """The error of a start that must not get as far as Ray."""
    was_initialized = ray.is_initialized()
    base = {"gateway": {"session_store": "memory:"}, "server": {"http_port": 0, "grpc_port": 0}}
    with pytest.raises(ForkKVError) as caught:
        start_cluster(parse_config({**base, **raw})).stop()
    assert ray.is_initialized() == was_initialized
    return caught.value


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage"), [("model.safetensors", cut), ("model.safetensors", Path.unlink), ("config.json", Path.unlink)]
)
def test_a_damaged_checkpoint_is_named(tiny_kit: TinyKit, tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    model_dir = shutil.copytree(tiny_kit.model_dir, tmp_path / "model")
    damage(model_dir / name)
    error = refused({"model": {"path": str(model_dir)}})
    assert isinstance(error, InvalidArgument)
    assert name in error.message


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter_is_named(tiny_kit: TinyKit, tmp_path: Path, name: str) -> None:
    directory = shutil.copytree(tiny_kit.adapter_dirs["planner"], tmp_path / "adapter")
    cut(directory / name)
    error = refused({"model": {"path": str(tiny_kit.model_dir)}, "adapters": [{"name": "planner", "path": str(directory)}]})
    assert isinstance(error, InvalidArgument)
    assert str(directory / name) in error.message


def test_an_adapter_may_not_take_the_base_models_name(tiny_kit: TinyKit) -> None:
    adapter = {"name": tiny_kit.model_dir.name, "path": str(tiny_kit.adapter_dirs["planner"])}
    error = refused({"model": {"path": str(tiny_kit.model_dir)}, "adapters": [adapter]})
    assert isinstance(error, InvalidArgument)
    assert error.field == f"adapters.{tiny_kit.model_dir.name}.name"


async def test_a_session_store_that_another_server_owns_is_named(tiny_kit: TinyKit, tmp_path: Path) -> None:
    store = SqliteSessionStore(tmp_path / "sessions.sqlite")
    try:
        raw = {"model": {"path": str(tiny_kit.model_dir)}, "gateway": {"session_store": f"sqlite:{store.path}"}}
        error = refused(raw)
    finally:
        await store.close()
    assert isinstance(error, FailedPrecondition)
    assert "belongs to the running process" in error.message


@pytest.mark.parametrize("field", ["http_port", "grpc_port"])
def test_a_port_that_is_in_use_is_named(tiny_kit: TinyKit, field: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        ports = {"http_port": 0, "grpc_port": 0, field: other.getsockname()[1]}
        error = refused({"model": {"path": str(tiny_kit.model_dir)}, "server": ports})
    assert isinstance(error, InvalidArgument)
    assert error.field == f"server.{field}"


def test_of_a_replicas_traceback_the_error_is_told() -> None:
    message = (
        "The deployment failed to start 6 times in a row. Error:\n  File 'x.py', line 1, in __init__\n"
        "RuntimeError: Traceback (most recent call last):\n"
        "forkkv_cluster.core.errors.InvalidArgument: tensor='a': has shape (1,), not (2,). Load another."
    )
    assert root_cause([message]) == "InvalidArgument: tensor='a': has shape (1,), not (2,). Load another."
    assert root_cause(["", "Out of memory\n"]) == "Out of memory"
