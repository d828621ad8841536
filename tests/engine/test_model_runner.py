"""The model runner against Hugging Face + peft (isolated) and the oracle (everything shared), over poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from forkkv_cluster.core.errors import FailedPrecondition, InvalidArgument, NotFound
from forkkv_cluster.engine.batch import Batch, ResidualTailCopy, TailCopy
from forkkv_cluster.engine.model_runner import ModelRunner
from forkkv_cluster.testing.tiny_models import ADAPTER_NAMES, TinyKit
from tests.engine.hand_scheduler import HandScheduler, Span
from tests.oracle.oracle import Oracle

TOLERANCE = 1e-4  # semantics: logits within 1e-4 in fp32
CONTEXT = [(7 * i * i + 3) % 2000 + 10 for i in range(64)]
OWN = [(11 * i + 5) % 2000 + 10 for i in range(24)]
OTHER = [(13 * i + 1) % 2000 + 10 for i in range(24)]

Expected = Callable[..., Tensor]


@pytest.fixture(scope="module", params=[4, 16], ids=["page4", "page16"])
def runner(request: pytest.FixtureRequest, tiny_kit: TinyKit) -> ModelRunner:
    """All eight adapters loaded, slots in the order of ``ADAPTER_NAMES``."""
    runner = ModelRunner.from_directory(tiny_kit.model_dir, dtype="float32", page_size=request.param)
    for name, path in tiny_kit.adapter_dirs.items():
        runner.load_adapter(name, path)
    return runner


@pytest.fixture(params=[False, True], ids=["runs", "scattered"])
def scheduler(request: pytest.FixtureRequest, runner: ModelRunner) -> HandScheduler:
    return HandScheduler(runner, is_scattered=request.param)


@pytest.fixture(scope="module")
def expected(tiny_kit: TinyKit) -> Expected:
    """The oracle: logits at each own token, by adapter name."""
    oracle = Oracle(tiny_kit.model_dir)
    adapters = {name: oracle.adapter(path) for name, path in tiny_kit.adapter_dirs.items()}

    def logits(
        own: list[int], name: str | None, sharing: str, context: list[int] = CONTEXT, writer: str | None = None
    ) -> Tensor:
        agent = adapters[name] if name is not None else None
        return oracle.logits(context, own, agent, sharing, adapters[writer] if writer is not None else None)

    return logits


def slot_of(name: str) -> int:
    return ADAPTER_NAMES.index(name)


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    """Within tolerance, and the same greedy tokens wherever the choice is not a tie (margin above 1e-3)."""
    torch.testing.assert_close(actual, wanted, atol=TOLERANCE, rtol=0)
    top = wanted.topk(2, dim=-1).values
    is_clear = top[:, 0] - top[:, 1] > 1e-3
    assert torch.equal(actual.argmax(-1)[is_clear], wanted.argmax(-1)[is_clear])


def write_context(
    scheduler: HandScheduler, adapters: list[str], context: list[int] = CONTEXT, chunk: int = 24
) -> tuple[list[int], dict[str, list[int]]]:
    """The base model's pass over the context, with the residual of each adapter (``eager``): base and residual pages."""
    base = scheduler.pages(len(context))
    residuals = {name: scheduler.residual_pages(slot_of(name), len(context)) for name in adapters}
    writes = {slot_of(name): pages for name, pages in residuals.items()}
    for start in range(0, len(context), chunk):
        end = min(start + chunk, len(context))
        scheduler.run(Span(context, start, end, base, writes="plain", residual_writes=writes), logits=False)
    return base, residuals


def branch(scheduler: HandScheduler, own: list[int], name: str, base: list[int], residual: list[int] | None) -> Span:
    """An agent's own tokens after the context, on pages of its own."""
    pages = base + scheduler.pages(len(own))
    reads = (slot_of(name), residual, len(CONTEXT)) if residual is not None else None
    return Span(CONTEXT + own, len(CONTEXT), len(CONTEXT) + len(own), pages, lora=slot_of(name), reads=reads)


