"""The harness over a real checkpoint, with log probabilities: what the engine says, held against logits."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from forkkv_cluster.core.config import SchedulerConfig
from forkkv_cluster.core.request import AdapterRef, ContextRequest, GenerateRequest, TokenLogprob
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.gpu import shared_runs
from forkkv_cluster.engine.outputs import StepOutput
from forkkv_cluster.engine.torch_runner import TorchRunner
from forkkv_cluster.testing.manual_clock import ManualClock
from tests.engine.harness import FakeEngine

NUM_TOP = 5
HAS_TABLES = True if os.environ.get("FORKKV_TEST_TABLES") == "1" else None
"""The same tests, on the path that a GPU takes."""
if HAS_TABLES:
    shared_runs.MIN_RUN_TOKENS = 1  # contexts of tests are short


class ModelEngine(FakeEngine):
    """fp32; memory starts as NaN. ``num_slabs`` of KV, ``scheduler`` as ``SchedulerConfig``."""

    def __init__(
        self,
        model_dir: Path,
        adapter_dirs: Mapping[str, Path],
        page_size: int = 16,
        num_slabs: int = 400,
        *,
        merged_share: float = 0.5,
        device: str = "cpu",
        has_tables: bool | None = None,
        **scheduler: int,
    ) -> None:
        self.page_size = page_size
        options = {"has_tables": HAS_TABLES if has_tables is None else has_tables, "page_size": page_size}
        self.runner = TorchRunner.from_directory(model_dir, dtype="float32", device=device, **options)  # type: ignore[assignment]
        self.clock = ManualClock()
        config = SchedulerConfig(**{"max_num_batched_tokens": 64, "max_num_seqs": 16, **scheduler})
        kv_bytes = num_slabs * self.runner.geometry.slab_bytes
        self.engine = Engine(self.runner, kv_bytes, config, self.clock, merged_share=merged_share)
        self.runner.kv.arena.fill_(float("nan"))  # type: ignore[attr-defined]
        self.adapters = {}
        for name, path in adapter_dirs.items():
            self.load(name, path)
        self.outputs, self.last, self.first, self.errors = {}, {}, {}, {}
        self.logprobs: dict[str, list[TokenLogprob]] = {}
        step = self.engine.step

        def recorded() -> StepOutput:
            output = step()
            for chunk in output.chunks:
                self.logprobs.setdefault(chunk.request_id, []).extend(chunk.logprobs)
            return output

        self.engine.step = recorded  # type: ignore[method-assign]

    def load(self, name: str, path: Path) -> None:
        self.adapters[name] = AdapterRef(name, self.engine.load_adapter(name, str(path)).digest)

    def ask(
        self,
        context: Sequence[int],
        own: Sequence[int],
        adapter: str | None,
        sharing: str,
        max_tokens: int = 10,
        **options: object,
    ) -> GenerateRequest:
        """A greedy request with the ``NUM_TOP`` best log probabilities."""
        return self.request(context, own, adapter, sharing, max_tokens=max_tokens, logprobs=NUM_TOP, **options)  # type: ignore[arg-type]

    def run_all(self, requests: Sequence[GenerateRequest | ContextRequest]) -> list[str]:
        ids = [self.add(request) for request in requests]
        self.drain()
        assert self.errors == {}
        return ids

    def assert_answers(self, request_id: str, wanted: Tensor) -> None:
        """``wanted`` [n, V]: logits at which each token of the output was chosen.

        Log probabilities within 2e-4 (logits within 1e-4), and the greedy token wherever the two best are 1e-3 apart.
        """
        tokens, logprobs = self.outputs[request_id], self.logprobs[request_id]
        assert len(tokens) == len(logprobs) == len(wanted)
        expected = wanted.log_softmax(dim=-1)
        for token, said, row in zip(tokens, logprobs, expected, strict=True):
            best = row.topk(2)
            assert token == best.indices[0] or best.values[0] - best.values[1] <= 1e-3
            assert said.token_id == token
            places = torch.tensor([token, *(t for t, _ in said.top)])
            values = torch.tensor([said.logprob, *(value for _, value in said.top)])
            torch.testing.assert_close(values, row[places], atol=2e-4, rtol=0)


def assert_same_outputs(first: ModelEngine, one: str, second: ModelEngine, other: str) -> None:
    """The same tokens and log probabilities up to a tie (two best less than 1e-3 apart), after which texts may part."""
    for a, b in zip(first.logprobs[one], second.logprobs[other], strict=True):
        if a.token_id != b.token_id:
            assert abs(a.top[0][1] - a.top[1][1]) <= 1e-3, "the texts part where the margin is clear"
            return
        assert abs(a.logprob - b.logprob) < 2e-4
