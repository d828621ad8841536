"""PEFT LoRA adapters: read, checked against the model, fused, and kept in numbered slots."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forkkv_cluster.cache.geometry import KVGeometry
from forkkv_cluster.core.adapter_semantics import read_trained_for
from forkkv_cluster.core.errors import InvalidArgument, NotFound, Unsupported
from forkkv_cluster.core.ids import AdapterDigest
from forkkv_cluster.core.request import AdapterInfo
from forkkv_cluster.engine.adapter_tables import AdapterTables
from forkkv_cluster.engine.digest import digest_files
from forkkv_cluster.engine.layers.lora import FusedLora, LoraFactors, LoraPart, fuse
from forkkv_cluster.engine.models.config import ModelConfig, read_json
from forkkv_cluster.engine.safetensors_reader import SafetensorsReader
from forkkv_cluster.engine.shard import WHOLE, Shard

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?(?P<module>model\.layers\.(?P<layer>\d+)\.(?:self_attn|mlp)\.(?P<name>\w+))\.lora_(?P<factor>A\.weight|B\.weight|B\.bias)"
)
_A, _B, _BIAS = "A.weight", "B.weight", "B.bias"
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)

_REFUSED: tuple[tuple[str, tuple[object, ...], str], ...] = (
    # field of adapter_config.json, values that mean "off", what it is
    ("use_dora", (None, False), "DoRA"),
    ("bias", (None, "none"), "LoRA with trained biases"),
    ("modules_to_save", (None, []), "fully trained modules beside the LoRA"),
    ("loftq_config", (None, {}), "LoftQ (it changes the base weights)"),
    ("fan_in_fan_out", (None, False), "transposed weights (fan_in_fan_out)"),
    ("layer_replication", (None, []), "layer replication"),
    ("megatron_config", (None,), "Megatron parallel layers"),
    ("trainable_token_indices", (None, []), "trained token embeddings"),
    ("target_parameters", (None, []), "LoRA on bare parameters"),
    ("use_qalora", (None, False), "QA-LoRA"),
    ("use_bdlora", (None, False), "block-diagonal LoRA"),
    ("arrow_config", (None,), "Arrow routing"),
    ("kasa_config", (None,), "KaSA"),
    ("velora_config", (None,), "VeLoRA"),
    ("monteclora_config", (None,), "MonteCLoRA"),
)
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PLAIN_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")  # they leave the base weights alone


@dataclass(frozen=True, slots=True, eq=False)
class LayerLora:
    """One adapter in one layer; a group is None where it targets none of its modules."""

    qkv: FusedLora | None
    o: FusedLora | None
    gate_up: FusedLora | None
    down: FusedLora | None

    @property
    def k(self) -> LoraPart | None:
        return self.qkv.parts.get("k_proj") if self.qkv else None

    @property
    def v(self) -> LoraPart | None:
        return self.qkv.parts.get("v_proj") if self.qkv else None

    @property
    def has_key_scale(self) -> bool:
        """Whether its residual keeps ``KeyScale``: with LoRA on k, on a model with QK-norm."""
        return self.k is not None and self.k.normed_b is not None

    def by_group(self) -> dict[str, FusedLora | None]:
        """The groups of modules that read the same input."""
        return {"qkv": self.qkv, "o": self.o, "gate_up": self.gate_up, "down": self.down}

    def key_scale_columns(self, pools: tuple[Tensor, Tensor], num_kv_heads: int) -> tuple[Tensor, Tensor]:
        """Where the residual's pools keep ``KeyScale``, norm and change: behind x A_k and x A_v, views [slots, Hkv]."""
        starts = (part.rank if part is not None else 0 for part in (self.k, self.v))
        norm, change = (pool[:, start : start + num_kv_heads] for pool, start in zip(pools, starts, strict=True))
        return norm, change


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights:
    """An adapter as read.

    ``residual_rank``: columns of its residual in the wider plane, for which a rank class is chosen; 0 without LoRA on k and v.
    That is the largest rank on k or v, a bias counts one, and Hkv more where k is targeted under QK-norm. Such a one alone
    may exceed the largest rank class; then the adapter has no residual. It is 0 for an aLoRA, too: shared context lies before
    its invocation, where it changes nothing.
    """

    info: AdapterInfo
    layers: tuple[LayerLora, ...]
    residual_rank: int

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(group.num_bytes for layer in self.layers for group in layer.by_group().values() if group is not None)

    def to(self, device: torch.device) -> AdapterWeights:
        """On that device; tensors that are there already are shared."""
        layers = (
            LayerLora(*(g.to(device) if g is not None else None for g in layer.by_group().values())) for layer in self.layers
        )
        return replace(self, layers=tuple(layers))


