"""Names of adapters: what may bear one, where its files are, and what happens when they change."""

from __future__ import annotations

from pathlib import Path

import pytest

from forkkv_cluster.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo, AdapterRef, Sharing
from forkkv_cluster.gateway.adapters import AdapterRegistry
from forkkv_cluster.gateway.session_store import MemorySessionStore
from tests.gateway.fakes import MODEL, FakePool, adapter_info, make_service


class TwoWorkers(FakePool):
    """The second was restarted and has nothing; ``content`` is what the files hold now, as a digest."""

    def __init__(self, kept: AdapterInfo, content: str) -> None:
        super().__init__()
        self.content = AdapterDigest(content)
        self.workers: list[dict[str, AdapterInfo]] = [{kept.name: kept}, {}]

    async def broadcast(self, method: str, *arguments: object) -> list[object]:
        return [self._answer(worker, method, *arguments) for worker in self.workers]

    def _answer(
        self,
        worker: dict[str, AdapterInfo],
        method: str,
        name: str = "",
        path: str = "",
        sharing: Sharing | None = None,
    ) -> object:
        if method == "list_adapters":
            return tuple(worker.values())
        if method == "unload_adapter":
            return worker.pop(name, None) and None
        if name in worker and worker[name].digest != self.content:
            return AlreadyExists("adapter", name, "It has other content.")
        worker[name] = AdapterInfo(name, self.content, path, 8, ("k_proj",), 16, sharing=sharing)
        return worker[name]


async def registry_over(pool: TwoWorkers, info: AdapterInfo) -> AdapterRegistry:
    store = MemorySessionStore()
    await store.put_adapter(info)
    return AdapterRegistry(pool, store)


async def test_a_restarted_worker_gets_its_adapter_again() -> None:
    info = adapter_info("late")
    pool = TwoWorkers(info, info.digest)
    assert await (await registry_over(pool, info)).restore(AdapterRef("late", info.digest))
    assert [set(worker) for worker in pool.workers] == [{"late"}, {"late"}]


async def test_files_that_changed_are_refused_and_left_on_no_worker() -> None:
    info = adapter_info("late")
    pool = TwoWorkers(info, "c" * 32)
    with pytest.raises(FailedPrecondition, match="'late'") as caught:
        await (await registry_over(pool, info)).restore(AdapterRef("late", info.digest))
    assert info.digest in caught.value.message
    assert "c" * 32 in caught.value.message
    assert pool.workers == [{"late": info}, {}]


async def test_a_relative_path_is_kept_as_an_absolute_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pool = TwoWorkers(adapter_info("other"), "c" * 32)
    info = await AdapterRegistry(pool, MemorySessionStore()).load("late", "adapters/late")
    assert info.path == str(tmp_path / "adapters" / "late")


async def test_the_base_models_name_is_taken() -> None:
    service = make_service(FakePool())
    with pytest.raises(AlreadyExists, match=MODEL.name):
        await service.load_adapter(MODEL.name, "/adapters/x")
    assert MODEL.name not in {info.name for info in await service.list_adapters()}


async def test_an_empty_name_is_no_adapter() -> None:
    service = make_service(FakePool())
    with pytest.raises(InvalidArgument):
        await service.unload_adapter("")
    with pytest.raises(InvalidArgument):
        await service.load_adapter("", "/adapters/x")
