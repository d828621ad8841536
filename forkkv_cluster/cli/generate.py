"""``forkkv generate``: one prompt, streamed to the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from forkkv_cluster.cli.common import DEFAULT_ADDRESS, Address, Token, errors_for_people
from forkkv_cluster.client import BranchSpec, Delta, Event, Finished, ForkKVClient
from forkkv_cluster.client.messages import GenerateOptions
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import Sharing


def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue, or to ask about the document.")],
    adapter: Annotated[str | None, typer.Option(help="Adapter to use; left out: the base model.")] = None,
    document: Annotated[
        Path | None, typer.Option(help="Text file: opens a session over it and asks on a branch.", exists=True, dir_okay=False)
    ] = None,
    sharing: Annotated[Sharing | None, typer.Option(help="Sharing of the session; only with --document.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
) -> None:
    """Generate text on a running cluster and stream it. Statistics go to standard error."""
    options: GenerateOptions = {"max_tokens": max_tokens, "temperature": temperature}
    if seed is not None:
        options["seed"] = seed
    with errors_for_people(), ForkKVClient(address, token=token) as client:
        if document is None:
            if sharing is not None:
                raise InvalidArgument("--sharing", str(sharing), "is of a session", "Name a --document, or leave it out.")
            _print(client.stream(prompt, adapter=adapter, **options))
            return
        adapters = [adapter] if adapter else []
        with client.create_session(_text_of(document), adapters=adapters, sharing=sharing) as session:
            (branch,) = session.fork([BranchSpec("cli", adapter)])
            _print(branch.stream(prompt, **options))


def _text_of(document: Path) -> str:
    try:
        return document.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("--document", str(document), f"cannot be read as text ({error})", "Name a text file.") from None


def _print(events: Iterator[Event]) -> None:
    for event in events:
        if isinstance(event, Delta):
            typer.echo(event.text, nl=False)
        elif isinstance(event, Finished):
            typer.echo()
            usage = event.usage
            inactive = "adapter not invoked, the base model answered; " if event.is_adapter_inactive else ""
            other = event.mismatched_training
            mismatch = f"[yellow]adapter trained for {other}, served under another sharing;[/] " if other is not None else ""
            Console(stderr=True).print(
                f"[dim]{mismatch}{inactive}{event.num_generated_tokens} tokens, {event.finish_reason}; prompt "
                f"{event.num_prompt_tokens} tokens, {usage.useful_hit_tokens} from the cache, {usage.prefill_tokens_run} run; "
                f"first token after {event.ttft_s:.3f} s, all after {event.e2e_s:.3f} s on {', '.join(event.worker_ids)}[/]"
            )
