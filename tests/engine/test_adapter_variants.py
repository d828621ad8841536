"""LoRA variants that peft knows: isolated they equal peft, over a shared context the oracle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.engine.batch import TailCopy
from forkkv_cluster.engine.model_runner import ModelRunner
from tests.engine.families import assert_same_answers, engine_logits
from tests.engine.hand_scheduler import HandScheduler, Span
from tests.oracle.oracle import Oracle

CONTEXT = [(7 * i * i + 3) % 2000 + 10 for i in range(48)]
PAGE_SIZE = 16
OWN = [(11 * i + 5) % 2000 + 10 for i in range(20)]
QKV = ["q_proj", "k_proj", "v_proj"]
ALL = [*QKV, "o_proj", "gate_proj", "up_proj", "down_proj"]

VARIANTS: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "alpha-pattern": {"alpha_pattern": {r"layers\.[02]\.self_attn\.q_proj": 40}},
    "k-and-v-of-other-ranks": {"rank_pattern": {"k_proj": 4, "layers.1.self_attn.v_proj": 2}},
    "v-alone": {"target_modules": ["v_proj"]},
    "some-layers": {"layers_to_transform": [1, 3]},
    "some-layers-by-pattern": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "regex": {"target_modules": r".*layers\.[12]\..*(k_proj|down_proj)"},
    "full-path": {"target_modules": ["model.layers.0.self_attn.v_proj"]},
    "bias": {"lora_bias": True, "target_modules": ALL},
    "bias-on-k-in-one-layer": {"lora_bias": True, "target_modules": r".*layers\.1\..*k_proj"},
    "mica": {"init_lora_weights": "mica"},  # B from the base's singular vectors; the base itself stays as it is
    "bias-and-other-ranks": {"lora_bias": True, "rank_pattern": {"v_proj": 3}, "layers_to_transform": [0, 3]},
}
KNOWN_TO_THE_ORACLE = [name for name in VARIANTS if name not in ("rslora", "alpha-pattern")]


def make(model_dir: Path, directory: Path, options: dict[str, Any]) -> Path:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for module in base.modules():
        if options.get("lora_bias") and isinstance(module, torch.nn.Linear):
            module.bias = torch.nn.Parameter(torch.zeros(module.out_features))  # else peft warns that it cannot merge
    config = LoraConfig(
        **({"r": 8, "lora_alpha": 2, "target_modules": QKV, "init_lora_weights": False} | options)  # type: ignore[arg-type]
    )
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_A" in name and not parameter.any():  # as training would have changed it
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(str(directory), save_embedding_layers=False)
    return directory


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, tiny_model_dir: Path, tmp_path: Path) -> Path:
    return make(tiny_model_dir, tmp_path / "adapter", VARIANTS[request.param])


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("sizes", [[68], [50, 1]], ids=["prefill", "then-decode"])
def test_isolated_a_variant_gives_what_peft_gives(tiny_model_dir: Path, variant: Path, sizes: list[int]) -> None:
    tokens = CONTEXT + OWN
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(variant)).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    runner = ModelRunner.from_directory(tiny_model_dir, dtype="float32", page_size=PAGE_SIZE)
    slot, _ = runner.load_adapter("variant", variant)
    assert_same_answers(engine_logits(runner, sizes, slot, tokens), wanted)


@pytest.mark.parametrize("sizes", [[20], [3, 1]], ids=["extend", "decode"])
@pytest.mark.parametrize("sharing", ["eager", "residual", "base"])
@pytest.mark.parametrize("name", KNOWN_TO_THE_ORACLE)
def test_over_a_shared_context_a_variant_gives_what_the_oracle_gives(
    tiny_model_dir: Path, tmp_path: Path, name: str, sharing: str, sizes: list[int]
) -> None:
    directory = make(tiny_model_dir, tmp_path / "adapter", VARIANTS[name])
    oracle = Oracle(tiny_model_dir)
    wanted = oracle.logits(CONTEXT, OWN, oracle.adapter(directory), sharing)
    scheduler, slot = _scheduler(tiny_model_dir, directory)
    base, residual = scheduler.pages(len(CONTEXT)), scheduler.residual_pages(slot, len(CONTEXT))
    writes = {slot: residual} if sharing == "eager" else {}
    scheduler.run(Span(CONTEXT, 0, len(CONTEXT), base, writes="plain", residual_writes=writes), logits=False)
    reads = (slot, residual, len(CONTEXT)) if sharing != "base" else None
    if sharing == "residual":
        scheduler.run(Span(CONTEXT, 0, len(CONTEXT), base, slot, "nothing", {slot: residual}, reads), logits=False)
    tokens, pages = CONTEXT + OWN, base + scheduler.pages(len(OWN))
    logits, start = [], len(CONTEXT)
    while start < len(tokens):
        end = min(start + sizes[min(len(logits), len(sizes) - 1)], len(tokens))
        logits += scheduler.run(Span(tokens, start, end, pages, slot, reads=reads))
        start = end
    assert_same_answers(torch.cat(logits), wanted)


def test_a_bias_is_in_a_merged_tail_too(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = make(tiny_model_dir, tmp_path / "adapter", VARIANTS["bias"])
    oracle = Oracle(tiny_model_dir)
    context = CONTEXT[:-3]  # ends inside a page
    wanted = oracle.logits(context, OWN, oracle.adapter(directory), "eager")
    scheduler, slot = _scheduler(tiny_model_dir, directory)
    base, residual = scheduler.pages(len(context)), scheduler.residual_pages(slot, len(context))
    span = Span(context, 0, len(context), base, writes="plain", residual_writes={slot: residual})
    scheduler.run(span, logits=False)
    whole = len(context) // PAGE_SIZE * PAGE_SIZE
    own = scheduler.pages(len(context) + len(OWN) - whole)
    copy = TailCopy(base[-1], own[0], len(context) - whole, whole, slot, residual[-1])
    tokens = context + OWN
    branch = Span(tokens, len(context), len(tokens), base[:-1] + own, slot, reads=(slot, residual, whole))
    (logits,) = scheduler.run(branch, tail_copies=[copy])
    assert_same_answers(logits, wanted)


def test_a_bias_counts_one_rank_in_the_residual_and_none_in_the_info(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = make(tiny_model_dir, tmp_path / "adapter", VARIANTS["bias"])
    runner = ModelRunner.from_directory(tiny_model_dir, dtype="float32", page_size=PAGE_SIZE)
    slot, info = runner.load_adapter("variant", directory)
    assert (runner.residual_rank(slot), runner.rank_class(slot), info.lora_rank) == (9, 16, 8)


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda tensors, name: tensors.pop(name), "is missing"),
        (lambda tensors, name: tensors.update({name: torch.zeros(5)}), r"shape \(5,\), not \(64,\)"),
        (lambda tensors, name: tensors.update({name: torch.full((64,), float("nan"))}), "NaN"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_a_broken_bias_is_refused_by_name(tiny_model_dir: Path, tmp_path: Path, edit: Any, named: str) -> None:
    directory = make(tiny_model_dir, tmp_path / "adapter", VARIANTS["bias"])
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors, "base_model.model.model.layers.2.self_attn.k_proj.lora_B.bias")
    save_file(tensors, path)
    runner = ModelRunner.from_directory(tiny_model_dir, dtype="float32", page_size=PAGE_SIZE)
    with pytest.raises(InvalidArgument, match=r"layers\.2\.self_attn\.k_proj\.lora_B\.bias.*" + named):
        runner.load_adapter("variant", directory)


def test_a_bias_that_the_config_denies_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    directory = make(tiny_model_dir, tmp_path / "adapter", VARIANTS["bias"])
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_bias": False}))
    runner = ModelRunner.from_directory(tiny_model_dir, dtype="float32", page_size=PAGE_SIZE)
    with pytest.raises(InvalidArgument, match="lora_bias"):
        runner.load_adapter("variant", directory)


def _scheduler(model_dir: Path, adapter_dir: Path) -> tuple[HandScheduler, int]:
    runner = ModelRunner.from_directory(model_dir, dtype="float32", page_size=PAGE_SIZE)
    slot, _ = runner.load_adapter("variant", adapter_dir)
    return HandScheduler(runner), slot
