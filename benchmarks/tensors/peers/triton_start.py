"""The Triton server bundled with pytriton, run by itself with its own Python backend (no pytriton proxy)."""

import os
import shutil
import site
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytriton
from models import COLUMNS, SHAPES

w, http, grpc, metrics, batch = sys.argv[1:]
triton = Path(pytriton.__file__).parent / "tritonserver"
folder = Path(tempfile.mkdtemp(prefix="bench-triton-"))
shutil.copytree(triton / "backends", folder / "backends")
shutil.copy(triton / f"python_backend_stubs/3.{sys.version_info.minor}/triton_python_backend_stub", folder / "backends/python")
(folder / "models" / w / "1").mkdir(parents=True)
shutil.copy(Path(__file__).with_name("triton_model.py"), folder / "models" / w / "1" / "model.py")
(folder / "models" / w / "config.pbtxt").write_text(
    f"""
name: "{w}" backend: "python" max_batch_size: {batch} dynamic_batching {{}} instance_group [{{ count: 1 kind: KIND_CPU }}]
input [{{ name: "input" data_type: TYPE_FP32 dims: {list(SHAPES[w])} }}]
output [{{ name: "output" data_type: TYPE_FP32 dims: [{COLUMNS[w]}] }}]
"""
)
packages = site.getsitepackages()[0]
os.environ["LD_LIBRARY_PATH"] = f"{sysconfig.get_config_var('LIBDIR')}:{packages}/nvidia_pytriton.libs"
os.environ["PYTHONPATH"] += f":{packages}"
options = {
    "model-repository": folder / "models",
    "backend-directory": folder / "backends",
    "http-address": "127.0.0.1",
    "http-port": http,
    "grpc-address": "127.0.0.1",
    "grpc-port": grpc,
    "metrics-port": metrics,
    "allow-gpu-metrics": "false",
}
server = str(triton / "bin" / "tritonserver")
os.execv(server, [server, *(f"--{k}={v}" for k, v in options.items())])
