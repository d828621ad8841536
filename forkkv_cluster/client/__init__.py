"""The Python SDK: sessions over a document, agents forked from it, streamed answers, joins.

    with ForkKVClient("127.0.0.1:9000") as client:
        with client.create_session(document, adapters=["planner", "critic"]) as session:
            planner, critic = session.fork([BranchSpec("p", "planner"), BranchSpec("c", "critic")])
            print(planner.generate("What now?", max_tokens=64).text)

``AsyncForkKVClient`` is the same with ``await`` and ``async for``. Errors are those of ``forkkv_cluster.core.errors``.
"""

from forkkv_cluster.client.aio import AsyncBranch, AsyncForkKVClient, AsyncSession
from forkkv_cluster.client.results import (
    BranchInfo,
    Delta,
    Event,
    Finished,
    Generation,
    JoinResult,
    PromptLogprobs,
    SessionInfo,
    Started,
    Status,
)
from forkkv_cluster.client.sync import Branch, ForkKVClient, Session
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.core.session import BranchSpec, JoinWhat

__all__ = [
    "AsyncBranch",
    "AsyncForkKVClient",
    "AsyncSession",
    "Branch",
    "BranchInfo",
    "BranchSpec",
    "Delta",
    "Event",
    "Finished",
    "ForkKVClient",
    "Generation",
    "JoinResult",
    "JoinWhat",
    "PromptLogprobs",
    "Session",
    "SessionInfo",
    "Sharing",
    "Started",
    "Status",
]
