"""The oracle is anchored: where Hugging Face and peft have an answer, it gives the same one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from forkkv_cluster.testing.tiny_models import ADAPTER_NAMES, TinyKit
from tests.engine.families import FAMILIES, hugging_face_logits, save
from tests.engine.qwen3_kit import WITH_K, build_qwen3_kit
from tests.oracle.oracle import Oracle

CONTEXT = [(7 * i * i + 3) % 2000 + 10 for i in range(40)]
OWN = [(11 * i + 5) % 2000 + 10 for i in range(9)]


@pytest.fixture(scope="module")
def oracle(tiny_model_dir: Path) -> Oracle:
    return Oracle(tiny_model_dir)


def test_base_model_equals_transformers(oracle: Oracle, tiny_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(torch.tensor([CONTEXT + OWN])).logits[0, len(CONTEXT) :]
    torch.testing.assert_close(oracle.logits(CONTEXT, OWN, None, "isolated"), expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ADAPTER_NAMES)
def test_isolated_equals_transformers_with_peft(oracle: Oracle, tiny_kit: TinyKit, name: str) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_kit.model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tiny_kit.adapter_dirs[name])).eval()
    with torch.no_grad():
        expected = model(torch.tensor([CONTEXT + OWN])).logits[0, len(CONTEXT) :]
    actual = oracle.logits(CONTEXT, OWN, oracle.adapter(tiny_kit.adapter_dirs[name]), "isolated")
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2-mha-tied", "qwen3", "qwen3-biased-tied"])
def test_biases_tied_embeddings_and_qk_norm_equal_transformers(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    tokens = [token % 300 for token in CONTEXT + OWN]
    answer = Oracle(save(model, tmp_path / "model")).logits([], tokens, None, "isolated")
    torch.testing.assert_close(answer, hugging_face_logits(model, tokens), atol=5e-5, rtol=0)


@pytest.mark.parametrize("sharing", ["base", "eager", "residual"])
def test_without_an_adapter_every_sharing_is_isolated(oracle: Oracle, sharing: str) -> None:
    expected = oracle.logits(CONTEXT, OWN, None, "isolated")
    torch.testing.assert_close(oracle.logits(CONTEXT, OWN, None, sharing), expected, atol=5e-5, rtol=0)


def test_the_first_writer_reads_what_an_isolated_pass_reads(oracle: Oracle, tiny_adapter_dirs: dict[str, Path]) -> None:
    agent = oracle.adapter(tiny_adapter_dirs["critic"])
    expected = oracle.logits(CONTEXT, OWN, agent, "isolated")
    torch.testing.assert_close(oracle.logits(CONTEXT, OWN, agent, "residual", writer=agent), expected, atol=5e-5, rtol=0)


def test_under_qk_norm_too_the_first_writer_reads_what_an_isolated_pass_reads(tmp_path: Path) -> None:
    kit = build_qwen3_kit(tmp_path)
    oracle = Oracle(kit.model_dir)
    context, own = [token % 300 for token in CONTEXT], [token % 300 for token in OWN]
    for name in WITH_K:
        agent = oracle.adapter(kit.adapter_dirs[name])
        expected = oracle.logits(context, own, agent, "isolated")
        actual = oracle.logits(context, own, agent, "residual", writer=agent)
        torch.testing.assert_close(actual, expected, atol=5e-5, rtol=0)
        assert (oracle.logits(context, own, agent, "residual") - expected).abs().max() > 1e-2


def test_sharing_modes_differ_for_an_adapter(oracle: Oracle, tiny_adapter_dirs: dict[str, Path]) -> None:
    agent = oracle.adapter(tiny_adapter_dirs["critic"])
    answers = {s: oracle.logits(CONTEXT, OWN, agent, s) for s in ("isolated", "residual", "eager", "base")}
    for first in answers:
        for second in answers:
            assert first == second or (answers[first] - answers[second]).abs().max() > 1e-2
