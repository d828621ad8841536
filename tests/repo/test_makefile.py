"""The Makefile, without running what takes minutes."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERBS = {"demo", "test", "test-slow", "lint", "serve", "protos", "bench", "soak", "clean"}


def make(*arguments: str) -> str:
    return subprocess.run(["make", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_make_alone_lists_the_verbs():
    listed = set(re.findall(r"^  make ([\w-]+) ", make(), re.MULTILINE))
    assert listed >= VERBS


def test_the_set_up_asks_for_torch_alone_first_and_looks_at_its_build_before_the_rest():
    lines = make("--dry-run", "--assume-new=pyproject.toml", "setup").splitlines()
    torch = next(i for i, line in enumerate(lines) if "--no-deps 'torch==" in line)
    check = next(i for i, line in enumerate(lines) if "deploy/check_torch.py" in line)
    rest = next(i for i, line in enumerate(lines) if "--editable '.[dev]'" in line)
    assert torch < check < rest
    assert all("--constraint deploy/constraints.txt" in lines[i] for i in (torch, rest))


def test_extra_arguments_reach_every_pip_install():
    lines = make("--dry-run", "--assume-new=pyproject.toml", "PIP_ARGS=--proxy here", "setup").splitlines()
    installs = [line for line in lines if "pip install" in line]
    assert len(installs) == 3
    assert all("--proxy here" in line for line in installs)


def test_the_set_up_runs_once_and_again_when_the_pins_change(tmp_path: Path):
    assert "pip install" in make("--dry-run", f"VENV={tmp_path}", "test")
    (tmp_path / ".ready").touch()
    assert "pip install" not in make("--dry-run", f"VENV={tmp_path}", "test")
    assert "pip install" in make("--dry-run", f"VENV={tmp_path}", "--assume-new=deploy/constraints.txt", "test")
