"""What `llm.deterministic` costs: the same workloads with it and without, turn by turn in one run.

python make_models.py M; python deterministic.py [--model models/S-bf16] [--turns 5]      (the project's environment, from this folder)
"""

import argparse
from pathlib import Path
from statistics import median

from quantization import Engine
from workloads import WORKLOADS, measure, vocab_size_of

from fairlead.core.specs import LlmSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "models" / "M-bf16")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--workloads", nargs="*", default=["single", "batch32", "prefill"], choices=list(WORKLOADS))
    options = parser.parse_args()
    sizes = {"max_model_len": 2048, "kv_cache_bytes": 1 << 30}
    off, on = (Engine(options.model, LlmSpec(deterministic=wanted, **sizes)) for wanted in (False, True))
    vocab_size = vocab_size_of(options.model)
    print("| workload | off | on | share of the speed that is left |\n|---|---|---|---|")
    for name in options.workloads:
        turns = []
        for turn in range(options.turns):
            seed = 7919 * turn + 1
            turns.append(
                [measure(engine.generate, name, vocab_size, seed) for engine in ((off, on), (on, off))[turn % 2]][:: 1 - 2 * (turn % 2)]
            )
        shares = [(before / after if WORKLOADS[name].lower_is_better else after / before) for before, after in turns]
        values = " | ".join(f"{median(pair[i] for pair in turns):.1f}" for i in range(2))
        print(f"| {WORKLOADS[name].title} ({WORKLOADS[name].unit}) | {values} | {median(shares):.2f} |", flush=True)


if __name__ == "__main__":
    main()
