"""vLLM's offline engine over the workloads of `forkkv bench offline`: a stand-alone script for a Python that has vLLM.

Reads one JSON object from standard input and writes one, as the last line, to standard output:

    in   {"model": DIR, "adapters": [DIR of each agent, or none], "context": [ids], "appends": [turn][agent][ids],
          "max_tokens": n, "repeats": n, "num_threads": n}
    out  {"wall_s": [of each repeat], "turn_s": [repeat][turn], "version": ...}

Prefix caching is on and starts cold in every repeat; one short batch warms up before. VLLM_CPU_KVCACHE_SPACE (GiB)
is 1 unless it is set.
"""

import json
import os
import sys
import time


def main() -> None:
    job = json.load(sys.stdin)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(job["num_threads"]))
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import vllm
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    num_agents = len(job["appends"][0])
    lora = [LoRARequest(f"agent-{i}", i + 1, path) for i, path in enumerate(job["adapters"])]
    lora_options = {"enable_lora": True, "max_loras": len(lora), "max_lora_rank": 16} if lora else {}
    longest = len(job["context"]) + len(job["appends"]) * (len(job["appends"][0][0]) + job["max_tokens"])
    llm = LLM(
        model=job["model"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=longest + 1,
        enable_prefix_caching=True,
        **lora_options,
    )

    def generate(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, sampling, lora_request=lora[: len(prompts)] or None, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def run() -> list[float]:
        llm.reset_prefix_cache()
        histories = [list(job["context"]) for _ in range(num_agents)]
        seconds = []
        for turn in job["appends"]:
            started = time.perf_counter()
            histories = [history + append for history, append in zip(histories, turn, strict=True)]
            outputs = generate(histories, job["max_tokens"])
            histories = [history + output for history, output in zip(histories, outputs, strict=True)]
            seconds.append(time.perf_counter() - started)
        return seconds

    generate([job["context"][:64] for _ in range(num_agents)], 8)
    turn_s = [run() for _ in range(job["repeats"])]
    report = {"wall_s": [sum(turns) for turns in turn_s], "turn_s": turn_s, "version": vllm.__version__}
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
