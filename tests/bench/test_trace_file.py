import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from forkkv_cluster.bench.trace import CloseEvent, ContextEvent, JoinEvent, Timing, TokenSource, TurnEvent
from forkkv_cluster.bench.trace_file import load_trace, parse_trace, write_trace
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.session import JoinWhat

# The example of the format's page, word for word.
PAGE = """\
{"format": "forkkv-trace/1", "vocab_size": 8192, "adapters": ["planner", "critic"], "note": "free text"}
{"type": "context", "id": "c0", "at_s": 0.0, "tenant": "t0", "adapters": ["planner", "critic"], "num_tokens": 2048, "seed": 1}
{"type": "turn", "id": "t0", "context": "c0", "branch": "b0", "adapter": "planner", "at_s": 0.0, \
"append": {"num_tokens": 64, "seed": 5}, "max_tokens": 64}
{"type": "turn", "id": "t1", "context": "c0", "branch": "b1", "adapter": "critic", "after": ["t0"], "think_s": 0.2, \
"append": {"num_tokens": 64, "seed": 6}, "max_tokens": 64}
{"type": "join", "id": "j0", "context": "c0", "from": "b0", "after": ["t0"]}
{"type": "close", "context": "c0", "after": ["t1"]}
"""
HEADER = {"format": "forkkv-trace/1", "vocab_size": 100, "adapters": ["a", "b"]}
CONTEXT = {"type": "context", "id": "c0", "adapters": ["a", "b"], "num_tokens": 8, "seed": 1}


def turn(id: str, branch: str = "b0", **more: Any) -> dict[str, Any]:
    values = {"type": "turn", "id": id, "context": "c0", "branch": branch, "adapter": "a", "max_tokens": 2}
    return {**values, "append": {"tokens": [7]}, **more}


def problem(*lines: dict[str, Any] | str) -> str:
    """The message with which this trace is refused."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    with pytest.raises(InvalidArgument) as caught:
        parse_trace(texts)
    return caught.value.message


def test_the_example_of_the_format_is_read_as_it_says():
    trace = parse_trace(PAGE.splitlines())
    assert (trace.vocab_size, trace.adapters, trace.note) == (8192, ("planner", "critic"), "free text")
    context, first, second, join, close = trace.events
    assert context == ContextEvent("c0", TokenSource(num_tokens=2048, seed=1), ("planner", "critic"), "t0")
    assert first == TurnEvent("t0", "c0", "b0", "planner", TokenSource(num_tokens=64, seed=5), 64)
    assert isinstance(second, TurnEvent)
    assert second.timing == Timing(after=("t0",), think_s=0.2)
    assert join == JoinEvent("j0", "c0", "b0", JoinWhat.ALL, Timing(after=("t0",)))
    assert isinstance(close, CloseEvent)
    assert close.timing.after == ("t1",)


def test_a_written_trace_reads_back_as_the_same(tmp_path: Path):
    given = [*PAGE.splitlines()[:-1], json.dumps({"type": "join", "id": "j1", "context": "c0", "from": "b1", "what": "output"})]
    trace = parse_trace(given)
    write_trace(trace, tmp_path / "t.jsonl")
    again = load_trace(tmp_path / "t.jsonl")
    assert (again.vocab_size, again.adapters, again.note, again.events) == (8192, trace.adapters, trace.note, trace.events)


def test_a_loaded_trace_carries_the_files_name_and_its_sha256(tmp_path: Path):
    (tmp_path / "hand.jsonl").write_text(PAGE)
    trace = load_trace(tmp_path / "hand.jsonl")
    assert (trace.name, trace.sha256) == ("hand.jsonl", hashlib.sha256(PAGE.encode()).hexdigest())


def test_a_turn_of_the_base_model_says_null():
    trace = parse_trace([json.dumps(line) for line in (HEADER, CONTEXT, turn("t0", adapter=None))])
    assert trace.turns[0].adapter is None


def test_blank_lines_are_skipped_and_still_counted():
    assert "trace line 3, type" in problem(HEADER, "", {"type": "frok"})


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(InvalidArgument, match=r"nowhere\.jsonl.*cannot be read"):
        load_trace(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((), "trace line 1, format=None: is missing"),
        (({"format": "forkkv-trace/2"},), "trace line 1, format='forkkv-trace/2': is not a format"),
        (({**HEADER, "vocab_size": 5},), "trace line 1, vocab_size=5"),
        (({**HEADER, "vocabulary": 5},), "trace line 1, vocabulary=5: is not a field of this line"),
        ((HEADER, '{"type": '), "trace line 2, column"),
        ((HEADER, "[1]"), "trace line 2, line=[1]: is not a JSON object"),
        ((HEADER, {**CONTEXT, "at_s": -1}), "trace line 2, at_s=-1: is not a time"),
        ((HEADER, {**CONTEXT, "num_tokens": 0}), "trace line 2, num_tokens=0"),
        ((HEADER, {**CONTEXT, "adapters": ["c"]}), "trace line 2, adapters='c': is not in the header's adapters"),
        ((HEADER, CONTEXT, CONTEXT), "trace line 3, id='c0': is the id of another context"),
        ((HEADER, turn("t0")), "trace line 2, context='c0': is not the id of a context above"),
        ((HEADER, CONTEXT, turn("t0", append={"tokens": [100]})), "trace line 3, append.tokens=[100]: is not a list"),
        ((HEADER, CONTEXT, turn("t0", append={"tokens": [True]})), "trace line 3, append.tokens=[True]"),
        ((HEADER, CONTEXT, turn("t0", append={"num_tokens": 1, "sed": 1})), "trace line 3, append.seed=None: is missing"),
        ((HEADER, CONTEXT, turn("t0", append={"tokens": []})), "trace line 3, append=[]: is empty in a branch's first turn"),
        ((HEADER, CONTEXT, turn("t0", max_tokens=0)), "trace line 3, max_tokens=0"),
        ((HEADER, CONTEXT, turn("t0", adapter="c")), "trace line 3, adapter='c': is not declared by context c0"),
        ((HEADER, CONTEXT, turn("t0"), turn("t0", "b1")), "trace line 4, id='t0': is the id of line 3"),
        ((HEADER, CONTEXT, turn("t0"), turn("t1", adapter="b")), "trace line 4, adapter='b': differs from the branch's first"),
        ((HEADER, CONTEXT, turn("t0", after=["t9"])), "trace line 3, after='t9': is not the id"),
        ((HEADER, CONTEXT, {"type": "join", "context": "c0", "from": "b0"}), "trace line 3, from='b0': has no turn above"),
        (
            (HEADER, CONTEXT, turn("t0"), {"type": "join", "context": "c0", "from": "b0", "what": "some"}),
            "trace line 4, what='some': is not known. Write one of: all, output.",
        ),
        ((HEADER, CONTEXT, {"type": "close", "context": "c0"}, turn("t0")), "trace line 4, context='c0': was closed in line 3"),
        (
            (HEADER, CONTEXT, turn("t0", after=["t1"]), turn("t1", "b1", after=["t0"])),
            "trace line 3, after='t0 waits for t1 waits for t0': is a circle",
        ),
        ((HEADER, CONTEXT, turn("t0", after=["t1"]), turn("t1")), "trace line 3, after="),
    ],
)
def test_a_bad_line_is_refused_by_its_number_field_and_value(lines: tuple[dict[str, Any] | str, ...], message: str):
    assert message in problem(*lines)
