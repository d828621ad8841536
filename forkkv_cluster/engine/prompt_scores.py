"""Scores of a step's rows, back to the prompts that they belong to. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from forkkv_cluster.core.ids import RequestId
from forkkv_cluster.core.request import PromptLogprobs
from forkkv_cluster.engine.scores import TokenScores
from forkkv_cluster.engine.sequence import Scheduled, Turn


def prompt_logprobs(work: Sequence[Scheduled], scores: TokenScores | None) -> dict[RequestId, PromptLogprobs]:
    """``scores`` of a batch over ``work``, by request: in both they stand in the order of the turns."""
    parts: dict[RequestId, PromptLogprobs] = {}
    if scores is None:
        return parts
    row = 0
    for scheduled in work:
        turn, positions = scheduled.item, scheduled.scored
        if isinstance(turn, Turn) and positions:
            rows = slice(row, row + len(positions))
            top = slice(0, turn.request.sampling.prompt_logprobs or 0)
            parts[turn.request_id] = PromptLogprobs(
                positions.start,
                turn.tokens[positions.start : positions.stop].copy(),
                scores.logprobs[rows],
                scores.ranks[rows],
                scores.top_ids[rows, top],
                scores.top_logprobs[rows, top],
            )
            row += len(positions)
    return parts
