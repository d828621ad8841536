"""Log probabilities of prompts: those of the oracle's logits, whatever the cache holds and however the prompt is cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import GenerateRequest, PromptLogprobs, TokenLogprob, joined_prompt_logprobs
from forkkv_cluster.engine.runner import StepResult
from forkkv_cluster.engine.scheduler import Scheduler
from forkkv_cluster.engine.scoring import score_in_chunks
from forkkv_cluster.engine.sequence import Turn
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.harness import FakeEngine
from tests.engine.test_engine_exactness import CONTEXT, TinyEngine, own_tokens
from tests.oracle.oracle import Oracle


@pytest.fixture(scope="module")
def oracle(tiny_kit: TinyKit) -> Oracle:
    return Oracle(tiny_kit.model_dir)


def scored(engine: FakeEngine, *requests: GenerateRequest) -> list[PromptLogprobs | None]:
    """Run them together; what was said of each prompt. The parts must join without a gap, before the first token."""
    for request in requests:
        engine.add(request)
    parts: dict[str, list[PromptLogprobs]] = {request.request_id: [] for request in requests}
    has_token: set[str] = set()
    while engine.engine.has_work:
        output = engine.engine.step()
        engine.engine.check_invariants()
        assert output.failures == ()
        for chunk in output.chunks:
            if chunk.prompt_logprobs is not None:
                assert chunk.request_id not in has_token
                known = parts[chunk.request_id]
                assert not known or known[-1].end == chunk.prompt_logprobs.first
                known.append(chunk.prompt_logprobs)
            has_token |= {chunk.request_id} if chunk.token_ids else set()
    return [joined_prompt_logprobs(parts[request.request_id]) for request in requests]


def check(part: PromptLogprobs | None, logits: torch.Tensor, tokens: Sequence[int], num_top: int) -> None:
    """``logits`` [n, V] of the rows before the ``tokens`` [n]."""
    assert part is not None
    logs = logits.log_softmax(-1)
    wanted = logs.gather(-1, torch.tensor(tokens).unsqueeze(-1)).squeeze(-1)
    assert part.token_ids.tolist() == list(tokens)
    assert np.abs(part.logprobs - wanted.numpy()).max() < 1e-4
    assert np.abs(part.top_logprobs - logs.topk(num_top).values.numpy()).max() < 1e-4
    assert np.abs(logs.gather(-1, torch.from_numpy(part.top_ids.astype(np.int64))).numpy() - part.top_logprobs).max() < 1e-4
    closest = (logs - wanted.unsqueeze(-1)).abs() < 1e-3  # ranks of tokens that are this close may differ
    ranks = (logs > wanted.unsqueeze(-1)).sum(-1) + 1
    assert (np.abs(part.ranks - ranks.numpy()) <= closest.sum(-1).numpy()).all()


@pytest.mark.parametrize(("page_size", "chunk"), [(4, 64), (16, 7), (16, 512)])
def test_whole_prompts_are_scored_as_the_oracle_scores_them(
    tiny_kit: TinyKit, oracle: Oracle, page_size: int, chunk: int
) -> None:
    engine = TinyEngine(tiny_kit, page_size, max_num_batched_tokens=chunk)
    names = ("planner", None)
    requests = [engine.request([], CONTEXT, name, "isolated", prompt_logprobs=k) for name, k in zip(names, (3, 1), strict=True)]
    requests.append(engine.request([], own_tokens(), "critic", "isolated"))  # one that does not ask, in the same steps
    planner, base, silent = scored(engine, *requests)
    agent = oracle.adapter(tiny_kit.adapter_dirs["planner"])
    assert planner is not None
    assert planner.first == 1
    check(planner, oracle.logits([], CONTEXT, agent, "isolated", None)[:-1], CONTEXT[1:], 3)
    check(base, oracle.logits([], CONTEXT, None, "isolated", None)[:-1], CONTEXT[1:], 1)
    assert silent is None


@pytest.mark.parametrize("sharing", ["eager", "residual", "base"])
@pytest.mark.parametrize("chunk", [7, 64])
def test_over_shared_context_the_branchs_own_tokens_are_scored(
    tiny_kit: TinyKit, oracle: Oracle, sharing: str, chunk: int
) -> None:
    engine = TinyEngine(tiny_kit, 16, max_num_batched_tokens=chunk)
    own = own_tokens()
    request = engine.request(CONTEXT, own, "planner", sharing, declared=["planner"], prompt_logprobs=2)
    (part,) = scored(engine, request)
    agent = oracle.adapter(tiny_kit.adapter_dirs["planner"])
    assert part is not None
    assert part.first == len(CONTEXT) + 1
    check(part, oracle.logits(CONTEXT, own, agent, sharing, None)[:-1], own[1:], 2)


@pytest.mark.parametrize(("sharing", "num_cached"), [("isolated", 0), ("eager", len(CONTEXT))])
def test_what_is_scored_is_run_again_though_it_is_cached(tiny_kit: TinyKit, sharing: str, num_cached: int) -> None:
    engine = TinyEngine(tiny_kit, 4)
    own = own_tokens()

    def ask(k: int | None) -> GenerateRequest:
        return engine.request(CONTEXT, own, "critic", sharing, declared=["critic"], prompt_logprobs=k)

    (first,) = scored(engine, ask(2))
    plain = ask(None)
    assert engine.run(plain) == engine.outputs[plain.request_id]
    again = ask(2)
    (second,) = scored(engine, again)
    assert first is not None
    assert second is not None
    assert np.allclose(first.logprobs, second.logprobs, atol=1e-4)
    last = ask(2)
    engine.run(last)
    usage = engine.last[last.request_id].usage
    assert usage is not None
    assert usage.useful_hit_tokens == num_cached
    assert engine.first[plain.request_id].usage.useful_hit_tokens == len(CONTEXT) + len(own) - 1  # type: ignore[union-attr]


def test_a_preempted_prompt_is_scored_once_and_as_it_would_have_been() -> None:
    lengths = (6, 50, 20)
    prompts = [[(7 * i + 5 * n) % 90 + 1 for i in range(length)] for n, length in enumerate(lengths)]

    def ask(engine: FakeEngine, prompt: list[int]) -> GenerateRequest:
        return engine.request([], prompt, "a8", "isolated", max_tokens=40, prompt_logprobs=0)

    calm, pressed = FakeEngine(num_slabs=64), FakeEngine(num_slabs=24, max_num_batched_tokens=4)
    wanted = [scored(calm, ask(calm, prompt))[0] for prompt in prompts]
    cut_at = []
    preempt = Scheduler._preempt

    def noted(self: Scheduler, item: Turn) -> None:
        cut_at.append(item.next_scored)
        preempt(self, item)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scheduler, "_preempt", noted)
        found = scored(pressed, *(ask(pressed, prompt) for prompt in prompts))
    assert any(position is not None and position > 1 for position in cut_at), "no prompt was preempted half scored"
    for one, other in zip(wanted, found, strict=True):
        assert one is not None
        assert other is not None
        assert (other.first, other.token_ids.tolist()) == (1, one.token_ids.tolist())
        assert other.logprobs.tolist() == one.logprobs.tolist()


def test_a_resumed_request_is_not_scored_again() -> None:
    engine = FakeEngine()
    request = engine.request([], [1, 2, 3], "a8", "isolated", resumed=[4, 5], prompt_logprobs=0)
    assert scored(engine, request) == [None]


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    engine = FakeEngine()
    assert scored(engine, engine.request([], [1], "a8", "isolated", prompt_logprobs=5)) == [None]


def test_scores_that_are_no_numbers_end_their_own_request_alone() -> None:
    engine = FakeEngine(max_num_batched_tokens=4)
    run = engine.runner.run

    def overflowing(batch: object, sampling: object) -> StepResult:
        result = run(batch, sampling)  # type: ignore[arg-type]
        assert result.scores is not None or not len(batch.scored_rows)  # type: ignore[attr-defined]
        if result.scores is not None:
            result.scores.logprobs[:] = np.nan
        return result

    engine.runner.run = overflowing  # type: ignore[method-assign, assignment]
    poisoned = engine.add(engine.request([], [1, 2, 3, 4, 5, 6, 7], "a8", "isolated", prompt_logprobs=0))
    sound = engine.add(engine.request([], [1, 2, 3], "b8", "isolated"))
    engine.drain()
    assert "not finite" in str(engine.errors[poisoned])
    assert len(engine.outputs[sound]) == 6


def test_more_alternatives_than_there_may_be_are_refused() -> None:
    engine = FakeEngine()
    with pytest.raises(InvalidArgument, match="prompt_logprobs=21"):
        engine.add(engine.request([], [1, 2], "a8", "isolated", prompt_logprobs=21))


def test_logits_of_a_long_prompt_are_never_all_in_memory() -> None:
    vocab_size, sizes = 2**17, []
    weights = torch.randn(vocab_size, 2, generator=torch.Generator().manual_seed(0))

    def to_logits(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return hidden @ weights.T

    hidden = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    tokens = np.arange(300, dtype=np.int64)
    scores = score_in_chunks(hidden, to_logits, tokens, 1, vocab_size)
    assert max(sizes) * vocab_size * 4 <= 64 * 2**20
    wanted = (hidden @ weights.T).log_softmax(-1)
    assert np.abs(scores.logprobs - wanted[torch.arange(300), torch.arange(300)].numpy()).max() < 1e-4
    assert np.abs(scores.top_logprobs[:, 0] - wanted.amax(-1).numpy()).max() < 1e-4


def test_entries_and_parts_say_what_the_arrays_say() -> None:
    arrays = (np.array([[7, 8], [9, 7]], np.int32), np.array([[-0.25, -2.0], [-0.5, -1.0]], np.float32))
    part = PromptLogprobs(3, np.array([8, 9], np.int32), np.array([-2, -0.5], np.float32), np.array([2, 1], np.int32), *arrays)
    assert part.entries() == (
        TokenLogprob(8, -2.0, ((7, -0.25), (8, -2.0)), 2),
        TokenLogprob(9, -0.5, ((9, -0.5), (7, -1.0)), 1),
    )
    assert part.between(4, 9).entries() == part.entries()[1:]
    assert part.between(0, 4).entries() == part.entries()[:1]
    joined = joined_prompt_logprobs([part.between(0, 4), part.between(4, 5)])
    assert joined is not None
    assert (joined.first, joined.end, joined.entries()) == (3, 5, part.entries())
    assert dataclasses.replace(part, first=5).end == 7
