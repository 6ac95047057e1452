"""Texts that a store may choke on: what is asked, noted and looked for reaches SQLite and PostgreSQL as it came, or is refused."""

import shutil
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from tests.api.jobs.served import Studio, studio
from tests.store.postgres import Postgres, private_postgres

pytestmark = pytest.mark.asyncio(loop_scope="module")

ODD = ["a\0b", "\x01\x1f\x7f", "\u202e", "'; DROP TABLE jobs; --", "ünïcödé ☃ 𝔘", "%s ? :x {}"]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with private_postgres() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["sqlite", "postgresql"])
async def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    folder = tmp_path_factory.mktemp("asks")
    url = "" if request.param == "sqlite" else request.getfixturevalue("postgres").new_database()
    async with studio(folder, url=url) as running:
        yield running
    shutil.rmtree(folder)


@pytest.mark.parametrize("text", ODD)
async def test_odd_texts_are_kept_as_they_came_or_refused(home: Studio, text: str) -> None:
    done = await home.ended((await home.submit(input={"prompt": text, "negative_prompt": text}))["id"])
    assert done["status"] == "complete"
    noted = await home.post("/v1/jobs", {"model": "painter", "input": {"prompt": "x"}, "metadata": {"note": text, text: "x"}})
    assert noted.status_code in (202, 400)
    if noted.status_code == 202:
        assert (await home.ended(noted.json()["id"]))["metadata"] == {"note": text, text: "x"}
    for path, body in (
        ("/v1/painter", {"prompt": text}),
        ("/v1/predictions", {"version": "painter", "input": {"prompt": text}}),
        ("/v1/images/generations", {"model": "painter", "prompt": text}),
    ):
        answer = await home.post(path, body)
        assert answer.status_code in (200, 201), answer.text
    (told,) = [each for each in (await home.get("/v1/predictions")).json()["results"][:2] if each["input"]]
    assert told["input"]["prompt"] == text


@pytest.mark.parametrize("text", ["%00", "%01", "%FF", "%E2%98%83", "'--", "a%00b"])
async def test_odd_texts_in_paths_and_queries_find_nothing(home: Studio, text: str) -> None:
    for method, path in (
        ("GET", f"/v1/jobs/{text}"),
        ("POST", f"/v1/jobs/{text}/cancel"),
        ("GET", f"/v1/jobs/{text}/events"),
        ("GET", f"/v1/jobs/{text}/deliveries"),
        ("POST", f"/v1/deliveries/{text}/replay"),
        ("GET", f"/v1/get_result?id={text}"),
        ("GET", f"/v1/predictions/{text}"),
        ("POST", f"/v1/predictions/{text}/cancel"),
        ("GET", f"/v1/models/fairlead/{text}"),
        ("POST", f"/v1/{text}"),
    ):
        answer = await home.ask(method, path, b"{}")
        assert answer.status_code == 404, (path, answer.text)
    listed = await home.get(f"/v1/jobs?model={text}")
    assert (listed.status_code, listed.json()["jobs"]) == (200, [])
    for path in (f"/v1/jobs?before={text}", f"/v1/predictions?cursor={text}"):
        assert (await home.get(path)).status_code in (400, 422)
    for body in ({"model": "painter\0", "input": {}}, {"model": "painter@\0", "input": {"prompt": "x"}}):
        assert (await home.post("/v1/jobs", body)).status_code == 404


async def test_odd_idempotency_keys(home: Studio) -> None:
    body = {"model": "painter", "input": {"prompt": "x"}}
    for key in ("'; DROP TABLE jobs; --", "%00", "é".encode().decode("latin-1")):
        headers = [(b"authorization", f"Bearer {home.key.secret}".encode()), (b"idempotency-key", key.encode("latin-1"))]
        first, again = [await home.http.post("/v1/jobs", json=body, headers=headers) for _ in range(2)]
        if first.status_code == 400:  # not all of Latin 1 can be printed
            assert "`Idempotency-Key`" in first.text
        else:
            assert (first.status_code, first.json()["id"]) == (202, again.json()["id"])
