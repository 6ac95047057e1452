"""What the core alone takes: install size, import time, idle memory of a server without models; prints one JSON line.

Installs the project into a fresh environment of its own, envs/core, without any extra (base environment; uv where UV says).
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from statistics import median

from measure import Tree
from registry import HERE
from run import free_port

ROOT = HERE.parents[1]
CORE = HERE / "envs/core"
INSTALLERS = {"pip", "setuptools", "wheel"}
IMPORT = "import time; t = time.perf_counter(); import fairlead.app, fairlead.cli.serve; print(time.perf_counter() - t)"
READY_SECONDS = 30


def install() -> float:
    """Bytes of site-packages, byte code included, the installer itself left out; as MB."""
    shutil.rmtree(CORE, ignore_errors=True)
    if uv := os.environ.get("UV"):
        subprocess.run([uv, "venv", "-q", "-p", sys.executable, CORE], check=True)
        subprocess.run([uv, "pip", "install", "-q", "--compile-bytecode", "-p", CORE / "bin/python", ROOT], check=True)
    else:
        subprocess.run([sys.executable, "-m", "venv", CORE], check=True)
        subprocess.run([CORE / "bin/python", "-m", "pip", "install", "-q", ROOT], check=True)
    packages = next(CORE.glob("lib/python*/site-packages"))
    kept = [entry for entry in packages.iterdir() if entry.name.split("-")[0] not in INSTALLERS]
    files = [file for entry in kept for file in (entry.rglob("*") if entry.is_dir() else [entry]) if file.is_file()]
    return sum(file.stat().st_size for file in files) / 1e6


def import_seconds() -> float:
    runs = [subprocess.run([CORE / "bin/python", "-c", IMPORT], capture_output=True, text=True, check=True).stdout for _ in range(6)]
    return median(float(text) for text in runs[1:])  # the first reads the files from the disk


def idle_mb() -> float:
    """Peak resident memory of the process tree, two seconds after it is ready."""
    tree, port = Tree(), free_port()
    with tempfile.TemporaryDirectory() as empty:
        ports = ["--port", str(port), "--grpc-port", str(free_port()), "--ops-port", str(free_port())]
        command = [CORE / "bin/fairlead", "serve", empty, "--control", "explicit", *ports]
        server = subprocess.Popen(command, env=os.environ | tree.env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until_ready(port, server)
            time.sleep(2)
            return tree.memory_mib()[0] * 1.048576
        finally:
            tree.stop()


def wait_until_ready(port: int, server: subprocess.Popen) -> None:
    until = time.monotonic() + READY_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until or server.poll() is not None:
                raise SystemExit(f"the core's server does not become ready: {error}") from None
            time.sleep(0.1)


if __name__ == "__main__":
    size = install()
    print(
        json.dumps(
            {"kind": "footprint", "install_mb": round(size, 1), "import_s": round(import_seconds(), 3), "idle_mb": round(idle_mb(), 1)}
        )
    )
