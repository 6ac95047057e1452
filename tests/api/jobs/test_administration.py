"""`/admin/jobs`: what whoever runs the server sees and stops of all tenants' jobs."""

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from fairlead.core.policy import Scope
from tests.api.jobs.served import Studio, studio
from tests.api.keyed import SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

LONG: dict[str, Any] = {"model": "slow", "input": {"prompt": "a long way", "num_steps": 200, "preview_steps": 1}}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    async with studio(tmp_path_factory.mktemp("jobs")) as running:
        yield running


class Operator:
    def __init__(self, home: Studio) -> None:
        key = home.new_key(Scope.ADMIN)
        base, headers = f"http://127.0.0.1:{home.server.ops.port}", {"authorization": f"Bearer {key.secret}"}
        self.key = key
        self.client = httpx2.AsyncClient(base_url=base, headers=headers, timeout=SECONDS)

    async def get(self, path: str) -> Any:
        answer = await self.client.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest_asyncio.fixture(loop_scope="module")
async def operator(home: Studio) -> AsyncIterator[Operator]:
    found = Operator(home)
    async with found.client:
        yield found


async def test_all_tenants_jobs_are_listed_the_newest_first(home: Studio, operator: Operator) -> None:
    first = await home.submit()
    second = (await home.post("/v1/jobs", {"model": "painter", "input": {"prompt": "an eight"}}, key=home.other)).json()
    for job, key in ((first, home.key), (second, home.other)):
        await home.ended(job["id"], key=key)
    page = await operator.get("/admin/jobs")
    assert [(job["id"], job["tenant"]) for job in page["jobs"][:2]] == [(second["id"], "other"), (first["id"], "acme")]
    assert page["jobs"][0]["key"] == home.other.id and page["jobs"][0]["face"] == "jobs" and page["jobs"][0]["result"] is None

    assert [job["id"] for job in (await operator.get("/admin/jobs?tenant=acme&model=painter&status=complete,failed"))["jobs"]] == [
        first["id"]
    ]
    page = await operator.get("/admin/jobs?limit=1")
    assert page["next"] == second["id"]
    assert (await operator.get(f"/admin/jobs?limit=1&before={page['next']}"))["jobs"][0]["id"] == first["id"]

    whole = await operator.get(f"/admin/jobs/{second['id']}")
    assert whole["result"]["pictures"][0]["url"].startswith("/v1/artifacts/")
    assert whole["urls"]["get"] == f"/v1/jobs/{second['id']}"


async def test_any_job_can_be_cancelled_and_that_is_written_down(home: Studio, operator: Operator) -> None:
    job = (await home.post("/v1/jobs", LONG)).json()["id"]
    await home.until(job, "active")
    answer = await operator.client.post(f"/admin/jobs/{job}/cancel")
    assert (answer.status_code, answer.json()["status"], answer.json()["tenant"]) == (200, "aborting", "acme")
    assert (await home.ended(job))["status"] == "aborted"
    (entry,) = (await operator.get(f"/admin/audit?subject={job}"))["entries"]
    assert (entry["action"], entry["actor"], entry["details"]["tenant"]) == ("job.cancel", operator.key.id, "acme")


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/admin/jobs?status=lost", 400, "must be of queued"),
        ("/admin/jobs?before=yesterday", 400, "is none that was given"),
        ("/admin/jobs?limit=0", 400, ""),
        ("/admin/jobs?since=1", 400, "is not known"),
        (f"/admin/jobs/job_{'0' * 32}", 404, "there is no job"),
    ],
)
async def test_what_is_refused(operator: Operator, path: str, status: int, said: str) -> None:
    answer = await operator.client.get(path)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert said in answer.json()["detail"]


async def test_who_may_not_administer_sees_nothing(home: Studio, operator: Operator) -> None:
    answer = await operator.client.get("/admin/jobs", headers={"authorization": f"Bearer {home.key.secret}"})
    assert answer.status_code == 403
