"""The shipped model, where it is shipped: it answers held-out casebooks about as well as its scores say."""

from __future__ import annotations

import json

import pytest

from forkkv_cluster.core.adapter_semantics import SEMANTICS_FILE, read_trained_for
from forkkv_cluster.core.errors import NotFound
from forkkv_cluster.core.request import Sharing
from forkkv_cluster.engine.llm import LLM
from forkkv_cluster.training.casebook import assets
from forkkv_cluster.training.casebook.adapter_specs import ADAPTERS
from forkkv_cluster.training.casebook.scoring import score
from forkkv_cluster.training.casebook.tokenizer import turn_text

NUM_EXAMPLES = 16
CONTEXT_TOKENS = 256

pytestmark = pytest.mark.skipif(not assets.is_shipped(), reason="no casebook model in this checkout")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(assets.model_dir(), adapters=assets.adapter_dirs() | assets.converted_dirs(), kv_bytes="64MiB", num_threads=1)


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


@pytest.mark.parametrize("adapter", list(assets.converted_dirs()))
def test_a_converted_adapter_answers_under_eager_about_as_well_as_its_conversion_measured(llm: LLM, adapter: str) -> None:
    questions = assets.held_out(assets.role_of(adapter), context_tokens=CONTEXT_TOKENS, count=NUM_EXAMPLES // 2)
    right = 0.0
    for example in questions:
        branch = llm.context(example.context, adapters=[adapter], sharing="eager").fork("agent", adapter=adapter)
        answer = branch.generate(turn_text(example.question), temperature=0.0, max_tokens=96)
        right += score(example.role, answer.text, example.answer)
    training = json.loads((assets.converted_dirs()[adapter] / SEMANTICS_FILE).read_text())["training"]
    assert right / len(questions) >= training["quality"]["trained, eager"]["exact_share"] - 0.3  # 8 examples of it


def test_converted_adapters_say_what_they_were_trained_for_and_ordinary_ones_say_nothing() -> None:
    assert {read_trained_for(path) for path in assets.converted_dirs().values()} == {Sharing.EAGER}
    assert {read_trained_for(path) for path in assets.adapter_dirs().values()} == {None}


def test_a_converted_adapter_has_the_role_of_the_one_that_it_was() -> None:
    assert assets.role_of("hop-eager") == assets.role_of("hop") == "hop"
    assert assets.role_of("mapper-alora") == "mapper"
    with pytest.raises(NotFound, match="sommelier"):
        assets.role_of("sommelier-eager")


def test_six_ordinary_adapters_and_two_aloras_ship_in_less_than_24_mb() -> None:
    is_activated = [ADAPTERS[name].is_activated for name in assets.adapter_dirs()]
    assert is_activated.count(False) >= 6
    assert is_activated.count(True) >= 2
    assert sum(path.stat().st_size for path in assets.ROOT.rglob("*.safetensors")) < 24e6
