"""What must hold between the lines of a trace, and the waits that follow from their order."""

from __future__ import annotations

from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter

from forkkv_cluster.bench.trace import CloseEvent, ContextEvent, JoinEvent, TraceEvent, TurnEvent
from forkkv_cluster.bench.trace_fields import trace_error

NumberedEvents = Sequence[tuple[int, TraceEvent]]


def check_trace(adapters: tuple[str, ...], events: NumberedEvents) -> None:
    """Raises InvalidArgument for the first line that names what is not there, twice, or in a circle."""
    _check_names(adapters, events)
    _check_after(events)
    _check_order(events)


def _check_names(adapters: tuple[str, ...], events: NumberedEvents) -> None:
    contexts: dict[str, ContextEvent] = {}
    branches: dict[tuple[str, str], str | None] = {}
    closed: dict[str, int] = {}
    for line, event in events:
        if isinstance(event, ContextEvent):
            if event.id in contexts:
                raise trace_error(line, "id", event.id, "is the id of another context", "Choose another.")
            for name in event.adapters:
                if name not in adapters:
                    raise trace_error(line, "adapters", name, "is not in the header's adapters", "Add it there.")
            contexts[event.id] = event
            continue
        if event.context not in contexts:
            raise trace_error(line, "context", event.context, "is not the id of a context above", "Open it first.")
        if event.context in closed:
            problem = f"was closed in line {closed[event.context]}"
            raise trace_error(line, "context", event.context, problem, "Close a context after all that uses it.")
        if isinstance(event, TurnEvent):
            _check_turn(line, event, contexts[event.context], branches)
        elif isinstance(event, JoinEvent):
            if (event.context, event.branch) not in branches:
                raise trace_error(line, "from", event.branch, "has no turn above", "Give the branch a turn before it joins.")
        else:
            closed[event.context] = line


def _check_turn(line: int, turn: TurnEvent, context: ContextEvent, branches: dict[tuple[str, str], str | None]) -> None:
    if turn.adapter is not None and turn.adapter not in context.adapters:
        declared = ", ".join(context.adapters) or "none"
        problem = f"is not declared by context {context.id}, which has: {declared}"
        raise trace_error(line, "adapter", turn.adapter, problem, "Declare it there, or write null for the base model.")
    key = (turn.context, turn.branch)
    if key not in branches:
        if len(turn.append) == 0:
            raise trace_error(line, "append", [], "is empty in a branch's first turn", "Append at least one token.")
        branches[key] = turn.adapter
    elif branches[key] != turn.adapter:
        problem = f"differs from the branch's first turn ({branches[key]})"
        raise trace_error(line, "adapter", turn.adapter, problem, "A branch keeps its adapter: name another branch.")


def _check_after(events: NumberedEvents) -> None:
    lines: dict[str, int] = {}
    for line, event in events:
        if isinstance(event, ContextEvent):
            continue
        if event.id in lines:
            raise trace_error(line, "id", event.id, f"is the id of line {lines[event.id]}", "Choose another.")
        lines[event.id] = line
    for line, event in events:
        for name in event.timing.after:
            if name not in lines:
                raise trace_error(line, "after", name, "is not the id of a turn, join or close", "Name one that is there.")


def _check_order(events: NumberedEvents) -> None:
    waits = implicit_waits([event for _, event in events])
    position = {event.id: index for index, (_, event) in enumerate(events) if not isinstance(event, ContextEvent)}
    graph = {
        index: {*waits[index], *(position[name] for name in event.timing.after)} for index, (_, event) in enumerate(events)
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        line = min(events[index][0] for index in error.args[1])
        circle = " waits for ".join(events[index][1].id for index in reversed(error.args[1]))
        raise trace_error(line, "after", circle, "is a circle", "Turns of a branch run in file order: wait forwards.") from None


def implicit_waits(events: Sequence[TraceEvent]) -> list[tuple[int, ...]]:
    """For each event the indices of those that it waits for by the file's order alone, whatever ``after`` says.

    A turn or join waits for its context and for the turn or join before it on its branch; a close for all of its context.
    """
    opened: dict[str, int] = {}
    last: dict[tuple[str, str], int] = {}
    of_context: dict[str, list[int]] = {}
    waits: list[tuple[int, ...]] = []
    for index, event in enumerate(events):
        if isinstance(event, ContextEvent):
            opened[event.id] = index
            waits.append(())
            continue
        if isinstance(event, CloseEvent):
            waits.append((opened[event.context], *of_context.get(event.context, ())))
            continue
        key = (event.context, event.branch)
        waits.append((opened[event.context], *((last[key],) if key in last else ())))
        last[key] = index
        of_context.setdefault(event.context, []).append(index)
    return waits
