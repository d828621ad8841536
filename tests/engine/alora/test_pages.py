"""aLoRA and the cache: pages before an invocation are the base model's, pages after it the adapter's alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forkkv_cluster.core.request import WriterMode
from forkkv_cluster.core.session import BranchSpec
from forkkv_cluster.engine.llm import LLM
from tests.engine.alora.kit import (
    CONTEXT,
    INVOKE,
    INVOKED,
    NUM_NEW,
    OTHER,
    QUESTION,
    SAMPLING,
    START,
    Judge,
    OpenLLM,
    answer,
    builder_of,
    completion_of,
    envelope,
    run,
    whole_pages,
)


@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_before_an_invocation_serve_the_base_model_and_the_other_way_round(
    new_llm: OpenLLM, judge: Judge, page_size: int
) -> None:
    llm = new_llm(page_size)
    assert answer(llm, INVOKED, "checker").usage.useful_hit_tokens == 0
    base = answer(llm, [*INVOKED[:START], 60, 61, 62], None)
    judge.check([*INVOKED[:START], 60, 61, 62], base, None)
    assert base.usage.useful_hit_tokens == whole_pages(START, page_size)
    fresh = new_llm(page_size)
    answer(fresh, INVOKED[:START], None)
    invoked = answer(fresh, INVOKED, "checker")
    judge.check(INVOKED, invoked, "checker")
    assert invoked.usage.useful_hit_tokens == START, "the beginning of a page of the base model is copied"
    assert invoked.usage.base_hit_tokens == invoked.usage.residual_hit_tokens


def test_pages_before_an_invocation_serve_every_alora(llm: LLM, judge: Judge) -> None:
    answer(llm, INVOKED, "checker")
    other = answer(llm, [*INVOKED[:START], *OTHER, 77], "rewriter")
    judge.check([*INVOKED[:START], *OTHER, 77], other, "rewriter")
    assert other.usage.useful_hit_tokens == whole_pages(START)


def test_pages_before_an_invocation_serve_no_plain_adapter(llm: LLM, judge: Judge) -> None:
    answer(llm, INVOKED, "checker")
    plain = answer(llm, INVOKED, "critic")
    judge.check(INVOKED, plain, "critic")
    assert plain.usage.base_hit_tokens == 0


def test_what_a_plain_adapter_wrote_serves_no_alora(llm: LLM, judge: Judge) -> None:
    answer(llm, INVOKED, "critic")
    invoked = answer(llm, INVOKED, "checker")
    judge.check(INVOKED, invoked, "checker")
    assert invoked.usage.base_hit_tokens == 0


def test_pages_after_an_invocation_serve_its_adapter_alone(new_llm: OpenLLM, judge: Judge) -> None:
    llm = new_llm(4)
    tokens = [*INVOKED, *QUESTION]
    answer(llm, tokens, "checker")
    again = answer(llm, tokens, "checker")
    assert again.usage.useful_hit_tokens == len(tokens) - 1
    for adapter, num_shared in ((None, START), ("critic", 0)):
        other = answer(llm, tokens, adapter)
        judge.check(tokens, other, adapter)
        assert other.usage.useful_hit_tokens == whole_pages(num_shared, 4)


def test_an_invocation_elsewhere_in_the_page_is_another_page(new_llm: OpenLLM, judge: Judge) -> None:
    llm = new_llm(64)
    earlier = [*CONTEXT, *INVOKE, *QUESTION, 77]
    answer(llm, earlier, "checker")
    later = [*earlier, *INVOKE, 78]
    completion = answer(llm, later, "checker")
    judge.check(later, completion, "checker")
    assert completion.usage.useful_hit_tokens == 64


def test_sharing_decides_nothing_for_what_an_alora_writes(llm: LLM) -> None:
    own = [*QUESTION, *INVOKE, 77]
    first = llm.context(CONTEXT, ["checker"], "isolated").fork("a", "checker").generate(own, max_tokens=NUM_NEW)
    for sharing in ("base", "eager", "residual"):
        again = llm.context(CONTEXT, ["checker"], sharing).fork("a", "checker").generate(own, max_tokens=NUM_NEW)
        assert again.token_ids == first.token_ids
        assert again.usage.useful_hit_tokens == len(CONTEXT) + len(own) - 1


def test_a_context_pass_under_eager_projects_nothing_for_an_alora(llm: LLM) -> None:
    llm.context(CONTEXT, ["checker", "rewriter"], "eager")
    assert llm.status().residual_bytes_held == 0
    branch = llm.context(CONTEXT, ["checker", "critic"], "eager").fork("a", "checker")
    assert branch.generate([*INVOKE, 77], max_tokens=2).usage.prefill_tokens_run == len(INVOKE) + 1
    assert llm.status().residual_bytes_held > 0, "the critic's"


def test_branches_of_one_context_run_its_pass_once(llm: LLM, judge: Judge) -> None:
    context = llm.context(CONTEXT, ["checker", "rewriter"], "eager")
    # Another worker, which has nothing of it: all its branches at once.
    fresh = {name: context.fork(name, adapter) for name, adapter in (("a", "checker"), ("b", "rewriter"), ("c", "checker"))}
    requests = [
        builder_of(llm).turn(
            replace(context.session, tenant="elsewhere"), branch.state, np.array(own, np.int32), SAMPLING, envelope(name)
        )
        for (name, branch), own in zip(fresh.items(), ([*INVOKE, 7], [*OTHER, 8], [*QUESTION, *INVOKE]), strict=True)
    ]
    before = llm.status().counters.prefill_tokens_run
    runs = run(llm.engine, *requests)
    num_own = sum(request.num_prompt_tokens - len(CONTEXT) for request in requests)
    assert llm.status().counters.prefill_tokens_run - before == len(CONTEXT) + num_own
    for request, done in zip(requests, runs, strict=True):
        assert request.adapter is not None
        judge.check(request.tokens.tolist(), completion_of(done), request.adapter.name)


def test_a_first_writer_changes_nothing_for_an_alora(llm: LLM, judge: Judge) -> None:
    session = replace(llm.context(CONTEXT, ["critic", "checker"], "residual").session, writer=WriterMode.FIRST)
    session = session.fork((BranchSpec("a", "checker"), BranchSpec("c", "critic")))
    assert session.first_writer is not None
    assert session.first_writer.name == "critic"
    own = np.array([*QUESTION, *INVOKE, 77], np.int32)
    requests = [builder_of(llm).turn(session, session.branch(name), own, SAMPLING, envelope(name)) for name in ("c", "a")]
    _, invoked = run(llm.engine, *requests)
    judge.check([*CONTEXT, *own.tolist()], completion_of(invoked), "checker")
