"""How each server is started, and where it answers in which encoding."""

import os
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
KSERVE = "http://127.0.0.1:{http}/v2/models/{w}/infer"
GRPC = "http://127.0.0.1:{grpc}/inference.GRPCInferenceService/ModelInfer"
PREDICT = "http://127.0.0.1:{http}/predict"
FAIRLEAD_PYTHON = Path(os.environ.get("FAIRLEAD_PYTHON", HERE.parents[1] / ".venv/bin/python"))


class Peer(NamedTuple):
    """`{w}` is the workload; `{http}`, `{grpc}` and `{metrics}` are free ports."""

    folder: Path
    """Where its programs are."""
    command: str
    urls: dict[str, str]
    """By encoding."""
    environ: dict[str, str] = {}


def peer(env: str, command: str, urls: dict[str, str], **environ: str) -> Peer:
    return Peer(HERE / "envs" / env / "bin", command, urls, environ)


def mlserver(workers: int, batch: int) -> Peer:
    command = f"python -m peers.mlserver_start {{w}} {{http}} {{grpc}} {{metrics}} {workers} {batch}"
    return peer("mlserver", command, {"json": KSERVE, "grpc": GRPC})


V2 = {"json": KSERVE, "bin": KSERVE, "grpc": GRPC}
SERVE = f"fairlead serve {HERE}/models/repository --port {{http}} --grpc-port {{grpc}} --ops-port {{metrics}}"
RAY = "python -m peers.ray_app {http}"

PEERS = {
    "fairlead": Peer(FAIRLEAD_PYTHON.parent, SERVE, V2),  # validation, batching, metrics, access log and request ids on
    "fairlead-thread": Peer(FAIRLEAD_PYTHON.parent, SERVE.replace("repository", "repository-thread"), V2),  # never inline
    "triton": peer("pytriton", "python -m peers.triton_start {w} {http} {grpc} {metrics} 64", V2),
    "pytriton": peer("pytriton", "python -m peers.pytriton_app {w} {http} {grpc} {metrics} 64", V2),
    "mlserver": mlserver(workers=1, batch=64),  # its default process layout, adaptive batching on
    "mlserver-w0": mlserver(workers=0, batch=64),
    "mlserver-nobatch": mlserver(workers=1, batch=0),
    "kserve": peer("kserve", "python -m peers.kserve_app {w} {http} {grpc}", V2),
    "fastapi": peer("fastapi", "uvicorn peers.fastapi_app:app --port {http} --no-access-log", {"native": PREDICT}),
    "bentoml": peer("bentoml", "bentoml serve peers.bentoml_app:Server --host 127.0.0.1 --port {http}", {"native": PREDICT}),
    "litserve": peer("litserve", "python -m peers.litserve_app {w} {http} 64", {"native": PREDICT}),
    "ray": peer("ray", RAY, {"native": "http://127.0.0.1:{http}/"}),
    "ray-fast": peer("ray", RAY, {"native": "http://127.0.0.1:{http}/"}, RAY_SERVE_THROUGHPUT_OPTIMIZED="1"),
}
MAIN = ("fairlead", "triton", "pytriton", "mlserver", "kserve", "fastapi", "bentoml", "litserve", "ray")
"""Without the variants."""
NAMES_PROBABILITIES = {"fairlead", "fairlead-thread", "mlserver", "mlserver-w0", "mlserver-nobatch"}
"""Servers whose XGBoost model answers probabilities only when asked for `predict_proba`."""
