"""``forkkv load-adapter``: load an adapter on a running cluster, and wait for what ``auto`` comes to on it."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from forkkv_cluster.cli.common import DEFAULT_ADDRESS, Address, Token, errors_for_people
from forkkv_cluster.client import ForkKVClient
from forkkv_cluster.core.request import AdapterInfo, Sharing
from forkkv_cluster.core.verdict import VerdictState

POLL_S = 0.5


def load_adapter(
    name: Annotated[str, typer.Argument(help="Name that requests use.")],
    path: Annotated[str, typer.Argument(help="PEFT directory on the workers' hosts.")],
    sharing: Annotated[
        Sharing | None,
        typer.Option(help=r"How requests with sharing auto are served on it; auto: it is measured. \[default: the server's]"),
    ] = None,
    wait: Annotated[bool, typer.Option(help="Wait until it is measured.")] = True,
    address: Address = DEFAULT_ADDRESS,
    token: Token = None,
) -> None:
    """Load an adapter on every worker of a running cluster, and say how requests with sharing auto are served on it."""
    with errors_for_people(), ForkKVClient(address, token=token) as client:
        client.load_adapter(name, path, sharing=sharing)
        info = _listed(client, name)
        while wait and info.verdict is not None and info.verdict.state is VerdictState.CALIBRATING:
            time.sleep(POLL_S)
            info = _listed(client, name)
        typer.echo("\n".join(described(info)))


def _listed(client: ForkKVClient, name: str) -> AdapterInfo:
    return next(info for info in client.list_adapters() if info.name == name)


def described(info: AdapterInfo) -> list[str]:
    """One line of the adapter, and one of each sharing that was measured."""
    verdict = info.verdict
    if verdict is None:
        return [f"{info.name}: loaded; no worker says how auto is served"]
    return [
        f"{info.name}: auto is served {verdict.sharing} ({verdict.state}): {verdict.reason}",
        *(
            f"  {entry.sharing}: {entry.agreement.disagreement:.2%} of {entry.agreement.num_positions} positions disagree with "
            f"{verdict.reference}, at most {entry.agreement.upper_bound:.2%}"
            for entry in verdict.measured
        ),
    ]
