"""The whole engine over a model with QK-norm answers as the oracle does, and refuses by name what has no rank class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from forkkv_cluster.core.errors import Unsupported
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.qwen3_kit import ADAPTERS, WITH_K, build_qwen3_kit
from tests.engine.test_adapter_variants import make
from tests.engine.test_engine_exactness import Judge, TinyEngine

CONTEXT = [(7 * i * i + 3) % 300 for i in range(43)]  # ends inside a page of 4 and of 16
SHARINGS = ["eager", "residual"]

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> TinyKit:
    return build_qwen3_kit(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def judge(kit: TinyKit) -> Judge:
    return Judge(kit)


def own_tokens(seed: int, num_tokens: int = 7) -> list[int]:
    return [(31 * i + 17 * seed + 5) % 300 for i in range(num_tokens)]


def run_all(
    engine: TinyEngine, sharing: str, names: Sequence[str], max_tokens: int = 8
) -> list[tuple[str, list[int], list[int]]]:
    """(adapter, own tokens, answer) of one branch of each adapter, all at once."""
    turns = [(name, own_tokens(seed)) for seed, name in enumerate(names)]
    ids = [
        engine.add(engine.request(CONTEXT, own, name, sharing, max_tokens=max_tokens, declared=list(ADAPTERS)))
        for name, own in turns
    ]
    engine.drain()
    assert engine.errors == {}
    return [(name, own, engine.outputs[request]) for request, (name, own) in zip(ids, turns, strict=True)]


@pytest.mark.parametrize(("page_size", "chunk"), [(4, 64), (16, 7), (16, 64)], ids=str)
@pytest.mark.parametrize("sharing", [*SHARINGS, "base", "isolated"])
def test_all_adapters_at_once_answer_as_the_oracle(
    kit: TinyKit, judge: Judge, sharing: str, page_size: int, chunk: int
) -> None:
    engine = TinyEngine(kit, page_size, max_num_batched_tokens=chunk)
    for name, own, answer in run_all(engine, sharing, list(ADAPTERS)):
        judge.check(CONTEXT, own, answer, name, sharing)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_small_pool_preempts_and_evicts_without_changing_a_token(kit: TinyKit, judge: Judge, sharing: str) -> None:
    engine = TinyEngine(kit, 4, num_slabs=8, max_num_batched_tokens=16)
    names = WITH_K * 2
    for name, own, answer in run_all(engine, sharing, names, max_tokens=12):
        judge.check(CONTEXT, own, answer, name, sharing)
    counters = engine.engine.status().counters
    assert counters.evictions > 0
    assert counters.preemptions > 0


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_stream_resumed_elsewhere_goes_on_as_it_would_have(kit: TinyKit, sharing: str) -> None:
    options = {"declared": list(ADAPTERS), "temperature": 0.8, "seed": 11, "max_tokens": 12}
    whole = TinyEngine(kit, 16)
    tokens = whole.run(whole.request(CONTEXT, own_tokens(1), "qkvo", sharing, **options))
    other = TinyEngine(kit, 16, max_num_batched_tokens=20)
    resumed = other.run(other.request(CONTEXT, own_tokens(1), "qkvo", sharing, resumed=tokens[:5], **options))
    assert resumed == tokens[5:]


def test_an_adapter_declared_late_is_served_by_the_base_model(kit: TinyKit, judge: Judge) -> None:
    engine = TinyEngine(kit, 16)
    engine.run(engine.context_request(CONTEXT, ["qv"]))
    answer = engine.run(engine.request(CONTEXT, own_tokens(2), "biased", "eager", declared=["qv", "biased"]))
    judge.check(CONTEXT, own_tokens(2), answer, "biased", "eager")


def test_the_first_writer_is_read_by_the_second_agent(kit: TinyKit, judge: Judge) -> None:
    engine = TinyEngine(kit, 16)
    for name in ("k-wider-than-v", "qkvo"):
        request = engine.request(CONTEXT, own_tokens(3), name, "residual", declared=list(ADAPTERS), writer="k-wider-than-v")
        judge.check(CONTEXT, own_tokens(3), engine.run(request), name, "residual", writer="k-wider-than-v")


@pytest.fixture(scope="module")
def with_a_wide_adapter(kit: TinyKit, tmp_path_factory: pytest.TempPathFactory) -> TinyKit:
    wide = make(kit.model_dir, tmp_path_factory.mktemp("wide") / "wide", {"target_modules": ["q_proj", "k_proj"], "r": 127})
    return TinyKit(Path(kit.directory), kit.model_dir, {"wide": wide, "qv": kit.adapter_dirs["qv"]})


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_residual_wider_than_any_rank_class_is_refused_with_a_remedy(with_a_wide_adapter: TinyKit, sharing: str) -> None:
    engine = TinyEngine(with_a_wide_adapter, 16)
    with pytest.raises(
        Unsupported, match=rf"sharing.*{sharing}.*wide needs 129 columns.*widest page has 128.*Use isolated or base"
    ):
        engine.add(engine.request(CONTEXT, own_tokens(4), "wide", sharing))
    if sharing == "eager":
        with pytest.raises(Unsupported, match="wide needs 129 columns"):
            engine.add(engine.context_request(CONTEXT, ["qv", "wide"]))
    engine.drain()
    engine.engine.check_invariants()


@pytest.mark.parametrize("sharing", ["isolated", "base"])
def test_an_adapter_without_a_rank_class_runs_isolated_and_base(with_a_wide_adapter: TinyKit, sharing: str) -> None:
    engine = TinyEngine(with_a_wide_adapter, 16)
    answer = engine.run(engine.request(CONTEXT, own_tokens(4), "wide", sharing))
    Judge(with_a_wide_adapter).check(CONTEXT, own_tokens(4), answer, "wide", sharing)


def test_an_adapter_shares_though_another_that_is_declared_cannot(with_a_wide_adapter: TinyKit) -> None:
    engine = TinyEngine(with_a_wide_adapter, 16)
    alone = engine.run(engine.request(CONTEXT, own_tokens(5), "qv", "eager"))
    declared = engine.run(engine.request(CONTEXT, own_tokens(5), "qv", "eager", declared=["wide", "qv"], namespace="other"))
    assert alone == declared
    assert len(alone) == 6
