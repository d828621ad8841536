"""Tensor parallelism: one model over several processes of one host, NCCL between GPUs, gloo between CPUs.

Rank 0, the leader, is the runner that an engine drives. It tells the other ranks what to do, one pickled command a step,
before it does so itself; they run the same batches over their own part of the weights and of the KV, page for page. What is
sampled, scheduled or matched is the leader's business alone.

The other ranks are child processes: they end with their leader, however it ends, since their connection to it breaks.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import shutil
import signal
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from forkkv_cluster.core.config import ClusterConfig
from forkkv_cluster.core.errors import FailedPrecondition
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.engine.adapters import AdapterWeights
from forkkv_cluster.engine.batch import Batch
from forkkv_cluster.engine.host_adapters import Weights
from forkkv_cluster.engine.model_loader import read_model_config, resolve_device
from forkkv_cluster.engine.runner import StepResult
from forkkv_cluster.engine.sampling_row import SamplingRow
from forkkv_cluster.engine.shard import Shard
from forkkv_cluster.engine.torch_runner import TorchRunner, options_of

_ONE_A_PROCESS = "this process runs a sharded model already. Close it first, or use another process."
_log = logging.getLogger("forkkv_cluster")


# --- what the leader says ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Allocate:
    kv_bytes: int
    host_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """By rank; each takes its own."""

    weights: tuple[AdapterWeights, ...]


@dataclass(frozen=True, slots=True)
class _Unload:
    slot: int


@dataclass(frozen=True, slots=True, eq=False)
class _Swap:
    batch: Batch


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    batch: Batch


@dataclass(frozen=True, slots=True)
class _Stop:
    pass


_Command = _Allocate | _Place | _Unload | _Swap | _Run | _Stop


class ShardGroup:
    """This process's place among the ranks. One a process."""

    def __init__(self, shard: Shard, device: torch.device, meeting: str) -> None:
        """``meeting``: a file's path by which the ranks find each other. Raises FailedPrecondition where this process is in a
        group already."""
        if dist.is_initialized():
            raise FailedPrecondition(_ONE_A_PROCESS)
        if device.type == "cuda":
            torch.cuda.set_device(shard.rank)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{meeting}",
            rank=shard.rank,
            world_size=shard.size,
        )
        self.shard = shard
        # A follower waits for as long as nothing is asked of the engine; that the leader has gone shows by the connection.
        self._control = dist.new_group(backend="gloo", timeout=timedelta(days=365))

    def reduce(self, partial: Tensor) -> Tensor:
        """[T, H] of this rank -> the sum over all ranks, in place."""
        dist.all_reduce(partial)
        return partial

    def tell(self, command: _Command) -> None:
        dist.broadcast_object_list([command], src=0, group=self._control)

    def hear(self) -> _Command:
        """The leader's next command. Raises RuntimeError when the leader has gone."""
        heard: list[Any] = [None]
        dist.broadcast_object_list(heard, src=0, group=self._control)
        return heard[0]  # type: ignore[no-any-return]

    def leave(self) -> None:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True, eq=False)
class ShardedWeights:
    """An adapter as every rank needs it; counted in host memory with all its parts."""

    by_rank: tuple[AdapterWeights, ...]

    @property
    def info(self) -> AdapterInfo:
        return self.by_rank[0].info

    @property
    def residual_rank(self) -> int:
        return self.by_rank[0].residual_rank

    @property
    def num_bytes(self) -> int:
        return sum(weights.num_bytes for weights in self.by_rank)


class _ShardRunner(TorchRunner):
    """One rank's model. All of them agree on every page, since each has the same arena."""

    group: ShardGroup

    @classmethod
    def of(cls, config: ClusterConfig, group: ShardGroup) -> Self:
        runner = cls.from_directory(config.model.path, **options_of(config), shard=group.shard)
        runner.group = group
        runner._model.reduce = group.reduce
        return runner


class Follower(_ShardRunner):
    """Any rank but the first."""

    def serve(self) -> None:
        """Do what the leader says until it stops, or goes."""
        while True:
            try:
                command = self.group.hear()
            except RuntimeError:  # gloo: the connection is closed
                return
            if isinstance(command, _Stop):
                return
            self._do(command)

    def _do(self, command: _Command) -> None:
        if isinstance(command, _Run):
            self.follow(command.batch)
        elif isinstance(command, _Swap):
            self.swap(command.batch)
        elif isinstance(command, _Place):
            self.place_adapter(command.weights[self.group.shard.rank])
        elif isinstance(command, _Unload):
            self.unload_adapter(command.slot)
        elif isinstance(command, _Allocate):
            self.allocate(command.kv_bytes, command.host_bytes)

    @torch.inference_mode()
    def follow(self, batch: Batch) -> None:
        """A step without its logits."""
        self._forward(batch)