def stepwise(span: Span, sizes: list[int]) -> list[Span]:
    """The span cut into consecutive pieces of these sizes, repeated."""
    pieces, start = [], span.start
    while start < span.end:
        end = min(start + sizes[len(pieces) % len(sizes)], span.end)
        pieces.append(Span(span.tokens, start, end, span.pages, span.lora, span.writes, span.residual_writes, span.reads))
        start = end
    return pieces


# --- isolated: Hugging Face and peft are the judge ------------------------------------------------------------------


def test_base_prefill_equals_transformers(scheduler: HandScheduler, tiny_model_dir: Path) -> None:
    tokens = CONTEXT + OWN
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    (logits,) = scheduler.run(Span(tokens, 0, len(tokens), scheduler.pages(len(tokens))))
    assert_same(logits, wanted)


@pytest.mark.parametrize("name", ADAPTER_NAMES)
def test_isolated_prefill_equals_transformers_with_peft(scheduler: HandScheduler, tiny_kit: TinyKit, name: str) -> None:
    tokens = CONTEXT + OWN
    base = AutoModelForCausalLM.from_pretrained(tiny_kit.model_dir, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tiny_kit.adapter_dirs[name])).eval()
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    (logits,) = scheduler.run(Span(tokens, 0, len(tokens), scheduler.pages(len(tokens)), lora=slot_of(name)))
    assert_same(logits, wanted)


@pytest.mark.parametrize("sizes", [[1], [7], [40], [33, 1, 1, 20]], ids=str)
def test_chunked_prefill_and_decode_equal_one_pass(scheduler: HandScheduler, expected: Expected, sizes: list[int]) -> None:
    tokens = CONTEXT + OWN
    whole = Span(tokens, 0, len(tokens), scheduler.pages(len(tokens)), lora=slot_of("coder"))
    logits = torch.cat([scheduler.run(piece)[0] for piece in stepwise(whole, sizes)])
    assert_same(logits, expected(tokens, "coder", "isolated", context=[]))


@pytest.mark.parametrize("sizes", [[24], [6], [1]], ids=str)
def test_one_batch_serves_all_adapters_and_the_base_model(
    scheduler: HandScheduler, expected: Expected, sizes: list[int]
) -> None:
    names: list[str | None] = [None, *ADAPTER_NAMES]
    spans = [
        stepwise(Span(OWN, 0, len(OWN), scheduler.pages(len(OWN)), lora=slot_of(n) if n is not None else None), sizes)
        for n in names
    ]
    steps = [scheduler.run(*pieces) for pieces in zip(*spans, strict=True)]
    for index, name in enumerate(names):
        assert_same(torch.cat([step[index] for step in steps]), expected(OWN, name, "isolated", context=[]))


# --- shared context: the oracle is the judge ------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[24], [6], [1], [20, 1]], ids=str)
def test_eager_branches_of_all_adapters_equal_the_oracle(
    scheduler: HandScheduler, expected: Expected, sizes: list[int]
) -> None:
    with_residual = [name for name in ADAPTER_NAMES if scheduler.runner.residual_rank(slot_of(name))]
    base, residuals = write_context(scheduler, with_residual)
    spans = [stepwise(branch(scheduler, OWN, n, base, residuals.get(n)), sizes) for n in ADAPTER_NAMES]
    steps = [scheduler.run(*pieces) for pieces in zip(*spans, strict=True)]
    for index, name in enumerate(ADAPTER_NAMES):
        assert_same(torch.cat([step[index] for step in steps]), expected(OWN, name, "eager"))


def test_branches_of_one_adapter_share_its_residual(scheduler: HandScheduler, expected: Expected) -> None:
    base, residuals = write_context(scheduler, ["critic"])
    branches = [branch(scheduler, own, "critic", base, residuals["critic"]) for own in (OWN, OTHER)]
    for actual, own in zip(scheduler.run(*branches), (OWN, OTHER), strict=True):
        assert_same(actual, expected(own, "critic", "eager"))


