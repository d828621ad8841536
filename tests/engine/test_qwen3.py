"""QK-norm (Qwen3): every sharing is exact for adapters that change k, whose shared K is no sum of a base part and their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from forkkv_cluster.engine.batch import ResidualTailCopy, TailCopy
from forkkv_cluster.engine.model_runner import ModelRunner
from forkkv_cluster.testing.tiny_models import TinyKit
from tests.engine.families import assert_same_answers, engine_logits, hugging_face_logits
from tests.engine.hand_scheduler import HandScheduler, Span
from tests.engine.qwen3_kit import ADAPTERS, WITH_K, build_qwen3_kit
from tests.oracle.oracle import Oracle

PAGE_SIZE = 16
CONTEXT = [(7 * i * i + 3) % 300 for i in range(48)]
OWN = [(11 * i + 5) % 300 for i in range(20)]
SIZES = {"extend": [20], "decode": [3, 1]}

pytestmark = pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> TinyKit:
    return build_qwen3_kit(tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def oracle(kit: TinyKit) -> Oracle:
    return Oracle(kit.model_dir)


def new_scheduler(kit: TinyKit, *names: str, dtype: str = "float32") -> tuple[HandScheduler, list[int]]:
    runner = ModelRunner.from_directory(kit.model_dir, dtype=dtype, page_size=PAGE_SIZE)
    slots = [runner.load_adapter(name, kit.adapter_dirs[name])[0] for name in names]
    return HandScheduler(runner), slots


def write_context(
    scheduler: HandScheduler, slot: int, sharing: str, context: list[int] = CONTEXT, chunk: int = 48
) -> tuple[list[int], list[int]]:
    """Base pages, and the residual pages that ``sharing`` wants, empty without any; in chunks of ``chunk`` tokens."""
    base = scheduler.pages(len(context))
    has_residual = sharing != "base" and scheduler.runner.residual_rank(slot) > 0
    residual = scheduler.residual_pages(slot, len(context)) if has_residual else []
    ends = [min(start + chunk, len(context)) for start in range(0, len(context), chunk)]
    starts = [0, *ends[:-1]]
    for start, end in zip(starts, ends, strict=True):
        writes = {slot: residual} if sharing == "eager" and residual else {}
        scheduler.run(Span(context, start, end, base, writes="plain", residual_writes=writes), logits=False)
    if sharing == "residual" and residual:
        for start, end in zip(starts, ends, strict=True):
            own_pass = Span(context, start, end, base, slot, "nothing", {slot: residual}, (slot, residual, end))
            scheduler.run(own_pass, logits=False)
    return base, residual


def pieces(span: Span, sizes: list[int]) -> list[Span]:
    """The span cut into consecutive pieces of these sizes; the last one repeats."""
    cut, start = [], span.start
    while start < span.end:
        end = min(start + sizes[min(len(cut), len(sizes) - 1)], span.end)
        cut.append(Span(span.tokens, start, end, span.pages, span.lora, reads=span.reads))
        start = end
    return cut


def branch(scheduler: HandScheduler, slot: int, base: list[int], residual: list[int], own: list[int] = OWN) -> Span:
    tokens, pages = CONTEXT + own, base + scheduler.pages(len(own))
    return Span(tokens, len(CONTEXT), len(tokens), pages, slot, reads=(slot, residual, len(CONTEXT)) if residual else None)


# --- Transformers and peft are the judge ----------------------------------------------------------------------------


def base_model(kit: TinyKit) -> Any:
    return Qwen3ForCausalLM.from_pretrained(kit.model_dir, dtype=torch.float32).eval()


def with_adapter(kit: TinyKit, name: str) -> Any:
    return PeftModel.from_pretrained(base_model(kit), str(kit.adapter_dirs[name])).eval()


def after_shared_context(kit: TinyKit, name: str, sharing: str) -> Tensor:
    """The base model fills a cache; under ``eager`` Transformers' own norm and rotation then put in the adapter's K and V of
    the base model's x; the adapter reads it."""
    model, cache = base_model(kit), DynamicCache()
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(torch.tensor([CONTEXT]), past_key_values=cache)
        cos_sin = model.model.rotary_emb(inputs[0], torch.arange(len(CONTEXT))[None])
        tensors = load_file(kit.adapter_dirs[name] / "adapter_model.safetensors")
        for index, x in enumerate(list(inputs) if sharing == "eager" else []):
            attention = model.model.layers[index].self_attn
            k, v = (_projected(attention, module, x, tensors, index) for module in ("k_proj", "v_proj"))
            k = attention.k_norm(k).transpose(1, 2)
            cache.layers[index].keys = apply_rotary_pos_emb(k, k, *cos_sin)[1]
            cache.layers[index].values = v.transpose(1, 2)
        output = with_adapter(kit, name)(torch.tensor([OWN]), past_key_values=cache)
    return output.logits[0]


