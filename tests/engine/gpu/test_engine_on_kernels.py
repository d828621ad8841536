"""A whole engine on the kernels that a GPU runs, held token by token against the engine on the CPU's path, in fp32.

Here in Triton's interpreter, on models of two layers; on a GPU where there is one, CUDA graphs included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from forkkv_kernels.launch import interpreted

from forkkv_cluster.engine.gpu import shared_runs
from tests.engine.model_engine import ModelEngine
from tests.engine.test_parity_matrix import CONTEXT, OWN, TARGETS, build

KINDS = ("llama-biased-wide-heads", "qwen3")  # heads of 16, the least that grouped decode compiles for
PLACES = [pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=pytest.mark.gpu)]


@contextmanager
def _short_runs() -> Iterator[None]:
    """Contexts of tests are short: shared runs must pay at once, or none would be seen."""
    before, shared_runs.MIN_RUN_TOKENS = shared_runs.MIN_RUN_TOKENS, 1
    try:
        yield
    finally:
        shared_runs.MIN_RUN_TOKENS = before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_agents_under_every_sharing_answer_on_kernels_as_on_the_cpu(kind: str, place: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kit = build(kind, tmp_path)
    agents = (*TARGETS, None)
    answers = []
    for device, has_tables in (("cpu", False), (place, True)):
        with interpreted() if has_tables and place == "cpu" else nullcontext(), _short_runs():
            engine = ModelEngine(kit.model_dir, kit.adapter_dirs, 16, device=device, has_tables=has_tables)
            ids = [
                engine.run_all([engine.ask(CONTEXT, OWN, agent, sharing, 4, declared=list(TARGETS)) for agent in agents])
                for sharing in ("eager", "residual", "isolated")
            ]
        answers.append([engine.outputs[request_id] for group in ids for request_id in group])
    assert answers[0] == answers[1]
