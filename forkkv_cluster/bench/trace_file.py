"""Reading, checking and writing traces (the format stands in ``bench.trace``)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from forkkv_cluster.bench.trace import (
    FORMAT,
    NUM_RESERVED,
    CloseEvent,
    ContextEvent,
    JoinEvent,
    Timing,
    TokenSource,
    Trace,
    TraceEvent,
    TurnEvent,
)
from forkkv_cluster.bench.trace_checks import check_trace
from forkkv_cluster.bench.trace_fields import Fields, trace_error
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.session import JoinWhat


def load_trace(path: str | Path) -> Trace:
    """Read and check a file. Raises InvalidArgument that names the line, the field, its value and the remedy."""
    try:
        data = Path(path).read_bytes()
        text = data.decode()
    except OSError as error:
        raise InvalidArgument("trace", str(path), f"cannot be read ({error.strerror})", "Name an existing file.") from None
    except UnicodeDecodeError:
        raise InvalidArgument("trace", str(path), "is not UTF-8 text", "Name a file of JSON lines.") from None
    trace = parse_trace(text.splitlines())
    return replace(trace, name=Path(path).name, sha256=hashlib.sha256(data).hexdigest())


def write_trace(trace: Trace, path: str | Path) -> None:
    """Write ``trace`` as JSON lines."""
    Path(path).write_text("".join(line + "\n" for line in trace.to_lines()))


def parse_trace(lines: Iterable[str]) -> Trace:
    """Parse and check lines; blank lines are skipped. Raises InvalidArgument that names the line and the field."""
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise trace_error(1, "format", None, "is missing: the trace is empty", f'Start with {{"format": "{FORMAT}", ...}}.')
    header = Fields(*numbered[0])
    if header.text("format") != FORMAT:
        raise header.error("format", "is not a format that this version reads", f'Write "{FORMAT}".')
    vocab_size = header.integer("vocab_size", minimum=NUM_RESERVED + 1)
    adapters = header.texts("adapters")
    note = header.text("note", default="")
    header.finish()
    events: list[tuple[int, TraceEvent]] = []
    for number, line in numbered[1:]:
        fields = Fields(number, line)
        events.append((number, _parse_event(fields, vocab_size)))
        fields.finish()
    check_trace(adapters, events)
    return Trace(vocab_size, adapters, tuple(event for _, event in events), note)


def _parse_event(fields: Fields, vocab_size: int) -> TraceEvent:
    kind = fields.text("type")
    timing = Timing(fields.seconds("at_s"), fields.texts("after", default=()), fields.seconds("think_s"))
    if kind == "context":
        source = _parse_source(fields, vocab_size, minimum=1)
        return ContextEvent(
            fields.text("id"), source, fields.texts("adapters", default=()), fields.text("tenant", default=""), timing
        )
    if kind == "turn":
        append = _parse_source(fields.nested("append"), vocab_size, minimum=0)
        adapter = fields.optional_text("adapter")
        max_tokens = fields.integer("max_tokens", minimum=1)
        return TurnEvent(fields.text("id"), fields.text("context"), fields.text("branch"), adapter, append, max_tokens, timing)
    if kind == "join":
        what = fields.choice("what", tuple(JoinWhat), default=JoinWhat.ALL)
        return JoinEvent(_event_id(fields), fields.text("context"), fields.text("from"), what, timing)
    if kind == "close":
        return CloseEvent(_event_id(fields), fields.text("context"), timing)
    raise fields.error("type", "is not a kind of event", "Write context, turn, join or close.")


def _event_id(fields: Fields) -> str:
    # Joins and closes that nothing waits for need no id.
    return fields.text("id", default=f"line {fields.line}")


def _parse_source(fields: Fields, vocab_size: int, minimum: int) -> TokenSource:
    if fields.has("tokens"):
        tokens = fields.integers("tokens", limit=vocab_size)
        if len(tokens) < minimum:
            raise fields.error("tokens", "is empty", f"Write at least {minimum} token.")
        source = TokenSource(tokens=tokens)
    else:
        source = TokenSource(num_tokens=fields.integer("num_tokens", minimum=minimum), seed=fields.integer("seed", minimum=0))
    if fields.is_nested:
        fields.finish()
    return source
