"""The model runner with the sampler behind it: what an ``Engine`` drives on a real device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from forkkv_cluster.core.config import ClusterConfig
from forkkv_cluster.core.errors import Unsupported
from forkkv_cluster.core.request import Guide
from forkkv_cluster.engine.batch import Batch
from forkkv_cluster.engine.model_runner import ModelRunner
from forkkv_cluster.engine.runner import StepResult
from forkkv_cluster.engine.sampler import SampledToken, is_plain_greedy, sample
from forkkv_cluster.engine.sampling_row import SamplingRow

if TYPE_CHECKING:
    from forkkv_cluster.engine.guides import Guides


def options_of(config: ClusterConfig) -> dict[str, Any]:
    """Arguments of ``ModelRunner.from_directory``."""
    model = config.model
    return {
        "name": model.name,
        "dtype": model.dtype,
        "device": model.device,
        "page_size": config.cache.page_size,
        "max_model_len": model.max_model_len,
        "load_format": model.load_format,
    }


class TorchRunner(ModelRunner):
    """One forward pass and one sampled token for each logit row."""

    _guides: Guides | None = None

    @classmethod
    def from_directory(cls, path: str | Path, **options: Any) -> Self:
        """As ``ModelRunner.from_directory``, with guides over the tokenizer of the same directory."""
        runner = super().from_directory(path, **options)
        runner._guides = _guides(path, runner.info.vocab_size, runner.info.eos_token_ids)
        return runner

    def check_guide(self, guide: Guide) -> None:
        """Raises Unsupported, with the reason, for a guide that cannot be followed."""
        if self._guides is None:
            problem, remedy = (
                "needs the model's tokenizer and llguidance",
                "Load the model from a directory, install llguidance.",
            )
            raise Unsupported(guide.kind.value, guide.text, problem, remedy)
        self._guides.check(guide)

    @classmethod
    def from_config(cls, config: ClusterConfig) -> TorchRunner:
        """Load the configured model. Raises InvalidArgument or Unsupported that names the bad field."""
        runner = cls.from_directory(config.model.path, **options_of(config))
        if not isinstance(runner, cls):
            raise TypeError(f"from_directory made a {type(runner).__name__}")
        return runner

    def run(self, batch: Batch, sampling: Sequence[SamplingRow]) -> StepResult:
        """Run the batch; ``sampling`` [R] gives params, position and tokens of each logit row.

        None stands for a row whose logits are not finite, as its adapter overflows, or whose guide gave up: neither is a
        fault of other rows.
        """
        logits, scores = self.execute_scored(batch)
        return StepResult(self._sample(logits, sampling), scores)

    def _sample(self, logits: Tensor, sampling: Sequence[SamplingRow]) -> list[SampledToken | None]:
        is_sound = torch.isfinite(logits.sum(dim=-1))  # one pass; a sum of numbers that are none is none
        if is_plain_greedy(sampling):  # one wait for the device, not three
            tokens, sound = torch.stack((logits.argmax(dim=-1), is_sound.long())).tolist()
            return [SampledToken(token) if is_number else None for token, is_number in zip(tokens, sound, strict=True)]
        masks, failed = self._guides.masks(sampling) if self._guides is not None else (None, [])
        is_sound[failed] = False
        if bool(is_sound.all()):
            return list(sample(logits, sampling, self.info.eos_token_ids, masks))
        logits = torch.where(is_sound.unsqueeze(-1), logits, 0.0)
        tokens = sample(logits, sampling, self.info.eos_token_ids, masks)
        return [token if sound else None for token, sound in zip(tokens, is_sound.tolist(), strict=True)]


def _guides(path: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> Guides | None:
    """None without llguidance: a host that only computes, for benchmarks, need not have it."""
    try:
        from forkkv_cluster.engine.guides import Guides
    except ImportError:
        return None
    return Guides(path, vocab_size, eos_token_ids)
