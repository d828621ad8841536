"""aLoRA end to end over the tiny model, fp32: wherever tokens come from, answers are those of peft running the same adapter.

peft says itself where the adapter starts. Log probabilities must agree within 1e-4 and tokens be peft's greedy ones, except
for ties, which are counted.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import SamplingParams, Sharing
from forkkv_cluster.core.request_builder import PromptSharing
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.testing.tiny_models import TinyKit, save_alora_adapter
from tests.engine.alora.kit import (
    CONTEXT,
    INVOKE,
    INVOKED,
    NUM_NEW,
    OTHER,
    QUESTION,
    SAMPLING,
    SHARINGS,
    START,
    Judge,
    OpenLLM,
    answer,
    builder_of,
    envelope,
    run,
    whole_pages,
)
from tests.engine.families import qwen3, save

PROMPTS: dict[str, tuple[list[int], list[int]]] = {
    # context, own tokens
    "first-own-token": (CONTEXT, [*INVOKE, *QUESTION]),
    "later": (CONTEXT, [*QUESTION, *QUESTION, *INVOKE, 77]),
    "nothing-after-it": (CONTEXT, [*QUESTION, *INVOKE]),
    "the-last-of-two": (CONTEXT, [*INVOKE, *QUESTION, *INVOKE, 77]),
    "two-that-overlap": (CONTEXT, [*QUESTION, *INVOKE, 42, 41, 77]),
    "cut-off-at-the-end": (CONTEXT, [*INVOKE, *QUESTION, *INVOKE[:2]]),
    "inside-the-context": ([*CONTEXT[:40], *INVOKE, *CONTEXT[40:]], QUESTION),
    "across-the-fork": ([*CONTEXT, *INVOKE[:1]], [*INVOKE[1:], *QUESTION]),
    "first-token-of-all": ([*INVOKE, *CONTEXT], QUESTION),
    "none": (CONTEXT, QUESTION),
}


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", PROMPTS)
def test_a_turn_answers_as_peft_does_wherever_the_invocation_is(used_llm: LLM, judge: Judge, name: str, sharing: str) -> None:
    context, own = PROMPTS[name]
    branch = used_llm.context(context, ["checker", "critic"], sharing).fork("a", "checker")
    completion = branch.generate(own, max_tokens=NUM_NEW, logprobs=0)
    judge.check([*context, *own], completion, "checker")
    assert completion.is_adapter_inactive == (name == "none")


@pytest.mark.parametrize(("page_size", "chunk"), [(4, 64), (16, 7), (64, 512), (1, 13)])
@pytest.mark.parametrize("sharing", ["isolated", "eager"])
def test_pages_and_chunks_change_nothing(new_llm: OpenLLM, judge: Judge, page_size: int, chunk: int, sharing: str) -> None:
    llm = new_llm(page_size, chunk)
    own = [*QUESTION, *INVOKE, 77]
    for _ in range(2):  # the second time from the cache
        branch = llm.context(CONTEXT, ["checker"], sharing).fork("a", "checker")
        judge.check([*CONTEXT, *own], branch.generate(own, max_tokens=NUM_NEW, logprobs=0), "checker")


@pytest.mark.parametrize("prompt", ["later", "first-token-of-all", "none"])
def test_a_request_without_a_session_answers_as_peft_does(used_llm: LLM, judge: Judge, prompt: str) -> None:
    tokens = [token for part in PROMPTS[prompt] for token in part]
    completion = answer(used_llm, tokens, "checker")
    judge.check(tokens, completion, "checker")
    assert completion.is_adapter_inactive == (prompt == "none")


def test_greedy_generation_is_what_pefts_own_loop_generates(used_llm: LLM, judge: Judge) -> None:
    wanted = judge.generate(INVOKED, "checker", 12)
    assert used_llm.generate([INVOKED], adapter="checker", max_tokens=12, ignore_eos=True)[0].token_ids == tuple(wanted)
    assert judge.generate(INVOKED, "critic", 12) != wanted


def test_without_an_invocation_the_base_model_answers(llm: LLM) -> None:
    inactive, base = (answer(llm, [*CONTEXT, *QUESTION], adapter) for adapter in ("checker", None))
    assert inactive.token_ids == base.token_ids
    assert (inactive.is_adapter_inactive, base.is_adapter_inactive) == (True, False)
    assert inactive.usage.useful_hit_tokens == 0
    assert base.usage.useful_hit_tokens > whole_pages(len(CONTEXT)), "one and the same request to the cache"


@pytest.mark.parametrize("sharing", ["isolated", "eager"])
def test_plain_and_activated_adapters_run_in_the_same_steps(used_llm: LLM, judge: Judge, sharing: str) -> None:
    context = used_llm.context(CONTEXT, ["checker", "rewriter", "tester"], sharing)
    turns = {
        "a": ("checker", [*QUESTION, *INVOKE, 77]),
        "b": ("rewriter", [*OTHER, *QUESTION]),
        "c": ("tester", [*INVOKE, *OTHER]),
        "d": (None, [*QUESTION, *INVOKE, 77]),
        "e": ("checker", [*OTHER, *QUESTION]),
        "f": ("rewriter", [*QUESTION, *OTHER, *INVOKE]),
    }
    branches = [(context.fork(name, adapter), own) for name, (adapter, own) in turns.items()]
    completions = used_llm.generate_turns(branches, max_tokens=NUM_NEW, logprobs=0)
    for (adapter, own), completion in zip(turns.values(), completions, strict=True):
        if adapter != "tester":
            judge.check([*CONTEXT, *own], completion, adapter)
    alone = used_llm.context(CONTEXT, ["tester"], sharing).fork("alone", "tester").generate(turns["c"][1], max_tokens=NUM_NEW)
    assert alone.token_ids == completions[2].token_ids


def test_generated_tokens_do_not_invoke(llm: LLM, judge: Judge, tiny_kit: TinyKit, tmp_path: Path) -> None:
    prompt = [*CONTEXT, *QUESTION]
    base = answer(llm, prompt, None)
    invocation = list(base.token_ids[2:4])
    assert invocation not in [prompt[i : i + 2] for i in range(len(prompt))]
    llm.load_adapter("early", save_alora_adapter(tiny_kit.model_dir, tmp_path / "early", invocation))
    completion = answer(llm, prompt, "early")
    assert completion.token_ids == base.token_ids
    assert completion.is_adapter_inactive


@pytest.mark.parametrize("sharing", ["isolated", "eager"])
def test_a_turn_finds_an_invocation_in_what_an_earlier_turn_wrote(
    llm: LLM, tiny_kit: TinyKit, tmp_path: Path, sharing: str
) -> None:
    # As for peft, the prompt is all that the turn starts from.
    probe = llm.context(CONTEXT).fork("probe").generate(QUESTION, max_tokens=NUM_NEW)
    early = save_alora_adapter(tiny_kit.model_dir, tmp_path / "early", probe.token_ids[2:5])
    llm.load_adapter("early", early)
    branch = llm.context(CONTEXT, ["early"], sharing).fork("a", "early")
    first = branch.generate(QUESTION, max_tokens=NUM_NEW)
    assert (first.token_ids, first.is_adapter_inactive) == (probe.token_ids, True)
    second = branch.generate([77], max_tokens=NUM_NEW, logprobs=0)
    prompt = [*CONTEXT, *QUESTION, *first.token_ids, 77]
    Judge(tiny_kit.model_dir, {"early": early}).check(prompt, second, "early")
    assert not second.is_adapter_inactive


def test_qk_norm_is_no_obstacle_as_no_residual_is_needed(tmp_path: Path) -> None:
    model_dir = save(qwen3(), tmp_path / "qwen3")
    directory = save_alora_adapter(model_dir, tmp_path / "checker", INVOKE)
    llm = LLM(model_dir, {"checker": directory}, dtype="float32", kv_bytes="8MiB", num_threads=1)
    judge = Judge(model_dir, {"checker": directory})
    context, own = [token % 300 for token in CONTEXT], [7, *INVOKE, 9]
    for sharing in SHARINGS:
        branch = llm.context(context, ["checker"], sharing).fork("a", "checker")
        judge.check([*context, *own], branch.generate(own, max_tokens=NUM_NEW, logprobs=0), "checker")


# --- later turns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_new_invocation_makes_earlier_invoked_tokens_the_base_models(llm: LLM, judge: Judge, sharing: str) -> None:
    branch = llm.context(CONTEXT, ["checker"], sharing).fork("a", "checker")
    history = [*CONTEXT, *INVOKE, *QUESTION]
    history += branch.generate([*INVOKE, *QUESTION], max_tokens=40).token_ids
    own = [*QUESTION, *INVOKE, 77]
    second = branch.generate(own, max_tokens=NUM_NEW, logprobs=0)
    judge.check([*history, *own], second, "checker")
    assert second.usage.useful_hit_tokens <= len(CONTEXT), "what the adapter wrote in the first turn is of no use now"
    assert second.usage.prefill_tokens_run == len(history) + len(own) - second.usage.useful_hit_tokens


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_turn_without_a_new_invocation_goes_on_from_the_last_one(llm: LLM, judge: Judge, sharing: str) -> None:
    branch = llm.context(CONTEXT, ["checker"], sharing).fork("a", "checker")
    first = branch.generate([*INVOKE, *QUESTION], max_tokens=NUM_NEW)
    history = [*CONTEXT, *INVOKE, *QUESTION, *first.token_ids]
    second = branch.generate(QUESTION, max_tokens=NUM_NEW, logprobs=0)
    judge.check([*history, *QUESTION], second, "checker")
    assert second.usage.useful_hit_tokens == len(history) - 1, "all but the last generated token, which has no KV yet"
    assert not second.is_adapter_inactive


# --- moving and waiting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["isolated", "eager", "base"])
@pytest.mark.parametrize("num_lost", [1, 7])
def test_a_stream_resumed_on_another_worker_goes_on_as_it_would_have(new_llm: OpenLLM, sharing: str, num_lost: int) -> None:
    one, other = new_llm(), new_llm(chunk=40)
    (ref,) = one.adapter_refs(["checker"])
    choice = PromptSharing(Sharing(sharing), None if sharing == "isolated" else len(CONTEXT))
    sampling = SamplingParams(max_tokens=16, temperature=0.8, seed=11)
    request = builder_of(one).prompt(np.array(INVOKED, np.int32), ref, choice, sampling, envelope("a"))
    (whole,) = run(one.engine, request)
    resumed = builder_of(other).resumed(request, whole.token_ids[:num_lost], 1, ["lost"])
    assert resumed.invocation_start == START
    (rest,) = run(other.engine, resumed)
    assert rest.token_ids == whole.token_ids[num_lost:]


def test_a_turn_that_had_to_give_its_memory_away_answers_the_same(new_llm: OpenLLM, judge: Judge) -> None:
    prompts = [[60 + i, *CONTEXT, *QUESTION, *INVOKE, 77] for i in range(6)]
    llm = new_llm(16, kv_bytes="2MiB")
    completions = llm.generate(prompts, adapter="checker", max_tokens=90, logprobs=0)
    assert llm.engine._scheduler.num_preemptions > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        judge.check(prompt, completion, "checker")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapter", "start"), [("checker", None), ("checker", len(INVOKED)), ("critic", START), (None, START)])
def test_a_request_whose_spans_contradict_its_adapter_is_refused(used_llm: LLM, adapter: str | None, start: int | None) -> None:
    ref = used_llm.adapter_refs([adapter])[0] if adapter is not None else None
    request = builder_of(used_llm).prompt(np.array(INVOKED, np.int32), ref, PromptSharing(), SAMPLING, envelope("a"))
    with pytest.raises(InvalidArgument, match="invocation_start"):
        used_llm.engine.add_request(replace(request, invocation_start=start))
