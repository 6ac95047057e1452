"""What a replica process costs: its start from a warm fork server, and a round trip, with and without shared memory.

python benchmarks/processes.py     Markdown on stdout; run it on a quiet machine
"""

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import uvloop

from fairlead.backends import BACKENDS
from fairlead.core.specs import ModelSpec
from fairlead.runtime.forkserver import ForkServer
from fairlead.runtime.process import ProcessInstance
from fairlead.runtime.slab import SLAB_BYTES

MODEL = """
class Model:
    def infer(self, inputs):
        return {"y": inputs["x"]}
"""
SPEC = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, -1]}], "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, -1]}]}
STARTS, TRIPS = 10, 2000


async def started(folder: Path, forkserver: ForkServer, slab_bytes: int = SLAB_BYTES) -> ProcessInstance:
    spec = msgspec.convert({"name": "echo", **SPEC}, ModelSpec)
    instance = ProcessInstance(spec, folder / "model.py", BACKENDS["python"], 1, forkserver, lambda: None, slab_bytes=slab_bytes)
    await instance.start()
    return instance


async def trip(instance: ProcessInstance, x: np.ndarray) -> tuple[float, float]:
    """(wall, this process's CPU) seconds of one batch there and back."""
    ended: asyncio.Future[object] = asyncio.get_running_loop().create_future()
    wall, cpu = time.perf_counter(), time.process_time()
    instance.run([{"x": x}], None, lambda outputs, error: ended.set_result(error))
    assert await ended is None
    return time.perf_counter() - wall, time.process_time() - cpu


async def main() -> None:
    forkserver = ForkServer("warning")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.py").write_text(MODEL)
        await (await started(folder, forkserver)).close()  # the fork server is warm now
        seconds = []
        for _ in range(STARTS):
            began = time.perf_counter()
            instance = await started(folder, forkserver)
            seconds.append(time.perf_counter() - began)
            await instance.close()
        print(f"start of a Python model from a warm fork server: median {statistics.median(seconds) * 1e3:.0f} ms of {STARTS}\n")
        print("| tensor, there and back | by | median us | this process's CPU us |")
        print("|---|---|--:|--:|")
        for shape in ((1, 16), (1, 150_528)):
            for label, slab_bytes in (("shared memory from 64 KiB", SLAB_BYTES), ("socket only", 0)):
                instance = await started(folder, forkserver, slab_bytes)
                x = np.ones(shape, np.float32)
                times = [await trip(instance, x) for _ in range(TRIPS)][TRIPS // 10 :]
                wall, cpu = (statistics.median(column) * 1e6 for column in zip(*times, strict=True))
                print(f"| {x.nbytes:,} bytes | {label} | {wall:.0f} | {cpu:.0f} |")
                await instance.close()
    await forkserver.close()


if __name__ == "__main__":
    uvloop.run(main())
