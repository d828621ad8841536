from forkkv_cluster.bench.demo_plan import AgentResult
from forkkv_cluster.bench.worker_killer import WorkerKiller
from tests.bench import demo_values
from tests.bench.demo_values import AGENTS

PIDS = {"w1": 11, "w2": 22}


def stream(index: int, worker: str, num_tokens: int, is_done: bool = False) -> AgentResult:
    return demo_values.stream(AGENTS[index], 10, num_tokens, worker=worker, is_done=is_done)


class Kills:
    def __init__(self) -> None:
        self.pids: list[int] = []
        self.killer = WorkerKiller(PIDS, self.pids.append)


def test_nothing_dies_before_every_stream_has_eight_tokens():
    kills = Kills()
    kills.killer.observe([stream(0, "w1", 20), stream(1, "w2", 7)])
    assert kills.pids == []
    assert kills.killer.result is None


def test_a_stream_that_ended_with_fewer_holds_nothing_up():
    kills = Kills()
    kills.killer.observe([stream(0, "w1", 20), stream(1, "w2", 3, is_done=True)])
    assert kills.pids == [11]


def test_the_worker_that_serves_most_streams_dies():
    kills = Kills()
    kills.killer.observe([stream(0, "w1", 9), stream(1, "w2", 8), stream(2, "w2", 12)])
    assert kills.pids == [22]
    assert kills.killer.result is not None
    assert (kills.killer.result.worker_id, kills.killer.result.num_streams) == ("w2", 2)
    assert kills.killer.result.tokens_at_kill == (9, 8, 12)


def test_streams_that_have_ended_do_not_count():
    kills = Kills()
    kills.killer.observe([stream(0, "w1", 9), stream(1, "w2", 8, is_done=True), stream(2, "w2", 12, is_done=True)])
    assert kills.pids == [11]


def test_only_one_worker_dies():
    kills = Kills()
    streams = [stream(0, "w1", 9), stream(1, "w2", 9)]
    kills.killer.observe(streams)
    kills.killer.observe(streams)
    assert len(kills.pids) == 1


def test_nothing_dies_when_all_streams_have_ended():
    kills = Kills()
    kills.killer.observe([stream(0, "w1", 9, is_done=True)])
    assert kills.pids == []
