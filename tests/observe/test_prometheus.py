"""A real Prometheus reads a real server that got traffic of each kind: every panel of every dashboard asks for what is there."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import httpx2
import pytest
import pytest_asyncio
import structlog

from fairlead.app import Server
from fairlead.backends import fake_engine, fake_painter
from fairlead.backends.table import BACKENDS
from fairlead.control.acts import deployment_row
from fairlead.control.deployments import Deployment
from fairlead.control.registry import Actor, Draft, Registry
from fairlead.control.rollouts import Wish
from fairlead.core.rollout import RegistrySettings, RolloutPolicy, Step
from fairlead.core.settings import Settings, parse_settings
from fairlead.core.versions import Stage
from fairlead.observe.dashboards.boards import DASHBOARDS
from fairlead.observe.fake_nvml import FakeDevice, FakeNvml
from fairlead.observe.table import TABLE
from fairlead.store.registry_rows import Move
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store
from tests.observe.prometheus import Prometheus, prometheus, promtool
from tests.servers import IDENTITY, write_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROOT = Path(__file__).parents[2]
SECONDS = 120.0
ODD = 'odd "name" {a=b} \\ ü'
"""Of a model: anything that a folder may be called."""
CONFIG = """
listen: {port: 0, grpc_port: 0, ops_port: 0}
models: {repositories: ["FOLDER/models"]}
logs: {requests: false}
limits: {drain_timeout: 1}
store: {url: "sqlite:///FOLDER/fairlead.db", flush_seconds: 0.1}
metrics: {triton_names: true, vllm_names: true}
control: {tick_seconds: 0.2}
slos: [{name: answers, target: 0.99}]
gateway:
  models:
    identity: {cache: {mode: deterministic}, price: {per_request: 0.5}}
    process: {limits: {requests_per_day: 30}, price: {per_request: 0.5}}
    chat: {price: {per_million_input_tokens: 1.0, per_million_output_tokens: 2.0}}
