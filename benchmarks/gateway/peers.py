"""The gateways that are compared: how each is set up, started and asked. All know one model, `mock`, behind one upstream."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
FAIRLEAD = os.environ.get("FAIRLEAD_PYTHON", str(HERE.parent.parent / ".venv/bin/python"))
LITELLM = HERE / "envs/litellm/bin"
KEY = "sk-bench-0123456789"


class Start(NamedTuple):
    command: list[str]
    url: str
    key: str
    environ: dict[str, str] = {}


class Peer(NamedTuple):
    name: str
    start: Callable[[Path, int, str], Start]
    """Of a folder for its files, a port and the upstream's URL."""
    settings: str
    """What it was told to do beside passing on, for the reader."""
    installed: Callable[[], bool] = lambda: True


def fairlead(folder: Path, port: int, upstream: str) -> Start:
    """Keys, limits on the tenant and the model, a queue, prices and usage records, metrics and the access log."""
    config = folder / "fairlead.yaml"
    config.write_text(f"""\
listen: {{port: {port}, grpc_port: 0, ops_port: 0}}
auth: {{required: true}}
store: {{url: "sqlite:///{folder}/store.db"}}
gateway:
  tenants:
    bench:
      limits: {{requests_per_minute: 1000000000, tokens_per_minute: 1000000000000, money_per_month: 1000000000, concurrent: 10000}}
  models:
    mock:
      upstreams: [{{url: "{upstream}", key: {KEY}, max_in_flight: 1024}}]
      limits: {{requests_per_minute: 1000000000}}
      price: {{per_million_input_tokens: 1.0, per_million_output_tokens: 2.0}}
      queue: {{max_in_flight: 1024, max_requests: 4096}}
""")
    ask = [FAIRLEAD, "-m", "fairlead"]
    made = ""
    for words in (["tenants", "create", "bench"], ["keys", "create", "--tenant", "bench"]):
        made = subprocess.run([*ask, *words, "--config", config, "--json"], check=True, stdout=subprocess.PIPE, text=True).stdout
    command = [*ask, "serve", "--config", str(config), "--log-format", "json"]
    return Start(command, f"http://127.0.0.1:{port}", json.loads(made)["secret"])


def litellm(folder: Path, port: int, upstream: str) -> Start:
    """The master key: keys of its own, their limits and budgets need a database. Its access log is on, as it comes."""
    config = folder / "config.yaml"
    config.write_text(f"""\
model_list:
  - model_name: mock
    litellm_params: {{model: openai/mock, api_base: "{upstream}/v1", api_key: {KEY}}}
general_settings: {{master_key: {KEY}}}
""")
    command = [str(LITELLM / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    # without it, it fetches its table of prices from the internet at the start
    environ = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "NO_DOCS": "True"}
    return Start(command, f"http://127.0.0.1:{port}", KEY, environ)


def direct(folder: Path, port: int, upstream: str) -> Start:
    """The upstream itself: what the load and the machine cost."""
    return Start([sys.executable, "-c", "import time; time.sleep(1e9)"], upstream, KEY)


PEERS = {
    peer.name: peer
    for peer in (
        Peer("direct", direct, "no gateway"),
        Peer("fairlead", fairlead, "key, limits, queue, prices, usage records, metrics, access log"),
        Peer("litellm", litellm, "master key, access log", (LITELLM / "litellm").exists),
    )
}
