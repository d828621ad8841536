"""The pinned versions: complete, plain, and within what the package asks for."""

import re
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
LINES = [line for line in (ROOT / "deploy" / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINS = {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in LINES)}


def direct_requirements() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]


def test_every_line_is_a_name_and_an_exact_version_without_a_local_part():
    for line in LINES:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line), line


def test_every_requirement_is_pinned_within_its_bounds():
    for requirement in direct_requirements():
        pin = PINS.get(canonicalize_name(requirement.name))
        assert pin is not None, requirement.name
        assert requirement.specifier.contains(Version(pin)), f"{requirement}: pinned {pin}"


def test_what_the_requirements_need_is_pinned_too():
    todo, seen = [requirement.name for requirement in direct_requirements()], set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in seen:
            continue
        seen.add(name)
        assert name in PINS, name
        needed = [Requirement(text) for text in requires(name) or []]
        todo += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]


def test_the_tests_run_with_the_pinned_versions():
    different = []
    for name, pin in PINS.items():
        try:
            installed = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue  # Pinned for another Python or platform.
        if installed != pin:
            different.append(f"{name}: {installed} instead of {pin}")
    assert different == []


def test_nothing_for_cuda_is_pinned():
    assert [name for name in PINS if name.startswith(("nvidia-", "cuda-"))] == []
