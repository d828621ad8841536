"""The committed modules are what the .proto files give."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from forkkv_cluster.api.v1 import cluster_pb2, common_pb2, sessions_pb2
from forkkv_cluster.core.request import Priority, Sharing
from forkkv_cluster.core.session import JoinWhat
from forkkv_cluster.core.status import EngineCounters

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "protos" / "generate.py"


def test_committed_modules_are_fresh() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_stale_module_is_found(tmp_path: Path) -> None:
    namespace: dict[str, object] = {"__name__": "generate", "__file__": str(SCRIPT)}
    exec(compile(SCRIPT.read_text(), str(SCRIPT), "exec"), namespace)
    (tmp_path / "a_pb2.py").write_text("old")
    (tmp_path / "left_over_pb2.pyi").write_text("x")
    differences = namespace["differences"]
    assert differences({"a_pb2.py": "new", "b_pb2.py": "new"}, tmp_path) == [  # type: ignore[operator]
        "a_pb2.py",
        "b_pb2.py",
        "left_over_pb2.pyi",
    ]


def names(enum: Any, prefix: str) -> set[str]:
    return {value.name.removeprefix(prefix) for value in enum.DESCRIPTOR.values}


def test_enums_have_the_values_of_core() -> None:
    assert names(common_pb2.Sharing, "SHARING_") == {"UNSPECIFIED", *(sharing.name for sharing in Sharing)}
    assert names(common_pb2.Priority, "PRIORITY_") == {"UNSPECIFIED", *(priority.name for priority in Priority)}
    assert names(sessions_pb2.JoinWhat, "JOIN_WHAT_") == {"UNSPECIFIED", *(what.name for what in JoinWhat)}


def test_counters_have_the_fields_of_core() -> None:
    assert set(cluster_pb2.EngineCounters.DESCRIPTOR.fields_by_name) == set(EngineCounters.__slots__)


def test_token_ids_travel_packed() -> None:
    field = common_pb2.TokenIds.DESCRIPTOR.fields_by_name["ids"]
    assert field.type == FieldDescriptor.TYPE_INT32
    assert len(common_pb2.TokenIds(ids=[1] * 100).SerializeToString()) < 110