class AdapterSlots:
    """Adapters on the device by slot: a small int, taken lowest first and used again after ``remove``."""

    def __init__(self) -> None:
        self._slots: dict[int, AdapterWeights] = {}
        self._tables: dict[int, AdapterTables] = {}

    def add(self, weights: AdapterWeights) -> int:
        slot = next(i for i in range(len(self._slots) + 1) if i not in self._slots)
        self._slots[slot] = weights
        return slot

    def remove(self, slot: int) -> None:
        """Raises NotFound when the slot is empty."""
        self[slot]
        del self._slots[slot]
        self._tables.pop(slot, None)

    def tables(self, slot: int) -> AdapterTables:
        """Addresses of what is in the slot. Raises NotFound when it is empty."""
        if slot not in self._tables:
            self._tables[slot] = AdapterTables(self[slot].layers)
        return self._tables[slot]

    def __getitem__(self, slot: int) -> AdapterWeights:
        """Raises NotFound when the slot is empty."""
        if slot not in self._slots:
            raise NotFound("adapter slot", str(slot), "Load the adapter first.")
        return self._slots[slot]


def load_adapter(
    name: str,
    path: str | Path,
    model: ModelConfig,
    geometry: KVGeometry,
    dtype: torch.dtype,
    device: torch.device,
    k_norms: Sequence[Tensor] = (),
    shard: Shard = WHOLE,
) -> AdapterWeights:
    """Read a PEFT directory and fuse its factors for ``model``; ``k_norms`` [D] by layer is what its family normalises K with.

    ``geometry`` is that of ``shard``, the part of the whole ``model`` for which the adapter is cut.

    Raises InvalidArgument for missing or corrupt files, a wrong dtype, or shapes of another base model (the tensor, its
    shape and the expected one are named), and Unsupported for LoRA variants that are not plain LoRA.
    """
    directory = Path(path)
    config = read_json(directory / CONFIG_FILE)
    _refuse_variants(config)
    _check_patterns(config)
    invocation_tokens = _invocation_tokens(config, model.vocab_size)
    factors = _read_factors(directory / WEIGHTS_FILE, config, model, dtype, device)
    norms = zip(range(model.num_layers), k_norms if model.qk_norm else [None] * model.num_layers, strict=True)
    own_model = shard.config(model)
    layers = tuple(_fuse_layer(shard.factors(factors.get(index, {})), own_model, norm) for index, norm in norms)
    targeted = {module for layer in factors.values() for module in layer}
    residual_rank = _residual_rank(layers, geometry) if not invocation_tokens else 0
    has_residual = 0 < residual_rank <= geometry.rank_classes[-1]
    info = AdapterInfo(
        name=name,
        digest=AdapterDigest(digest_files([directory / CONFIG_FILE, directory / WEIGHTS_FILE])),
        path=str(path),
        lora_rank=max(len(part.a) for layer in factors.values() for part in layer.values()),
        target_modules=tuple(module for module in module_shapes(model) if module in targeted),
        residual_bytes_per_token=geometry.bytes_per_token(geometry.rank_class(residual_rank)) if has_residual else 0,
        invocation_tokens=invocation_tokens,
        trained_for=read_trained_for(directory),
    )
    return AdapterWeights(info, layers, residual_rank)


