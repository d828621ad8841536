"""Reading adapters again beside a running engine: the thread, and real files that change."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from forkkv_cluster.core.config import AdapterMemoryConfig, ClusterConfig, parse_config
from forkkv_cluster.core.errors import FailedPrecondition, Internal
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.engine.adapter_loader import LoadResult, ThreadLoader, read_again
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.testing.fake_model_runner import FakeWeights
from forkkv_cluster.testing.tiny_models import TinyKit

INFO = AdapterInfo("a", AdapterDigest("digest"), "path", 8, ("k_proj",), 32)


def results_of(loader: ThreadLoader, count: int) -> list[LoadResult]:
    results: list[LoadResult] = []
    while len(results) < count:
        loader.wait(5.0)
        results += loader.take()
    return results


def test_the_caller_goes_on_while_a_file_is_read() -> None:
    may_end = threading.Event()

    def read(name: str, path: str) -> Weights:
        assert may_end.wait(10)
        return FakeWeights(INFO, 8)

    loader = ThreadLoader(read)
    loader.submit(INFO)
    assert loader.take() == []
    loader.wait(0.001)  # returns though nothing is there
    may_end.set()
    (result,) = results_of(loader, 1)
    assert result.weights == FakeWeights(INFO, 8)


def test_an_unexpected_error_becomes_a_result_and_the_thread_goes_on() -> None:
    def read(name: str, path: str) -> Weights:
        if name == "bad":
            raise MemoryError("no room")
        return FakeWeights(INFO, 8)

    loader = ThreadLoader(read)
    loader.submit(AdapterInfo("bad", INFO.digest, "path", 8, (), 0))
    loader.submit(INFO)
    bad, good = results_of(loader, 2)
    assert isinstance(bad.error, Internal)
    assert good.weights is not None


def test_other_content_than_was_registered_is_an_error_that_names_both() -> None:
    result = read_again(lambda name, path: FakeWeights(INFO, 8), AdapterInfo("a", AdapterDigest("old"), "path", 8, (), 0))
    assert isinstance(result.error, FailedPrecondition)
    assert "'a'" in result.error.message
    assert "digest old, now digest" in result.error.message


# --- the whole engine, with real files --------------------------------------------------------------------------------


def config_of(kit: TinyKit, adapters: Mapping[str, Path], memory: AdapterMemoryConfig) -> ClusterConfig:
    return parse_config(
        {
            "model": {"path": str(kit.model_dir), "dtype": "float32"},
            "adapters": [{"name": name, "path": str(path)} for name, path in adapters.items()],
            "cache": {"kv_bytes": "16MiB", "page_size": 16},
            "adapter_memory": memory.model_dump(),
            "defaults": {"adapter_sharing": "isolated"},  # who is read is who is asked for
        }
    )


@pytest.fixture
def adapters(tiny_kit: TinyKit, tmp_path: Path) -> dict[str, Path]:
    """Copies, so that a test may change them."""
    names = ("planner", "critic", "coder")
    return {name: Path(shutil.copytree(tiny_kit.adapter_dirs[name], tmp_path / name)) for name in names}


@pytest.mark.parametrize("host_bytes", [0, 2**30], ids=["from disk", "from host memory"])
def test_one_slot_for_three_adapters_gives_the_tokens_of_three_slots(
    tiny_kit: TinyKit, adapters: dict[str, Path], host_bytes: int
) -> None:
    names = [*adapters, *adapters]
    prompts = [[7, 8, 9 + index] for index in range(len(names))]
    outputs = []
    for slots in (1, 3):
        memory = AdapterMemoryConfig(max_device_adapters=slots, host_bytes=host_bytes)
        llm = LLM.from_config(config_of(tiny_kit, adapters, memory))
        outputs.append([c.token_ids for c in llm.generate(prompts, adapter=names, max_tokens=4, temperature=0.0)])
        status = llm.status().adapter_memory
        assert status.num_on_device == slots
        assert (status.disk_loads > 0) == (slots == 1 and host_bytes == 0)
    assert outputs[0] == outputs[1]


def test_a_file_that_changed_on_disk_fails_the_request_by_name(tiny_kit: TinyKit, adapters: dict[str, Path]) -> None:
    llm = LLM.from_config(config_of(tiny_kit, adapters, AdapterMemoryConfig(max_device_adapters=1, host_bytes=0)))
    shutil.copyfile(
        tiny_kit.adapter_dirs["critic"] / "adapter_config.json", adapters["coder"] / "adapter_config.json"
    )  # fmt: skip
    shutil.copyfile(
        tiny_kit.adapter_dirs["critic"] / "adapter_model.safetensors", adapters["coder"] / "adapter_model.safetensors"
    )
    with pytest.raises(FailedPrecondition, match=r"files of adapter 'coder'.*have changed"):
        llm.generate([[1, 2, 3]], adapter="coder", max_tokens=2)
    assert len(llm.generate([[1, 2, 3]], adapter="critic", max_tokens=2)[0].token_ids) == 2


def test_host_and_device_bytes_are_those_of_the_weights(tiny_kit: TinyKit, adapters: dict[str, Path]) -> None:
    llm = LLM.from_config(config_of(tiny_kit, adapters, AdapterMemoryConfig(max_device_adapters=1)))
    status = llm.status().adapter_memory
    hidden, kv, layers = 128, 64, 4
    planner = layers * 4 * 8 * (4 * hidden + 2 * hidden + 2 * kv)  # fp32, rank 8: A of q, k, v, o; B likewise
    assert status.device_bytes == planner
    assert (status.num_on_host, status.num_on_device) == (3, 1)
    assert status.host_bytes > 3 * planner
