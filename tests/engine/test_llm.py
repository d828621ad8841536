"""The offline API over the tiny model, fp32: its answers are the oracle's, and its contexts share as a session does."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from forkkv_cluster.core.adapter_semantics import write_trained_for
from forkkv_cluster.core.config import parse_config
from forkkv_cluster.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from forkkv_cluster.core.request import FinishReason, SamplingParams, Sharing
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.test_engine_exactness import CONTEXT, Judge

ADAPTERS = ("planner", "critic", "coder")
DOCUMENT = "The river rose in the night. The bridge was closed at four, and nobody told the school."


@pytest.fixture(scope="module")
def judge(tiny_kit: TinyKit) -> Judge:
    return Judge(tiny_kit)


@pytest.fixture
def llm(tiny_kit: TinyKit) -> Iterator[LLM]:
    adapters = {name: tiny_kit.adapter_dirs[name] for name in ADAPTERS}
    llm = LLM(tiny_kit.model_dir, adapters, dtype="float32", kv_bytes="32MiB", num_threads=1)
    yield llm
    assert not llm.engine.has_work
    llm.engine.check_invariants()
    assert llm.status().num_pinned_pages == 0


def test_ten_lines_from_a_model_directory_to_a_join(llm: LLM):
    context = llm.context(DOCUMENT, adapters=["planner", "critic"], sharing="eager")
    branch = context.fork("a", adapter="planner")
    plan = branch.generate("What now?", max_tokens=8)
    before = len(context.token_ids)
    assert context.join(branch) == len(llm.tokens("What now?")) + 8
    assert len(context.token_ids) == before + len(llm.tokens("What now?")) + 8
    reader = context.fork("b", adapter="critic")
    assert reader.generate("And then?", max_tokens=4).usage.useful_hit_tokens == len(context.token_ids)
    assert plan.text == llm.decode(plan.token_ids)
    assert plan.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("sharing", ["isolated", "residual", "eager", "base"])
def test_a_branch_answers_as_the_oracle_does(llm: LLM, judge: Judge, sharing: str):
    branch = llm.context(CONTEXT, ADAPTERS, sharing).fork("a", "planner")
    own = [11, 12, 13, 14]
    output = branch.generate(own, max_tokens=8)
    judge.check(CONTEXT, own, output.token_ids, "planner", sharing)


def test_a_second_turn_goes_on_from_the_first(llm: LLM, judge: Judge):
    branch = llm.context(CONTEXT, ADAPTERS, "eager").fork("a", "critic")
    first = branch.generate([11, 12, 13], max_tokens=6)
    second = branch.generate([15, 16], max_tokens=6)
    judge.check(CONTEXT, [11, 12, 13, *first.token_ids, 15, 16], second.token_ids, "critic", "eager")
    assert branch.token_ids.tolist() == [*CONTEXT, 11, 12, 13, *first.token_ids, 15, 16, *second.token_ids]
    # All but the last generated token, which has no KV before this turn.
    assert second.usage.base_hit_tokens == len(CONTEXT) + 3 + 6 - 1


def test_branches_of_one_call_run_in_the_same_steps_and_answer_as_alone(llm: LLM, tiny_kit: TinyKit, judge: Judge):
    context = llm.context(CONTEXT, ADAPTERS, "eager")
    branches = [context.fork(name, name) for name in ADAPTERS]
    before = llm.status().counters.num_steps
    outputs = llm.generate_turns([(branch, [20 + i, 30]) for i, branch in enumerate(branches)], max_tokens=12)
    assert llm.status().counters.num_steps - before <= 12 + 3  # not 3 * 12
    for i, (name, output) in enumerate(zip(ADAPTERS, outputs, strict=True)):
        judge.check(CONTEXT, [20 + i, 30], output.token_ids, name, "eager")
        assert context.session.branch(name).own.tolist() == [20 + i, 30, *output.token_ids]


def test_a_context_that_names_no_sharing_shares_nothing_with_an_adapter_of_which_nothing_is_known(llm: LLM, judge: Judge):
    context = llm.context(CONTEXT, ADAPTERS)
    assert context.session.sharing is Sharing.AUTO
    output = context.fork("a", "planner").generate([11, 12, 13, 14], max_tokens=8)
    judge.check(CONTEXT, [11, 12, 13, 14], output.token_ids, "planner", "isolated")


def test_prompts_without_a_context_run_each_with_its_adapter(llm: LLM, judge: Judge):
    prompts = [CONTEXT[:20], CONTEXT[20:50], CONTEXT[:33]]
    for prompt, name, output in zip(
        prompts,
        ("planner", None, "coder"),
        llm.generate(prompts, adapter=["planner", None, "coder"], max_tokens=6),
        strict=True,
    ):
        judge.check([], prompt, output.token_ids, name, "isolated")


def test_a_branch_of_a_branch_continues_it(llm: LLM):
    parent = llm.context(CONTEXT, ADAPTERS, "eager").fork("a", "planner")
    parent.generate([11, 12], max_tokens=4)
    child = parent.fork("b", "planner")
    assert child.token_ids.tolist() == parent.token_ids.tolist()
    assert parent.generate([7], max_tokens=5).token_ids == child.generate([7], max_tokens=5).token_ids


def test_more_prompts_than_run_at_once_all_end(llm: LLM):
    outputs = llm.generate([[i + 10, 5] for i in range(150)], max_tokens=2)
    assert [len(output.token_ids) for output in outputs] == [2] * 150


def test_a_stop_string_ends_the_output_before_it_and_frees_the_request(llm: LLM):
    (whole,) = llm.generate([DOCUMENT], max_tokens=24)
    stop = whole.text[len(whole.text) // 2 :][:3]
    (cut,) = llm.generate([DOCUMENT], max_tokens=24, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason is FinishReason.STOP
    assert len(cut.token_ids) < 24
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_a_stop_token_is_kept_as_a_token_and_left_out_of_the_text(llm: LLM):
    (whole,) = llm.generate([DOCUMENT], max_tokens=12)
    token = whole.token_ids[5]
    (cut,) = llm.generate([DOCUMENT], max_tokens=12, stop_token_ids=[token])
    length = whole.token_ids.index(token) + 1
    assert cut.token_ids == whole.token_ids[:length]
    assert cut.text == llm.decode(cut.token_ids[:-1])


def test_options_go_over_the_sampling_that_is_given(llm: LLM):
    base = SamplingParams(temperature=1.0, seed=3, max_tokens=9)
    (sampled,) = llm.generate([[5, 6]], sampling=base, max_tokens=4, logprobs=2)
    assert len(sampled.token_ids) == 4
    assert [len(entry.top) for entry in sampled.logprobs] == [2] * 4
    (again,) = llm.generate([[5, 6]], sampling=base)
    assert again.token_ids[:4] == sampled.token_ids


def test_a_failing_turn_changes_no_branch_and_leaves_nothing_in_the_engine(llm: LLM):
    context = llm.context(CONTEXT, ADAPTERS, "eager")
    good, bad = context.fork("good", "planner"), context.fork("bad", "critic")
    with pytest.raises(InvalidArgument, match="exceed"):
        llm.generate_turns([(good, [5]), (bad, [6] * 20_000)], max_tokens=4)
    assert len(good.state.own) == len(bad.state.own) == 0
    assert not llm.engine.has_work


def test_mistakes_are_named_with_their_remedy(llm: LLM):
    context = llm.context(CONTEXT, ["planner"], "eager")
    branch = context.fork("a", "planner")
    with pytest.raises(AlreadyExists):
        context.fork("a", "planner")
    with pytest.raises(NotFound, match="Declare it"):
        context.fork("b", "critic")
    with pytest.raises(NotFound, match="Loaded: coder, critic, planner"):
        llm.generate([[5]], adapter="unknown")
    with pytest.raises(FailedPrecondition, match="twice"):
        llm.generate_turns([(branch, [5]), (branch, [6])])
    with pytest.raises(InvalidArgument, match="without tokens of its own"):
        branch.generate([])
    with pytest.raises(InvalidArgument, match="not a sampling option"):
        branch.generate([5], temprature=1.0)
    with pytest.raises(InvalidArgument, match="Put it into a list"):
        llm.generate("text")
    with pytest.raises(InvalidArgument, match="another context"):
        llm.context(CONTEXT, ["planner"], "eager").join(branch)
    with pytest.raises(InvalidArgument, match="is empty"):
        llm.context([])
    with pytest.raises(InvalidArgument, match="sharing='some'"):
        llm.context(CONTEXT, sharing="some")


def test_a_model_without_a_tokenizer_takes_and_gives_token_ids(tiny_kit: TinyKit, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).symlink_to(tiny_kit.model_dir / name)
    llm = LLM(model, kv_bytes="8MiB", num_threads=1)
    (output,) = llm.generate([np.array([5, 6, 7])], max_tokens=3)
    assert (len(output.token_ids), output.text) == (3, "")
    with pytest.raises(InvalidArgument, match="no tokenizer"):
        llm.generate(["text"])


def test_a_configuration_gives_every_other_setting(tiny_kit: TinyKit):
    raw = {"model": {"path": str(tiny_kit.model_dir), "name": "m"}, "cache": {"kv_bytes": "8MiB", "page_size": 16}}
    llm = LLM.from_config(parse_config(raw))
    llm.context(CONTEXT)
    assert llm.status().pools[0].num_cached == -(-len(CONTEXT) // 16)


def test_adapters_are_loaded_and_unloaded_by_name(llm: LLM, tiny_kit: TinyKit):
    llm.unload_adapter("coder")
    with pytest.raises(NotFound):
        llm.generate([[5]], adapter="coder")
    llm.load_adapter("coder", tiny_kit.adapter_dirs["coder"])
    assert len(llm.generate([[5]], adapter="coder", max_tokens=2)[0].token_ids) == 2


@pytest.mark.parametrize(("is_included", "ending"), [(False, ""), (True, "STOP")])
def test_a_stop_string_ends_the_text_before_or_after_it(llm: LLM, is_included: bool, ending: str):
    (free,) = llm.generate([[5, 6, 7]], max_tokens=24)
    stop = free.text[len(free.text) // 2 :][:3]
    (cut,) = llm.generate([[5, 6, 7]], max_tokens=24, stop=(stop,), include_stop_str_in_output=is_included)
    assert cut.finish_reason is FinishReason.STOP
    assert cut.text == free.text[: free.text.index(stop)] + ending.replace("STOP", stop)
    assert free.token_ids[: len(cut.token_ids)] == cut.token_ids


def test_an_answer_under_another_sharing_than_its_adapter_was_trained_for_says_so(llm: LLM, tiny_kit: TinyKit, tmp_path: Path):
    directory = Path(shutil.copytree(tiny_kit.adapter_dirs["critic"], tmp_path / "critic"))
    write_trained_for(directory, Sharing.EAGER, {})
    llm.load_adapter("trained", directory)
    said = {}
    for sharing in ("eager", "residual"):
        branch = llm.context(CONTEXT, adapters=["trained"], sharing=sharing).fork("b", adapter="trained")
        said[sharing] = branch.generate([5, 6], max_tokens=1).mismatched_training
    said["isolated"] = llm.generate([CONTEXT], adapter="trained", max_tokens=1)[0].mismatched_training
    said["base"] = llm.generate([CONTEXT], max_tokens=1)[0].mismatched_training
    llm.unload_adapter("trained")
    assert said == {"eager": None, "residual": Sharing.EAGER, "isolated": Sharing.EAGER, "base": None}


def test_prompt_logprobs_have_an_entry_for_every_token_of_the_prompt(llm: LLM):
    (whole,) = llm.generate([CONTEXT], "planner", max_tokens=1, prompt_logprobs=1)
    assert whole.prompt_logprobs is not None
    assert whole.prompt_logprobs[0] is None
    assert [entry.token_id for entry in whole.prompt_logprobs[1:] if entry is not None] == CONTEXT[1:]
    branch = llm.context(CONTEXT, ADAPTERS, "eager").fork("a", "planner")
    turn = branch.generate([11, 12, 13], max_tokens=1, prompt_logprobs=0)
    assert turn.prompt_logprobs is not None
    assert [entry is None for entry in turn.prompt_logprobs] == [True] * (len(CONTEXT) + 1) + [False, False]
    assert llm.generate([CONTEXT], max_tokens=1)[0].prompt_logprobs is None
