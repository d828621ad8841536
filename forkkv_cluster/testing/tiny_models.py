"""The tiny model kit: a small Llama checkpoint and PEFT adapters with *random* weights, for tests and benchmarks.

Real files in the real formats (config, safetensors and tokenizer saved by transformers, adapters saved by peft), so the
loading code that runs is the code that runs in production. The text that such a model writes means nothing.

Weights are seeded: the same arguments give the same bytes. Rows of ``lm_head`` that stand for special or padding tokens
are zero, so that greedy decoding never ends by accident: tests that want an end use ``stop_token_ids``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from forkkv_cluster.testing.tiny_tokenizer import BOS, EOS, PAD, SPECIAL_TOKENS, demo_document, save_tokenizer

__all__ = ["ADAPTER_NAMES", "TinyKit", "TinyModelSpec", "build_tiny_kit", "demo_document", "save_alora_adapter"]

FORMAT = "forkkv-tiny-kit/1"
MODEL_NAME = "tiny-random-llama"
_MAX_TOKENIZER_SIZE = 4096
_README = """# Tiny model kit

A Llama of {num_layers} layers and {num_adapters} LoRA adapters, all with *random* weights (seed {seed}).
For tests and benchmarks: what it writes means nothing.
"""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")

# name, rank, targets: mostly attention, in varied subsets, so that every path of the loader runs
_ADAPTERS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("planner", 8, _ATTENTION),
    ("critic", 16, _ATTENTION),
    ("coder", 16, (*_ATTENTION, *_MLP)),
    ("tester", 8, ("q_proj", "v_proj")),
    ("writer", 16, ("k_proj", "v_proj", "o_proj")),
    ("reader", 8, (*_ATTENTION, "down_proj")),
    ("judge", 16, ("q_proj", "k_proj", "v_proj")),
    ("scout", 8, ("q_proj", "o_proj", *_MLP)),
)
ADAPTER_NAMES = tuple(name for name, _, _ in _ADAPTERS)


@dataclass(frozen=True, slots=True)
class TinyModelSpec:
    """Shape of the model. ``adapter_strength`` multiplies every B: at 0.15 each adapter changes 40 to 60 % of greedy
    tokens on the shipped document (tests measure it); at 1.0 it would be 97 % and more, and nothing would be alike."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 8192
    max_position: int = 16384
    initializer_range: float = 0.12
    adapter_strength: float = 0.15


@dataclass(frozen=True, slots=True)
class TinyKit:
    """Directories of a built kit; ``adapter_dirs`` by adapter name."""

    directory: Path
    model_dir: Path
    adapter_dirs: Mapping[str, Path]


def build_tiny_kit(
    directory: str | Path, *, num_adapters: int = 8, seed: int = 0, spec: TinyModelSpec | None = None
) -> TinyKit:
    """Write the kit into ``directory``, or use the complete one of the same arguments that is there.

    Adapters beyond the eighth repeat the list with other weights (``planner-2``). Built beside and renamed, so a broken
    build is never taken for a kit. Raises FileExistsError when the directory holds anything else.
    """
    target, spec = Path(directory), spec or TinyModelSpec()
    manifest = {"format": FORMAT, "num_adapters": num_adapters, "seed": seed, "spec": asdict(spec)}
    if not _is_complete(target, manifest):
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        try:
            _write(staging, num_adapters, seed, spec)
            (staging / "kit.json").write_text(json.dumps(manifest, indent=2, sort_keys=True))
            _publish(staging, target, manifest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    names = [_adapter_name(index) for index in range(num_adapters)]
    return TinyKit(target, target / MODEL_NAME, {name: target / f"random-{name}" for name in names})


def _is_complete(target: Path, manifest: Mapping[str, Any]) -> bool:
    try:
        found = json.loads((target / "kit.json").read_text())
    except (OSError, ValueError):
        return False
    return bool(found == manifest)


def _publish(staging: Path, target: Path, manifest: Mapping[str, Any]) -> None:
    staging.chmod(0o755)
    try:
        staging.rename(target)
    except OSError:
        if not _is_complete(target, manifest):  # else another process was faster, with the same bytes
            raise FileExistsError(f"{target} exists and is not this tiny kit. Remove it, or name another directory.") from None


def _adapter_name(index: int) -> str:
    name = ADAPTER_NAMES[index % len(ADAPTER_NAMES)]
    return name if index < len(ADAPTER_NAMES) else f"{name}-{index // len(ADAPTER_NAMES) + 1}"


def _write(root: Path, num_adapters: int, seed: int, spec: TinyModelSpec) -> None:
    model_dir = root / MODEL_NAME
    model_dir.mkdir()
    num_tokens = save_tokenizer(model_dir, min(_MAX_TOKENIZER_SIZE, spec.vocab_size))
    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(seed)
        model = _new_model(spec, num_tokens)
        model.save_pretrained(str(model_dir))
        for index in range(num_adapters):
            torch.manual_seed(seed + 1 + index)
            _save_adapter(model, root / f"random-{_adapter_name(index)}", index, spec)
    (root / "README.md").write_text(_README.format(num_layers=spec.num_layers, num_adapters=num_adapters, seed=seed))


@contextmanager
def quiet_hub() -> Iterator[None]:
    """No progress bars, and no word of what peft still asks transformers for by its old name."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # untyped
    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _new_model(spec: TinyModelSpec, num_tokens: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = {token: index for index, token in enumerate(SPECIAL_TOKENS)}
    config = LlamaConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.num_layers,
        num_attention_heads=spec.num_heads,
        num_key_value_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        max_position_embeddings=spec.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        initializer_range=spec.initializer_range,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, spec.initializer_range)
        model.lm_head.weight[: len(SPECIAL_TOKENS)] = 0.0
        model.lm_head.weight[num_tokens:] = 0.0
    model.name_or_path = MODEL_NAME  # what peft writes as the adapter's base model
    return model


def _save_adapter(model: Any, directory: Path, index: int, spec: TinyModelSpec) -> None:
    from peft import LoraConfig, get_peft_model

    _, rank, targets = _ADAPTERS[index % len(_ADAPTERS)]
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM"
    )  # fmt: skip
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(spec.adapter_strength)
    adapted.save_pretrained(str(directory), save_embedding_layers=False)  # "auto" asks a model hub
    adapted.unload()
    sort_targets(directory / "adapter_config.json")


def save_alora_adapter(
    model_dir: str | Path,
    directory: str | Path,
    invocation_tokens: Sequence[int],
    *,
    targets: Sequence[str] = (*_ATTENTION, *_MLP),
    seed: int = 0,
    **options: Any,
) -> Path:
    """Write a random aLoRA for the model in ``model_dir`` with peft; ``options`` go to its ``LoraConfig``.

    It is stronger than the kit's adapters, so that a token which it should not have touched shows.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]), quiet_hub():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32, local_files_only=True)
        config = LoraConfig(
            **{"r": 8, "lora_alpha": 4, **options},
            target_modules=list(targets),
            alora_invocation_tokens=list(invocation_tokens),
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        )
        get_peft_model(model, config).save_pretrained(str(directory), save_embedding_layers=False)
    sort_targets(Path(directory) / "adapter_config.json")
    return Path(directory)


def sort_targets(path: Path) -> None:
    """peft writes a set: its order depends on the process, and with it the adapter's content digest."""
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True))
