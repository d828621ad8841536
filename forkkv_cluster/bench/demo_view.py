"""What the demo shows: streams side by side while they run, tables afterwards."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from forkkv_cluster.bench.demo_checks import Check, Savings
from forkkv_cluster.bench.demo_plan import AgentResult, Answer, PolicyResult
from forkkv_cluster.bench.demo_run import OnUpdate

_PANELS_A_ROW = 3
_PANEL_LINES = 4
_PLAIN = Console(file=io.StringIO())
"""Wraps text, writes nothing."""
_MIN_WIDTH = 120
"""Columns that the tables need; a pipe has no width of its own."""


def make_console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, _MIN_WIDTH))


@contextmanager
def streams_side_by_side(console: Console, title: str) -> Iterator[OnUpdate]:
    """A display that follows the streams; on something that is no terminal, one line at the end of each."""
    if not console.is_terminal:
        printed: set[str] = set()

        def print_ended(streams: Sequence[AgentResult]) -> None:
            for stream in streams:
                if stream.is_done and stream.agent.name not in printed:
                    printed.add(stream.agent.name)
                    said = " | ".join(_said(answer) for answer in stream.answers)
                    line = f"{title} · {stream.agent.name} ({stream.worker}): {said}"
                    console.print(line, highlight=False, markup=False, overflow="ellipsis", no_wrap=True)

        yield print_ended
        return
    with Live(console=console, refresh_per_second=12, transient=True) as live:

        def show(streams: Sequence[AgentResult]) -> None:
            live.update(Group(Text(title, style="bold"), _panels(streams, console.width)))

        yield show


def _panels(streams: Sequence[AgentResult], width: int) -> Columns:
    panel_width = max(24, width // _PANELS_A_ROW - 1)
    panels = [
        Panel(
            _conversation(stream, panel_width - 4),
            title=f"{stream.agent.name} · {len(stream.token_ids)}",
            subtitle=stream.worker,
            border_style="green" if stream.is_done else "cyan",
            width=panel_width,
            height=_PANEL_LINES + 2,
        )
        for stream in streams
    ]
    return Columns(panels)


def _conversation(stream: AgentResult, width: int) -> Text:
    """The last lines of questions and answers."""
    lines: list[Text] = []
    for answer in stream.answers:
        for text, style in ((answer.question.text, "dim"), (_said(answer), _style(answer))):
            lines += Text(text, style=style).wrap(_PLAIN, width)
    return Text("\n").join(lines[-_PANEL_LINES:])


def _style(answer: Answer) -> str:
    if not answer.finish_reason:
        return ""
    return "green" if answer.is_right else "red"


def _said(answer: Answer) -> str:
    return " ".join(answer.text.split())


def _mark(answer: Answer) -> Text:
    return Text("right", style="green") if answer.is_right else Text("wrong", style="bold red")


def answer_table(results: Sequence[PolicyResult]) -> Table:
    """A row for each question and each different answer to it; under each policy whether the answer is right."""
    table = Table(title="what the agents answered under each policy", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("agent", no_wrap=True)
    table.add_column("question")
    table.add_column("answer")
    for result in results:
        table.add_column(_label(result), justify="right", no_wrap=True)
    for streams in zip(*(result.streams for result in results), strict=True):
        name = streams[0].agent.name
        for answers in zip(*(stream.answers for stream in streams), strict=True):
            _add_answers(table, name, answers)
            name = ""
    table.add_section()
    counts = (f"{result.num_right} of {len(result.answers)}" for result in results)
    table.add_row(Text("right", style="bold"), "", "", *(Text(count, style="bold") for count in counts))
    return table


def _add_answers(table: Table, name: str, answers: Sequence[Answer]) -> None:
    """``answers`` to one question, one for each policy."""
    asked = (Text(name), Text(answers[0].question.text))
    for said in dict.fromkeys(_said(answer) for answer in answers):
        given = [answer for answer in answers if _said(answer) == said]
        marks = (_mark(answer) if _said(answer) == said else Text() for answer in answers)
        table.add_row(*asked, Text(said, style=_style(given[0])), *marks)
        asked = (Text(), Text())


def _label(result: PolicyResult) -> str:
    return "killed" if result.kill is not None else result.sharing


def agent_table(result: PolicyResult) -> Table:
    """One row for each agent of a run."""
    killed = f", {result.kill.worker_id} killed" if result.kill is not None else ""
    size = f"{len(result.agents)} agents over {result.num_context_tokens:,} shared tokens, then one more"
    table = Table(title=f"{result.sharing}{killed}: {size}", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("agent", "adapter", "worker"):
        table.add_column(column, no_wrap=True)
    for column in ("TTFT ms", "tokens", "context", "base hit", "residual hit", "useful hit"):
        table.add_column(column, justify="right", no_wrap=True)
    for stream in result.streams:
        counts = (
            len(stream.token_ids),
            stream.num_context_tokens,
            stream.usage.base_hit_tokens,
            stream.usage.residual_hit_tokens,
            stream.usage.useful_hit_tokens,
        )
        workers = " > ".join(worker.removeprefix("worker-") for worker in stream.workers)
        numbers = (f"{count:,}" for count in counts)
        table.add_row(stream.agent.name, stream.agent.adapter, workers, f"{stream.ttft_s * 1000:,.0f}", *numbers)
    return table


def policy_table(results: Sequence[PolicyResult]) -> Table:
    """One row for each policy."""
    title = "the same work under each policy, all workers together"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("sharing")
    for column in ("right", "wall s", "prefill tokens run", "base KV", "residual KV", "KV held"):
        table.add_column(column, justify="right")
    for result in results:
        sizes = (_mebibytes(n) for n in (result.base_bytes_held, result.residual_bytes_held, result.kv_bytes_held))
        right = f"{result.num_right} of {len(result.answers)}"
        table.add_row(result.sharing, right, f"{result.wall_s:.2f}", f"{result.prefill_tokens_run:,}", *sizes)
    return table


def savings_line(saved: Savings) -> str:
    return (
        f"The fork saved {saved.prefill_tokens:,} prefill tokens ({saved.prefill_ratio:.1f} times fewer), "
        f"{_mebibytes(saved.kv_bytes)} of KV ({saved.kv_ratio:.1f} times less) "
        f"and {saved.wall_s:.1f} s ({saved.wall_ratio:.1f} times faster)."
    )


def cost_line(saved: Savings) -> str:
    if not saved.lost_answers:
        return "It cost no right answer."
    total = sum(saved.lost_answers.values())
    adapters = ", ".join(f"{adapter} {count}" for adapter, count in saved.lost_answers.items())
    noun = "answer" if total == 1 else "answers"
    return (
        f"It cost {total} right {noun} ({adapters}): sharing `auto` measures an adapter before it shares, "
        "`forkkv train-adapter` makes of it one that was trained for sharing."
    )


def check_lines(checks: Sequence[Check]) -> Iterator[Text]:
    for check in checks:
        mark, style = ("ok", "green") if check.holds else ("FAILED", "bold red")
        yield Text.assemble((f"{mark:>6}", style), f"  {check.promise}", (f"  ({check.evidence})", "dim"))


def _mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
