"""Whole engine runs: agents over one shared context on random weights of a real configuration.

    python kernels/benchmarks/end_to_end.py --shape llama-3.1-8b --agents 16 --context 32768

Each mode runs the same trace in the same engine and pool, cold: `eager` and `isolated` with an adapter of rank 16 on q, k, v
and o for each agent, `no adapters` with none.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from forkkv_cluster.bench.offline import OfflineTarget  # noqa: E402
from forkkv_cluster.bench.offline_bench import NO_ADAPTER  # noqa: E402
from forkkv_cluster.bench.offline_workloads import Workload  # noqa: E402
from forkkv_cluster.bench.runner import run_trace  # noqa: E402
from forkkv_cluster.core.config import parse_config  # noqa: E402
from forkkv_cluster.core.request import Sharing  # noqa: E402
from forkkv_cluster.engine.engine import Engine  # noqa: E402

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_theta": 1000000.0,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_theta": 1000000.0,
    },
    "tiny": {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float32", "rope_theta": 10000.0,
    },
}  # fmt: skip
RANK = 16
PAGE_SIZE = 64


def write_model(root: Path, shape: str) -> Path:
    """A config.json alone: weights are made up (``load_format: dummy``)."""
    directory = root / shape
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[shape]))
    return directory


def write_adapters(root: Path, shape: str, count: int) -> list[Path]:
    """PEFT directories with random factors on q, k, v and o, small enough that activations stay finite."""
    config = SHAPES[shape]
    hidden, heads, kv_heads = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)
    sizes = {"q_proj": (hidden, heads * head_dim), "k_proj": (hidden, kv_heads * head_dim)}
    sizes |= {"v_proj": sizes["k_proj"], "o_proj": (heads * head_dim, hidden)}
    generator = torch.Generator().manual_seed(0)
    directories = []
    for index in range(count):
        tensors = {}
        for layer in range(config["num_hidden_layers"]):
            for module, (size_in, size_out) in sizes.items():
                name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
                for factor, size in (("A", (RANK, size_in)), ("B", (size_out, RANK))):
                    drawn = torch.empty(size).uniform_(-0.02, 0.02, generator=generator)
                    tensors[f"{name}.lora_{factor}.weight"] = drawn.bfloat16()
        directory = root / f"{shape}-agent-{index}"
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(directory / "adapter_model.safetensors"))
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(sizes), "task_type": "CAUSAL_LM"}
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        directories.append(directory)
    return directories


def make_engine(model: Path, adapters: Sequence[Path], kv_bytes: int, device: str, max_batched: int) -> Engine:
    return Engine.from_config(
        parse_config(
            {
                "model": {"path": str(model), "dtype": "auto", "device": device, "load_format": "dummy"},
                "adapters": [{"name": path.name, "path": str(path)} for path in adapters],
                "adapter_memory": {"max_device_adapters": max(len(adapters), 1)},
                "cache": {"kv_bytes": kv_bytes, "page_size": PAGE_SIZE, "merged_share": 0.0 if device == "cuda" else 0.5},
                # Half of what a step holds may be prompt while others decode: 256, the default, is for CPUs, and would
                # let `isolated`, whose prompts are long, wait 128 steps for each.
                "scheduler": {
                    "max_num_batched_tokens": max_batched,
                    "max_prefill_tokens_beside_decodes": max_batched // 2,
                },
                "defaults": {"adapter_sharing": "isolated"},  # nothing is measured beside what is timed
            }
        )
    )


def run_mode(engine: Engine, workload: Workload, mode: str, adapters: tuple[str, ...], tenant: str) -> dict[str, Any]:
    """One cold run: seconds of all; medians of the time to a turn's first token and of a decode step."""
    sharing = Sharing.EAGER if mode == NO_ADAPTER else Sharing(mode)
    target = OfflineTarget(engine, block_size=PAGE_SIZE, sharing=sharing)
    used = () if mode == NO_ADAPTER else adapters
    started_s = time.perf_counter()
    trace = workload.trace(used, engine.model_info.vocab_size, tenant)
    report = run_trace(trace, target, sharing=sharing, seed=0, on_progress=lambda num_ended: None).report
    turns = report["turns"]
    return {
        "mode": mode,
        "wall_s": report["wall_s"],
        "real_s": time.perf_counter() - started_s,
        "ttft_s": statistics.median(turn["ttft_s"] for turn in turns),
        "step_s": statistics.median((turn["e2e_s"] - turn["ttft_s"]) / max(turn["output_tokens"] - 1, 1) for turn in turns),
        "prefill_tokens_run": report["prefill_tokens_run"],
    }


