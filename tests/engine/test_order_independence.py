"""What a request answers depends on the request alone: not on arrival, mates, chunks, pages, eviction or reloads."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from forkkv_cluster.core.request import GenerateRequest
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.model_engine import ModelEngine, assert_same_outputs

CONTEXT = [(7 * i * i + 3) % 2000 + 10 for i in range(45)]
AGENTS = ("critic", "coder", "tester", None)
SHARINGS = ("isolated", "residual", "eager", "base")
TURNS = [(agent, sharing, [20 + n, 30, 40 + 7 * n]) for n, agent in enumerate(AGENTS) for sharing in SHARINGS]
DECLARED = ("critic", "coder")


def requests(engine: ModelEngine) -> list[GenerateRequest]:
    return [engine.ask(CONTEXT, own, agent, sharing, declared=DECLARED) for agent, sharing, own in TURNS]


@pytest.fixture(scope="module")
def adapter_dirs(tiny_kit: TinyKit) -> dict[str, Path]:
    return {agent: tiny_kit.adapter_dirs[agent] for agent in AGENTS if agent is not None}


@pytest.fixture(scope="module")
def make(tiny_kit: TinyKit, adapter_dirs: dict[str, Path]) -> Callable[..., ModelEngine]:
    return lambda *args, **options: ModelEngine(tiny_kit.model_dir, adapter_dirs, *args, **options)


@pytest.fixture(scope="module")
def alone(make: Callable[..., ModelEngine]) -> tuple[ModelEngine, list[str]]:
    """Each turn by itself, on an engine that knows nothing yet."""
    total = make()
    ids = []
    for position in range(len(TURNS)):
        engine = make()
        (request_id,) = engine.run_all([requests(engine)[position]])
        total.outputs[request_id], total.logprobs[request_id] = engine.outputs[request_id], engine.logprobs[request_id]
        ids.append(request_id)
    return total, ids


def assert_as_alone(alone: tuple[ModelEngine, list[str]], engine: ModelEngine, ids: list[str]) -> None:
    for one, other in zip(alone[1], ids, strict=True):
        assert_same_outputs(alone[0], one, engine, other)


@pytest.mark.parametrize("seed", [0, 1])
def test_in_any_order_of_arrival_among_any_mates(alone, make: Callable[..., ModelEngine], seed: int) -> None:
    engine, chance = make(16), random.Random(seed)
    made, ids = requests(engine), [""] * len(TURNS)
    for position in chance.sample(range(len(TURNS)), len(TURNS)):
        ids[position] = engine.add(made[position])
        for _ in range(chance.randint(0, 3)):
            engine.step()
    engine.drain()
    assert_as_alone(alone, engine, ids)


@pytest.mark.parametrize(("page_size", "chunk"), [(4, 64), (16, 5), (64, 512)])
def test_in_any_chunks_on_pages_of_any_size(alone, make: Callable[..., ModelEngine], page_size: int, chunk: int) -> None:
    engine = make(page_size, max_num_batched_tokens=chunk)
    assert_as_alone(alone, engine, engine.run_all(requests(engine)))


def test_in_a_pool_that_evicts_and_preempts(alone, make: Callable[..., ModelEngine]) -> None:
    engine = make(4, num_slabs=26)
    for _ in range(2):  # the second time, among what the first has left
        assert_as_alone(alone, engine, engine.run_all(requests(engine)))
    counters = engine.engine.status().counters
    assert min(counters.evictions, counters.preemptions) > 0


def test_from_the_cache_and_after_a_reload_of_every_adapter(
    alone, make: Callable[..., ModelEngine], adapter_dirs: dict[str, Path]
) -> None:
    engine = make()
    engine.run_all(requests(engine))
    for name in adapter_dirs:
        engine.engine.unload_adapter(name)
    for name, path in reversed(adapter_dirs.items()):  # into other slots than before
        engine.load(name, path)
    before = engine.engine.status().counters.prefill_tokens_run
    ids = engine.run_all(requests(engine))
    assert engine.engine.status().counters.prefill_tokens_run - before < len(TURNS) * 20, "the cache was not used"
    assert_as_alone(alone, engine, ids)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_an_adapter_whose_b_is_zero_is_the_base_model(tiny_kit: TinyKit, tmp_path: Path, sharing: str) -> None:
    shutil.copytree(tiny_kit.adapter_dirs["coder"], tmp_path / "zero")
    path = tmp_path / "zero" / "adapter_model.safetensors"
    tensors = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in load_file(path).items()}
    save_file(tensors, path)
    engine = ModelEngine(tiny_kit.model_dir, {"zero": tmp_path / "zero"})
    ids = engine.run_all([engine.ask(CONTEXT, [11, 12], adapter, sharing, max_tokens=16) for adapter in ("zero", None)])
    assert_same_outputs(engine, ids[0], engine, ids[1])


def test_one_content_under_two_names_is_one_adapter(tiny_kit: TinyKit) -> None:
    path = tiny_kit.adapter_dirs["critic"]
    engine = ModelEngine(tiny_kit.model_dir, {"critic": path, "again": path})
    first = engine.ask(CONTEXT, [11, 12], "critic", "eager")
    engine.run_all([first])
    second = engine.ask(CONTEXT, [11, 12], "again", "eager")
    engine.run_all([second])
    usage = engine.last[second.request_id].usage
    assert usage is not None
    assert usage.prefill_tokens_run <= 16, "the other name's pages were not found"
    assert engine.outputs[first.request_id] == engine.outputs[second.request_id]


def test_a_context_that_its_own_adapter_wrote_is_no_fork(tiny_kit: TinyKit) -> None:
    """Writer and reader are one adapter: base KV plus residual is what its isolated pass would have written."""
    engine = ModelEngine(tiny_kit.model_dir, {"coder": tiny_kit.adapter_dirs["coder"]})
    written = engine.ask(CONTEXT, [11, 12], "coder", "residual", max_tokens=16, writer="coder")
    isolated = engine.ask(CONTEXT, [11, 12], "coder", "isolated", max_tokens=16)
    one, other = engine.run_all([written, isolated])
    assert_same_outputs(engine, one, engine, other)


def test_a_fork_of_a_branch_with_its_own_adapter_goes_on_as_the_branch(tiny_kit: TinyKit) -> None:
    """Both carry the same history with the same fork point; the fork runs nothing of it again."""
    engine = ModelEngine(tiny_kit.model_dir, {"critic": tiny_kit.adapter_dirs["critic"]})
    own = [11, 12, 13]
    (turn,) = engine.run_all([engine.ask(CONTEXT, own, "critic", "eager", max_tokens=20)])
    history = [*own, *engine.outputs[turn], 50]
    branch, fork = (engine.ask(CONTEXT, history, "critic", "eager") for _ in range(2))
    engine.run_all([branch])
    engine.run_all([fork])
    usage = engine.last[fork.request_id].usage
    assert usage is not None
    assert usage.prefill_tokens_run <= 16
    assert engine.outputs[branch.request_id] == engine.outputs[fork.request_id]
