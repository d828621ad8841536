"""aLoRA end to end over the tiny model, fp32: wherever tokens come from, answers are those of peft running the same adapter.

peft says itself where the adapter starts. Log probabilities must agree within 1e-4 and tokens be peft's greedy ones, except
for ties, which are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.variants import calculate_alora_offsets
from transformers import AutoModelForCausalLM

from forkkv_cluster.core.config import parse_config
from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.core.request import GenerateRequest, SamplingParams, WriterMode
from forkkv_cluster.core.request_builder import Envelope, PromptSharing, RequestBuilder
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.llm import LLM, Completion
from forkkv_cluster.engine.local_runs import LocalRun, run_to_end
from forkkv_cluster.testing.tiny_models import TinyKit, save_alora_adapter
from tests.engine.families import qwen3, save

CONTEXT = [(7 * i * i + 3) % 2000 + 10 for i in range(75)]  # ends inside a page
INVOKE = [41, 42, 41]  # overlaps with itself
OTHER = [51, 52]
QUESTION = [(11 * i + 5) % 2000 + 100 for i in range(13)]
NUM_NEW = 8
SHARINGS = ["isolated", "base", "eager", "residual"]

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


@pytest.fixture(scope="module")
def alora_dirs(tiny_kit: TinyKit, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("alora")
    return {
        "checker": save_alora_adapter(tiny_kit.model_dir, root / "checker", INVOKE),
        "rewriter": save_alora_adapter(tiny_kit.model_dir, root / "rewriter", OTHER, seed=1, lora_bias=True, use_rslora=True),
    }


class Judge:
    """peft's answers, by adapter; None is the base model."""

    def __init__(self, model_dir: Path, adapter_dirs: Mapping[str, Path]) -> None:
        self._models: dict[str | None, Any] = {None: _load(model_dir)}
        for name, directory in adapter_dirs.items():
            self._models[name] = PeftModel.from_pretrained(_load(model_dir), str(directory)).eval()

    def logprobs(self, prompt: Sequence[int], output: Sequence[int], adapter: str | None) -> torch.Tensor:
        """[len(output), V]: how likely every next token was."""
        model, ids = self._models[adapter], torch.tensor([[*prompt, *output[:-1]]])
        options = {}
        if adapter is not None and model.peft_config["default"].alora_invocation_tokens:
            (offset,) = calculate_alora_offsets(model.peft_config, "default", torch.tensor([list(prompt)]))
            options["alora_offsets"] = [None if offset is None else offset + len(output) - 1]
        with torch.inference_mode():
            logits = model(ids, **options).logits[0, len(prompt) - 1 :]
        return torch.log_softmax(logits.float(), dim=-1)

    def check(self, prompt: Sequence[int], answer: Completion, adapter: str | None) -> None:
        wanted = self.logprobs(prompt, answer.token_ids, adapter)
        found = torch.tensor([entry.logprob for entry in answer.logprobs])
        torch.testing.assert_close(found, wanted[torch.arange(len(found)), list(answer.token_ids)], atol=1e-4, rtol=0)
        top = wanted.topk(2, dim=-1)
        is_clear = top.values[:, 0] - top.values[:, 1] > 1e-3
        assert is_clear.sum() >= len(found) // 2, "too many ties to say anything"
        assert torch.equal(torch.tensor(answer.token_ids)[is_clear], top.indices[:, 0][is_clear])


