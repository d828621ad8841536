"""The shipped casebook model: where it lies, its adapters and their roles, held-out examples, scores.

llm = LLM(assets.model_dir(), adapters=assets.adapter_dirs())
example = assets.held_out("mapper", context_tokens=512, count=1)[0]
context = llm.context(example.context, adapters=["mapper"], sharing="isolated")
answer = context.fork("m", adapter="mapper").generate(turn_text(example.question), max_tokens=64)
score("mapper", answer.text, example.answer)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forkkv_cluster.core.errors import NotFound
from forkkv_cluster.training.casebook.adapter_specs import ADAPTERS
from forkkv_cluster.training.casebook.samples import Example, examples

__all__ = ["ROOT", "adapter_dirs", "converted_dirs", "held_out", "is_shipped", "model_dir", "role_of", "scores"]

_CONVERTED = "-eager"
"""Ends the name of an adapter that ``forkkv train-adapter`` has converted."""
ROOT = Path(__file__).resolve().parents[2] / "assets" / "casebook"


def is_shipped() -> bool:
    return (ROOT / "model" / "model.safetensors").is_file()


def model_dir() -> Path:
    """A Hugging Face directory. Raises NotFound where the installation holds no casebook model."""
    if not is_shipped():
        raise NotFound("casebook model", str(ROOT / "model"), "Train one: the commands stand in README.md there.")
    return ROOT / "model"


def adapter_dirs() -> dict[str, Path]:
    """PEFT directories by adapter name, in the order of ``adapter_specs``."""
    return {name: path for name in ADAPTERS if (path := ROOT / "adapters" / name).is_dir()}


def converted_dirs() -> dict[str, Path]:
    """Those of the ordinary adapters that were converted for ``eager`` sharing, by name: ``<adapter>-eager``."""
    names = (f"{name}{_CONVERTED}" for name in ADAPTERS)
    return {name: path for name in names if (path := ROOT / "converted" / name).is_dir()}


def role_of(adapter: str | None) -> str:
    """What an adapter is for; None, the base model, looks up. Raises NotFound."""
    if adapter is None:
        return "lookup"
    spec = ADAPTERS.get(adapter.removesuffix(_CONVERTED))
    if spec is None:
        raise NotFound("casebook adapter", adapter, f"Name one of {', '.join(ADAPTERS)}.")
    return spec.role


def held_out(role: str, *, context_tokens: int, count: int, seed: int = 1) -> list[Example]:
    """Examples about held-out casebooks, the same for the same arguments. Raises KeyError for an unknown role."""
    return examples(role, seed=seed, context_tokens=context_tokens, count=count)


def scores() -> Mapping[str, Any]:
    """``base``: role -> context tokens -> accuracy. ``adapters``: name -> held_out, training, base -> the same."""
    found: Mapping[str, Any] = json.loads((ROOT / "scores.json").read_text())
    return found
