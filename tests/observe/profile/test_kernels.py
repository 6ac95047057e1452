"""The table of a trace: own times, what calls what, and what operators allocate."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from fairlead.observe.profile.kernels import read, read_in_child
from fairlead.observe.profile.recorder import TorchRecorder, device_memory

EVENTS = [
    {"ph": "X", "cat": "cpu_op", "name": "outer", "pid": 1, "tid": 1, "ts": 0, "dur": 100, "args": {"Input Dims": [[2, 3]]}},
    {"ph": "X", "cat": "cpu_op", "name": "inner", "pid": 1, "tid": 1, "ts": 10, "dur": 30, "args": {}},
    {"ph": "i", "cat": "cpu_instant_event", "name": "[memory]", "pid": 1, "tid": 1, "ts": 20, "args": {"Bytes": 64}},
    {"ph": "X", "cat": "cpu_op", "name": "inner", "pid": 1, "tid": 1, "ts": 50, "dur": 20, "args": {}},
    {"ph": "X", "cat": "cpu_op", "name": "other thread", "pid": 1, "tid": 2, "ts": 10, "dur": 50, "args": {}},
    {"ph": "X", "cat": "kernel", "name": "gemm", "pid": 0, "tid": 7, "ts": 10, "dur": 80, "args": {}},
    {"ph": "M", "name": "process_name", "pid": "Spans", "tid": "x", "args": {"name": "y"}},
]


@pytest.mark.parametrize("compressed", [False, True])
def test_own_times_leave_out_what_is_called(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / ("trace.json.gz" if compressed else "trace.json")
    data = json.dumps({"schemaVersion": 1, "traceEvents": EVENTS}).encode()
    path.write_bytes(gzip.compress(data) if compressed else data)
    rows = {row.name: row for row in read(path)}
    assert {name: round(row.seconds * 1e6) for name, row in rows.items()} == {"gemm": 80, "outer": 50, "inner": 50, "other thread": 50}
    assert (rows["inner"].calls, rows["inner"].allocated_bytes, rows["outer"].shapes) == (2, 64, "[[2, 3]]")
    assert (rows["gemm"].kind, rows["gemm"].share, round(rows["inner"].share, 2)) == ("kernel", 1.0, 0.33)


async def test_a_record_of_torch_becomes_a_table_in_a_process_of_its_own(tmp_path: Path) -> None:
    recorder = TorchRecorder(shapes=True, allocations=True)
    recorder.start()
    torch.ones(64, 64) @ torch.ones(64, 32)
    recorder.stop()
    path = tmp_path / "trace.json"
    recorder.write(str(path))
    rows = {row.name: row for row in await read_in_child(path)}
    assert rows["aten::mm"].calls == 1 and "[64, 64], [64, 32]" in rows["aten::mm"].shapes
    assert sum(row.allocated_bytes for row in rows.values()) == 64 * 64 * 4 + 64 * 32 * 4 + 64 * 32 * 4
    assert device_memory() == {} or torch.cuda.is_available()


async def test_a_trace_that_is_none_is_an_error_and_not_an_empty_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="ended with 1"):
        await read_in_child(path)