def test_a_branch_in_base_sharing_reads_no_residual(scheduler: HandScheduler, expected: Expected) -> None:
    base, _ = write_context(scheduler, [])
    (logits,) = scheduler.run(branch(scheduler, OWN, "judge", base, None))
    assert_same(logits, expected(OWN, "judge", "base"))


def test_a_late_residual_is_written_by_the_base_model_alone(scheduler: HandScheduler, expected: Expected) -> None:
    base, _ = write_context(scheduler, ["planner"])
    before = scheduler.runner.kv.arena.clone()
    late = scheduler.residual_pages(slot_of("critic"), len(CONTEXT))
    writes = {slot_of("critic"): late}
    for piece in stepwise(Span(CONTEXT, 0, len(CONTEXT), base, writes="nothing", residual_writes=writes), [24]):
        scheduler.run(piece, logits=False)
    keys, _ = scheduler.runner.kv.base(0)
    slots = np.concatenate([np.arange(p * scheduler.page_size, (p + 1) * scheduler.page_size) for p in base])
    unchanged = before[0, 0].view(keys.shape)[slots]
    assert torch.equal(keys[slots], unchanged)
    (logits,) = scheduler.run(branch(scheduler, OWN, "critic", base, late))
    assert_same(logits, expected(OWN, "critic", "eager"))


@pytest.mark.parametrize("chunk", [64, 24, 5])
@pytest.mark.parametrize("name", ["critic", "tester", "writer"])
def test_own_residual_pass_equals_the_oracle(scheduler: HandScheduler, expected: Expected, name: str, chunk: int) -> None:
    base, _ = write_context(scheduler, [])
    slot = slot_of(name)
    residual = scheduler.residual_pages(slot, len(CONTEXT))
    for start in range(0, len(CONTEXT), chunk):
        end = min(start + chunk, len(CONTEXT))
        span = Span(CONTEXT, start, end, base, slot, "nothing", {slot: residual}, (slot, residual, end))
        scheduler.run(span, logits=False)
    (logits,) = scheduler.run(branch(scheduler, OWN, name, base, residual))
    assert_same(logits, expected(OWN, name, "residual"))


def test_first_writer_and_a_second_agent_equal_the_oracle(scheduler: HandScheduler, expected: Expected) -> None:
    base, pages = scheduler.pages(len(CONTEXT)), {}
    for name, writes in (("coder", "plain"), ("judge", "nothing")):
        slot = slot_of(name)
        pages[name] = scheduler.residual_pages(slot, len(CONTEXT))
        for start, end in ((0, 40), (40, 50), (50, 64)):
            span = Span(CONTEXT, start, end, base, slot, writes, {slot: pages[name]}, (slot, pages[name], end))
            scheduler.run(span, logits=False)
    results = scheduler.run(*(branch(scheduler, OWN, name, base, pages[name]) for name in ("coder", "judge")))
    for actual, name in zip(results, ("coder", "judge"), strict=True):
        assert_same(actual, expected(OWN, name, "residual", writer="coder"))


def test_plain_and_merged_rows_of_one_segment_keep_apart(scheduler: HandScheduler, expected: Expected) -> None:
    """A first-writer pass and own tokens of the same adapter in one step, as neighbours in one LoRA segment."""
    base, slot = scheduler.pages(len(CONTEXT)), slot_of("coder")
    residual = scheduler.residual_pages(slot, len(CONTEXT))
    isolated = Span(OWN, 0, len(OWN), scheduler.pages(len(OWN)), lora=slot)
    writer = Span(CONTEXT, 0, len(CONTEXT), base, slot, "plain", {slot: residual}, (slot, residual, len(CONTEXT)))
    _, logits = scheduler.run(writer, isolated)
    assert_same(logits, expected(OWN, "coder", "isolated", context=[]))
    (logits,) = scheduler.run(branch(scheduler, OWN, "coder", base, residual))
    assert_same(logits, expected(OWN, "coder", "residual", writer="coder"))


