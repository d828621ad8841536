"""Hugging Face checkpoint directories: config.json and safetensors, single or sharded."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from forkkv_cluster.core.errors import InvalidArgument, Unsupported
from forkkv_cluster.engine.digest import digest_files
from forkkv_cluster.engine.dummy_weights import DummyWeights
from forkkv_cluster.engine.models.config import ModelConfig, parse_config, read_json
from forkkv_cluster.engine.models.decoder import Decoder, load_decoder
from forkkv_cluster.engine.models.registry import family_of
from forkkv_cluster.engine.safetensors_reader import SafetensorsReader
from forkkv_cluster.engine.shard import WHOLE, Shard

LOAD_FORMATS = ("auto", "dummy")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)  # a buffer that old checkpoints carry; derived from the config


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """Weights on the device, and what identifies them. ``config`` is the whole model's; ``model`` is the part of ``shard``."""

    model: Decoder
    config: ModelConfig
    digest: str
    dtype: torch.dtype
    shard: Shard = WHOLE


def resolve_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """``auto`` is the checkpoint's dtype on a GPU and float32 on a CPU. Raises Unsupported for an unknown name."""
    if name == "auto":
        name = config.dtype if device.type == "cuda" else "float32"
    if name not in _DTYPES:
        raise Unsupported("dtype", name, "is not supported", f"Use one of auto, {', '.join(_DTYPES)}.")
    return _DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """``auto`` is cuda where there is one. Raises InvalidArgument for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidArgument("device", name, "is not there", "Use device: cpu, or install a CUDA build of torch.")
    if name not in ("cpu", "cuda"):
        raise InvalidArgument("device", name, "is not known", "Use auto, cpu or cuda.")
    return torch.device(name)


def read_model_config(directory: Path) -> ModelConfig:
    """What a checkpoint directory says of its model. Raises InvalidArgument for missing or broken files, Unsupported for a
    model that this engine does not run."""
    if not directory.is_dir():
        raise InvalidArgument("model.path", str(directory), "is not a directory", "Name a Hugging Face checkpoint directory.")
    raw = read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    return parse_config(raw, family_of(raw.get("architectures")), read_json(generation) if generation.exists() else {})


def load_model(
    path: str | Path, dtype: str, device: torch.device, load_format: str = "auto", shard: Shard = WHOLE
) -> LoadedModel:
    """Read a checkpoint, or one rank's part; ``load_format`` ``dummy`` reads its config.json alone and makes the weights up.

    Raises InvalidArgument, naming the file or tensor, for missing or corrupt files and wrong shapes; Unsupported for
    models that this engine does not run and for an unknown format.
    """
    if load_format not in LOAD_FORMATS:
        raise Unsupported("load_format", load_format, "is not supported", f"Use one of {', '.join(LOAD_FORMATS)}.")
    directory = Path(path)
    config = read_model_config(directory)
    own_config = shard.config(config)
    torch_dtype = resolve_dtype(dtype, config, device)
    if load_format == "dummy":
        std = read_json(directory / "config.json").get("initializer_range")
        dummy = DummyWeights(torch_dtype, device, float(std or 0.02))
        model = load_decoder(own_config, shard.take(dummy.take))
        return LoadedModel(model, config, dummy.digest(digest_files([directory / "config.json"])), torch_dtype, shard)
    shards = _weight_files(directory)
    with ExitStack() as stack:
        checkpoint = _Checkpoint([stack.enter_context(SafetensorsReader(shard)) for shard in shards], torch_dtype, device)
        model = load_decoder(own_config, shard.take(checkpoint.take))
        checkpoint.check_all_taken(config)
    return LoadedModel(model, config, digest_files([directory / "config.json", *shards]), torch_dtype, shard)


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidArgument("path", str(index), "has no weight_map", "Download it again.")
    return [directory / name for name in sorted(set(weight_map.values()))]


class _Checkpoint:
    """Tensors by name over all shards; remembers what was taken."""

    def __init__(self, readers: list[SafetensorsReader], dtype: torch.dtype, device: torch.device) -> None:
        self._by_name = {name: reader for reader in readers for name in reader.names}
        self._files = ", ".join(str(reader.path) for reader in readers)
        self._dtype, self._device = dtype, device
        self._taken: set[str] = set()

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        reader = self._by_name.get(name)
        if reader is None:
            raise InvalidArgument("tensor", name, f"is missing from {self._files}", "Download the checkpoint again.")
        tensor = reader.read(name)
        if tuple(tensor.shape) != shape:
            raise InvalidArgument("tensor", name, f"in {reader.path} has shape {tuple(tensor.shape)}, config.json says {shape}",
                                  "Use the config.json that belongs to these weights.")  # fmt: skip
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise Unsupported("tensor", name, f"in {reader.path} is {tensor.dtype}: quantised weights are not supported",
                              "Use a checkpoint in float32, bfloat16 or float16.")  # fmt: skip
        self._taken.add(name)
        return tensor.to(self._device, self._dtype)

    def check_all_taken(self, config: ModelConfig) -> None:
        """A tensor that the model does not know would change the result if it were left out: refuse it by name."""
        known = {"lm_head.weight"} if config.tie_embeddings else set()
        unknown = sorted(n for n in self._by_name if n not in self._taken | known and not n.endswith(_IGNORED_SUFFIXES))
        if unknown:
            raise Unsupported("tensor", unknown[0], f"and {len(unknown) - 1} more are not part of {config.architecture}",
                              "Use a checkpoint of a supported architecture.")  # fmt: skip
