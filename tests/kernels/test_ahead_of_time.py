"""Kernels compile for cards that this machine does not have, within their budgets. A covering set; ``make cubins`` has all."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

import forkkv_kernels._triton as package
import triton
import triton.language as tl
from forkkv_kernels._triton.aot import AotVariant, Resources, compile_variant, over_budget
from forkkv_kernels._triton.aot_matrix import COVERING_ARCHS, Job, covering_jobs, run_job, run_jobs, variants_by_module

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="nothing compiles under TRITON_INTERPRET=1")


@triton.jit
def _sum_of_rows(x_ptr, out_ptr, num_rows, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # noqa: N803 (Triton's custom)
    rows = tl.arange(0, ROWS)
    x = tl.load(x_ptr + rows[:, None] * stride + tl.arange(0, WIDTH)[None, :], mask=rows[:, None] < num_rows, other=0.0)
    tl.store(out_ptr + rows, tl.sum(x, axis=1), mask=rows < num_rows)


def _variant(**changes) -> AotVariant:
    made = AotVariant(
        _sum_of_rows, {"x_ptr": "*fp32", "out_ptr": "*fp32", "num_rows": "i32", "stride": "i32:16"}, {"ROWS": 16, "WIDTH": 64},
        num_warps=1, num_stages=1, name="sum",
    )  # fmt: skip
    return made._replace(**changes)


def test_a_covering_set_of_cubins_keeps_its_budgets() -> None:
    jobs = covering_jobs(most=40)
    results = list(run_jobs(jobs, num_processes=2))
    assert [problem for result in results for problem in result.problems] == []
    assert len(results) == len(jobs)


def test_the_covering_set_has_every_kernel_on_both_architectures() -> None:
    text = {path.stem: path.read_text() for path in Path(next(iter(package.__path__))).glob("*.py")}
    kernels = {
        (stem, name) for stem in text for name in re.findall(r"@triton\.jit(?:\([^)]*\))?\ndef (\w+_kernel)\(", text[stem])
    }
    by_module = variants_by_module()
    jobs = covering_jobs(most=40)
    functions = [(by_module[job.module][job.index].kernel.fn, job.arch) for job in jobs]
    covered = {(function.__module__.rsplit(".")[-1], function.__name__, arch) for function, arch in functions}
    assert covered == {(*kernel, arch) for kernel in kernels for arch in COVERING_ARCHS}
    assert len(jobs) <= 40
    assert len({(job.module, job.index, job.arch) for job in jobs}) == len(jobs)


def test_names_of_variants_are_unique() -> None:
    names = [variant.name for variants in variants_by_module().values() for variant in variants]
    assert sorted(names) == sorted({*names})


def test_resources_are_those_of_the_cubin() -> None:
    made = compile_variant(_variant(), 80)
    assert made.cubin.startswith(b"\x7fELF")
    assert 8 <= made.registers <= 255
    assert made.local_bytes == 0
    assert made.arch == 80


def test_alignment_widens_loads() -> None:
    def loads(type_: str) -> int:
        signature = {"x_ptr": type_, "out_ptr": "*fp32", "num_rows": "i32", "stride": "i32:16"}
        return _sass(compile_variant(_variant(signature=signature), 80).cubin).count("LDG.E.128")

    assert loads("*fp32") > 0
    assert loads("*fp32:1") == 0


def test_spilled_registers_are_seen_as_local_memory() -> None:
    spilling = _variant(constants={"ROWS": 128, "WIDTH": 128}, maxnreg=24)
    made = compile_variant(spilling, 80)
    assert made.local_bytes > 0
    assert over_budget(spilling, made) == [f"sum on sm_80: {made.local_bytes} bytes of local memory (spills), more than 0"]
    assert over_budget(spilling._replace(max_local_bytes=made.local_bytes), made) == []
    assert over_budget(spilling._replace(max_local_bytes={80: made.local_bytes}), made) == []
    assert len(over_budget(spilling._replace(max_local_bytes={90: made.local_bytes}), made)) == 1


@pytest.mark.parametrize(
    ("budget", "arch", "is_over"),
    [(8, 80, True), (9, 80, False), (0, 120, False), ({120: 8}, 120, True), ({90: 9}, 90, False), ({90: 9}, 80, True)],
)
def test_spills_are_refused_on_the_cards_that_blocks_were_chosen_for(budget: object, arch: int, is_over: bool) -> None:
    made = Resources("sum", arch, registers=40, shared_bytes=0, local_bytes=9, cubin=b"")
    assert bool(over_budget(_variant(max_local_bytes=budget), made)) is is_over


def test_each_exceeded_budget_is_named() -> None:
    made = Resources("sum", 89, registers=200, shared_bytes=101_377, local_bytes=0, cubin=b"")
    assert over_budget(_variant(max_registers=128), made) == [
        "sum on sm_89: 101377 bytes of shared memory, more than 101376",
        "sum on sm_89: 200 registers, more than 128",
    ]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"signature": {"x_ptr": "*fp32"}}, "out_ptr is in neither"),
        ({"constants": {"ROWS": 16, "WIDTH": 64, "DEPTH": 1}}, "no argument DEPTH"),
    ],
)
def test_a_signature_that_does_not_fit_is_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        compile_variant(_variant(**changes), 80)


def test_a_kernel_that_does_not_compile_is_a_problem_not_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("broken_kernels")
    module.aot_variants = lambda: [_variant(constants={"ROWS": 3, "WIDTH": 64})]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_kernels", module)
    (problem,) = run_job(Job("broken_kernels", 0, "sum", 90)).problems
    assert problem.startswith("sum on sm_90: ")
    assert "power of 2" in problem


def _sass(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.nvdisasm.path
        return subprocess.run([tool, file.name], check=True, capture_output=True, text=True).stdout