class Leader(_ShardRunner):
    """Rank 0: what an ``Engine`` drives. Its ``children`` are the processes of the other ranks."""

    children: Sequence[Any]
    _close: weakref.finalize[..., Leader]

    @classmethod
    def from_config(cls, config: ClusterConfig) -> Leader:
        """Start the other ranks and load this one's part. Raises as ``TorchRunner.from_config``, and InvalidArgument for sizes
        that the number of ranks does not divide."""
        size = config.worker.tensor_parallel
        device = resolve_device(config.model.device)
        _check(config, device)
        meeting = Path(tempfile.mkdtemp(prefix="forkkv-shards-"))
        children = [_start(config, rank, str(meeting / "ranks")) for rank in range(1, size)]
        try:
            group = ShardGroup(Shard(0, size), device, str(meeting / "ranks"))
            runner = cls.of(config, group)
        except BaseException:
            if dist.is_initialized():
                dist.destroy_process_group()
            _end(children, meeting)
            raise
        runner.children = children
        runner._close = weakref.finalize(runner, _stop, group, children, meeting)
        return runner

    def close(self) -> None:
        """End the other ranks. Also done when this object goes."""
        self._close()

    def allocate(self, kv_bytes: int, host_bytes: int = 0) -> None:
        """As of ``ModelRunner``, the same on every rank."""
        self.geometry.num_slabs(kv_bytes)  # raises before anybody is told
        self.group.tell(_Allocate(kv_bytes, host_bytes))
        super().allocate(kv_bytes, host_bytes)

    def read_adapter(self, name: str, path: str | Path) -> ShardedWeights:  # type: ignore[override]
        """Read it for every rank. Safe on any thread. Raises as ``adapters.load_adapter``."""
        size = self.group.shard.size
        return ShardedWeights(tuple(self._read_for(Shard(rank, size), name, path) for rank in range(size)))

    def place_adapter(self, weights: Weights) -> int:
        """Every rank takes the same slot: the lowest that is free."""
        if not isinstance(weights, ShardedWeights):
            raise TypeError(f"a sharded runner places ShardedWeights, not {type(weights).__name__}")
        self.group.tell(_Place(weights.by_rank))
        return super().place_adapter(weights.by_rank[0])

    def unload_adapter(self, slot: int) -> None:
        """Free the slot on every rank. Raises NotFound when it is empty."""
        super().unload_adapter(slot)
        self.group.tell(_Unload(slot))

    def swap(self, batch: Batch) -> None:
        """As of ``ModelRunner``, on every rank."""
        self.group.tell(_Swap(batch))
        super().swap(batch)

    def run(self, batch: Batch, sampling: Sequence[SamplingRow]) -> StepResult:
        """As of ``TorchRunner``: all ranks run, this one samples."""
        self.group.tell(_Run(batch))
        return super().run(batch, sampling)


# --- processes -----------------------------------------------------------------------------------------------------------


def _check(config: ClusterConfig, device: torch.device) -> None:
    """Whatever can be told before a process is started."""
    size = config.worker.tensor_parallel
    Shard(0, size).config(read_model_config(Path(config.model.path)))
    if dist.is_initialized():
        raise FailedPrecondition(_ONE_A_PROCESS)
    if device.type == "cuda" and torch.cuda.device_count() < size:
        raise FailedPrecondition(
            f"worker.tensor_parallel {size} needs as many GPUs and this process sees {torch.cuda.device_count()}. "
            f"Set worker.num_gpus to {size}, or lower it."
        )


def _start(config: ClusterConfig, rank: int, meeting: str) -> Any:
    """A process of its own rather than a fork: the parent has threads and, on a GPU, a CUDA context."""
    process = multiprocessing.get_context("spawn").Process(
        target=_follow, args=(config, rank, meeting), name=f"forkkv-rank-{rank}", daemon=True
    )
    process.start()
    return process


def _follow(config: ClusterConfig, rank: int, meeting: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the leader says when to stop
    torch.set_num_threads(config.worker.num_threads)
    group = ShardGroup(Shard(rank, config.worker.tensor_parallel), resolve_device(config.model.device), meeting)
    Follower.of(config, group).serve()


def _stop(group: ShardGroup, children: Sequence[Any], meeting: Path) -> None:
    with contextlib.suppress(RuntimeError):  # one of them has gone already
        group.tell(_Stop())
    group.leave()
    _end(children, meeting)


def _end(children: Sequence[Any], meeting: Path) -> None:
    for child in children:
        child.join(timeout=30.0)
        if child.is_alive():
            _log.warning("%s does not stop and is killed", child.name)
            child.kill()
    shutil.rmtree(meeting, ignore_errors=True)