def bench(quick: bool) -> Iterator[dict[str, Any]]:
    """Rows for the kit: `eager` against the same agents without adapters, and without sharing."""
    is_cuda = torch.cuda.is_available()
    shape, agents, context = ("llama-3.1-8b", 16, 32768) if is_cuda and not quick else ("tiny", 3, 192)
    turn = 128 if is_cuda and not quick else 8
    yield from run(shape, agents, context, 3, turn, "cuda" if is_cuda else "cpu", default_kv_bytes(shape))


def default_kv_bytes(shape: str) -> int:
    """Of a card 65 %: what weights and steps leave. 16 agents of 32k tokens each on a KV of their own take 66 GiB."""
    if shape == "tiny" or not torch.cuda.is_available():
        return 16 << 20
    return int(0.65 * torch.cuda.get_device_properties(0).total_memory)


def run(shape: str, agents: int, context: int, turns: int, turn: int, device: str, kv_bytes: int) -> Iterator[dict[str, Any]]:
    """The run that takes longest comes last, so that a limit of time costs only its row."""
    root = ROOT / ".forkkv" / "end-to-end"
    model, adapters = write_model(root, shape), write_adapters(root, shape, agents)
    engine = make_engine(model, adapters, kv_bytes, device, 8192 if device == "cuda" else 512)
    names = tuple(path.name for path in adapters)
    workload = Workload(f"{agents} agents, {context:,} shared", agents, context, turns, turn, turn)
    # The same shapes before, but for two short turns: kernels are compiled and graphs captured then.
    warm_up = Workload("warm-up", agents, context, 2, turn, 8)
    for mode in ("eager", NO_ADAPTER):
        print(json.dumps({"warm-up": True, **run_mode(engine, warm_up, mode, names, f"warm-up-{mode}")}), flush=True)
    eager: dict[str, Any] = {}
    for mode, target in (("eager", None), (NO_ADAPTER, 0.9), ("isolated", 5.0)):
        found = run_mode(engine, workload, mode, names, f"run-{mode}")
        print(json.dumps(found), flush=True)
        if mode == "eager":
            eager = found
            continue
        yield {
            "name": f"{shape}, {workload.name}, {turns} turns of {turn} in and out: eager against {mode}",
            "ms": eager["wall_s"] * 1000,
            "baseline_ms": found["wall_s"] * 1000,
            "ratio": found["wall_s"] / eager["wall_s"],
            "target": target,
            "note": f"TTFT {eager['ttft_s']:.3f} s against {found['ttft_s']:.3f} s, decode step {1e3 * eager['step_s']:.2f} ms"
            f" against {1e3 * found['step_s']:.2f}",
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--agents", type=int, default=16)
    parser.add_argument("--context", type=int, default=32768, help="shared tokens")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--turn", type=int, default=128, help="tokens in and out of a turn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kv-gib", type=float, help="default: 65 %% of the card")
    asked = parser.parse_args()
    kv_bytes = int(asked.kv_gib * 2**30) if asked.kv_gib else default_kv_bytes(asked.shape)
    for row in run(asked.shape, asked.agents, asked.context, asked.turns, asked.turn, asked.device, kv_bytes):
        print(json.dumps(row))


if __name__ == "__main__":
    main()
