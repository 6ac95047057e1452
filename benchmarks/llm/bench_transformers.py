"""transformers, offline: python bench_transformers.py MODEL generate|cb    (environment transformers)

generate: one padded batch; cb: its continuous batching over a paged cache
"""

import sys
from pathlib import Path

from workloads import answers, serve_workloads

answer = answers()
import torch  # noqa: E402
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.set_verbosity_error()
folder, mode = Path(sys.argv[1]), sys.argv[2]
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation="sdpa").eval()
paged = ContinuousBatchingConfig(num_blocks=320, page_size=32, max_batch_tokens=1024, use_cuda_graph=False, allow_block_sharing=True)


def settings(output: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=output, min_new_tokens=output, do_sample=False, eos_token_id=None, pad_token_id=0)


def padded(prompts: list[list[int]], output: int) -> list[int]:
    ids = torch.tensor(prompts)
    answered = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings(output))
    return [answered.shape[1] - ids.shape[1]] * len(prompts)


def continuous(prompts: list[list[int]], output: int) -> list[int]:
    answered = model.generate_batch(
        prompts, generation_config=settings(output), continuous_batching_config=paged, progress_bar=False, warmup=False
    )
    return [len(result.generated_tokens) for result in answered.values()]


with torch.inference_mode():
    serve_workloads(padded if mode == "generate" else continuous, folder, answer)
