"""The generator of deploy/ is a script beside its files, not a module of the package: tests load it from its path."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def load_script(name: str) -> ModuleType:
    """A script of deploy/ as a module."""
    spec = importlib.util.spec_from_file_location(f"deploy_{name}", DEPLOY / f"{name}.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(DEPLOY / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def deploy_dir() -> Path:
    return DEPLOY


@pytest.fixture(scope="session")
def generator() -> ModuleType:
    return load_script("generate")


@pytest.fixture(scope="session")
def check_torch() -> ModuleType:
    return load_script("check_torch")