def _projected(attention: Any, module: str, x: Tensor, tensors: dict[str, Tensor], index: int) -> Tensor:
    out, stem = getattr(attention, module)(x), f"base_model.model.model.layers.{index}.self_attn.{module}.lora_"
    if stem + "A.weight" in tensors:
        out = out + x @ tensors[stem + "A.weight"].T @ tensors[stem + "B.weight"].T  # alpha / r = 1
    return out.view(1, x.shape[1], -1, attention.head_dim)


@pytest.mark.parametrize("sizes", [[68], [40, 20, 1]], ids=["prefill", "chunks-and-decode"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_isolated_equals_transformers_with_peft(kit: TinyKit, name: str, sizes: list[int]) -> None:
    scheduler, (slot,) = new_scheduler(kit, name)
    wanted = hugging_face_logits(with_adapter(kit, name), CONTEXT + OWN)
    assert_same_answers(engine_logits(scheduler.runner, sizes, slot, CONTEXT + OWN), wanted)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("sharing", ["base", "eager"])
@pytest.mark.parametrize("name", ["qkvo", "k-alone", "k-in-one-layer", "qv"])
def test_a_shared_context_equals_a_cache_that_transformers_filled(
    kit: TinyKit, name: str, sharing: str, sizes: list[int]
) -> None:
    scheduler, (slot,) = new_scheduler(kit, name)
    span = branch(scheduler, slot, *write_context(scheduler, slot, sharing))
    logits = torch.cat([scheduler.run(piece)[0] for piece in pieces(span, sizes)])
    assert_same_answers(logits, after_shared_context(kit, name, sharing))


# --- the oracle is the judge ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("chunk", [48, 20, 7], ids=lambda n: f"chunk{n}")
@pytest.mark.parametrize("sharing", ["eager", "residual"])
@pytest.mark.parametrize("name", WITH_K)
def test_a_branch_equals_the_oracle(
    kit: TinyKit, oracle: Oracle, name: str, sharing: str, chunk: int, sizes: list[int]
) -> None:
    scheduler, (slot,) = new_scheduler(kit, name)
    span = branch(scheduler, slot, *write_context(scheduler, slot, sharing, chunk=chunk))
    logits = torch.cat([scheduler.run(piece)[0] for piece in pieces(span, sizes)])
    assert_same_answers(logits, oracle.logits(CONTEXT, OWN, oracle.adapter(kit.adapter_dirs[name]), sharing))


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_agents_of_all_adapters_read_one_context_in_the_same_steps(kit: TinyKit, oracle: Oracle, sizes: list[int]) -> None:
    scheduler, slots = new_scheduler(kit, *ADAPTERS)
    base = scheduler.pages(len(CONTEXT))
    residuals = {slot: scheduler.residual_pages(slot, len(CONTEXT)) for slot in slots if scheduler.runner.residual_rank(slot)}
    scheduler.run(Span(CONTEXT, 0, len(CONTEXT), base, writes="plain", residual_writes=residuals), logits=False)
    branches = [pieces(branch(scheduler, slot, base, residuals.get(slot, [])), sizes) for slot in slots]
    steps = [scheduler.run(*spans) for spans in zip(*branches, strict=True)]
    for index, name in enumerate(ADAPTERS):
        wanted = oracle.logits(CONTEXT, OWN, oracle.adapter(kit.adapter_dirs[name]), "eager")
        assert_same_answers(torch.cat([step[index] for step in steps]), wanted)


@pytest.mark.parametrize("sharing", ["eager", "residual"])
@pytest.mark.parametrize("name", WITH_K)
def test_a_tail_inside_a_page_becomes_the_agents_own(kit: TinyKit, oracle: Oracle, name: str, sharing: str) -> None:
    context = CONTEXT[:-3]
    scheduler, (slot,) = new_scheduler(kit, name)
    base, residual = write_context(scheduler, slot, sharing, context)
    whole = len(context) // PAGE_SIZE * PAGE_SIZE
    tokens, own = context + OWN, scheduler.pages(len(context) + len(OWN) - whole)
    copy = TailCopy(base[-1], own[0], len(context) - whole, whole, slot, residual[-1])
    span = Span(tokens, len(context), len(tokens), base[:-1] + own, slot, reads=(slot, residual, whole))
    (logits,) = scheduler.run(span, tail_copies=[copy])
    assert_same_answers(logits, oracle.logits(context, OWN, oracle.adapter(kit.adapter_dirs[name]), sharing))


def test_a_copied_residual_page_keeps_what_rescales_k(kit: TinyKit, oracle: Oracle) -> None:
    scheduler, (slot,) = new_scheduler(kit, "qkvo")
    base, residual = write_context(scheduler, slot, "eager")
    target = scheduler.residual_pages(slot, PAGE_SIZE)[0]
    span = branch(scheduler, slot, base, [*residual[:-1], target])
    (logits,) = scheduler.run(span, residual_tail_copies=[ResidualTailCopy(slot, residual[-1], target, PAGE_SIZE)])
    assert_same_answers(logits, oracle.logits(CONTEXT, OWN, oracle.adapter(kit.adapter_dirs["qkvo"]), "eager"))


def test_the_first_writer_and_a_second_agent_equal_the_oracle(kit: TinyKit, oracle: Oracle) -> None:
    names = ("qkvo", "k-alone")
    scheduler, slots = new_scheduler(kit, *names)
    base = scheduler.pages(len(CONTEXT))
    for slot, name, writes in zip(slots, names, ("plain", "nothing"), strict=True):
        residual = scheduler.residual_pages(slot, len(CONTEXT))
        for start, end in ((0, 30), (30, 40), (40, 48)):
            span = Span(CONTEXT, start, end, base, slot, writes, {slot: residual}, (slot, residual, end))
            scheduler.run(span, logits=False)
        (logits,) = scheduler.run(branch(scheduler, slot, base, residual))
        agent, writer = (oracle.adapter(kit.adapter_dirs[n]) for n in (name, "qkvo"))
        assert_same_answers(logits, oracle.logits(CONTEXT, OWN, agent, "residual", writer))


@pytest.mark.parametrize("sharing", ["eager", "residual"])
def test_half_precision_is_as_close_to_float32_shared_as_isolated(kit: TinyKit, oracle: Oracle, sharing: str) -> None:
    scheduler, (slot,) = new_scheduler(kit, "qkvo", dtype="bfloat16")
    agent, errors = oracle.adapter(kit.adapter_dirs["qkvo"]), {}
    for mode, sizes in ((sharing, SIZES["extend"]), (sharing, SIZES["decode"]), ("isolated", SIZES["extend"])):
        if mode == "isolated":
            logits = engine_logits(scheduler.runner, [68], slot, CONTEXT + OWN)[len(CONTEXT) :]
        else:
            span = branch(scheduler, slot, *write_context(scheduler, slot, mode))
            logits = torch.cat([scheduler.run(piece)[0] for piece in pieces(span, sizes)])
        wanted = oracle.logits(CONTEXT, OWN, agent, mode)
        errors[mode, len(sizes)] = float((logits - wanted).norm() / wanted.norm())
    assert max(errors[sharing, 1], errors[sharing, 2]) < 1.5 * errors["isolated", 1], errors


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_what_rescales_k_lies_beside_the_residual_in_an_ordinary_rank_class(kit: TinyKit) -> None:
    scheduler, slots = new_scheduler(kit, *ADAPTERS)
    runner = scheduler.runner
    columns = {name: (runner.residual_rank(slot), runner.rank_class(slot)) for name, slot in zip(ADAPTERS, slots, strict=True)}
    # Two kv heads: each plane has two columns more than its rank, where the adapter has LoRA on k in that layer.
    assert columns == {
        "qkvo": (10, 16), "k-alone": (14, 16), "k-wider-than-v": (13, 16), "k-in-one-layer": (10, 16), "biased": (11, 16),
        "qv": (8, 8), "qo": (0, None),
    }  # fmt: skip


def test_a_plain_family_keeps_the_rank_alone(tiny_kit: TinyKit) -> None:
    runner = ModelRunner.from_directory(tiny_kit.model_dir, page_size=PAGE_SIZE)
    slot, _ = runner.load_adapter("critic", Path(tiny_kit.adapter_dirs["critic"]))
    assert (runner.residual_rank(slot), runner.rank_class(slot)) == (16, 16)
