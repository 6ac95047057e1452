"""Checks and measures the engine on a CUDA machine, from a bare checkout: torch, triton and transformers are enough.

    python benchmarks/llm/gpu.py --out results                 everything, some eight minutes on an H200
    python benchmarks/llm/gpu.py --out results --only checks,attention --sweep
    python benchmarks/llm/gpu.py --rehearse                    the same paths in small, on a CPU under Triton's interpreter

Weights are random, shapes are real. A short table is printed; details, and what failed, go to results/gpu.json.
"""

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(Path(__file__).parent)]
REHEARSAL = "--rehearse" in sys.argv
if REHEARSAL:
    os.environ["TRITON_INTERPRET"] = "1"

import bare  # noqa: E402

STOOD_IN = bare.install(everywhere=REHEARSAL)

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import transformers  # noqa: E402

from fairlead.core.errors import FairleadError  # noqa: E402
from fairlead.core.generation import Sampling  # noqa: E402
from fairlead.llm.attention.reference import ReferenceAttention  # noqa: E402
from fairlead.llm.attention.torch_attention import TorchAttention  # noqa: E402
from fairlead.llm.attention.triton_attention import TritonAttention, Tuning  # noqa: E402
from fairlead.llm.batch import AttentionSpec, LayerCache, StepBatch  # noqa: E402
from fairlead.llm.blocks import BlockPool  # noqa: E402
from fairlead.llm.cuda.layers import TritonLayers  # noqa: E402
from fairlead.llm.cuda.runner import CudaRunner, capture_graph  # noqa: E402
from fairlead.llm.cuda.sampler import CudaSampler  # noqa: E402
from fairlead.llm.decoder import LeanDecoder, add_norm, head_norm, probe, rotate  # noqa: E402
from fairlead.llm.engine import Engine  # noqa: E402
from fairlead.llm.linear import ACTIVATIONS  # noqa: E402
from fairlead.llm.scheduler import Scheduler  # noqa: E402
from fairlead.llm.tokenizer import Tokenizer  # noqa: E402

DEVICE = "cpu" if REHEARSAL else "cuda"
HALF = torch.float16 if REHEARSAL else torch.bfloat16  # the interpreter multiplies no bfloat16
WEIGHTS = torch.float32 if REHEARSAL else torch.bfloat16
BLOCK = 16 if REHEARSAL else 64

