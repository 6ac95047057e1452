"""What this machine allows: how fast it reads the model's weights, how fast it multiplies matrices.

python limits.py MODEL     one JSON line (the project's environment; a C compiler)

Every token of a single stream reads all weights once: bytes / bandwidth is the shortest time of one. A prompt of a thousand
tokens is bound by arithmetic: operations / GEMM rate, of bf16 or float32, whichever this processor is faster at. The
vocabulary's input table is left out, of which a token reads one row; so is, for prompts, the output table, which only a
prompt's last token needs.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors import safe_open

HERE = Path(__file__).parent
GEMM = (1024, 1024, 3072)
"""Tokens, inputs, outputs: a prompt in one projection of the 0.6B shape."""
SECONDS = 1.5


def counts(model: Path) -> dict[str, int]:
    """Parameters in the layers and in the output table, which may be the input table too."""
    tied = json.loads((model / "config.json").read_text()).get("tie_word_embeddings", False)
    layers = table = 0
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                size = math.prod(file.get_slice(key).get_shape())
                if "layers." in key:
                    layers += size
                elif key == ("model.embed_tokens.weight" if tied else "lm_head.weight"):
                    table = size
    return {"layer_params": layers, "table_params": table}


def bandwidth(num_bytes: int) -> dict[int, float]:
    """GB/s by number of threads."""
    program = HERE / "envs/membw"
    program.parent.mkdir(exist_ok=True)
    if not program.exists() or program.stat().st_mtime < (HERE / "membw.c").stat().st_mtime:
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp"]
        subprocess.run([os.environ.get("CC", "cc"), *flags, HERE / "membw.c", "-o", program], check=True)
    lines = subprocess.run([program, str(num_bytes)], check=True, capture_output=True, text=True).stdout.splitlines()
    return {row["threads"]: row["gb_per_s"] for row in map(json.loads, lines)}


def gemm_gflops(dtype: torch.dtype) -> float:
    """The best of torch's own layout and of weights packed ahead."""
    num_tokens, inputs, outputs = GEMM
    x, weight = torch.randn(num_tokens, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
    calls = [lambda: torch.nn.functional.linear(x, weight)]
    if dtype == torch.bfloat16 and hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_tokens)
        calls.append(lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""))
    fastest = math.inf
    for call in calls:
        call()
        until = time.perf_counter() + SECONDS
        while (began := time.perf_counter()) < until:
            call()
            fastest = min(fastest, time.perf_counter() - began)
    return 2 * num_tokens * inputs * outputs / fastest / 1e9


def main() -> None:
    size = counts(Path(sys.argv[1]))
    num_bytes = 2 * (size["layer_params"] + size["table_params"])
    by_threads = bandwidth(num_bytes)
    with torch.inference_mode():
        bf16, fp32 = gemm_gflops(torch.bfloat16), gemm_gflops(torch.float32)
    fastest = max(by_threads.values())
    row = {
        **size,
        "weight_bytes": num_bytes,
        "gb_per_s": {str(threads): rate for threads, rate in by_threads.items()},
        "bf16_gflops": round(bf16),
        "fp32_gflops": round(fp32),
        "single_tok_s": round(fastest * 1e9 / num_bytes, 1),
        "prefill_tok_s": round(max(bf16, fp32) * 1e9 / (2 * size["layer_params"])),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
