"""The base model, the adapter that learns and the one that it may learn from, in one peft model; and the saved result."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from forkkv_cluster.core.adapter_semantics import write_trained_for
from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.core.request import AdapterInfo, Sharing
from forkkv_cluster.engine.adapter_check import check_adapter
from forkkv_cluster.engine.model_loader import read_model_config, resolve_device
from forkkv_cluster.engine.models.config import ModelConfig
from forkkv_cluster.testing.tiny_models import quiet_hub, sort_targets

STUDENT, TEACHER = "default", "teacher"
"""peft's names of both. A ``default`` adapter is saved at the top of its directory."""

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class LoraShape:
    """A new adapter. ``alpha`` over ``rank`` is its scaling; targets are the names of linear modules."""

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = ALL_LINEAR
    dropout: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class LoraModel:
    """``peft_model`` holds ``STUDENT``, whose factors alone are trained, in fp32; and ``TEACHER`` where there is one."""

    peft_model: Any
    config: ModelConfig
    model_dir: Path
    dtype: torch.dtype
    device: torch.device
    has_teacher: bool

    @property
    def causal_lm(self) -> Any:
        """The Transformers model around peft's modules."""
        return self.peft_model.get_base_model()

    def parameters(self) -> list[Tensor]:
        """Those that are trained."""
        return [parameter for parameter in self.peft_model.parameters() if parameter.requires_grad]

    @property
    def max_len(self) -> int:
        """Tokens up to which training computes what an engine does: no window hides any, no frequency follows the length."""
        return sequence_limit(self.config)


def sequence_limit(config: ModelConfig) -> int:
    """Tokens of the longest sequence that an engine takes by default, or would with a smaller ``max_model_len``."""
    limits = (config.max_position, config.sliding_window, config.rope.max_fixed_len)
    return min(limit for limit in limits if limit is not None)


def load_tokenizer(model_dir: Path) -> Any:
    """None where the directory holds none."""
    if not any((model_dir / name).exists() for name in _TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)


def open_model(
    model_dir: Path,
    sharing: Sharing,
    *,
    shape: LoraShape | None = None,
    teacher_dir: Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
) -> LoraModel:
    """Load the base and put the adapters into it: without ``shape`` the student starts as a copy of the teacher.

    ``dtype`` auto is bfloat16 on a GPU and float32 on a CPU. Raises InvalidArgument or Unsupported for what no engine would
    serve so; then nothing was trained in vain.
    """
    config, place = read_model_config(model_dir), resolve_device(device)
    torch_dtype = _resolve_dtype(dtype, place)
    if teacher_dir is not None:
        _check(check_adapter(teacher_dir, config), sharing, teacher_dir)
    with quiet_hub(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base: Any = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch_dtype, local_files_only=True)
        base = base.to(place)
        if teacher_dir is not None and shape is None:
            peft_model: Any = PeftModel.from_pretrained(base, str(teacher_dir), adapter_name=STUDENT, is_trainable=True)
        else:
            peft_model = get_peft_model(base, _lora_config(shape or LoraShape()), adapter_name=STUDENT)
        if teacher_dir is not None:
            peft_model.load_adapter(str(teacher_dir), TEACHER, is_trainable=False)
    model = LoraModel(peft_model, config, model_dir, torch_dtype, place, teacher_dir is not None)
    select(model, STUDENT)
    if shape is not None or teacher_dir is None:
        with tempfile.TemporaryDirectory() as scratch:
            _save_factors(model, Path(scratch))
            _check(check_adapter(scratch, config), sharing, model_dir)
    return model


def select(model: LoraModel, adapter: str) -> None:
    """Make ``adapter`` the one that peft itself runs; what is trained stays the student."""
    model.peft_model.set_adapter(adapter)
    for name, parameter in model.peft_model.named_parameters():
        is_student = "lora_" in name and f".{STUDENT}." in name
        parameter.requires_grad_(is_student)
        if is_student:
            parameter.data = parameter.data.float()


def save_adapter(model: LoraModel, directory: Path, sharing: Sharing, training: Mapping[str, Any]) -> None:
    """Write the student as a PEFT directory that says what it was trained for."""
    _save_factors(model, directory)
    write_trained_for(directory, sharing, training)


def _save_factors(model: LoraModel, directory: Path) -> None:
    with quiet_hub():
        # Whether embeddings changed "auto" would ask a model hub.
        model.peft_model.save_pretrained(str(directory), selected_adapters=[STUDENT], save_embedding_layers=False)
    sort_targets(directory / "adapter_config.json")


def _lora_config(shape: LoraShape) -> LoraConfig:
    return LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,  # type: ignore[arg-type]  # peft computes with any number
        lora_dropout=shape.dropout,
        target_modules=list(shape.targets),
        task_type="CAUSAL_LM",
    )


def _resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name not in _DTYPES:
        raise Unsupported("dtype", name, "is not supported in training", f"Use one of auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def _check(info: AdapterInfo, sharing: Sharing, directory: Path) -> None:
    """Raises Unsupported for an adapter that ``sharing`` means nothing for, or that no engine would share."""
    if info.invocation_tokens:
        raise Unsupported("adapter", str(directory), "is an aLoRA: it is exact under every sharing as it is",
                          "Serve it; there is nothing to train.")  # fmt: skip
    is_residual = sharing in (Sharing.EAGER, Sharing.RESIDUAL) and not {"k_proj", "v_proj"}.isdisjoint(info.target_modules)
    if is_residual and info.residual_bytes_per_token == 0:
        raise InvalidArgument("rank", info.lora_rank, f"is too wide for {sharing} sharing on this model: its residual has no "
                              "rank class", "Lower the rank, or leave k_proj out of the targets.")  # fmt: skip
