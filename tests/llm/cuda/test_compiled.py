"""What an interpreter cannot tell: the kernels compile for real devices, and the script that measures them starts without our packages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[3]
COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fairlead.llm.attention import triton_kernels as attention
from fairlead.llm.cuda import kernels as layers

BF16, F32, I32, I64 = "*bf16", "*fp32", "*i32", "*i64"
POINTERS = {"tables": I32, "starts": I32, "lens": I32, "slots": I64, "positions": I64, "parts": F32, "maxima": F32, "sums": F32, "cos": F32, "sin": F32}
for name in ("q", "k", "v", "x", "y", "out", "k_cache", "v_cache", "sinks", "weight", "qkv", "q_norm", "k_norm", "both"):
    POINTERS[name] = BF16
FLOATS = ("scale", "softcap", "eps")
HEAD = {"GROUP": 4, "K_SIZE": 128, "V_SIZE": 128, "K_PADDED": 128, "V_PADDED": 128, "BLOCK_SIZE": 64}
TILE = {"TILE": 64, "HAS_SOFTCAP": True, "HAS_WINDOW": True}
KERNELS = (
    (attention.store, {key: HEAD[key] for key in HEAD if key != "GROUP"}),
    (attention.attend, {**HEAD, **TILE, "BLOCK_Q": 16, "BLOCK_M": 64, "HAS_SINKS": True}),
    (attention.attend_part, {**HEAD, **TILE, "NUM_HEADS": 32, "BLOCK_M": 16, "NUM_PARTS": 8}),
    (attention.merge_parts, {"NUM_HEADS": 32, "V_SIZE": 128, "V_PADDED": 128, "NUM_PARTS": 8, "HAS_SINKS": True}),
    (layers.add_norm, {"HAS_Y": True, "ROUND_FIRST": True, "PADDED": 4096}),
    (layers.add_normed, {"ROUND_FIRST": False, "PADDED": 4096}),
    (layers.rope_store, {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "SIZE": 128, "HALF_PADDED": 64, "BLOCK_SIZE": 64, "ROTATES": True, "NORMS": True, "ROUND_FIRST": True}),
    (layers.gated, {"ACTIVATION": 3, "BLOCK": 1024}),
)
for number, (kernel, sizes) in enumerate(KERNELS):
    names = kernel.arg_names
    types = {name: "constexpr" if name in sizes else POINTERS.get(name, "fp32" if name in FLOATS else "i32") for name in names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name in POINTERS or "stride" in name or name == "size"}
    source = ASTSource(kernel, types, {(names.index(name),): value for name, value in sizes.items()}, aligned)
    built = compile(source, target=GPUTarget("cuda", (90, 80)[number % 2], 32), options={"num_warps": 4, "num_stages": 3})
    print(kernel.__name__, len(built.asm["cubin"]) > 0, built.metadata.shared <= 160 << 10)
"""


def test_every_kernel_compiles_for_its_devices(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env={**environment, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )

    assert done.returncode == 0, done.stderr
    assert [line.split()[1:] for line in done.stdout.splitlines()] == [["True", "True"]] * 8


def test_the_script_starts_with_torch_triton_and_transformers_alone(tmp_path):
    command = [sys.executable, "benchmarks/llm/gpu.py", "--rehearse", "--only", "limits", "--out", str(tmp_path)]

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "matrix product" in done.stdout
    assert '"stood in"' in (tmp_path / "gpu.json").read_text()
