"""The shipped model, where it is shipped: it answers held-out casebooks about as well as its scores say."""

from __future__ import annotations

import pytest

from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.scoring import score
from forkkv_cluster.training.casebook.tokenizer import turn_text

NUM_EXAMPLES = 16
CONTEXT_TOKENS = 256

pytestmark = pytest.mark.skipif(not assets.is_shipped(), reason="no casebook model in this checkout")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(assets.model_dir(), adapters=assets.adapter_dirs(), kv_bytes="64MiB", num_threads=1)


@pytest.mark.parametrize("adapter", [None, *assets.adapter_dirs()], ids=lambda name: name or "base")
def test_the_shipped_model_answers_held_out_casebooks(llm: LLM, adapter: str | None) -> None:
    role = assets.role_of(adapter)
    questions = assets.held_out(role, context_tokens=CONTEXT_TOKENS, count=NUM_EXAMPLES)
    prompts = [example.context + turn_text(example.question) for example in questions]
    answers = llm.generate(prompts, adapter=adapter, temperature=0.0, max_tokens=96)
    right = sum(score(role, answer.text, example.answer) for answer, example in zip(answers, questions, strict=True))
    scores = assets.scores()
    found = scores["base"]["held_out"][role] if adapter is None else scores["adapters"][adapter]["accuracy"]["held_out"]
    assert right / NUM_EXAMPLES >= found[str(CONTEXT_TOKENS)] - 0.25  # 16 examples of it: two standard deviations


@pytest.mark.parametrize("adapter", list(assets.adapter_dirs()))
def test_an_adapter_is_much_better_than_the_base_at_its_role(adapter: str) -> None:
    accuracy = assets.scores()["adapters"][adapter]["accuracy"]
    held_out, training, base = (accuracy[name][str(CONTEXT_TOKENS)] for name in ("held_out", "training", "base"))
    assert held_out >= base + 0.3
    assert held_out >= 0.95 * training - 0.1  # of a hundred examples each
