"""Two aLoRAs beside two plain adapters; peft's models of them; engines that serve them all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.testing.tiny_models import TinyKit, save_alora_adapter
from tests.engine.alora.kit import INVOKE, OTHER, Judge, OpenLLM, open_llm


@pytest.fixture(scope="session")
def adapter_dirs(tiny_kit: TinyKit, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("alora")
    return {
        "checker": save_alora_adapter(tiny_kit.model_dir, root / "checker", INVOKE),
        "rewriter": save_alora_adapter(
            tiny_kit.model_dir, root / "rewriter", OTHER, seed=1, targets=["q_proj", "k_proj", "v_proj"], use_rslora=True
        ),
        "critic": tiny_kit.adapter_dirs["critic"],
        "tester": tiny_kit.adapter_dirs["tester"],
    }


@pytest.fixture(scope="session")
def judge(tiny_kit: TinyKit, adapter_dirs: dict[str, Path]) -> Judge:
    return Judge(tiny_kit.model_dir, adapter_dirs)


@pytest.fixture
def new_llm(tiny_kit: TinyKit, adapter_dirs: dict[str, Path]) -> Iterator[OpenLLM]:
    """Opens engines; at the end none of them may hold anything."""
    opened: list[LLM] = []

    def open_(page_size: int = 16, chunk: int = 64, kv_bytes: str = "8MiB") -> LLM:
        opened.append(open_llm(tiny_kit.model_dir, adapter_dirs, page_size, chunk, kv_bytes))
        return opened[-1]

    yield open_
    for llm in opened:
        _check_idle(llm)


@pytest.fixture
def llm(new_llm: OpenLLM) -> LLM:
    """An empty one."""
    return new_llm()


@pytest.fixture(scope="module")
def used_llm(tiny_kit: TinyKit, adapter_dirs: dict[str, Path]) -> Iterator[LLM]:
    """One for all tests of a file, with whatever the earlier ones left in its cache."""
    llm = open_llm(tiny_kit.model_dir, adapter_dirs)
    yield llm
    _check_idle(llm)


def _check_idle(llm: LLM) -> None:
    assert not llm.engine.has_work
    llm.engine.check_invariants()
    assert llm.status().num_pinned_pages == 0
