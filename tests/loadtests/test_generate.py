import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from forkkv_cluster.bench.trace import ContextEvent, JoinEvent, Trace
from forkkv_cluster.bench.trace_file import load_trace, parse_trace

LOADTESTS = Path(__file__).resolve().parents[2] / "loadtests"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loadtests_generate", LOADTESTS / "generate.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(LOADTESTS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def generate(generator: ModuleType, path: Path, *arguments: str) -> Trace:
    """The trace that these arguments write, read back and checked."""
    assert generator.main([*arguments, "--output", str(path)]) == 0
    return load_trace(path)


@pytest.mark.parametrize("recipe", ["mapreduce", "react"])
def test_the_same_seed_gives_the_same_bytes_and_another_one_others(generator: ModuleType, tmp_path: Path, recipe: str):
    first = generate(generator, tmp_path / "a", recipe, "--seed", "3")
    again = generate(generator, tmp_path / "b", recipe, "--seed", "3")
    other = generate(generator, tmp_path / "c", recipe, "--seed", "4")
    assert first.sha256 == again.sha256 != other.sha256


@pytest.mark.parametrize("recipe", ["mapreduce", "react"])
def test_no_two_runs_of_tokens_share_a_seed(generator: ModuleType, tmp_path: Path, recipe: str):
    trace = generate(generator, tmp_path / "t", recipe)
    seeds = [trace.events[0].source.seed, *(turn.append.seed for turn in trace.turns)]
    assert len(set(seeds)) == len(seeds)


def test_the_reducer_waits_for_the_output_of_every_mapper(generator: ModuleType, tmp_path: Path):
    trace = generate(generator, tmp_path / "t", "mapreduce", "--mappers", "5", "--contexts", "2", "--gap-s", "3")
    contexts = [event for event in trace.events if isinstance(event, ContextEvent)]
    assert [context.timing.at_s for context in contexts] == [0.0, 3.0]
    joins = {event.id for event in trace.events if isinstance(event, JoinEvent) and event.context == "c1"}
    reducer = next(turn for turn in trace.turns if turn.id == "c1-reduce")
    assert len(joins) == 5
    assert set(reducer.timing.after) == joins


def test_mappers_run_at_once_with_adapters_in_turn(generator: ModuleType, tmp_path: Path):
    trace = generate(generator, tmp_path / "t", "mapreduce", "--mappers", "3", "--adapters", "planner,critic")
    assert [turn.adapter for turn in trace.turns[:3]] == ["planner", "critic", "planner"]
    assert all(not turn.timing.after and 128 <= len(turn.append) <= 512 for turn in trace.turns[:3])


def test_react_agents_take_turns_round_robin(generator: ModuleType, tmp_path: Path):
    trace = generate(generator, tmp_path / "t", "react", "--agents", "2", "--turns", "3", "--output-tokens", "4:9")
    assert [turn.branch for turn in trace.turns] == ["agent0", "agent1"] * 3
    assert [turn.timing.after for turn in trace.turns[1:]] == [(turn.id,) for turn in trace.turns[:-1]]
    assert all(4 <= turn.max_tokens <= 9 for turn in trace.turns)


def test_without_a_file_the_trace_goes_to_standard_output(generator: ModuleType, capsys: pytest.CaptureFixture[str]):
    assert generator.main(["react", "--agents", "1", "--turns", "1"]) == 0
    assert len(parse_trace(capsys.readouterr().out.splitlines()).turns) == 1


@pytest.mark.parametrize(
    "arguments", [["react", "--agents", "0"], ["react", "--adapters", ","], ["mapreduce", "--suffix", "9:2"], []]
)
def test_bad_arguments_are_refused(generator: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        generator.main(arguments)
    assert ended.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_the_trace_written_by_hand_is_in_the_format():
    trace = load_trace(LOADTESTS / "traces" / "hand.jsonl")
    assert {type(event).__name__ for event in trace.events} == {"ContextEvent", "TurnEvent", "JoinEvent", "CloseEvent"}
