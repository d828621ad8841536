"""aLoRA adapters over the tiny model, engines that serve them, and what peft answers with the same files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.variants import calculate_alora_offsets
from transformers import AutoModelForCausalLM

from forkkv_cluster.core.config import parse_config
from forkkv_cluster.core.request import GenerateRequest, SamplingParams
from forkkv_cluster.core.request_builder import Envelope, RequestBuilder
from forkkv_cluster.engine.engine import Engine
from forkkv_cluster.engine.llm import LLM, Completion
from forkkv_cluster.engine.local_runs import LocalRun, run_to_end

CONTEXT = [(7 * i * i + 3) % 2000 + 10 for i in range(75)]  # ends inside a page
INVOKE = [41, 42, 41]  # overlaps with itself
OTHER = [51, 52]
QUESTION = [(11 * i + 5) % 2000 + 100 for i in range(13)]
NUM_NEW = 8
SHARINGS = ["isolated", "base", "eager", "residual"]

INVOKED = [*CONTEXT, *QUESTION, *INVOKE, 77]
START = len(CONTEXT) + len(QUESTION)
SAMPLING = SamplingParams(max_tokens=16, logprobs=0)
OpenLLM = Callable[..., LLM]
"""(page_size, chunk, kv_bytes), all of them optional."""


class Judge:
    """peft's answers, by adapter; None is the base model."""

    def __init__(self, model_dir: Path, adapter_dirs: Mapping[str, Path]) -> None:
        self._models: dict[str | None, Any] = {None: _load(model_dir)}
        for name, directory in adapter_dirs.items():
            self._models[name] = PeftModel.from_pretrained(_load(model_dir), str(directory)).eval()

    def logprobs(self, prompt: Sequence[int], output: Sequence[int], adapter: str | None) -> torch.Tensor:
        """[len(output), V]: how likely every next token was."""
        model, ids = self._models[adapter], torch.tensor([[*prompt, *output[:-1]]])
        options = {}
        if adapter is not None and model.peft_config["default"].alora_invocation_tokens:
            (offset,) = calculate_alora_offsets(model.peft_config, "default", torch.tensor([list(prompt)]))
            options["alora_offsets"] = [None if offset is None else offset + len(output) - 1]
        with torch.inference_mode():
            logits = model(ids, **options).logits[0, len(prompt) - 1 :]
        return torch.log_softmax(logits.float(), dim=-1)

    def generate(self, prompt: Sequence[int], adapter: str, num_tokens: int, eos_token_id: int | None = None) -> list[int]:
        """Greedy, all by itself; ends with ``eos_token_id``, if there is one, or after ``num_tokens``."""
        ids = torch.tensor([list(prompt)])
        options = {"do_sample": False, "max_new_tokens": num_tokens, "eos_token_id": eos_token_id, "pad_token_id": 0}
        with torch.inference_mode():
            output = self._models[adapter].generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return output[0, len(prompt) :].tolist()

    def check(self, prompt: Sequence[int], answer: Completion, adapter: str | None) -> None:
        wanted = self.logprobs(prompt, answer.token_ids, adapter)
        found = torch.tensor([entry.logprob for entry in answer.logprobs])
        torch.testing.assert_close(found, wanted[torch.arange(len(found)), list(answer.token_ids)], atol=1e-4, rtol=0)
        top = wanted.topk(2, dim=-1)
        is_clear = top.values[:, 0] - top.values[:, 1] > 1e-3
        assert is_clear.sum() >= len(found) // 2, "too many ties to say anything"
        assert torch.equal(torch.tensor(answer.token_ids)[is_clear], top.indices[:, 0][is_clear])


def _load(model_dir: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float32).eval()


def open_llm(
    model_dir: Path, adapter_dirs: Mapping[str, Path], page_size: int = 16, chunk: int = 64, kv_bytes: str = "8MiB"
) -> LLM:
    """An engine whose memory starts as NaN, so that what nobody wrote cannot be read unseen."""
    llm = LLM.from_config(
        parse_config(
            {
                "model": {"path": str(model_dir), "name": "tiny", "dtype": "float32"},
                "adapters": [{"name": name, "path": str(path)} for name, path in adapter_dirs.items()],
                "cache": {"page_size": page_size, "kv_bytes": kv_bytes},
                "scheduler": {"max_num_batched_tokens": chunk},
                "worker": {"num_threads": 1},
            }
        )
    )
    llm.engine._runner.kv.arena.fill_(float("nan"))  # type: ignore[attr-defined]
    return llm


def answer(llm: LLM, prompt: Sequence[int], adapter: str | None) -> Completion:
    """A request without a session."""
    return llm.generate([prompt], adapter=adapter, max_tokens=NUM_NEW, logprobs=0)[0]


def whole_pages(num_tokens: int, page_size: int = 16) -> int:
    return num_tokens // page_size * page_size


def builder_of(llm: LLM) -> RequestBuilder:
    return RequestBuilder(llm.engine.model_info, block_size=16, namespace_of="{}/{}".format)


def envelope(name: str) -> Envelope:
    return Envelope(f"test-{name}", "tenant")


def run(engine: Engine, *requests: GenerateRequest) -> list[LocalRun]:
    runs = [LocalRun(request) for request in requests]
    run_to_end(engine, runs)
    return runs


def completion_of(done: LocalRun) -> Completion:
    return Completion(tuple(done.token_ids), "", done.finish_reason, done.usage, tuple(done.logprobs))
