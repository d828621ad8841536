"""How the C++ is compiled and found again, and what runs where it cannot be compiled."""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from forkkv_kernels._cpu import library, structs
from forkkv_kernels._cpu.build import CACHE_VARIABLE, SOURCE_DIR, BuildError, built_library

COMPILER = os.environ.get("CXX") or shutil.which("g++")


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_library() -> Iterator[None]:
    """Nothing is loaded at the start, nor left behind for others."""
    library._library.cache_clear()
    library._functions_of.cache_clear()
    yield
    library._library.cache_clear()
    library._functions_of.cache_clear()


def compiler(folder: Path, compile_with: str) -> Path:
    """A stand-in: it notes each call in ``calls``, has a version, and runs a shell command with the output's path in $out."""
    path = folder / "compiler"
    path.write_text(
        f'#!/bin/sh\necho "$*" >> "{folder}/calls"\n'
        'if [ "$1" = --version ]; then echo compiler 1.0; exit 0; fi\n'
        f'while [ "$1" != -o ]; do shift; done; out="$2"\n{compile_with}\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_without_a_compiler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BuildError, match=r"no C\+\+ compiler was found. Install g\+\+"):
        built_library()


def test_a_compiler_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(BuildError, match="no-such-compiler does not run"):
        built_library()


def test_what_a_failing_compiler_said_is_kept(tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, "printf 'not in \\377 any encoding' >&2; exit 1")))
    with pytest.raises(BuildError, match=r"cpu\.so (?s:.*) failed:\nnot in .+ any encoding"):
        built_library()
    assert list(cache_dir.iterdir()) == []


def test_what_a_compiler_without_a_version_said_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "compiler"
    script.write_text("#!/bin/sh\necho no licence >&2\nexit 3\n")
    script.chmod(0o700)
    monkeypatch.setenv("CXX", str(script))
    with pytest.raises(BuildError, match="no licence"):
        built_library()


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("CXX", str(compiler(tmp_path, ': > "$out"')))
    with pytest.raises(BuildError, match="file/cache"):
        built_library()


def test_a_library_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, 'echo one > "$out"')))
    first = built_library()
    assert built_library() == first
    assert first.read_text() == "one\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.startswith("--version") for call in calls] == [True, False, True]


def test_another_compiler_makes_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = set()
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv("CXX", str(compiler(tmp_path / name, f'echo {name} > "$out"')))
        paths.add(built_library())
    assert {path.read_text() for path in paths} == {"one\n", "other\n"}


def test_a_compiler_may_have_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiler(tmp_path, 'echo one > "$out"')
    monkeypatch.setenv("CXX", f"env {path}")
    assert built_library().read_text() == "one\n"


def test_processes_that_build_at_once_all_get_the_library(tmp_path: Path, cache_dir: Path) -> None:
    """Each compiler waits until the other one runs, too."""
    wait = 'touch "$0.$$"; for i in $(seq 200); do [ $(ls "$0".* | wc -l) -ge 2 ] && break; sleep 0.05; done; echo one > "$out"'
    environment = {**os.environ, "CXX": str(compiler(tmp_path, wait))}
    code = "from forkkv_kernels._cpu.build import built_library; print(built_library().read_text().strip())"
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["one", "one"]
    assert len(list(tmp_path.glob("compiler.*"))) == 2
    assert len(list(cache_dir.iterdir())) == 1


@pytest.mark.usefixtures("no_library")
@pytest.mark.parametrize("fails", ["compiling", "loading"])
def test_the_references_run_with_one_warning_where_there_is_no_library(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, {"compiling": "exit 1", "loading": 'echo no library > "$out"'}[fails])))
    with caplog.at_level(logging.WARNING, "forkkv_kernels"):
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            assert library.functions_for(torch.zeros(1, dtype=dtype)) is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "CPU kernels are not there, so the slower PyTorch ops run"
    ]


@pytest.mark.usefixtures("no_library")
def test_the_switch_turns_them_off_without_a_compiler_or_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", str(compiler(tmp_path, "exit 1")))
    monkeypatch.setenv(library.SWITCH, "0")
    assert library.functions_for(torch.zeros(1)) is None
    assert not caplog.records
    assert not (tmp_path / "calls").exists()


NESTED = {
    "Residual": {"slots_": "slots.", "k_": "k.", "v_": "v."},
    "Tile": {"slots_": "slots."},
    "Gather": {"slots_": "slots.", "residual_": "residual_slots."},
    "Lora": {"in_size": "in"},
}
FACTORS = ("a", "stride", "rank", "b")


def member(struct: str, field: str) -> str:
    """What ``tables.h`` calls a field of ``structs.py``."""
    if struct == "Gather" and field in FACTORS:
        return f"factors.{field}"
    for start, replacement in NESTED.get(struct, {}).items():
        if field.startswith(start):
            return replacement + field.removeprefix(start)
    return field


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_the_structs_of_both_languages_agree(tmp_path: Path) -> None:
    tables: Mapping[str, tuple[str, ...]] = {
        "Residual": structs.RESIDUAL_FIELDS, "Tile": structs.TILE_FIELDS, "LoraPart": structs.LORA_PART_FIELDS,
        "LoraSegment": structs.LORA_SEGMENT_FIELDS,
    }  # fmt: skip
    offsets = {name: {field: 8 * i for i, field in enumerate(fields)} for name, fields in tables.items()}
    sizes = {name: 8 * len(fields) for name, fields in tables.items()}
    for struct in (structs.Decode, structs.Gather, structs.Lora, structs.RopeStore):
        offsets[struct.__name__] = {field[0]: getattr(struct, field[0]).offset for field in struct._fields_}
        sizes[struct.__name__] = ctypes.sizeof(struct)
    lines = [f"static_assert(sizeof({name}) == {size});" for name, size in sizes.items()]
    lines += [
        f"static_assert(offsetof({name}, {member(name, field)}) == {offset});"
        for name, fields in offsets.items()
        for field, offset in fields.items()
    ]
    source = tmp_path / "agree.cpp"
    source.write_text("\n".join(["#include <cstddef>", '#include "tables.h"', "using namespace forkkv;", *lines]))
    assert COMPILER is not None
    command = [*COMPILER.split(), "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", f"-I{SOURCE_DIR}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
