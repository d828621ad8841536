"""The architecture's import table, held by reading the code: imports inside functions count like any other.

A rule names what a package may import besides the standard library, itself and everything below a listed name. The
longest rule that fits a module is the one that holds for it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORKKV = "forkkv_cluster"

PURE = {"core", "numpy", "xxhash"}
TERMINAL = {"typer", "rich"}
# Libraries that gRPC, FastAPI and Ray bring their types from.
WIRE = {"numpy", "pydantic", "google.protobuf", "grpc", "grpc_health"}

RULES: dict[str, set[str]] = {
    "core": {"numpy", "xxhash"},
    "core.config": {"numpy", "xxhash", "pydantic", "yaml"},
    "api": {"google.protobuf", "grpc"},
    "cache": PURE,
    "engine": PURE | {"cache", "forkkv_kernels", "torch", "transformers", "peft", "safetensors", "llguidance"},
    "directory": PURE,
    "directory.actor": PURE | {"ray"},
    "directory.client": PURE | {"ray"},
    "routing": PURE | {"directory.mirror"},
    "routing.request_router": PURE | {"directory.mirror", "directory.mirror_registry", "ray"},
    "autoscaling": PURE,
    "autoscaling.serve_policy": PURE | {"ray"},
    "worker": PURE | {"engine", "directory.client", "observability", "ray"},
    "gateway": PURE
    | WIRE
    | {"api", "directory.client", "directory.mirror", "observability", "ray", "fastapi", "starlette", "redis", "transformers"},
    "observability": {"core", "prometheus_client"},
    # Fakes implement the engine's facade and lay KV memory out as the cache does; the tiny model kit writes real checkpoints.
    "testing": PURE | {"cache", "engine", "torch", "transformers", "peft", "tokenizers", "safetensors"},
    "bench": PURE | TERMINAL | {"client", "engine", "testing"},
    # It asks the shipped adapters, each its role's questions.
    "bench.demo_casebook": PURE | {"training.casebook"},
    # They time the bookkeeping itself, which an engine hides.
    "bench.cache_bench": PURE | {"cache"},
    "bench.scheduler_bench": PURE | {"cache", "engine"},
    # Its samples are those that the shipped adapters were trained on, and it reads K, V and hidden states as tensors.
    "bench.quality": PURE | TERMINAL | {"engine", "forkkv_kernels", "torch", "transformers", "training.casebook"},
    "training": PURE | TERMINAL | {"client", "engine", "testing", "torch", "transformers", "peft", "safetensors", "tokenizers"},
    "client": PURE | {"api", "grpc"},
    # The verbs of the command line that need no server in the same process; ``__main__`` holds those that do.
    "cli": PURE | TERMINAL | {"client", "pydantic"},
    "forkkv_kernels": {"torch", "triton"},
}
COMPOSITION_ROOTS = {"app", "preflight", "__main__"}
"""May import everything; nothing but each other may import them."""


def module_files() -> Iterator[tuple[str, Path]]:
    """(module without the top package, file) of everything that the wheel holds."""
    for base, prefix in ((ROOT / FORKKV, ""), (ROOT / "kernels" / "forkkv_kernels", "forkkv_kernels.")):
        for path in sorted(base.rglob("*.py")):
            name = prefix + ".".join(path.relative_to(base).with_suffix("").parts)
            yield name.removesuffix(".__init__"), path


def imports_of(module: str, path: Path) -> Iterator[tuple[str, int]]:
    """(imported module without the top package, line). ``from a import b`` counts as ``a.b``: b may be a module."""
    package = [*([] if module.startswith("forkkv_kernels") else [FORKKV]), *module.split(".")]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + (path.name == "__init__.py")] if node.level else []
            start = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((name.removeprefix(f"{FORKKV}."), node.lineno) for name in names)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def forbidden_imports(module: str, path: Path) -> list[str]:
    rule = max((r for r in RULES if is_within(module, r)), key=len, default=None)
    if rule is None:
        return [] if module in (*COMPOSITION_ROOTS, "__init__", FORKKV, "") else [f"{module}: no rule of the table names it"]
    allowed = RULES[rule] | {module.split(".")[0]}
    return [
        f"{module}:{line} imports {name}, which the rule for {rule} does not allow"
        for name, line in imports_of(module, path)
        if name.split(".")[0] not in sys.stdlib_module_names
        and name.split(".")[0] != "__future__"
        and name != f"{FORKKV}"
        and not any(is_within(name, entry) for entry in allowed)
    ]


@pytest.mark.parametrize(("module", "path"), list(module_files()), ids=lambda value: value if isinstance(value, str) else "")
def test_module_imports_only_what_its_layer_may(module: str, path: Path) -> None:
    assert forbidden_imports(module, path) == []


def test_an_import_inside_a_function_is_found(tmp_path: Path) -> None:
    path = tmp_path / "sneaky.py"
    path.write_text("def f():\n    from forkkv_cluster.worker import deployment\n    import torch\n")
    found = forbidden_imports("gateway.sneaky", path)
    assert [line.split(" imports ")[1].split(",")[0] for line in found] == ["worker.deployment", "torch"]


def test_a_relative_import_is_resolved(tmp_path: Path) -> None:
    path = tmp_path / "sneaky.py"
    path.write_text("from ..worker import deployment\n")
    assert len(forbidden_imports("gateway.sneaky", path)) == 1