"""
CHAT = "backend: fake_engine\nparameters: {step_seconds: 0.01}\nllm: {max_num_seqs: 1}\n"
PAINTER = "backend: fake_painter\nparameters: {num_steps: 3, size: 16}\n"
SLOW = "backend: fake_painter\nparameters: {num_steps: 1000, step_seconds: 1.0, size: 16}\ndiffusion: {max_steps: 1000, max_num_seqs: 1}\n"
QUIET = {
    "fairlead_gateway_retries_total", "fairlead_gateway_fallbacks_total", "fairlead_gateway_hedges_total", "fairlead_job_retries_total",
    "fairlead_auth_failures_total", "fairlead_gateway_abuse_actions_total", "fairlead_usage_failed_writes_total", "fairlead_rollouts_total",
    "fairlead_alerts",
    "fairlead_traces_total",
    "fairlead_shadow_copies_total", "fairlead_webhook_deliveries_total", "fairlead_accepted_tokens_total",
}  # fmt: skip
"""What this traffic gives no cause for: a panel may be empty where it asks for nothing else."""


UNSEEN = {"fairlead_alerts"}
"""What has a series only where something is wrong, beside what is counted."""


class House(NamedTuple):
    server: Server
    prometheus: Prometheus


async def until(there: Callable[[], Any], what: str = "") -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := await asyncio.to_thread(there)):
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.05)
    return found


def prepare(folder: Path) -> Settings:
    """Models of each kind, and one that the registry deploys, of which there is a newer version."""
    models = folder / "models"
    write_model(models, "identity", IDENTITY)
    write_model(models, ODD, IDENTITY)
    write_model(models, "process", IDENTITY, spec="instances: {isolation: process, count: 2}\n")
    for name, spec in {
        "chat": CHAT,
        "painter": PAINTER,
        "slow": SLOW,
    }.items():
        (models / name / "1").mkdir(parents=True)
        (models / name / "1" / "weights").touch()
        (models / name / "model.yaml").write_text(spec)
    settings = parse_settings(CONFIG.replace("FOLDER", str(folder)), "test")
    store = Store.open(settings.store.url)
    registry = Registry(store, RegistrySettings())
    for content in ("one", "two"):
        source = folder / content
        source.mkdir()
        (source / "model.py").write_text(f"{IDENTITY}# {content}\n")
        registry.add(str(source), "fraud", Draft(), Actor("me"))
    audit = AuditRow(time=1.0, actor="me", action="version.stage", subject="fraud@1")
    store.registry.move("fraud", 1, Stage.VALIDATED, "", audit)
    row = deployment_row("fraud", Deployment(champion=1), revision=0, actor="me", reason="", now=1.0)
    store.control.commit(deployments=[row], moves=[Move("fraud", 1, Stage.SERVING)], audits=[audit])
    store.close()
    return settings


def tensor(model: str, value: float = 1.0) -> tuple[str, dict[str, Any]]:
    data = {"name": "input", "shape": [1, 4], "datatype": "FP32", "data": [value] * 4}
    return f"/v2/models/{quote(model)}/infer", {"inputs": [data]}


async def traffic(client: httpx2.AsyncClient) -> None:
    """Of each kind."""
    for number in range(10):
        for model in ("identity", "process", "fraud", ODD):
            path, body = tensor(model, float(number % 3))
            assert (await client.post(path, json=body)).status_code in (200, 429), model
    chat = {"model": "chat", "messages": [{"role": "user", "content": "one two three four"}], "max_tokens": 8}
    answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=chat) for _ in range(3)))  # in a line
    assert {answer.status_code for answer in answers} == {200}
    assert (await client.post("/v1/chat/completions", json=chat | {"stream": True})).status_code == 200
    assert (await client.post("/v1/images/generations", json={"model": "painter", "prompt": "a seven"})).status_code == 200
    job = {"model": "chat", "input": {"messages": chat["messages"]}}
    assert (await client.post("/v1/jobs", json=job)).status_code == 202
    path, body = tensor("nobody")
    assert (await client.post(path, json=body)).status_code == 404


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    folder = tmp_path_factory.mktemp("house")
    for kind in (fake_engine.KIND, fake_painter.KIND):
        BACKENDS[kind.name] = kind
    with structlog.testing.capture_logs():
        server = Server(await asyncio.to_thread(prepare, folder))
        assert server.telemetry.instruments is not None and server.control is not None
        server.telemetry.instruments.devices._find = lambda: FakeNvml(FakeDevice())
        server.telemetry.finished.listeners.append(lambda timelines: [server.metrics.exemplify(each) for each in timelines] and None)
        await server.start()
        policy = RolloutPolicy(steps=(Step(share=0.5, seconds=3600.0, min_requests=100_000),))
        await server.control.rollouts.start(Wish(candidates=("fraud@2",), policy="", inline=policy, reason=""), "me", "")
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.http.port}", timeout=30) as client:
            with prometheus(folder, [f"127.0.0.1:{server.ops.port}"]) as scraper:
                for _ in range(3):  # one runs for ever, the others wait for it
                    slow = {"model": "slow", "input": {"prompt": "a snail"}}
                    assert (await client.post("/v1/jobs", json=slow)).status_code == 202
                asking = asyncio.create_task(_go_on(client))
                stepped = "count_over_time((fairlead_rollout_step > 0)[1m:1s]) > 3"
                await until(lambda: asking.done() or scraper.query(stepped), "the rollout's first step")
                assert not asking.done(), asking.result()
                yield House(server, scraper)
                assert not asking.done(), asking.result()
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        await server.stop()
    for kind in (fake_engine.KIND, fake_painter.KIND):
        del BACKENDS[kind.name]


async def _go_on(client: httpx2.AsyncClient) -> None:
    while True:
        await traffic(client)
        await asyncio.sleep(0.2)


def filled_in(expr: str) -> str:
    """As Grafana does where all is chosen."""
    return re.sub(r'"\$\w+"', '".*"', expr.replace("$__rate_interval", "1m"))


@pytest.mark.parametrize("name", [each.name for each in DASHBOARDS])
async def test_every_query_of_a_dashboard_has_data(house, name):
    (board,) = (each for each in DASHBOARDS if each.name == name)
    empty = []
    for row in board.rows:
        for panel in row.panels:
            for query in panel.queries:
                asked = set(re.findall(r"\b(?:fairlead|process)_\w+?(?=_bucket\b|_sum\b|_count\b|\{|\[|\)| )", query.expr))
                assert asked and asked <= TABLE.keys(), query.expr
                expr = filled_in(query.expr)
                found = await asyncio.to_thread(house.prometheus.query, expr)
                if not found and not asked & QUIET:
                    empty.append((panel.title, expr))
    assert empty == []


async def test_what_a_panels_legend_names_is_a_label_of_its_series(house):
    for board in DASHBOARDS:
        for row in board.rows:
            for panel in row.panels:
                for query in panel.queries:
                    labels = set(re.findall(r"\{\{(\w+)\}\}", query.legend))
                    for series in await asyncio.to_thread(house.prometheus.query, filled_in(query.expr)):
                        # a label without a value is none
                        assert series["metric"].keys() <= labels, (panel.title, query.expr)


async def test_the_values_of_the_variables_are_there(house):
    for label, name in (
        ("model", "fairlead_requests_total"),
        ("version", "fairlead_requests_total"),
        ("tenant", "fairlead_tenant_requests_total"),
    ):
        values = await asyncio.to_thread(house.prometheus.ask, f"label/{label}/values", **{"match[]": name})
        assert values, label
    models = await asyncio.to_thread(house.prometheus.ask, "label/model/values")
    assert {"identity", "process", "chat", "painter", "fraud", ODD} <= set(models)
    assert "nobody" not in models


async def test_prometheus_takes_all_that_the_table_has_with_its_kind_and_unit(house):
    told = await asyncio.to_thread(house.prometheus.ask, "metadata")
    expected = {metric.family: metric.kind for metric in TABLE.values()}
    assert {name: told[name][0]["type"] for name in expected if name in told} == {
        name: kind for name, kind in expected.items() if name in told
    }
    assert set(expected) <= set(told)
    assert told["fairlead_request_seconds"][0]["unit"] == "seconds"


async def test_all_of_the_table_has_series_but_for_what_is_counted_and_did_not_happen(house):
    names = await asyncio.to_thread(house.prometheus.ask, "label/__name__/values")
    missing = {name for name, metric in TABLE.items() if not {name, f"{name}_count"} & set(names)}
    assert {name for name in missing if not TABLE[name].counted} == UNSEEN


async def test_exemplars_reach_prometheus(house):
    def found() -> list[Any]:
        now = time.time()
        query = {"query": "fairlead_request_seconds_bucket", "start": str(now - 600), "end": str(now + 60)}
        series: list[Any] = house.prometheus.ask("query_exemplars", **query)
        return series

    series = await until(found, "an exemplar")
    for each in series:
        for exemplar in each["exemplars"]:
            assert re.fullmatch("[0-9a-f]{32}", exemplar["labels"]["trace_id"])


async def test_requests_are_answered_while_prometheus_scrapes(house):
    """Each second a scrape of all this; the server's own clock says how late its loop came."""
    (up,) = await asyncio.to_thread(house.prometheus.query, "min_over_time(up[1m])")
    assert up["value"][1] == "1"
    (failed,) = await asyncio.to_thread(house.prometheus.query, 'sum(fairlead_requests_total{outcome="failure"})')
    assert failed["value"][1] == "0"


async def test_the_scrape_config_is_one():
    done = await asyncio.to_thread(promtool, "check", "config", ROOT / "deploy" / "prometheus" / "prometheus.yml")
    assert done.returncode == 0, done.stdout + done.stderr


async def test_promtool_finds_nothing_wrong_with_the_text(house):
    text = house.server.metrics.text()[1].decode()
    process = await asyncio.create_subprocess_exec(
        "promtool", "check", "metrics", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate(text.encode())
    ours = [line for line in said.decode().splitlines() if line.startswith("fairlead_")]
    assert process.returncode in (0, 3) and ours == []
