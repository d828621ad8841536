"""Which implementation an op runs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from forkkv_kernels._cpu.library import references_only
from forkkv_kernels.launch import interpreted, use_triton


def test_a_tensor_on_the_cpu_is_left_to_others() -> None:
    assert not use_triton(torch.zeros(1))


def test_the_interpreter_has_to_be_chosen_before_triton_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), interpreted():
        pass


@pytest.mark.interpreter
def test_a_test_asks_for_the_interpreter() -> None:
    with interpreted():
        assert use_triton(torch.zeros(1))
        assert not use_triton(torch.zeros(1, dtype=torch.float64))
        with references_only():
            assert not use_triton(torch.zeros(1))
    assert not use_triton(torch.zeros(1))


@pytest.mark.gpu
def test_a_tensor_on_a_gpu_is_triton_s() -> None:
    assert use_triton(torch.zeros(1, device="cuda"))


def test_every_op_imports_without_triton() -> None:
    code = (
        "import sys, pkgutil, importlib, forkkv_kernels.ops as ops; sys.modules['triton'] = None\n"
        "for m in pkgutil.iter_modules(ops.__path__): importlib.import_module(f'forkkv_kernels.ops.{m.name}')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