def module_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear module that a LoRA may target."""
    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    hidden, intermediate = model.hidden_size, model.intermediate_size
    return {
        "q_proj": (hidden, q_size),
        "k_proj": (hidden, kv_size),
        "v_proj": (hidden, kv_size),
        "o_proj": (q_size, hidden),
        "gate_proj": (hidden, intermediate),
        "up_proj": (hidden, intermediate),
        "down_proj": (intermediate, hidden),
    }


def _refuse_variants(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise Unsupported("peft_type", config.get("peft_type"), "only LORA is supported", "Train a LoRA adapter.")
    for key, off, feature in _REFUSED:
        if config.get(key) not in off:
            raise Unsupported(key, config[key], f"{feature} is not supported", "Train a plain LoRA adapter.")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        raise Unsupported("init_lora_weights", init, "changes the base weights, so the base cannot be shared",
                          "Convert it to plain LoRA (PEFT: path_initial_model_for_weight_conversion).")  # fmt: skip
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        raise Unsupported("init_lora_weights", init, "is not known here and may change the base weights",
                          f"Use one of {', '.join(str(known) for known in _PLAIN_INITS[1:])}.")  # fmt: skip


def _check_patterns(config: Mapping[str, Any]) -> None:
    """Both maps from module names, or expressions, to numbers: broken ones are refused before a tensor is read."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict):
            raise InvalidArgument(key, patterns, "is not a map from module names to numbers", "Mend adapter_config.json.")
        for pattern, value in patterns.items():
            try:
                re.compile(_pattern_of(pattern))
            except re.error as error:
                raise InvalidArgument(key, pattern, f"is not a regular expression ({error})",
                                      "Mend adapter_config.json.") from None  # fmt: skip
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise InvalidArgument(f"{key}[{pattern}]", value, "is not a number", "Mend adapter_config.json.")


