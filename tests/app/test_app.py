"""Composition without a cluster: what a configuration comes to."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from ray.exceptions import ActorDiedError
from ray.serve import Application

from forkkv_cluster import app
from forkkv_cluster.app import RunningCluster, build_app, free_port, resolve_config, serve_app, start_cluster
from forkkv_cluster.core.config import ClusterConfig, parse_config
from forkkv_cluster.core.errors import InvalidArgument, Unavailable
from forkkv_cluster.preflight import check_before_start
from forkkv_cluster.testing.tiny_models import TinyKit
from forkkv_cluster.training.casebook import assets


def config_of(tiny_kit: TinyKit, **sections: object) -> ClusterConfig:
    adapters = [{"name": "planner", "path": str(tiny_kit.adapter_dirs["planner"])}]
    return parse_config({"model": {"path": str(tiny_kit.model_dir)}, "adapters": adapters, **sections})


def test_paths_become_absolute_and_the_model_gets_a_name(
    tiny_kit: TinyKit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve_config(config_of(tiny_kit))
    assert config.model.name == tiny_kit.model_dir.name
    assert config.gateway.session_store == f"sqlite:{tmp_path}/.forkkv/sessions.sqlite"


def test_without_a_model_the_casebook_model_is_served_with_its_adapters() -> None:
    config = resolve_config(ClusterConfig())
    assert (config.model.path, config.model.name) == (str(assets.model_dir()), "casebook")
    assert {adapter.name: Path(adapter.path) for adapter in config.adapters} == assets.adapter_dirs()
    check_before_start(config)


def test_the_configurations_own_name_and_adapters_win_over_the_embedded_ones(tiny_kit: TinyKit) -> None:
    hop = str(tiny_kit.adapter_dirs["planner"])
    config = resolve_config(parse_config({"model": {"name": "mine"}, "adapters": [{"name": "hop", "path": hop}]}))
    assert config.model.name == "mine"
    assert [adapter.path for adapter in config.adapters if adapter.name == "hop"] == [hop]


def test_an_installation_without_the_casebook_model_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "ROOT", tmp_path)
    with pytest.raises(InvalidArgument, match="lacks the casebook model") as caught:
        resolve_config(ClusterConfig())
    assert caught.value.field == "model.path"


@pytest.mark.parametrize(
    ("raw", "field"),
    [
        ({"model": {"path": "/nowhere"}}, "model.path"),
        ({"adapters": [{"name": "lost", "path": "/nowhere"}]}, "adapters.lost.path"),
    ],
)
def test_a_missing_directory_is_named_before_anything_starts(tiny_kit: TinyKit, raw: dict[str, object], field: str) -> None:
    config = parse_config({"model": {"path": str(tiny_kit.model_dir)}, **raw})
    with pytest.raises(InvalidArgument) as caught:
        build_app(config)
    assert caught.value.field == field


def test_an_application_is_built_without_a_cluster(tiny_kit: TinyKit) -> None:
    assert isinstance(build_app(config_of(tiny_kit)), Application)


def test_serve_can_parse_the_arguments_of_the_builder() -> None:
    (parameter,) = inspect.signature(serve_app).parameters.values()
    assert parameter.annotation is ClusterConfig


def test_a_cluster_that_listens_everywhere_is_reached_on_loopback() -> None:
    server = {"host": "0.0.0.0", "http_port": 8001, "grpc_port": 9001}
    cluster = RunningCluster(parse_config({"server": server}), owns_ray=False)
    assert (cluster.http_url, cluster.grpc_address) == ("http://127.0.0.1:8001", "127.0.0.1:9001")


@pytest.mark.parametrize("error", [ActorDiedError(), TimeoutError("HTTP proxies not available after 60s.")])
def test_a_proxy_that_does_not_start_is_unavailable_and_everything_is_stopped(
    tiny_kit: TinyKit, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def no_proxy(**options: object) -> None:
        raise error

    stopped: list[RunningCluster] = []
    monkeypatch.setattr(app, "_start_ray", lambda config: None)
    monkeypatch.setattr(app.serve, "start", no_proxy)
    monkeypatch.setattr(RunningCluster, "stop", lambda cluster: stopped.append(cluster))
    ports = {"server": {"http_port": 0, "grpc_port": 0}, "gateway": {"session_store": "memory:"}}
    with pytest.raises(Unavailable, match=r"proxies did not start .*try again"):
        start_cluster(config_of(tiny_kit, **ports))
    assert len(stopped) == 1


def test_a_free_port_can_be_bound() -> None:
    assert 0 < free_port() < 65536