def test_context_pass_and_decode_share_a_step(scheduler: HandScheduler, expected: Expected) -> None:
    base, residuals = write_context(scheduler, ["critic"])
    other = scheduler.pages(len(OTHER))
    pieces = stepwise(branch(scheduler, OWN, "critic", base, residuals["critic"]), [1])
    late = scheduler.residual_pages(slot_of("judge"), len(CONTEXT))
    first = scheduler.run(
        Span(OTHER, 0, len(OTHER), other, writes="plain"),
        Span(CONTEXT, 0, len(CONTEXT), base, writes="nothing", residual_writes={slot_of("judge"): late}),
        pieces[0],
    )
    rest = [scheduler.run(piece)[0] for piece in pieces[1:]]
    assert_same(first[0], expected(OTHER, None, "isolated", context=[]))
    assert_same(torch.cat([first[2], *rest]), expected(OWN, "critic", "eager"))


def test_sharing_modes_answer_differently(runner: ModelRunner) -> None:
    scheduler = HandScheduler(runner)
    base, residuals = write_context(scheduler, ["critic"])
    tokens = CONTEXT + OWN
    eager, without = scheduler.run(
        branch(scheduler, OWN, "critic", base, residuals["critic"]), branch(scheduler, OWN, "critic", base, None)
    )
    (isolated,) = scheduler.run(Span(tokens, 0, len(tokens), scheduler.pages(len(tokens)), lora=slot_of("critic")))
    isolated = isolated[len(CONTEXT) :]
    for first, second in ((eager, without), (eager, isolated), (without, isolated)):
        assert (first - second).abs().max() > 1e-2


