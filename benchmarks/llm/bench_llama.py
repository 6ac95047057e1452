"""llama.cpp, offline, through its C interface: python bench_llama.py MODEL.gguf    (environment llama)

All sequences are decoded in one batch a step, as its server does it with as many slots; common tokens are computed once and
copied between sequences, as its parallel example does it.
"""

import ctypes
import os
import sys
from itertools import takewhile
from pathlib import Path

from workloads import answers, serve_workloads

answer = answers()
import llama_cpp as llama  # noqa: E402
import numpy as np  # noqa: E402

MAX_SEQUENCES, MAX_TOKENS = 32, 4608
NUM_THREADS = os.cpu_count()

quiet = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(quiet, ctypes.c_void_p(0))
llama.llama_backend_init()
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
settings = llama.llama_context_default_params()
settings.n_ctx, settings.n_batch, settings.n_seq_max, settings.kv_unified = 8192, MAX_TOKENS, MAX_SEQUENCES, True
settings.n_threads = settings.n_threads_batch = NUM_THREADS
context = llama.llama_init_from_model(model, settings)
memory = llama.llama_get_memory(context)
vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
batch = llama.llama_batch_init(MAX_TOKENS, 0, 1)


def decode(tokens: list[tuple[int, int, int, bool]]) -> list[int]:
    """(token, position, sequence, whether its successor is wanted) -> the likeliest successors."""
    for place, (token, position, sequence, wanted) in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place], batch.logits[place] = token, position, 1, wanted
        batch.seq_id[place][0] = sequence
    batch.n_tokens = len(tokens)
    assert llama.llama_decode(context, batch) == 0
    wanted = [place for place, token in enumerate(tokens) if token[3]]
    return [int(np.ctypeslib.as_array(llama.llama_get_logits_ith(context, place), (vocab_size,)).argmax()) for place in wanted]


def generate(prompts: list[list[int]], output: int) -> list[int]:
    llama.llama_memory_clear(memory, True)
    shared = 0
    if len(prompts) > 1:
        shared = len(list(takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=True))))
    if shared:
        decode([(token, position, 0, False) for position, token in enumerate(prompts[0][:shared])])
        for sequence in range(1, len(prompts)):
            llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
    last = [
        (prompt[place], place, sequence, place == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for place in range(shared, len(prompt))
    ]
    tokens = decode(last)
    for step in range(output - 1):
        tokens = decode([(token, len(prompts[sequence]) + step, sequence, True) for sequence, token in enumerate(tokens)])
    return [output] * len(tokens)


serve_workloads(generate, Path(sys.argv[1]).with_suffix(""), answer)