def _invocation_tokens(config: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """What activates an aLoRA; empty for a plain LoRA. Raises InvalidArgument for what no prompt can hold."""
    key = "alora_invocation_tokens"
    tokens = config.get(key)
    if tokens is None:
        return ()
    if not isinstance(tokens, list) or not tokens:
        raise InvalidArgument(key, tokens, "is not a list of at least one token id",
                              "Name the invocation's token ids, or leave the key out for a plain LoRA.")  # fmt: skip
    for position, token in enumerate(tokens):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise InvalidArgument(f"{key}[{position}]", token, f"is no token id in [0, {vocab_size})",
                                  "Tokenise the invocation with this model's tokenizer.")  # fmt: skip
    return tuple(tokens)


def _read_factors(
    path: Path, config: Mapping[str, Any], model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> dict[int, dict[str, LoraFactors]]:
    """layer -> module -> factors."""
    found: dict[tuple[int, str, str], dict[str, Tensor]] = {}
    with SafetensorsReader(path) as reader:
        for tensor_name in reader.names:
            match = _TENSOR_NAME.fullmatch(tensor_name)
            if match is None or match["name"] not in module_shapes(model):
                raise Unsupported("tensor", tensor_name, f"in {path} is not a LoRA factor of a supported module",
                                  f"Target only {', '.join(module_shapes(model))}.")  # fmt: skip
            key = (int(match["layer"]), match["name"], match["module"])
            found.setdefault(key, {})[match["factor"]] = _floating(reader.read(tensor_name), tensor_name)
    if not found:
        raise InvalidArgument("path", str(path), "holds no LoRA factor", "Save the adapter again with peft.")
    factors: dict[int, dict[str, LoraFactors]] = {}
    for (layer, name, module), tensors in found.items():
        _check_tensors(module, layer, tensors, config, model, module_shapes(model)[name])
        factors.setdefault(layer, {})[name] = _scaled(module, tensors, config, dtype, device)
    _check_targets(path, config, factors)
    return factors


def _scaled(
    module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any], dtype: torch.dtype, device: torch.device
) -> LoraFactors:
    """PEFT scales what comes out of B, its bias included; multiplied in fp32."""
    a, bias = tensors[_A], tensors.get(_BIAS)
    scaling = _scaling(module, config, len(a))
    b = tensors[_B].float().t() * scaling
    return LoraFactors(
        a.to(device, dtype).contiguous(),
        b.to(device, dtype).contiguous(),
        (bias.float() * scaling).to(device, dtype) if bias is not None else None,
    )


def _floating(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype not in _FLOATING:
        raise InvalidArgument("dtype", str(tensor.dtype).removeprefix("torch."), f"wrong dtype of adapter tensor {name}",
                              "Save the adapter in float32, float16 or bfloat16.")  # fmt: skip
    return tensor


def _check_tensors(
    module: str,
    layer: int,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    model: ModelConfig,
    shape: tuple[int, int],
) -> None:
    if layer >= model.num_layers:
        raise InvalidArgument("tensor", module, f"the base model has {model.num_layers} layers",
                              "Load an adapter that was trained on this base model.")  # fmt: skip
    rank = _by_pattern(module, config.get("rank_pattern"), config.get("r"))
    wanted: dict[str, tuple[Any, ...]] = {_A: (rank, shape[0]), _B: (shape[1], rank)}
    if config.get("lora_bias"):
        wanted[_BIAS] = (shape[1],)
    elif _BIAS in tensors:
        raise InvalidArgument("lora_bias", config.get("lora_bias"), f"does not go with tensor {module}.lora_{_BIAS}",
                              "Use the adapter_config.json that belongs to these weights.")  # fmt: skip
    for factor, expected in wanted.items():
        if factor not in tensors:
            raise InvalidArgument("tensor", f"{module}.lora_{factor}", "is missing", "Save the adapter again with peft.")
        actual = tuple(tensors[factor].shape)
        if actual != expected:
            raise InvalidArgument("tensor", f"{module}.lora_{factor}", f"has shape {actual}, not {expected}",
                                  "Load an adapter that was trained on this base model.")  # fmt: skip
        if not torch.isfinite(tensors[factor]).all():
            raise InvalidArgument("tensor", f"{module}.lora_{factor}", "holds NaN or infinity", "Train it again.")


def _scaling(module: str, config: Mapping[str, Any], rank: int) -> float:
    """s = alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA."""
    alpha = _by_pattern(module, config.get("alpha_pattern"), config.get("lora_alpha"))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise InvalidArgument("lora_alpha", alpha, "is not a number", "Mend adapter_config.json.")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(module: str, patterns: Mapping[str, Any] | None, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's path, as PEFT picks it."""
    for pattern, value in (patterns or {}).items():
        if re.match(_pattern_of(pattern), module):
            return value
    return default


def _pattern_of(name: str) -> str:
    return rf"(.*\.)?({name})$"


def _check_targets(path: Path, config: Mapping[str, Any], factors: Mapping[int, Mapping[str, object]]) -> None:
    targets = config.get("target_modules")
    if not isinstance(targets, list):  # A regular expression: the tensors are the truth.
        return
    present = {module for layer in factors.values() for module in layer}
    for target in targets:
        if str(target).rsplit(".", 1)[-1] not in present:
            raise InvalidArgument("target_modules", target, f"has no tensor in {path}", "Save the adapter again with peft.")


def _fuse_layer(factors: Mapping[str, LoraFactors], model: ModelConfig, k_norm: Tensor | None) -> LayerLora:
    out = {module: shape[1] for module, shape in module_shapes(model).items()}
    groups = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
    qkv, *others = (fuse(factors, {module: out[module] for module in group}) for group in groups)
    if qkv is not None and k_norm is not None and "k_proj" in qkv.parts:
        qkv = replace(qkv, parts={**qkv.parts, "k_proj": qkv.parts["k_proj"].with_norm(k_norm)})
    return LayerLora(qkv, *others)


def _residual_rank(layers: Sequence[LayerLora], geometry: KVGeometry) -> int:
    """Raises InvalidArgument for a rank on k or v beyond the largest class."""
    parts = [(layer, part) for layer in layers for part in (layer.k, layer.v) if part is not None]
    if parts:
        geometry.rank_class(max(part.rank for _, part in parts))
    return max((part.rank + geometry.num_kv_heads * layer.has_key_scale for layer, part in parts), default=0)
