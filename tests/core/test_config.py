"""The configuration file: every mistake is refused at start, by the name of its field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from forkkv_cluster.core.config import ClusterConfig, load_config, parse_bytes, parse_config
from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.request import Sharing, WriterMode


def nested(path: str, value: object) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {head: nested(rest, value)} if rest else {head: value}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.dtype", "int4"),
        ("model.device", "tpu"),
        ("model.max_model_len", -1),
        ("cache.kv_bytes", 0),
        ("cache.kv_bytes", "lots"),
        ("cache.kv_bytes", "-1GiB"),
        ("cache.kv_bytes", True),
        ("cache.kv_bytes", 1.5),
        ("cache.host_bytes", -1),
        ("cache.host_bytes", "much"),
        ("cache.page_size", 0),
        ("cache.page_size", 2048),
        ("cache.page_size", "many"),
        ("scheduler.max_num_seqs", 0),
        ("scheduler.max_num_batched_tokens", 0),
        ("scheduler.retry_after_s", 0),
        ("worker.num_replicas", 0),
        ("worker.num_gpus", -1),
        ("worker.num_threads", 0),
        ("gateway.max_ongoing_requests", 0),
        ("gateway.resume_grace_s", -1),
        ("routing.policy", "random"),
        ("routing.speculative_ttl_s", 0),
        ("server.http_port", 65536),
        ("server.grpc_port", -1),
        ("server.app_name", ""),
        ("defaults.session_sharing", "some"),
        ("defaults.writer", "last"),
        ("defaults.max_tokens", 0),
        ("adapters", "planner"),
        ("cache", 5),
    ],
)
def test_a_bad_value_is_refused_by_its_path(path: str, value: object) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_config(nested(path, value))
    assert caught.value.field == path
    assert "forkkv config" in caught.value.attributes["remedy"]
    assert "Value error" not in caught.value.message


@pytest.mark.parametrize("path", ["colour", "cache.pages", "model.nmae", "server.tls", "defaults.sharing"])
def test_an_unknown_key_is_refused_by_its_path(path: str) -> None:
    with pytest.raises(InvalidArgument, match="is not a known key") as caught:
        parse_config(nested(path, 7))
    assert caught.value.field == path


def test_a_bad_adapter_is_named_by_its_place() -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_config({"adapters": [{"name": "a", "path": "p"}, {"name": "b"}]})
    assert caught.value.field == "adapters.1.path"


def test_two_adapters_of_one_name_are_refused() -> None:
    adapters = [{"name": "a", "path": "p"}, {"name": "a", "path": "q"}]
    with pytest.raises(InvalidArgument, match="the name 'a' is used 2 times"):
        parse_config({"adapters": adapters})


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.quantization", "awq"),
        ("quantization", "gptq"),
        ("scheduler.speculative_decoding", {"model": "draft"}),
        ("speculative_decoding", True),
        ("worker.disaggregation", True),
        ("worker.tensor_parallel_size", 2),
    ],
)
def test_a_feature_that_is_not_there_is_refused_by_name(path: str, value: object) -> None:
    with pytest.raises(Unsupported, match="is not supported") as caught:
        parse_config(nested(path, value))
    assert caught.value.field == path.rpartition(".")[2]


def test_sessions_and_adapters_may_be_served_auto_by_default() -> None:
    config = parse_config({"defaults": {"session_sharing": "auto", "adapter_sharing": "auto"}})
    assert (config.defaults.session_sharing, config.defaults.adapter_sharing) == (Sharing.AUTO, Sharing.AUTO)


@pytest.mark.parametrize("bound", [0, 1, -0.1])
def test_a_bound_on_disagreement_that_bounds_nothing_or_everything_is_refused(bound: float) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_config({"calibration": {"max_disagreement": bound}})
    assert caught.value.field == "calibration.max_disagreement"


@pytest.mark.parametrize("raw", [[], "model: tiny", 7])
def test_a_file_that_is_no_mapping_is_refused(raw: object) -> None:
    with pytest.raises(InvalidArgument, match="is not a mapping"):
        parse_config(raw)


def test_several_gateways_need_a_store_that_they_share() -> None:
    with pytest.raises(InvalidArgument, match="num_replicas is 2 but session_store is 'sqlite:x'") as caught:
        parse_config({"gateway": {"num_replicas": 2, "session_store": "sqlite:x"}})
    assert caught.value.field == "gateway"
    parse_config({"gateway": {"num_replicas": 2, "session_store": "redis://127.0.0.1:6379/0"}})


def test_an_unknown_session_store_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="postgres://x' is not memory:, sqlite:PATH or redis://"):
        parse_config({"gateway": {"session_store": "postgres://x"}})


@pytest.mark.parametrize(
    "gateway",
    [
        {"api_tokens": {"hunter2": 5}},
        {"api_tokens": ["hunter2"]},
        {"salt": ["hunter2"]},
        {"salt": "hunter2", "num_replicas": 2},
        {"salt": "hunter2", "api_tokens": {"hunter2": "t"}, "session_store": "file"},
    ],
)
def test_an_error_tells_no_secrets(gateway: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument, match="gateway") as caught:
        parse_config({"gateway": gateway})
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in str(caught.value.attributes)


# --- what is accepted -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [None, {}])
def test_an_empty_file_is_the_defaults(raw: object) -> None:
    config = parse_config(raw)
    assert config == ClusterConfig()
    assert (config.defaults.session_sharing, config.defaults.adapter_sharing) == (Sharing.AUTO, Sharing.AUTO)
    assert config.defaults.writer is WriterMode.CANONICAL
    assert config.server.host == "127.0.0.1"


def test_the_defaults_survive_a_round_trip() -> None:
    assert parse_config(json.loads(ClusterConfig().model_dump_json())) == ClusterConfig()


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (1000, 1000),
        ("1000", 1000),
        ("1000b", 1000),
        ("1KiB", 1024),
        ("1kb", 1000),
        ("512 MiB", 512 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("2GB", 2 * 10**9),
        ("1TiB", 2**40),
        (" 1gib ", 2**30),
    ],
)
def test_sizes_are_read_with_their_units(text: object, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "1.2.3GiB", "1e9", "ten", "1PiB", "-5", ".", True, None, 1.5])
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match="for example 512MiB"):
        parse_bytes(text)


def sections(model: type[BaseModel], prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += sections(kind, f"{prefix}{name}.")
        else:
            found.append((prefix + name, field))
    return found


def test_every_field_has_a_doc_line_and_a_default() -> None:
    for path, field in sections(ClusterConfig):
        assert field.description, path
        assert field.description.endswith("."), path
        assert not field.is_required(), path


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ClusterConfig().cache.page_size = 0


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_yaml_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("cache: {kv_bytes: 1MiB, host_bytes: 3 MiB}\nadapters:\n  - {name: a, path: dir/a}\n")
    config = load_config(path)
    assert (config.cache.kv_bytes, config.cache.host_bytes) == (2**20, 3 * 2**20)
    assert config.adapters[0].name == "a"


def test_a_json_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text('{"worker": {"num_replicas": 3}}')
    assert load_config(path).worker.num_replicas == 3


def test_an_empty_yaml_file_is_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("# nothing\n")
    assert load_config(path) == ClusterConfig()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"missing\.yaml.*cannot be read"):
        load_config(tmp_path / "missing.yaml")


def test_a_file_that_is_not_yaml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("cache: {kv_bytes: [")
    with pytest.raises(InvalidArgument, match="is not YAML"):
        load_config(path)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(b"model:\n  name: \xff\xfe\n")
    with pytest.raises(InvalidArgument, match=r"cluster\.yaml") as caught:
        load_config(path)
    assert caught.value.field == "config"