def _load(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def judge(tiny_kit: TinyKit, alora_dirs: dict[str, Path]) -> Judge:
    return Judge(tiny_kit.model_dir, {**alora_dirs, "critic": tiny_kit.adapter_dirs["critic"]})


OpenLLM = Callable[..., LLM]


@pytest.fixture
def open_llm(tiny_kit: TinyKit, alora_dirs: dict[str, Path]) -> Iterator[OpenLLM]:
    """Engines with both aLoRAs and two plain adapters; memory starts as NaN, and nothing may be held at the end."""
    opened: list[LLM] = []

    def open_(page_size: int = 16, chunk: int = 64, kv_bytes: str = "8MiB", **scheduler: int) -> LLM:
        adapters = {**alora_dirs, "critic": tiny_kit.adapter_dirs["critic"], "tester": tiny_kit.adapter_dirs["tester"]}
        llm = LLM.from_config(
            parse_config(
                {
                    "model": {"path": str(tiny_kit.model_dir), "name": "tiny", "dtype": "float32"},
                    "adapters": [{"name": name, "path": str(path)} for name, path in adapters.items()],
                    "cache": {"page_size": page_size, "kv_bytes": kv_bytes},
                    "scheduler": {"max_num_batched_tokens": chunk, **scheduler},
                    "worker": {"num_threads": 1},
                }
            )
        )
        llm.engine._runner.kv.arena.fill_(float("nan"))  # type: ignore[attr-defined]
        opened.append(llm)
        return llm

    yield open_
    for llm in opened:
        llm.engine.check_invariants()
        assert llm.status().num_pinned_pages == 0


@pytest.fixture
def llm(open_llm: OpenLLM) -> LLM:
    return open_llm()


def answer(llm: LLM, prompt: Sequence[int], adapter: str | None) -> Completion:
    """A request without a session."""
    return llm.generate([prompt], adapter=adapter, max_tokens=NUM_NEW, logprobs=0)[0]


def whole_pages(num_tokens: int, page_size: int = 16) -> int:
    return num_tokens // page_size * page_size


# --- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", PROMPTS)
def test_a_turn_answers_as_peft_does_wherever_the_invocation_is(llm: LLM, judge: Judge, name: str, sharing: str) -> None:
    context, own = PROMPTS[name]
    branch = llm.context(context, ["checker", "critic"], sharing).fork("a", "checker")
    completion = branch.generate(own, max_tokens=NUM_NEW, logprobs=0)
    judge.check([*context, *own], completion, "checker")
    assert completion.is_adapter_inactive == (name == "none")


@pytest.mark.parametrize(("page_size", "chunk"), [(4, 64), (16, 7), (64, 512), (1, 13)])
@pytest.mark.parametrize("sharing", ["isolated", "eager"])
def test_pages_and_chunks_change_nothing(open_llm: OpenLLM, judge: Judge, page_size: int, chunk: int, sharing: str) -> None:
    llm = open_llm(page_size, chunk)
    own = [*QUESTION, *INVOKE, 77]
    for _ in range(2):  # the second time from the cache
        branch = llm.context(CONTEXT, ["checker"], sharing).fork("a", "checker")
        judge.check([*CONTEXT, *own], branch.generate(own, max_tokens=NUM_NEW, logprobs=0), "checker")


@pytest.mark.parametrize("prompt", ["later", "first-token-of-all", "none"])
def test_a_request_without_a_session_answers_as_peft_does(llm: LLM, judge: Judge, prompt: str) -> None:
    tokens = [token for part in PROMPTS[prompt] for token in part]
    completion = answer(llm, tokens, "checker")
    judge.check(tokens, completion, "checker")
    assert completion.is_adapter_inactive == (prompt == "none")


def test_without_an_invocation_the_base_model_answers(llm: LLM) -> None:
    inactive, base = (answer(llm, [*CONTEXT, *QUESTION], adapter) for adapter in ("checker", None))
    assert inactive.token_ids == base.token_ids
    assert (inactive.is_adapter_inactive, base.is_adapter_inactive) == (True, False)
    assert inactive.usage.useful_hit_tokens == 0
    assert base.usage.useful_hit_tokens > whole_pages(len(CONTEXT)), "one and the same request to the cache"


@pytest.mark.parametrize("sharing", ["isolated", "eager"])
def test_plain_and_activated_adapters_run_in_the_same_steps(llm: LLM, judge: Judge, sharing: str) -> None:
    context = llm.context(CONTEXT, ["checker", "rewriter", "tester"], sharing)
    turns = {
        "a": ("checker", [*QUESTION, *INVOKE, 77]),
        "b": ("rewriter", [*OTHER, *QUESTION]),
        "c": ("tester", [*INVOKE, *OTHER]),
        "d": (None, [*QUESTION, *INVOKE, 77]),
        "e": ("checker", [*OTHER, *QUESTION]),
        "f": ("rewriter", [*QUESTION, *OTHER, *INVOKE]),
    }
    branches = [(context.fork(name, adapter), own) for name, (adapter, own) in turns.items()]
    completions = llm.generate_turns(branches, max_tokens=NUM_NEW, logprobs=0)
    for (adapter, own), completion in zip(turns.values(), completions, strict=True):
        if adapter != "tester":
            judge.check([*CONTEXT, *own], completion, adapter)
    alone = llm.context(CONTEXT, ["tester"], sharing).fork("alone", "tester").generate(turns["c"][1], max_tokens=NUM_NEW)
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


# --- page identity ----------------------------------------------------------------------------------------------------

INVOKED = [*CONTEXT, *QUESTION, *INVOKE, 77]
START = len(CONTEXT) + len(QUESTION)


@pytest.mark.parametrize("page_size", [1, 16])
def test_pages_before_an_invocation_serve_the_base_model_and_the_other_way_round(
    open_llm: OpenLLM, judge: Judge, page_size: int
) -> None:
    llm = open_llm(page_size)
    assert answer(llm, INVOKED, "checker").usage.useful_hit_tokens == 0
    base = answer(llm, [*INVOKED[:START], 60, 61, 62], None)
    judge.check([*INVOKED[:START], 60, 61, 62], base, None)
    assert base.usage.useful_hit_tokens == whole_pages(START, page_size)
    fresh = open_llm(page_size)
    answer(fresh, INVOKED[:START], None)
    invoked = answer(fresh, INVOKED, "checker")
    judge.check(INVOKED, invoked, "checker")
    assert invoked.usage.useful_hit_tokens >= whole_pages(START, page_size)
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


def test_pages_after_an_invocation_serve_its_adapter_alone(open_llm: OpenLLM, judge: Judge) -> None:
    llm = open_llm(4)
    tokens = [*INVOKED, *QUESTION, *OTHER]
    answer(llm, tokens, "checker")
    again = answer(llm, tokens, "checker")
    assert again.usage.useful_hit_tokens == len(tokens) - 1
    for adapter, num_shared in (("rewriter", START), (None, START), ("critic", 0)):
        other = answer(llm, tokens, adapter)
        judge.check(tokens, other, adapter)
        assert other.usage.useful_hit_tokens == whole_pages(num_shared, 4)


def test_an_invocation_elsewhere_in_the_page_is_another_page(open_llm: OpenLLM, judge: Judge) -> None:
    llm = open_llm(64)
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
    from forkkv_cluster.core.session import BranchSpec

    session = session.fork((BranchSpec("a", "checker"), BranchSpec("c", "critic")))
    assert session.first_writer is not None
    assert session.first_writer.name == "critic"
    own = np.array([*QUESTION, *INVOKE, 77], np.int32)
    requests = [builder_of(llm).turn(session, session.branch(name), own, SAMPLING, envelope(name)) for name in ("c", "a")]
    _, invoked = run(llm.engine, *requests)
    judge.check([*CONTEXT, *own.tolist()], completion_of(invoked), "checker")


# --- moving and waiting -----------------------------------------------------------------------------------------------

SAMPLING = SamplingParams(max_tokens=16, logprobs=0)


def builder_of(llm: LLM) -> RequestBuilder:
    return RequestBuilder(llm.engine.model_info, block_size=16, namespace_of="{}/{}".format)


def envelope(name: str) -> Envelope:
    return Envelope(f"test-{name}", "tenant")


def run(engine: Engine, *requests: GenerateRequest) -> list[LocalRun]:
    runs = [LocalRun(request) for request in requests]
    run_to_end(engine, runs)
    return runs


def completion_of(done: LocalRun) -> Completion:
    return Completion(tuple(done.token_ids), "", done.finish_reason, done.usage, tuple(done.logprobs))


@pytest.mark.parametrize("sharing", [None, *SHARINGS[1:]])
@pytest.mark.parametrize("num_lost", [1, 7])
def test_a_stream_resumed_on_another_worker_goes_on_as_it_would_have(open_llm: OpenLLM, sharing: Any, num_lost: int) -> None:
    one, other = open_llm(), open_llm(chunk=40)
    (ref,) = one.adapter_refs(["checker"])
    choice = PromptSharing(sharing, None if sharing is None else len(CONTEXT))
    sampling = SamplingParams(max_tokens=16, temperature=0.8, seed=11)
    request = builder_of(one).prompt(np.array(INVOKED, np.int32), ref, choice, sampling, envelope("a"))
    (whole,) = run(one.engine, request)
    resumed = builder_of(other).resumed(request, whole.token_ids[:num_lost], 1, ["lost"])
    assert resumed.invocation_start == START
    (rest,) = run(other.engine, resumed)
    assert rest.token_ids == whole.token_ids[num_lost:]


def test_a_turn_that_had_to_give_its_memory_away_answers_the_same(open_llm: OpenLLM, judge: Judge) -> None:
    prompts = [[*CONTEXT, *QUESTION, *[60 + i] * 4, *INVOKE, 77] for i in range(6)]
    llm = open_llm(16, kv_bytes="2MiB")
    completions = llm.generate(prompts, adapter="checker", max_tokens=90, logprobs=0)
    assert llm.status().counters.num_preemptions > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        judge.check(prompt, completion, "checker")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("adapter", "start"), [("checker", None), ("checker", len(INVOKED)), ("critic", START), (None, START)])
def test_a_request_whose_spans_contradict_its_adapter_is_refused(llm: LLM, adapter: str | None, start: int | None) -> None:
    ref = llm.adapter_refs([adapter])[0] if adapter is not None else None
    request = builder_of(llm).prompt(np.array(INVOKED, np.int32), ref, PromptSharing(), SAMPLING, envelope("a"))
    with pytest.raises(InvalidArgument, match="invocation_start"):
        llm.engine.add_request(replace(request, invocation_start=start))
