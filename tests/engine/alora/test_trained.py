"""The shipped aLoRAs under ``base`` in fp32: the base model's pages of a held-out casebook serve them as they are, and they
answer, token for token, what peft generates with the same files.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch

from forkkv_cluster.core.request import TokenLogprob
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.roles import Turn
from forkkv_cluster.training.casebook.tokenizer import Encoder
from tests.engine.alora.kit import Judge, open_llm

pytestmark = pytest.mark.skipif(not assets.is_shipped(), reason="the casebook model is not in this installation")

ACTIVATED = {
    name: path
    for name, path in assets.adapter_dirs().items()
    if json.loads((path / "adapter_config.json").read_text()).get("alora_invocation_tokens")
}
EXAMPLES = [*((256, index) for index in range(6)), (1024, 0)]
"""(tokens of the casebook at most, which)."""
MAX_TOKENS = 48
NUM_TOP = 20


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge(assets.model_dir(), ACTIVATED)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return open_llm(assets.model_dir(), ACTIVATED, chunk=512, kv_bytes="96MiB")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(assets.model_dir())


def example(encoder: Encoder, adapter: str, context_tokens: int, index: int) -> tuple[list[int], list[int]]:
    """Context and question of a held-out example."""
    found = assets.held_out(assets.role_of(adapter), context_tokens=context_tokens, count=index + 1)[index]
    return encoder.context(found.context).tolist(), encoder.turn(Turn(found.question, found.answer))[0]


def assert_close(found: Sequence[TokenLogprob], wanted: torch.Tensor) -> None:
    """The ``NUM_TOP`` best log probabilities of each token; wanted [n, V]."""
    for entry, row in zip(found, wanted, strict=True):
        places, values = zip(*entry.top, strict=True)
        torch.testing.assert_close(torch.tensor(values), row[list(places)], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("context_tokens", "index"), EXAMPLES)
@pytest.mark.parametrize("adapter", ACTIVATED)
def test_a_shipped_alora_generates_over_shared_pages_what_peft_generates(
    llm: LLM, judge: Judge, encoder: Encoder, adapter: str, context_tokens: int, index: int
) -> None:
    tokens, own = example(encoder, adapter, context_tokens, index)
    context = llm.context(tokens, [adapter], sharing="base")
    before = llm.status().counters.prefill_tokens_run
    answer = context.fork("a", adapter).generate(own, max_tokens=MAX_TOKENS, logprobs=NUM_TOP)
    assert answer.token_ids == tuple(judge.generate([*tokens, *own], adapter, MAX_TOKENS, eos_token_id=encoder.eos))
    assert len(answer.token_ids) > 5
    assert_close(answer.logprobs, judge.logprobs([*tokens, *own], answer.token_ids, adapter))
    assert llm.status().counters.prefill_tokens_run - before == len(own), "some of the context was run again"
    assert answer.usage.useful_hit_tokens == len(tokens)
    assert not answer.is_adapter_inactive


@pytest.mark.parametrize("adapter", ACTIVATED)
def test_a_shipped_alora_does_not_answer_as_the_base_model(llm: LLM, encoder: Encoder, adapter: str) -> None:
    tokens, own = example(encoder, adapter, 256, 0)
    context = llm.context(tokens, [adapter], sharing="base")
    branches = [(context.fork(str(name), name), own) for name in (adapter, None)]
    activated, base = llm.generate_turns(branches, max_tokens=MAX_TOKENS)
    assert activated.token_ids != base.token_ids
