"""The C++ path of the engine: when it is taken, and that it says what the PyTorch references say."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from forkkv_kernels._cpu.library import references_only
from forkkv_kernels.ops.paged_decode import is_available

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.engine.adapters import AdapterSlots
from forkkv_cluster.engine.attention import Attention, PagedAttention, attention_for
from forkkv_cluster.engine.attention_plan import plan_attention
from forkkv_cluster.engine.batch import AttentionSpan
from forkkv_cluster.engine.kv_buffers import KVBuffers
from forkkv_cluster.engine.layers.rotary import RopeSettings, RotaryTable
from forkkv_cluster.engine.native_attention import NativeAttention
from forkkv_cluster.testing.tiny_models import ADAPTER_NAMES, TinyKit
from tests.engine.model_engine import ModelEngine, assert_same_outputs

DOCUMENT = [(7 * i * i + 3) % 2000 + 10 for i in range(150)]  # ends inside a page
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(not is_available(CPU, torch.float32), reason="no C++ compiler")


def attention(dtype: torch.dtype, spans: Sequence[AttentionSpan] = ()) -> tuple[Attention, KVBuffers]:
    """Over memory of random numbers."""
    kv = KVBuffers(KVGeometry(1, 2, 16, 4, dtype.itemsize), 8, dtype, CPU)
    torch.nn.init.normal_(kv.arena, generator=torch.Generator().manual_seed(0))
    rotary = RotaryTable(RopeSettings(), 16, 64, dtype, CPU)
    return attention_for(plan_attention(spans, 4), kv, AdapterSlots(), rotary), kv


@pytest.mark.parametrize(
    ("dtype", "wanted"), [(torch.float32, NativeAttention), (torch.bfloat16, NativeAttention), (torch.float16, PagedAttention)]
)
def test_the_path_follows_from_the_dtype(dtype: torch.dtype, wanted: type) -> None:
    assert type(attention(dtype)[0]) is wanted


def test_the_references_run_where_they_are_asked_for() -> None:
    with references_only():
        assert type(attention(torch.float32)[0]) is PagedAttention
    assert type(attention(torch.float32)[0]) is NativeAttention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_long_and_short_spans_writes_every_row(dtype: torch.dtype) -> None:
    pages = np.arange(8, dtype=np.int32)
    spans = [
        AttentionSpan(0, 1, 9, pages[:3], None),
        AttentionSpan(1, 21, 5, pages[:7], None),
        AttentionSpan(21, 24, 4, pages, None),
    ]
    q = torch.randn(24, 6, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    native, _ = attention(dtype, spans)
    with references_only():
        reference, _ = attention(dtype, spans)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(native.run(0, q), reference.run(0, q), atol=tolerance, rtol=tolerance)


def run(kit: TinyKit, sharing: str, merged_share: float, is_native: bool) -> tuple[ModelEngine, list[str]]:
    """Every adapter and the base model at once, twice: the second time over what the first has left."""
    with nullcontext() if is_native else references_only():
        engine = ModelEngine(kit.model_dir, kit.adapter_dirs, max_num_batched_tokens=96, merged_share=merged_share)
        ids = []
        for own in ([5, 6, 7], list(range(20, 40))):
            agents = (*ADAPTER_NAMES, None)
            ids += engine.run_all(
                [engine.ask(DOCUMENT, own, agent, sharing, max_tokens=12, declared=ADAPTER_NAMES) for agent in agents]
            )
        assert (engine.engine.status().merged_bytes_held > 0) == (merged_share > 0 and sharing in ("eager", "residual"))
        return engine, ids


@pytest.mark.parametrize(
    ("sharing", "merged_share"),
    [("isolated", 0.5), ("base", 0.5), ("eager", 0.5), ("eager", 0.0), ("residual", 0.5), ("residual", 0.0)],
)
def test_both_paths_give_the_same_greedy_tokens(tiny_kit: TinyKit, sharing: str, merged_share: float) -> None:
    (native, ids), (reference, others) = (run(tiny_kit, sharing, merged_share, is_native) for is_native in (True, False))
    for one, other in zip(ids, others, strict=True):
        assert_same_outputs(native, one, reference, other)


ENGINE = """
import sys
from pathlib import Path
from tests.engine.test_native_attention import answer
print(answer(Path(sys.argv[1]), Path(sys.argv[2])))
"""


def answer(model_dir: Path, adapter_dir: Path) -> list[int]:
    engine = ModelEngine(model_dir, {"planner": adapter_dir})
    (request_id,) = engine.run_all([engine.ask(range(10, 60), [5, 6], "planner", "residual", max_tokens=6)])
    return engine.outputs[request_id]


def test_the_engine_answers_without_a_compiler_as_it_does_with_one(tiny_kit: TinyKit) -> None:
    paths = (tiny_kit.model_dir, tiny_kit.adapter_dirs["planner"])
    command = [sys.executable, "-c", ENGINE, *map(str, paths)]
    variables = {**os.environ, "PATH": "", "CXX": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=240)
    assert done.stderr.count("CPU kernels are not there") == 1
    assert done.stdout == f"{answer(*paths)}\n"
