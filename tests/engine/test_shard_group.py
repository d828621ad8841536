"""One model over two processes (gloo, fp32): its answers are the oracle's, as those of a whole one are."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from forkkv_cluster.core.config import ClusterConfig, parse_config
from forkkv_cluster.core.errors import FailedPrecondition, InvalidArgument
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.engine.make_runner import make_runner
from forkkv_cluster.engine.shard_group import Leader
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.test_engine_exactness import CONTEXT, Judge

ADAPTERS = ("planner", "critic", "coder")
OWN = [11, 12, 13, 14]


def _config(kit: TinyKit, ranks: int = 2, **cache: object) -> ClusterConfig:
    return parse_config(
        {
            "model": {"path": str(kit.model_dir), "dtype": "float32", "device": "cpu"},
            "adapters": [{"name": name, "path": str(kit.adapter_dirs[name])} for name in ADAPTERS],
            "cache": {"kv_bytes": "8MiB", "page_size": 16, **cache},
            "worker": {"tensor_parallel": ranks},
        }
    )


@pytest.fixture(scope="module")
def judge(tiny_kit: TinyKit) -> Judge:
    return Judge(tiny_kit)


@pytest.fixture(scope="module")
def llm(tiny_kit: TinyKit) -> Iterator[LLM]:
    llm = LLM.from_config(_config(tiny_kit, host_bytes="8MiB"))
    yield llm
    llm.engine.check_invariants()


@pytest.mark.parametrize("sharing", ["isolated", "residual", "eager", "base"])
@pytest.mark.parametrize("agent", [*ADAPTERS, None])
def test_a_branch_answers_as_the_oracle_does(llm: LLM, judge: Judge, sharing: str, agent: str | None):
    branch = llm.context(CONTEXT, ADAPTERS, sharing).fork(f"{agent}-{sharing}", agent)
    output = branch.generate(OWN, max_tokens=6)
    judge.check(CONTEXT, OWN, output.token_ids, agent, sharing)


def test_agents_in_one_batch_answer_as_each_does_alone(llm: LLM, judge: Judge):
    context = llm.context(CONTEXT, ADAPTERS, "eager")
    branches = [context.fork(f"batch-{name}", name) for name in ADAPTERS]
    for name, output in zip(ADAPTERS, llm.generate_turns([(b, OWN) for b in branches], max_tokens=6), strict=True):
        judge.check(CONTEXT, OWN, output.token_ids, name, "eager")


def test_an_adapter_that_is_loaded_again_after_it_left_answers_as_before(llm: LLM, tiny_kit: TinyKit):
    first = llm.generate([CONTEXT[:20]], adapter="critic", max_tokens=6)[0].token_ids
    llm.engine.unload_adapter("critic")
    llm.engine.load_adapter("critic", str(tiny_kit.adapter_dirs["critic"]))
    assert llm.generate([CONTEXT[:20]], adapter="critic", max_tokens=6)[0].token_ids == first


def test_the_pages_of_a_rank_hold_its_own_heads_and_whole_residuals(llm: LLM, tiny_kit: TinyKit):
    whole = make_runner(_config(tiny_kit, ranks=1)).geometry
    own = llm.engine._runner.geometry
    assert own.base_bytes_per_token * 2 == whole.base_bytes_per_token
    assert own.bytes_per_token(8) == whole.bytes_per_token(8)


def test_a_second_sharded_model_in_the_same_process_is_refused(llm: LLM, tiny_kit: TinyKit):
    with pytest.raises(FailedPrecondition, match="runs a sharded model already"):
        make_runner(_config(tiny_kit))


def test_a_model_whose_heads_cannot_be_dealt_out_is_refused_before_a_process_starts(tiny_kit: TinyKit):
    with pytest.raises(InvalidArgument, match=r"worker\.tensor_parallel"):
        make_runner(_config(tiny_kit, ranks=3))


def test_the_other_ranks_end_when_their_leader_closes(llm: LLM):
    """Last in this file: the shared model is gone after it."""
    runner = llm.engine._runner
    assert isinstance(runner, Leader)
    assert all(child.is_alive() for child in runner.children)
    runner.close()
    assert [child.exitcode for child in runner.children] == [0]


_LONELY = """
import os, sys
from forkkv_cluster.core.config import parse_config
from forkkv_cluster.engine.make_runner import make_runner

if __name__ == "__main__":
    model = {"path": sys.argv[1], "dtype": "float32", "device": "cpu"}
    runner = make_runner(parse_config({"model": model, "worker": {"tensor_parallel": 2}}))
    runner.allocate(8 << 20)
    print(runner.children[0].pid, flush=True)
    sys.stdin.readline()
    os.kill(runner.children[0].pid, 9)
    runner.children[0].join()
    try:
        runner.allocate(8 << 20)
    except RuntimeError as error:
        print("broken", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def lonely(tiny_kit: TinyKit, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    script = tmp_path / "lonely.py"
    script.write_text(_LONELY)
    command = [sys.executable, str(script), str(tiny_kit.model_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_the_other_ranks_end_when_their_leader_is_killed(lonely: subprocess.Popen[str]):
    assert lonely.stdout is not None
    child = int(lonely.stdout.readline())
    lonely.kill()
    assert _ends(child)


def test_a_leader_that_has_lost_a_rank_fails_instead_of_waiting(lonely: subprocess.Popen[str]):
    assert lonely.stdout is not None
    assert lonely.stdin is not None
    lonely.stdout.readline()
    lonely.stdin.write("kill it\n")
    lonely.stdin.flush()
    assert lonely.stdout.readline() == "broken\n"


def _ends(pid: int, within_s: float = 30.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.kill(pid, signal.SIGKILL)
    return False