QWEN_06B = {
    "kind": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    "kind": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
SMALL = {
    "kind": "qwen3",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


class Report:
    """Rows as they come, on the screen and in the file."""

    def __init__(self, out: Path | None) -> None:
        self.out = out
        self.rows: list[dict[str, Any]] = []
        self.details: dict[str, Any] = {}

    def add(
        self, name: str, value: float | str, unit: str = "", must: float | None = None, good: float | None = None, *, most: bool = False
    ) -> None:
        """`must`, `good`: what is aimed at; at most that where `most`."""
        verdict = ""
        if must is not None and isinstance(value, (int, float)) and not REHEARSAL:
            reached = [aim is not None and (value <= aim if most else value >= aim) for aim in (must, good)]
            verdict = "good" if reached[1] else "must" if reached[0] else "MISSED"
        self.rows.append({"name": name, "value": value, "unit": unit, "must": must, "good": good, "verdict": verdict})
        shown = f"{value:,.4g}" if isinstance(value, float) else str(value)
        aims = "" if must is None else f"must {must:g}" + ("" if good is None else f", good {good:g}")
        print(f"{name:58} {shown:>12} {unit:10} {aims:26} {verdict}", flush=True)
        self.save()

    def save(self) -> None:
        if self.out is not None:
            (self.out / "gpu.json").write_text(json.dumps({"rows": self.rows, "details": self.details}, indent=1, default=str))


def sync() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], Any], *, repeats: int = 20) -> float:
    """Of one call, the median of several, on the device's own clock."""
    for _ in range(1 if REHEARSAL else 3):
        work()
    sync()
    times = []
    for _ in range(1 if REHEARSAL else repeats):
        if DEVICE == "cpu":
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[len(times) // 2]


# Models and engines


@contextlib.contextmanager
def dtype_of(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def model_of(shape: dict[str, Any], dtype: torch.dtype, *, max_len: int = 4096) -> Any:
    """transformers' own, with random weights, on the device."""
    torch.manual_seed(0)
    sizes = {name: value for name, value in shape.items() if name != "kind"}
    config = transformers.AutoConfig.for_model(
        shape["kind"], max_position_embeddings=max_len, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    with dtype_of(dtype), torch.device(DEVICE):
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()


def tokenizer_of(vocab_size: int) -> Tokenizer:
    """Every id is some text."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(f"t{number}" for number in range(vocab_size - len(alphabet)))]
    backend = Backend(models.BPE({word: id for id, word in enumerate(words)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        backend.save(f"{folder}/tokenizer.json")
        return Tokenizer.load(folder)


def decoder_of(model: Any, *, max_len: int) -> LeanDecoder:
    kernel = TritonAttention(num_processors=8 if REHEARSAL else 0)
    decoder = LeanDecoder.from_graph(model, kernel, max_model_len=max_len)
    assert isinstance(decoder, LeanDecoder), decoder
    return decoder


def engine_of(
    decoder: LeanDecoder,
    *,
    max_num_seqs: int,
    max_batch_tokens: int,
    max_len: int,
    num_blocks: int,
    graphs: bool = True,
    overlap: bool = True,
) -> Engine:
    sizes = {"max_num_seqs": max_num_seqs, "max_batch_tokens": max_batch_tokens, "max_model_len": max_len}
    capture = (None if not graphs else capture_graph()) if DEVICE == "cuda" else ((lambda compute: compute) if graphs else None)
    runner = CudaRunner(decoder, num_blocks=num_blocks, block_size=BLOCK, capture=capture, **sizes)
    scheduler = Scheduler(BlockPool(num_blocks, BLOCK, prefix_caching=False), max_waiting=4096, **sizes)
    sampler, tokenizer = CudaSampler(decoder.vocab_size), tokenizer_of(decoder.vocab_size)
    return Engine(runner, scheduler, sampler, tokenizer, max_model_len=max_len, overlap=overlap)


def answered(engine: Engine, requests: list[tuple[list[int], Sampling]]) -> list[list[int]]:
    for id, (ids, sampling) in enumerate(requests):
        engine.add(id, ids, sampling, stream=False)
    found: dict[int, list[int]] = {}
    while engine.has_work:
        for id, delta in engine.step():
            assert not isinstance(delta, FairleadError), delta
            found[id] = delta.token_ids
    sync()
    return [found[id] for id in range(len(requests))]


def prompt(numbers: random.Random, length: int, vocab_size: int) -> list[int]:
    return [numbers.randrange(3, vocab_size) for _ in range(length)]


def paged(num_seqs: int, context_len: int, query_len: int, heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """A step of equal sequences in blocks of no order."""
    num_blocks = -(-context_len // BLOCK)
    layer = LayerCache(*(torch.randn(num_seqs * num_blocks, kv_heads, BLOCK, size, device=DEVICE, dtype=dtype) for _ in range(2)))
    tables = torch.randperm(num_seqs * num_blocks, device=DEVICE).view(num_seqs, num_blocks).int()
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    starts = torch.arange(num_seqs + 1, device=DEVICE, dtype=torch.int32) * query_len
    lens = torch.full((num_seqs,), context_len, dtype=torch.int32, device=DEVICE)
    batch = StepBatch(none, none, none, starts, lens, tables, none, query_len, context_len)
    q = torch.randn(num_seqs * query_len, heads, size, device=DEVICE, dtype=dtype)
    return q, layer, batch, AttentionSpec(size**-0.5)


# What is checked


def checks(report: Report, args: argparse.Namespace) -> None:
    """The kernels against the oracle, the decoder against transformers, captured and overlapping steps against launched ones."""
    kernel, oracle = TritonAttention(num_processors=8 if REHEARSAL else 0), ReferenceAttention()
    worst = 0.0
    numbers = random.Random(0)
    for case in range(4 if REHEARSAL else 24):
        dtype = (torch.float32, HALF)[case % 2]
        group, kv_heads, size = numbers.choice([1, 2, 4, 7, 8]), numbers.choice([1, 2, 3]), numbers.choice([16, 64, 80, 128])
        lens = [numbers.randrange(1, 300) for _ in range(4)]
        queries = [1] * 4 if case % 3 == 0 else [numbers.randrange(1, min(40, length) + 1) for length in lens]
        num_blocks = [-(-length // BLOCK) for length in lens]
        order = torch.randperm(sum(num_blocks)).tolist()
        tables = torch.zeros(4, max(num_blocks), dtype=torch.int32)
        for s, num in enumerate(num_blocks):
            tables[s, :num] = torch.tensor([order.pop() for _ in range(num)])
        layer = LayerCache(*(torch.randn(sum(num_blocks), kv_heads, BLOCK, size, device=DEVICE, dtype=dtype) for _ in range(2)))
        none = torch.zeros(0, dtype=torch.int64)
        starts = torch.tensor([0, *queries]).cumsum(0).int()
        batch = StepBatch(
            none,
            none,
            none,
            starts.to(DEVICE),
            torch.tensor(lens, dtype=torch.int32, device=DEVICE),
            tables.to(DEVICE),
            none,
            max(queries),
            max(lens),
        )
        q = torch.randn(int(starts[-1]), group * kv_heads, size, device=DEVICE, dtype=dtype)
        sinks = torch.randn(group * kv_heads, device=DEVICE) if case % 4 == 1 else None
        spec = AttentionSpec(size**-0.5, numbers.choice([0, 0, 33]), numbers.choice([0.0, 20.0]), sinks)
        exact = oracle.attend(q.float(), LayerCache(layer.k.float(), layer.v.float()), batch, spec)
        difference = float((kernel.attend(q, layer, batch, spec).float() - exact).abs().max())
        tolerance = 1e-4 if dtype == torch.float32 else 2e-2
        assert difference <= tolerance, f"attention case {case}: off by {difference}"
        worst = max(worst, difference / tolerance)
    report.add("attention kernels agree with the oracle", "yes", f"{worst:.0%} of tol.")

    layers = TritonLayers()
    x, y, weight = (torch.randn(*shape, device=DEVICE).to(HALF) for shape in ((37, 1024), (37, 1024), (1024,)))
    ours, theirs = x.clone(), x.clone()
    torch.testing.assert_close(
        layers.add_norm(ours, y, weight, 1e-6, 1.0, True), add_norm(theirs, y, weight, 1e-6, 1.0, True), rtol=2e-2, atol=2e-2
    )
    torch.testing.assert_close(ours, theirs)
    both = torch.randn(37, 2 * 3072, device=DEVICE).to(HALF)
    gate, up = both.chunk(2, -1)
    for name, activation in ACTIVATIONS.items():
        torch.testing.assert_close(layers.gated(both, name), activation(gate) * up, rtol=2e-2, atol=2e-2)
    qkv = torch.randn(9, 8 * 64, device=DEVICE).to(HALF)
    cos, sin = torch.randn(32, 32, device=DEVICE).cos(), torch.randn(32, 32, device=DEVICE).sin()
    positions, slots = torch.arange(9, device=DEVICE), torch.arange(9, device=DEVICE) * 3
    k_cache, v_cache = (torch.zeros(4, 2, BLOCK, 64, device=DEVICE, dtype=HALF) for _ in range(2))
    norm = torch.randn(64, device=DEVICE).to(HALF)
    ours = qkv.clone()
    layers.rope_store(ours, positions, slots, cos, sin, k_cache, v_cache, norm, norm, 4, 1e-6, True)
    q, k = (head_norm(part, norm, 64, 1e-6, True) for part in qkv.split([256, 128, 128], 1)[:2])
    torch.testing.assert_close(ours.view(9, -1, 64)[:, :4], rotate(q, cos[positions, None], sin[positions, None]), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(
        k_cache[slots // BLOCK, :, slots % BLOCK], rotate(k, cos[positions, None], sin[positions, None]), rtol=2e-2, atol=2e-2
    )
    report.add("kernels between the projections agree with torch's", "yes")

    model = model_of(SMALL, torch.float32, max_len=256)
    decoder = decoder_of(model, max_len=256)
    reason = probe(model, decoder)
    assert not reason, reason
    sizes = {"max_num_seqs": 8, "max_batch_tokens": 64, "max_len": 256, "num_blocks": 64}
    requests = [
        (prompt(numbers, 3 + 7 * number, 512), Sampling(temperature=0.0, max_tokens=6 if REHEARSAL else 24, ignore_eos=True))
        for number in range(6)
    ]
    ways = ((False, False), (True, False), (False, True), (True, True))
    launched, captured, *overlapped = (
        answered(engine_of(decoder, graphs=graphs, overlap=overlap, **sizes), requests) for graphs, overlap in ways
    )
    assert launched == captured, "captured steps give other tokens"
    assert [launched] * 2 == overlapped, "steps that overlap give other tokens"
    drawn = [(ids, Sampling(temperature=0.8, seed=id, max_tokens=sampling.max_tokens)) for id, (ids, sampling) in enumerate(requests)]
    one, other = (answered(engine_of(decoder, overlap=overlap, **sizes), drawn) for overlap in (False, True))
    assert one == other, "steps that overlap draw other tokens"
    expected = []
    for ids, sampling in requests:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([ids], device=DEVICE),
                attention_mask=torch.ones(1, len(ids), device=DEVICE, dtype=torch.int64),
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        expected.append(out[0, len(ids) :].tolist())
    assert captured == expected, "greedy tokens differ from transformers.generate in float32"
    report.add("greedy tokens in float32: transformers, launched, captured, overlapping", "equal")


# What is measured


def limits(report: Report, args: argparse.Namespace) -> None:
    """What the device gives at best: what the others are compared with."""
    size = 1 << (20 if REHEARSAL else 31)
    a, b = (torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    report.details["copy_bytes_per_second"] = 2 * size / seconds_of(lambda: a.copy_(b))
    report.add("copy, read and written", report.details["copy_bytes_per_second"] / 1e9, "GB/s")
    n = 128 if REHEARSAL else 8192
    x, w = (torch.randn(n, n, device=DEVICE, dtype=HALF) for _ in range(2))
    report.details["flops"] = 2 * n**3 / seconds_of(lambda: x @ w)
    report.add("matrix product", report.details["flops"] / 1e12, "TFLOP/s")


def attention(report: Report, args: argparse.Namespace) -> None:
    """Prefill against torch's flash attention over dense memory, decode against the copy."""
    if "copy_bytes_per_second" not in report.details:
        limits(report, args)
    heads, kv_heads, size = (4, 2, 32) if REHEARSAL else (32, 8, 128)
    length = 64 if REHEARSAL else 8192
    q, layer, batch, spec = paged(1, length, length, heads, kv_heads, size, HALF)
    q4, k4, v4 = (torch.randn(1, heads, length, size, device=DEVICE, dtype=HALF) for _ in range(3))
    dense = seconds_of(lambda: F.scaled_dot_product_attention(q4, k4, v4, is_causal=True))
    num_seqs, context = (4, 80) if REHEARSAL else (64, 4096)
    decode = paged(num_seqs, context, 1, heads, kv_heads, size, HALF)
    num_bytes = num_seqs * context * kv_heads * size * 2 * HALF.itemsize
    processors = 8 if REHEARSAL else 0
    tunings = [Tuning()]
    if args.sweep:
        tunings += [
            Tuning(rows, tile, warps, stages) for rows in (64, 128) for tile in (32, 64, 128) for warps in (4, 8) for stages in (2, 3)
        ]
        tunings += [
            Tuning(decode_tile=tile, decode_warps=warps, decode_stages=stages)
            for tile in (32, 64, 128)
            for warps in (2, 4, 8)
            for stages in (2, 3, 4)
        ]
    found = []
    for tuning in tunings:
        kernel = TritonAttention(tuning, num_processors=processors)
        try:
            prefill_seconds = seconds_of(lambda: kernel.attend(q, layer, batch, spec), repeats=5)  # noqa: B023  # called at once
            decode_seconds = seconds_of(lambda: kernel.attend(*decode), repeats=10)  # noqa: B023
        except Exception as error:
            found.append((tuning, f"{type(error).__name__}: {error}"))
            continue
        found.append((tuning, prefill_seconds, decode_seconds))
    report.details["tunings"] = [str(each) for each in found]
    measured = [each for each in found if len(each) == 3]
    assert measured, found
    prefill, decoded = min(each[1] for each in measured), min(each[2] for each in measured)
    flops = 2 * 2 * heads * size * length * length / 2
    report.add("prefill attention of 8,192 tokens", flops / prefill / 1e12, "TFLOP/s")
    report.add("  of torch's flash attention", dense / prefill, "", 0.7, 0.9)
    report.add("decode attention, 64 sequences of 4,096", num_bytes / decoded / 1e9, "GB/s")
    report.add("  of the copy's bandwidth", num_bytes / decoded / report.details["copy_bytes_per_second"], "", 0.65, 0.85)
    if args.sweep:
        for name, at in (("prefill", 1), ("decode", 2)):
            print(f"  best for {name}: {min(measured, key=lambda each: each[at])[0]}")
    gathered = TorchAttention()
    report.details["torch_decode_seconds"] = seconds_of(lambda: gathered.attend(*decode), repeats=3)


def small_model(report: Report, args: argparse.Namespace) -> None:
    """Qwen3-0.6B's shape, 256 sequences of 100 to 1,024 tokens in and out: nano-vllm's benchmark."""
    shape, num, least, most = (SMALL, 3, 4, 9) if REHEARSAL else (QWEN_06B, 256, 100, 1024)
    model = model_of(shape, WEIGHTS)
    decoder = decoder_of(model, max_len=4096)
    del model
    sizes = {"max_num_seqs": num, "max_batch_tokens": 256 if REHEARSAL else 16_384, "max_len": 4096}
    num_blocks = num * (2 * most // BLOCK + 1) + 4096 // BLOCK
    numbers = random.Random(0)
    prompts = [prompt(numbers, numbers.randrange(least, most + 1), shape["vocab_size"]) for _ in range(num)]
    lengths = [numbers.randrange(least, most + 1) for _ in range(num)]
    for name, way, graphs, overlap in (
        ("greedy", {"temperature": 0.0}, True, True),
        ("greedy, no overlap", {"temperature": 0.0}, True, False),
        ("temperature 0.6", {"temperature": 0.6, "seed": 1}, True, True),
        ("temperature 0.6, no overlap", {"temperature": 0.6, "seed": 1}, True, False),
        ("greedy, no graphs", {"temperature": 0.0}, False, True),
    ):
        engine = engine_of(decoder, num_blocks=num_blocks, graphs=graphs, overlap=overlap, **sizes)
        for _ in range(1 if REHEARSAL else 2):  # once to capture
            began = time.perf_counter()
            out = answered(
                engine, [(ids, Sampling(max_tokens=length, ignore_eos=True, **way)) for ids, length in zip(prompts, lengths, strict=True)]
            )
            seconds = time.perf_counter() - began
        assert [len(ids) for ids in out] == lengths
        aims = (14_000.0, 21_000.0) if name == "greedy" else (None, None)
        report.add(f"0.6B, {num} sequences, {name}", sum(lengths) / seconds, "tok/s", *aims)
    for overlap in (True, False):
        idle(report, decoder, sizes, num_blocks, overlap=overlap)


def idle(report: Report, decoder: LeanDecoder, sizes: dict[str, int], num_blocks: int, *, overlap: bool) -> None:
    """How much of the time between decode steps the device has nothing to do."""
    name = "device idle between decode steps, 64 sequences" + (", no overlap" if not overlap else "")
    num = 4 if REHEARSAL else 64
    engine = engine_of(decoder, num_blocks=num_blocks, overlap=overlap, **sizes)
    numbers = random.Random(1)
    for id in range(num):
        engine.add(id, prompt(numbers, 8, decoder.vocab_size), Sampling(temperature=0.0, max_tokens=80, ignore_eos=True), stream=True)
    for _ in range(10):
        engine.step()
    sync()
    if DEVICE == "cpu":
        report.add(name, "rehearsed")
        return
    from torch.profiler import ProfilerActivity, profile

    steps = 40
    began = time.perf_counter()
    for _ in range(steps // 2):
        engine.step()
    sync()
    seconds = (time.perf_counter() - began) / (steps // 2)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps // 2):
            engine.step()
        sync()
    busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 1e6 / (steps // 2)
    report.details[f"decode step, overlap {overlap}"] = {"seconds": seconds, "busy": busy}
    aims = (0.15, 0.03) if overlap else (None, None)
    report.add(name, max(0.0, 1 - busy / seconds), "", *aims, most=True)


def large_model(report: Report, args: argparse.Namespace) -> None:
    """Llama-3.1-8B's shape in bfloat16."""
    shape = SMALL if REHEARSAL else LLAMA_8B
    began = time.perf_counter()
    model = model_of(shape, WEIGHTS, max_len=8192)
    decoder = decoder_of(model, max_len=8192)
    del model
    sync()
    report.details["large_built_seconds"] = time.perf_counter() - began
    long, few = (10, 6) if REHEARSAL else (1400, 256)
    num = 2 if REHEARSAL else 64
    sizes = {
        "max_num_seqs": num,
        "max_batch_tokens": 64 if REHEARSAL else 8192,
        "max_len": 8192,
        "num_blocks": num * (2048 // BLOCK) + 8192 // BLOCK,
    }
    began = time.perf_counter()
    engine = engine_of(decoder, **sizes)
    answered(engine, [([5, 6, 7], Sampling(temperature=0.0, max_tokens=4, ignore_eos=True))])
    report.add("8B, ready and first answer, weights there", time.perf_counter() - began, "s", 20.0, 8.0, most=True)
    numbers = random.Random(2)

    def decoded(num_seqs: int, prompt_len: int, new: int) -> float:
        """Tokens a second of pure decode steps."""
        for id in range(num_seqs):
            engine.add(
                id,
                prompt(numbers, prompt_len, shape["vocab_size"]),
                Sampling(temperature=0.0, max_tokens=new, ignore_eos=True),
                stream=True,
            )
        while any(sequence.num_generated < 3 for sequence in [*engine.scheduler.running, *engine.scheduler.waiting]):
            engine.step()
        sync()
        began, steps = time.perf_counter(), 0
        while engine.scheduler.num_running == num_seqs:
            engine.step()
            steps += 1
        sync()
        seconds = time.perf_counter() - began
        while engine.has_work:
            engine.step()
        return num_seqs * steps / seconds

    decoded(1, 128 if not REHEARSAL else 8, 8)
    report.add("8B, batch 1, decode", decoded(1, 128 if not REHEARSAL else 8, few), "tok/s", 190.0, 220.0)
    report.add("8B, batch 64, context 1,500, decode", decoded(num, long, 200 if not REHEARSAL else 6), "tok/s", 4800.0, 6200.0)
    prompts = [prompt(numbers, 10 if REHEARSAL else 2048, shape["vocab_size"]) for _ in range(2 if REHEARSAL else 16)]
    began = time.perf_counter()
    answered(engine, [(ids, Sampling(temperature=0.0, max_tokens=1, ignore_eos=True)) for ids in prompts])
    report.add("8B, prefill", sum(map(len, prompts)) / (time.perf_counter() - began), "tok/s", 24_000.0, 34_000.0)


def transformers_too(report: Report, args: argparse.Namespace) -> None:
    """transformers' continuous batching on the same model, requests and machine."""
    shape, num = (SMALL, 3) if REHEARSAL else (QWEN_06B, 128)
    model = model_of(shape, WEIGHTS)
    numbers = random.Random(3)
    prompts = [
        prompt(numbers, numbers.randrange(4, 10) if REHEARSAL else numbers.randrange(100, 1025), shape["vocab_size"]) for _ in range(num)
    ]
    new = 4 if REHEARSAL else 256
    decoder = decoder_of(model, max_len=4096)
    engine = engine_of(
        decoder,
        max_num_seqs=num,
        max_batch_tokens=256 if REHEARSAL else 16_384,
        max_len=4096,
        num_blocks=num * (1300 // BLOCK + 1) + 4096 // BLOCK,
    )
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        answered(engine, [(ids, Sampling(temperature=0.0, max_tokens=new, ignore_eos=True)) for ids in prompts])
        seconds.append(time.perf_counter() - began)
    ours = num * new / seconds[-1]
    if REHEARSAL:
        report.add("transformers' continuous batching", "not rehearsed")
        return
    config = transformers.GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
    model.set_attn_implementation("sdpa")
    began = time.perf_counter()
    out = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    tokens = sum(len(each.generated_tokens) for each in out.values())
    theirs = tokens / (time.perf_counter() - began)
    report.add("transformers' continuous batching, 0.6B", theirs, "tok/s")
    report.add("ours over theirs", ours / theirs, "x", 3.0, 5.0)


PARTS: dict[str, Callable[[Report, argparse.Namespace], None]] = {
    "checks": checks,
    "limits": limits,
    "attention": attention,
    "small": small_model,
    "large": large_model,
    "transformers": transformers_too,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for the details")
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--sweep", action="store_true", help="try many tunings of the attention kernels (minutes)")
    parser.add_argument("--rehearse", action="store_true", help="in small, on a CPU")
    args = parser.parse_args()
    if not REHEARSAL and not torch.cuda.is_available():
        print("no CUDA device: `--rehearse` runs the same paths in small on the CPU")
        return 2
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    report = Report(args.out)
    device = "rehearsal on a CPU" if REHEARSAL else torch.cuda.get_device_name()
    report.details["machine"] = {
        "device": device,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "stood in": STOOD_IN,
    }
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}\n")
    failed = []
    for name in args.only.split(","):
        began = time.perf_counter()
        try:
            PARTS[name](report, args)
        except Exception:
            failed.append(name)
            report.details[f"{name} failed"] = traceback.format_exc()
            print(f"{name} FAILED\n{traceback.format_exc()}", flush=True)
        report.details[f"{name} seconds"] = round(time.perf_counter() - began, 1)
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    report.save()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
