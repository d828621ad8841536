"""One rank's part of a model: Megatron's split (arXiv 1909.08053). Pure slicing; who adds the parts up is ``shard_group``.

Modules that read the hidden states (q, k, v, gate, up) are cut by their outputs, whole heads at a time; those that write
them (o, down) by their inputs, so that what the ranks compute adds up to the product. Of a LoRA on the former B is cut, on
the latter A; x A_k and x A_v are the same on every rank, and so are residual pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from forkkv_cluster.core.errors import InvalidArgument
from forkkv_cluster.engine.layers.lora import LoraFactors
from forkkv_cluster.engine.models.config import ModelConfig

Take = Callable[[str, tuple[int, ...]], Tensor]
"""(name, shape) -> one tensor of a checkpoint."""

_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_BY_INPUT = ("o_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank ``rank`` of ``size``. Raises InvalidArgument for a rank that is none of them."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise InvalidArgument("rank", self.rank, f"is none of {self.size} ranks", f"Use 0 to {self.size - 1}.")

    @property
    def is_whole(self) -> bool:
        return self.size == 1

    def config(self, model: ModelConfig) -> ModelConfig:
        """The sizes of this part. Raises InvalidArgument for heads or an MLP that cannot be cut evenly."""
        for name, size in (
            ("num_attention_heads", model.num_heads),
            ("num_key_value_heads", model.num_kv_heads),
            ("intermediate_size", model.intermediate_size),
        ):
            if size % self.size:
                raise InvalidArgument("worker.tensor_parallel", self.size, f"does not divide {name} {size}",
                                      "Choose a number of ranks that divides it.")  # fmt: skip
        return replace(
            model,
            num_heads=model.num_heads // self.size,
            num_kv_heads=model.num_kv_heads // self.size,
            intermediate_size=model.intermediate_size // self.size,
        )

    def take(self, whole: Take) -> Take:
        """``whole`` gives tensors of the checkpoint; the result gives this rank's part of them, asked for by its own shape."""
        if self.is_whole:
            return whole

        def part(name: str, shape: tuple[int, ...]) -> Tensor:
            module, _, kind = name.rpartition(".")
            dim = _cut_dim(module.rsplit(".", 1)[-1], is_bias=kind == "bias")
            full = tuple(size * self.size if axis == dim else size for axis, size in enumerate(shape))
            return self._own(whole(name, full), module.rsplit(".", 1)[-1], kind == "bias")

        return part

    def factors(self, by_module: Mapping[str, LoraFactors]) -> dict[str, LoraFactors]:
        """One layer's LoRA factors, as a whole model has them -> this rank's."""
        return {module: self._factors(module, factors) for module, factors in by_module.items()}

    def _factors(self, module: str, factors: LoraFactors) -> LoraFactors:
        if self.is_whole:
            return factors
        bias = factors.bias
        if module in _BY_INPUT:
            own_bias = self._own(bias, module, is_bias=True) if bias is not None else None
            return LoraFactors(self._piece(factors.a, 1), factors.b, own_bias)
        return LoraFactors(factors.a, self._piece(factors.b, 1), self._piece(bias, 0) if bias is not None else None)

    def _own(self, tensor: Tensor, module: str, is_bias: bool) -> Tensor:
        if is_bias and module in _BY_INPUT:
            return tensor if self.rank == 0 else tensor.new_zeros(tensor.shape)  # it is added once, not once a rank
        dim = _cut_dim(module, is_bias)
        return tensor if dim is None else self._piece(tensor, dim)

    def _piece(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor.chunk(self.size, dim)[self.rank].contiguous()


WHOLE = Shard()


def _cut_dim(module: str, is_bias: bool) -> int | None:
    """Of a weight [out, in] or a bias [out]; None: every rank has it whole."""
    if module in _BY_OUTPUT:
        return 0
    return 1 if module in _BY_INPUT and not is_bias else None
