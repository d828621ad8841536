"""The runner with the sampler behind it, on real weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.test_engine_exactness import CONTEXT, TinyEngine


@pytest.fixture
def overflowing_adapter(tiny_kit: TinyKit, tmp_path: Path) -> str:
    """An adapter whose weights are finite and whose products are not."""
    shutil.copytree(tiny_kit.adapter_dirs["planner"], tmp_path / "overflowing")
    path = tmp_path / "overflowing" / "adapter_model.safetensors"
    weights = {name: w.fill_(3e38) if "lora_B" in name else w for name, w in load_file(path).items()}
    save_file(weights, path)
    return str(path.parent)


def test_an_overflowing_adapter_fails_its_own_requests_and_changes_no_other(
    tiny_kit: TinyKit, overflowing_adapter: str
) -> None:
    alone = TinyEngine(tiny_kit, 16)
    expected = alone.run(alone.request(CONTEXT, [5, 6], "critic", declared=["critic"]))

    engine = TinyEngine(tiny_kit, 16)
    info = engine.engine.load_adapter("overflowing", overflowing_adapter)
    engine.adapters["overflowing"] = type(engine.adapters["critic"])("overflowing", info.digest)
    poisoned = engine.add(engine.request(CONTEXT, [5, 6], "overflowing", declared=["critic", "overflowing"]))
    sound = engine.add(engine.request(CONTEXT, [5, 6], "critic", declared=["critic", "overflowing"]))
    engine.drain()
    assert "overflowing" in str(engine.errors[poisoned])
    assert engine.outputs[sound] == expected
