"""Steps on tables, through the references: what goes beyond the parity matrix."""

from __future__ import annotations

from pathlib import Path

import torch

from forkkv_cluster.engine.gpu.packed_tables import PackedTables
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.families import FAMILIES, save
from tests.engine.model_engine import ModelEngine
from tests.engine.test_adapter_variants import make

CONTEXT = [(7 * i * i + 3) % 300 for i in range(40)]
OWN = [(11 * i + 5) % 300 for i in range(9)]


def test_an_adapter_too_wide_for_a_residual_runs_isolated(tmp_path: Path) -> None:
    """Rank 128 on k of a model with QK-norm, and what rescales K beside it, exceed the largest class."""
    torch.manual_seed(0)
    model_dir = save(FAMILIES["qwen3"](), tmp_path / "model")
    adapter = make(model_dir, tmp_path / "wide", {"target_modules": ["q_proj", "k_proj"], "r": 128, "lora_alpha": 8})
    answers = []
    for has_tables in (False, True):
        engine = ModelEngine(model_dir, {"wide": adapter}, has_tables=has_tables)
        ids = engine.run_all([engine.ask(CONTEXT, OWN, agent, "isolated", 6) for agent in ("wide", None)])
        answers.append([engine.outputs[request_id] for request_id in ids])
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]


def test_an_adapter_in_the_slot_of_one_that_left_answers_as_itself(tiny_kit: TinyKit) -> None:
    dirs = {name: tiny_kit.adapter_dirs[name] for name in ("planner", "critic")}
    alone = ModelEngine(tiny_kit.model_dir, {"critic": dirs["critic"]}, has_tables=False)
    (wanted,) = alone.run_all([alone.ask(CONTEXT, OWN, "critic", "isolated", 6)])
    engine = ModelEngine(tiny_kit.model_dir, {"planner": dirs["planner"]}, has_tables=True)
    engine.run_all([engine.ask(CONTEXT, OWN, "planner", "isolated", 6)])
    engine.engine.unload_adapter("planner")
    engine.load("critic", dirs["critic"])
    (own,) = engine.run_all([engine.ask(CONTEXT, OWN, "critic", "isolated", 6)])
    assert engine.outputs[own] == alone.outputs[wanted]


def test_tables_lie_apart_at_sixteen_bytes() -> None:
    tables = PackedTables({"a": (3,), "b": (2, 2), "c": (1,), "d": (5,)}, torch.device("cpu"))
    start = min(table.data_ptr() for table in tables.device.values())
    assert {(table.data_ptr() - start) % 16 for table in tables.device.values()} == {0}
    for number, name in enumerate(tables.host):
        tables.host[name][:] = number
    tables.upload()
    assert [int(tables.device[name].sum()) for name in tables.host] == [0, 4, 2, 15]
