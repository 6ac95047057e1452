"""vLLM's CPU build, offline: python bench_vllm.py MODEL [--no-prefix]    (environment vllm; settings of threads in registry.py)"""

import sys
from pathlib import Path

from workloads import answers, serve_workloads


def main() -> None:
    answer = answers()
    from vllm import LLM, SamplingParams

    model = Path(sys.argv[1])
    llm = LLM(
        model=str(model),
        dtype="auto",
        max_model_len=2048,
        max_num_seqs=64,
        enable_prefix_caching="--no-prefix" not in sys.argv,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], output: int) -> list[int]:
        sampling = SamplingParams(temperature=0, max_tokens=output, min_tokens=output, ignore_eos=True, detokenize=False)
        results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
        return [len(result.outputs[0].token_ids) for result in results]

    serve_workloads(generate, model, answer)


if __name__ == "__main__":  # its worker processes import this file
    main()
