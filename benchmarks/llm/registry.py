"""How each engine is started: offline, as a process that answers workloads, and as a server of the OpenAI protocol."""

import os
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
FAIRLEAD_PYTHON = Path(os.environ.get("FAIRLEAD_PYTHON", HERE.parents[1] / ".venv/bin/python"))
BOTH_CORES = f"0-{(os.cpu_count() or 1) - 1}"


class Engine(NamedTuple):
    """`{here}`, `{model}` and `{port}` are filled in; commands are of the environment whose python is given."""

    python: Path
    offline: str = ""
    serve: str = ""
    """Empty: not measured so."""
    environ: dict[str, str] = {}
    fields: dict[str, object] = {"ignore_eos": True}
    """Of its requests over HTTP, beside the common ones."""

    def command(self, line: str, **fill: object) -> list[str]:
        program, *arguments = (part.format(here=HERE, **fill) for part in line.split())
        folder = self.python.parent
        return [program if "/" in program else str(folder / program), *arguments]


def python_of(environment: str) -> Path:
    return HERE / "envs" / environment / "bin/python"


def vllm(*options: str, **environ: str) -> Engine:
    offline = " ".join(["python {here}/bench_vllm.py {model}", *options])
    serve = "python -m vllm.entrypoints.openai.api_server --model {model} --served-model-name m --host 127.0.0.1 --port {port} --max-model-len 2048 --max-num-seqs 64 --disable-log-stats"
    return Engine(
        python_of("vllm"),
        offline,
        "" if options else serve,
        {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"} | environ,
    )


def transformers(mode: str, serve: str) -> Engine:
    common = "transformers serve {model} --device cpu --host 127.0.0.1 --port {port}"
    return Engine(
        python_of("transformers"),
        f"python {{here}}/bench_transformers.py {{model}} {mode}",
        f"{common} {serve}",
        {"HF_HUB_OFFLINE": "1"},
        {},  # it refuses fields that it does not know; these weights hardly ever choose the end
    )


def fairlead(*settings: str) -> Engine:
    return Engine(FAIRLEAD_PYTHON, " ".join(["python {here}/bench_fairlead.py {model}", *settings]))


LLAMA = HERE / "envs/llama/lib"
ENGINES = {
    "fairlead": Engine(
        FAIRLEAD_PYTHON,
        "python {here}/bench_fairlead.py {model}",
        "fairlead serve {model} --port {port} --grpc-port 0 --ops-port 0",
    ),
    # each optimisation off, and all of them
    "fairlead-noprefix": fairlead("prefix_caching=false"),
    "fairlead-graph": fairlead("decoder=graph"),
    "fairlead-torch": fairlead("kernels=torch"),
    "fairlead-int8": fairlead("quantization=int8"),
    "fairlead-plain": fairlead("decoder=graph", "kernels=torch", "prefix_caching=false"),
    # it leaves one core to its other processes: one thread where there are two
    "vllm": vllm(),
    "vllm-2": vllm(VLLM_CPU_OMP_THREADS_BIND=BOTH_CORES),
    "vllm-2-noprefix": vllm("--no-prefix", VLLM_CPU_OMP_THREADS_BIND=BOTH_CORES),
    "transformers": transformers("generate", ""),
    "transformers-cb": transformers("cb", "--continuous-batching --cb-block-size 32 --cb-num-blocks 320 --cb-max-batch-tokens 1024"),
    "llama.cpp": Engine(
        python_of("llama"),
        "python {here}/bench_llama.py {model}.gguf",
        "{here}/envs/llama/bin/llama-server -m {model}.gguf --host 127.0.0.1 --port {port} -t 2 -tb 2 --parallel 8 -c 16384 --alias m --no-webui --jinja",
        {"LLAMA_CPP_LIB_PATH": str(LLAMA), "LD_LIBRARY_PATH": str(LLAMA)},
    ),
}
PEERS = ("vllm", "vllm-2", "transformers", "transformers-cb", "llama.cpp")
MAIN = ("fairlead", *PEERS)
"""Without the variants."""
