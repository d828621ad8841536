"""Sizes of dense decoders and of LoRA adapters on them. Weights and KV in 16 bits: 2 bytes an element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from forkkv_cluster.core.errors import InvalidArgument

ELEMENT_BYTES = 2
RANK_CLASSES = (8, 16, 32, 64, 128)
"""Widths of residual pages: those of ``cache.geometry``, which this package may not import; a test compares them."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A dense decoder. Sizes in elements, ``max_position`` in tokens."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    tie_embeddings: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Elements of one token's K in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """(in, out) of a layer's linear modules, by the names that ``--targets`` takes."""
        return {
            "q": (self.hidden_size, self.q_size),
            "k": (self.hidden_size, self.kv_size),
            "v": (self.hidden_size, self.kv_size),
            "o": (self.q_size, self.hidden_size),
            "gate": (self.hidden_size, self.intermediate_size),
            "up": (self.hidden_size, self.intermediate_size),
            "down": (self.intermediate_size, self.hidden_size),
        }

    @property
    def linear_params(self) -> int:
        """Of all layers' linear modules, without biases."""
        return self.num_layers * sum(rows * columns for rows, columns in self.modules.values())

    @property
    def head_params(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def num_params(self) -> int:
        biases = self.q_size + 2 * self.kv_size if self.qkv_bias else 0
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.qk_norm else 0)
        embeddings = self.head_params * (1 if self.tie_embeddings else 2)
        return self.linear_params + self.num_layers * (biases + norms) + embeddings + self.hidden_size

    @property
    def weight_bytes(self) -> int:
        return ELEMENT_BYTES * self.num_params

    @property
    def streamed_bytes(self) -> int:
        """Weights that every step reads: all linear modules and the head, not the embedding table."""
        return ELEMENT_BYTES * (self.linear_params + self.head_params)

    @property
    def base_bytes_per_token(self) -> int:
        """K and V of one token over all layers."""
        return 2 * self.num_layers * self.kv_size * ELEMENT_BYTES


@dataclass(frozen=True, slots=True)
class LoraShape:
    """An adapter of one rank on ``targets``, names of ``ModelShape.modules``."""

    rank: int = 16
    targets: tuple[str, ...] = ("q", "k", "v", "o")

    def num_params(self, model: ModelShape) -> int:
        """Raises InvalidArgument for a target that the model does not have."""
        modules = model.modules
        for target in self.targets:
            if target not in modules:
                raise InvalidArgument("targets", target, "is not a module", f"Name some of {', '.join(modules)}.")
        return model.num_layers * sum(self.rank * sum(modules[target]) for target in self.targets)

    def residual_columns(self, model: ModelShape) -> int:
        """Elements of one token, layer and plane that it keeps; 0 without k and v. QK-norm keeps scales of K beside x A_k."""
        if not {"k", "v"} & {*self.targets}:
            return 0
        return self.rank + (model.num_kv_heads if model.qk_norm and "k" in self.targets else 0)

    def residual_bytes_per_token(self, model: ModelShape) -> int:
        """Of its page over all layers and both planes. Raises InvalidArgument where it is wider than every page."""
        columns = self.residual_columns(model)
        if not columns:
            return 0
        width = next((width for width in RANK_CLASSES if columns <= width), None)
        if width is None:
            raise InvalidArgument("rank", self.rank, f"needs more than {RANK_CLASSES[-1]} columns", "Plan with a smaller rank.")
        return 2 * model.num_layers * width * ELEMENT_BYTES


@dataclass(frozen=True, slots=True)
class Workload:
    """``agents`` over one context of ``context`` tokens, ``adapters`` of them distinct; each agent runs ``turns`` turns of
    ``input`` tokens in and ``output`` out."""

    context: int = 32768
    agents: int = 16
    adapters: int = 16
    turns: int = 3
    input: int = 128
    output: int = 128
    lora: LoraShape = field(default_factory=LoraShape)

    def __post_init__(self) -> None:
        if not 1 <= self.adapters <= self.agents:
            raise InvalidArgument(
                "adapters", self.adapters, f"is not from 1 to the {self.agents} agents", "Several agents may share an adapter."
            )

    @property
    def own_tokens(self) -> int:
        """Of one agent after its last turn."""
        return self.turns * (self.input + self.output)


LLAMA_3_1_8B = ModelShape("Llama-3.1-8B", 32, 4096, 14336, 32, 8, 128, 128256, 131072)
QWEN_2_5_7B = ModelShape("Qwen2.5-7B", 28, 3584, 18944, 28, 4, 128, 152064, 32768, qkv_bias=True)
QWEN_3_8B = ModelShape("Qwen3-8B", 36, 4096, 12288, 32, 8, 128, 151936, 40960, qk_norm=True)
KNOWN_SHAPES = {shape.name.lower(): shape for shape in (LLAMA_3_1_8B, QWEN_2_5_7B, QWEN_3_8B)}
"""From the checkpoints' own config.json."""


def shape_of(config: Mapping[str, Any], name: str) -> ModelShape:
    """From a checkpoint's config.json. Raises InvalidArgument for a missing or impossible size."""
    hidden, heads = _size(config, "hidden_size"), _size(config, "num_attention_heads")
    architecture = next(iter(config.get("architectures") or ()), "")
    return ModelShape(
        name=name,
        num_layers=_size(config, "num_hidden_layers"),
        hidden_size=hidden,
        intermediate_size=_size(config, "intermediate_size"),
        num_heads=heads,
        num_kv_heads=_size(config, "num_key_value_heads", heads),
        head_dim=_size(config, "head_dim", 128 if architecture.startswith("Qwen3") else hidden // heads),
        vocab_size=_size(config, "vocab_size"),
        max_position=_size(config, "max_position_embeddings"),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture.startswith("Qwen2") or bool(config.get("attention_bias", False)),
        qk_norm=architecture.startswith("Qwen3"),
    )


def _size(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidArgument(key, value, "is missing from config.json or is not a positive integer", "Mend config.json.")
    return value