# --- copies of partly filled pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["critic", "tester", "writer", "scout"])
def test_a_merged_tail_copy_makes_the_tail_the_agents_own(scheduler: HandScheduler, expected: Expected, name: str) -> None:
    context = CONTEXT[:61]  # ends inside a page of 4 and of 16
    size, slot = scheduler.page_size, slot_of(name)
    has_residual = scheduler.runner.residual_rank(slot) > 0
    base, residuals = write_context(scheduler, [name] if has_residual else [], context)
    whole = len(context) // size * size
    tokens = context + OWN
    own = scheduler.pages(len(tokens) - whole)
    residual = residuals.get(name)
    copy = TailCopy(
        base[whole // size], own[0], len(context) - whole, whole, slot if residual else None, residual[-1] if residual else None
    )
    reads = (slot, residual, whole) if residual else None
    span = Span(tokens, len(context), len(tokens), base[: whole // size] + own, slot, reads=reads)
    (logits,) = scheduler.run(span, tail_copies=[copy])
    assert_same(logits, expected(OWN, name, "eager", context=context))


def test_a_plain_tail_copy_forks_a_branch_inside_a_page(scheduler: HandScheduler, expected: Expected) -> None:
    tokens, fork, size = OWN + OTHER, 21, scheduler.page_size
    source = scheduler.pages(fork)
    slot = slot_of("critic")
    scheduler.run(Span(OWN, 0, fork, source, lora=slot))
    whole = fork // size * size
    target = scheduler.pages(len(tokens) - whole)
    copy = TailCopy(source[whole // size], target[0], fork - whole, whole)
    fork_tokens = OWN[:fork] + OTHER
    span = Span(fork_tokens, fork, len(fork_tokens), source[: whole // size] + target, lora=slot)
    (logits,) = scheduler.run(span, tail_copies=[copy])
    assert_same(logits, expected(OTHER, "critic", "isolated", context=OWN[:fork]))


def test_a_residual_tail_copy_carries_the_residual_along(scheduler: HandScheduler, expected: Expected) -> None:
    base, residuals = write_context(scheduler, ["critic"])
    slot, residual = slot_of("critic"), residuals["critic"]
    replaced = scheduler.residual_pages(slot, scheduler.page_size)[0]
    copy = ResidualTailCopy(slot, residual[-1], replaced, scheduler.page_size)
    span = branch(scheduler, OWN, "critic", base, [*residual[:-1], replaced])
    (logits,) = scheduler.run(span, residual_tail_copies=[copy])
    assert_same(logits, expected(OWN, "critic", "eager"))


# --- the rest of the interface --------------------------------------------------------------------------------------


def test_a_step_of_copies_alone_returns_no_logits(runner: ModelRunner) -> None:
    scheduler = HandScheduler(runner)
    pages = scheduler.pages(2 * scheduler.page_size)
    (logits,) = scheduler.run(tail_copies=[TailCopy(pages[0], pages[1], 1, 0)], logits=False)
    assert logits.shape == (0, runner.info.vocab_size)


def test_executing_before_allocating_is_refused(tiny_model_dir: Path) -> None:
    fresh = ModelRunner.from_directory(tiny_model_dir, page_size=16)
    empty = np.zeros(0, dtype=np.int64)
    copy = TailCopy(0, 1, 1, 0)
    with pytest.raises(FailedPrecondition, match="allocate"):
        fresh.execute(Batch(empty, empty, empty, empty, empty, (), (), (), empty, (copy,)))


def test_slots_are_used_again_after_unloading(tiny_kit: TinyKit, expected: Expected) -> None:
    runner = ModelRunner.from_directory(tiny_kit.model_dir, page_size=16)
    slots = [runner.load_adapter(name, tiny_kit.adapter_dirs[name])[0] for name in ("planner", "critic", "coder")]
    assert slots == [0, 1, 2]
    runner.unload_adapter(1)
    with pytest.raises(NotFound):
        runner.residual_rank(1)
    assert runner.load_adapter("judge", tiny_kit.adapter_dirs["judge"])[0] == 1
    scheduler = HandScheduler(runner)
    (logits,) = scheduler.run(Span(OWN, 0, len(OWN), scheduler.pages(len(OWN)), lora=1))
    assert_same(logits, expected(OWN, "judge", "isolated", context=[]))


def test_info_describes_the_model(runner: ModelRunner, tiny_kit: TinyKit) -> None:
    info = runner.info
    assert (info.vocab_size, info.max_model_len, info.dtype, info.eos_token_ids) == (8192, 16384, "float32", (1,))
    assert info.base_bytes_per_token == 4 * 2 * 2 * 32 * 4
    assert info.digest == ModelRunner.from_directory(tiny_kit.model_dir, page_size=16).info.digest


def test_a_length_beyond_the_model_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(InvalidArgument, match="max_model_len"):
        ModelRunner.from_directory(tiny_model_dir, page_size=16, max_model_len=99999)


def test_half_precision_stays_close_to_float32(tiny_kit: TinyKit, expected: Expected) -> None:
    runner = ModelRunner.from_directory(tiny_kit.model_dir, dtype="bfloat16", page_size=16)
    for name, path in tiny_kit.adapter_dirs.items():
        runner.load_adapter(name, path)
    scheduler = HandScheduler(runner)
    base, residuals = write_context(scheduler, ["critic"])
    for sizes in ([24], [1]):
        pieces = stepwise(branch(scheduler, OWN, "critic", base, residuals["critic"]), sizes)
        logits = torch.cat([scheduler.run(piece)[0] for piece in pieces])
        wanted = expected(OWN, "critic", "eager")
        assert torch.nn.functional.cosine_similarity(logits, wanted).min() > 0.99


def test_adapters_change_at_least_a_fifth_of_greedy_tokens(runner: ModelRunner, tiny_adapter_dirs: Mapping[str, Path]) -> None:
    scheduler = HandScheduler(runner)
    tokens = CONTEXT + OWN
    names: list[str | None] = [None, *tiny_adapter_dirs]
    spans = [Span(tokens, 0, len(tokens), scheduler.pages(len(tokens)), slot_of(n) if n else None) for n in names]
    base, *others = (logits.argmax(-1) for logits in scheduler.run(*spans))
    for name, other in zip(tiny_adapter_dirs, others, strict=True):
        assert (other != base).float().mean() >= 0.2, name
