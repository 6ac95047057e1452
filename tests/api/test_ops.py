"""The operations port: what Prometheus and a kubelet ask."""

from contextlib import asynccontextmanager

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fairlead.api.http_server import HttpServer
from fairlead.api.ops import ops_app
from fairlead.observe.finished import Finished
from fairlead.observe.metrics import Metrics
from fairlead.runtime.repository import ModelRepository, RepositorySettings


@asynccontextmanager
async def port():
    """(a client of the operations port, the repository behind it), before anything is loaded."""
    metrics = Metrics()
    repository = ModelRepository(RepositorySettings(sources=()), metrics)
    server = HttpServer(repository, ops_app(repository, metrics.scrape), Finished())
    await server.listen(port=0)
    try:
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
            yield client, repository
    finally:
        await server.drain(1.0)


async def test_health_follows_the_server_through_its_life():
    async with port() as (client, repository):
        starting = await client.get("/healthz/ready")
        assert (starting.status_code, starting.json()) == (503, {"ready": False, "error": "Server is not ready"})
        assert (await client.get("/healthz/live")).json() == {"live": True}

        await repository.start()
        assert (await client.get("/healthz/ready")).json() == {"ready": True}
        working = await client.get("/healthz")
        assert (working.status_code, working.json()) == (200, {"live": True, "ready": True})

        await repository.stop()
        stopping = await client.get("/healthz")
        assert (stopping.status_code, stopping.json()) == (503, {"live": True, "ready": False, "error": "Server exiting"})
        assert (await client.get("/healthz/live")).status_code == 200


async def test_a_kubelet_may_ask_with_head():
    async with port() as (client, repository):
        assert (await client.head("/healthz/ready")).status_code == 503
        await repository.start()
        answer = await client.head("/healthz/ready")
        assert (answer.status_code, answer.content) == (200, b"")


async def test_prometheus_reads_the_metrics():
    async with port() as (client, repository):
        repository.metrics.loads["iris", "success"] += 1
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain; version=")
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        (sample,) = families["fairlead_model_loads"].samples
        assert (sample.labels, sample.value) == ({"model": "iris", "outcome": "success"}, 1.0)


async def test_open_metrics_are_there_for_who_asks():
    async with port() as (client, _):
        answer = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert answer.text.endswith("# EOF\n")


@pytest.mark.parametrize(
    ("method", "path", "status", "error"),
    [("GET", "/v2", 404, "Not Found"), ("GET", "/metrics/", 404, "Not Found"), ("POST", "/metrics", 405, "Method Not Allowed")],
)
async def test_what_is_not_there_is_refused_in_json(method, path, status, error):
    async with port() as (client, _):
        answer = await client.request(method, path)
        assert (answer.status_code, answer.json()) == (status, {"error": error})


async def test_a_failure_inside_is_an_answer_without_its_secrets():
    async def failing(accept: str) -> tuple[str, bytes]:
        raise RuntimeError("the password is swordfish")

    repository = ModelRepository(RepositorySettings(sources=()), Metrics())
    transport = httpx2.ASGITransport(ops_app(repository, failing))
    async with httpx2.AsyncClient(transport=transport, base_url="http://ops") as client:
        answer = await client.get("/metrics")
    assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})
