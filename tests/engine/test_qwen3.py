"""QK-norm (Qwen3): exact for own tokens and under ``base``; a residual on k is refused by name, one on v alone is exact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM

from forkkv_cluster.core.config import SchedulerConfig
from forkkv_cluster.core.errors import Unsupported
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.model_runner import ModelRunner
from forkkv_cluster.engine.torch_runner import TorchRunner
from forkkv_cluster.testing.manual_clock import ManualClock
from tests.engine.families import FAMILIES, assert_same_answers, engine_logits, hugging_face_logits, save
from tests.engine.hand_scheduler import HandScheduler, Span
from tests.engine.harness import FakeEngine

PAGE_SIZE = 16
CONTEXT = [(7 * i * i + 3) % 300 for i in range(48)]
OWN = [(11 * i + 5) % 300 for i in range(20)]
ADAPTERS = {"qkvo": ["q_proj", "k_proj", "v_proj", "o_proj"], "qv": ["q_proj", "v_proj"], "qo": ["q_proj", "o_proj"]}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save(FAMILIES["qwen3"](), tmp_path_factory.mktemp("qwen3") / "model")


@pytest.fixture(scope="module")
def adapter_dirs(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directories = {}
    for seed, (name, targets) in enumerate(ADAPTERS.items()):
        torch.manual_seed(seed + 1)
        config = LoraConfig(r=8, lora_alpha=8, target_modules=targets, init_lora_weights=False)
        directories[name] = tmp_path_factory.mktemp("adapters") / name
        get_peft_model(base_model(model_dir), config).save_pretrained(str(directories[name]), save_embedding_layers=False)
    return directories


def base_model(model_dir: Path) -> Any:
    return Qwen3ForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def with_adapter(model_dir: Path, adapter_dir: Path) -> Any:
    return PeftModel.from_pretrained(base_model(model_dir), str(adapter_dir)).eval()


def after_shared_context(model_dir: Path, adapter_dir: Path, *, adds_v: bool) -> Tensor:
    """Transformers: the base model fills the cache, the adapter reads it. ``adds_v``: plus its residual of v (``eager``)."""
    model, cache = base_model(model_dir), DynamicCache()
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([CONTEXT]), past_key_values=cache)
        tensors = load_file(adapter_dir / "adapter_model.safetensors")
        for index, x in enumerate(inputs if adds_v else []):
            name = f"base_model.model.model.layers.{index}.self_attn.v_proj.lora_"
            delta = x[0] @ tensors[name + "A.weight"].T @ tensors[name + "B.weight"].T  # alpha / r = 1
            cache.layers[index].values += delta.view(len(CONTEXT), -1, 16).transpose(0, 1)
        output = with_adapter(model_dir, adapter_dir)(torch.tensor([OWN]), past_key_values=cache)
    return output.logits[0]


def over_context(runner: ModelRunner, slot: int, sizes: list[int], *, is_eager: bool) -> Tensor:
    scheduler = HandScheduler(runner)
    base = scheduler.pages(len(CONTEXT))
    residual = scheduler.residual_pages(slot, len(CONTEXT)) if is_eager else []
    writes = {slot: residual} if is_eager else {}
    scheduler.run(Span(CONTEXT, 0, len(CONTEXT), base, writes="plain", residual_writes=writes), logits=False)
    reads = (slot, residual, len(CONTEXT)) if is_eager else None
    tokens, pages, start = CONTEXT + OWN, base + scheduler.pages(len(OWN)), len(CONTEXT)
    logits: list[Tensor] = []
    while start < len(tokens):
        end = min(start + sizes[min(len(logits), len(sizes) - 1)], len(tokens))
        logits += scheduler.run(Span(tokens, start, end, pages, slot, reads=reads))
        start = end
    return torch.cat(logits)


@pytest.mark.parametrize("sizes", [[68], [40, 20, 1]], ids=["prefill", "chunks-and-decode"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_isolated_equals_transformers_with_peft(
    model_dir: Path, adapter_dirs: dict[str, Path], name: str, sizes: list[int]
) -> None:
    runner = ModelRunner.from_directory(model_dir, dtype="float32", page_size=PAGE_SIZE)
    slot, _ = runner.load_adapter(name, adapter_dirs[name])
    wanted = hugging_face_logits(with_adapter(model_dir, adapter_dirs[name]), CONTEXT + OWN)
    assert_same_answers(engine_logits(runner, sizes, slot, CONTEXT + OWN), wanted)


@pytest.mark.parametrize("sizes", [[20], [3, 1]], ids=["extend", "decode"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_under_base_an_adapter_reads_what_the_base_model_wrote(
    model_dir: Path, adapter_dirs: dict[str, Path], name: str, sizes: list[int]
) -> None:
    runner = ModelRunner.from_directory(model_dir, dtype="float32", page_size=PAGE_SIZE)
    slot, _ = runner.load_adapter(name, adapter_dirs[name])
    wanted = after_shared_context(model_dir, adapter_dirs[name], adds_v=False)
    assert_same_answers(over_context(runner, slot, sizes, is_eager=False), wanted)


@pytest.mark.parametrize("sizes", [[20], [3, 1]], ids=["extend", "decode"])
def test_a_residual_on_v_alone_is_exact_under_eager(model_dir: Path, adapter_dirs: dict[str, Path], sizes: list[int]) -> None:
    runner = ModelRunner.from_directory(model_dir, dtype="float32", page_size=PAGE_SIZE)
    slot, _ = runner.load_adapter("qv", adapter_dirs["qv"])
    wanted = after_shared_context(model_dir, adapter_dirs["qv"], adds_v=True)
    assert (wanted - after_shared_context(model_dir, adapter_dirs["qv"], adds_v=False)).abs().max() > 1e-2
    assert_same_answers(over_context(runner, slot, sizes, is_eager=True), wanted)


class QwenEngine(FakeEngine):
    """The harness over the random Qwen3."""

    def __init__(self, model_dir: Path, adapter_dirs: dict[str, Path]) -> None:
        self.page_size = PAGE_SIZE
        self.runner = TorchRunner.from_directory(model_dir, dtype="float32", device="cpu", page_size=PAGE_SIZE)  # type: ignore[assignment]
        self.clock = ManualClock()
        config = SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=8)
        self.engine = Engine(self.runner, 100 * self.runner.geometry.slab_bytes, config, self.clock)
        loaded = {name: self.engine.load_adapter(name, str(path)) for name, path in adapter_dirs.items()}
        self.adapters = {name: info.ref for name, info in loaded.items()}
        self.outputs, self.last, self.first, self.errors = {}, {}, {}, {}


@pytest.fixture
def engine(model_dir: Path, adapter_dirs: dict[str, Path]) -> QwenEngine:
    return QwenEngine(model_dir, adapter_dirs)


@pytest.mark.parametrize("sharing", ["eager", "residual"])
def test_a_residual_on_k_is_refused_with_a_remedy(engine: QwenEngine, sharing: str) -> None:
    with pytest.raises(Unsupported, match=rf"sharing.*{sharing}.*qkvo.*k_proj.*QK-norm.*Use isolated or base"):
        engine.add(engine.request(CONTEXT, OWN, "qkvo", sharing))
    engine.drain()
    engine.engine.check_invariants()


def test_a_context_that_would_need_a_residual_on_k_is_refused(engine: QwenEngine) -> None:
    with pytest.raises(Unsupported, match=r"qkvo.*k_proj"):
        engine.add(engine.context_request(CONTEXT, ["qv", "qkvo"]))
    assert engine.run(engine.context_request(CONTEXT, ["qv"])) == []


def test_an_adapter_without_k_shares_though_another_cannot(engine: QwenEngine) -> None:
    alone = engine.run(engine.request(CONTEXT, OWN, "qv", "eager"))
    declared = engine.run(engine.request(CONTEXT, OWN, "qv", "eager", declared=["qkvo", "qo"], namespace="other"))
    assert alone == declared
    assert len(alone) == 6


@pytest.mark.parametrize("sharing", ["isolated", "base"])
def test_isolated_and_base_serve_every_adapter(
    engine: QwenEngine, model_dir: Path, adapter_dirs: dict[str, Path], sharing: str
) -> None:
    output = engine.run(engine.request(CONTEXT, OWN, "qkvo", sharing, max_tokens=1))
    if sharing == "isolated":
        wanted = hugging_face_logits(with_adapter(model_dir, adapter_dirs["qkvo"]), CONTEXT + OWN)[-1]
    else:
        wanted = after_shared_context(model_dir, adapter_dirs["qkvo"], adds_v=False)[-1]
    best = wanted.topk(2).values
    assert best[0] - best[1] > 1e-3, "a tie says nothing"
    assert output == [int(wanted.argmax())]
