"""OpenAI's images, asked by OpenAI's SDK; forms that no SDK would send; and clients that leave."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from io import BytesIO
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio
from jsonschema import Draft202012Validator
from PIL import Image

from fairlead.core.pictures import metadata_of, read_header
from tests.api.http_fake import Wire
from tests.api.jobs.served import Studio, in_base64, picture, studio
from tests.api.keyed import SECONDS

pytestmark = pytest.mark.asyncio(loop_scope="module")

FILTERS = "  models:\n    painter: {filters: {deny: [forbidden]}}\n"
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def home(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Studio]:
    async with studio(tmp_path_factory.mktemp("openai"), extra=FILTERS) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def client(home: Studio) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key=home.key.secret, base_url=f"{home.url}/v1", max_retries=0, timeout=SECONDS) as sdk:
        yield sdk


def transparent(width: int = 64, height: int = 64) -> bytes:
    return picture(width, height, mode="RGBA", colour=(0, 0, 0, 0))


def refused(answer: httpx2.Response) -> tuple[int, str | None, str | None]:
    """(status, parameter, code)."""
    error = answer.json()["error"]
    assert error["message"] and error["type"]
    return answer.status_code, error["param"], error["code"]


def form(*parts: tuple[str, bytes, bytes], boundary: bytes = b"frontier") -> bytes:
    """(name, file name or b"", content) of each part."""
    body = b""
    for name, file, content in parts:
        more = b'; filename="' + file + b'"\r\nContent-Type: image/png' if file else b""
        body += (
            b"--" + boundary + b'\r\nContent-Disposition: form-data; name="' + name.encode() + b'"' + more + b"\r\n\r\n" + content + b"\r\n"
        )
    return body + b"--" + boundary + b"--\r\n"


FORM = "multipart/form-data; boundary=frontier"


# With the SDK


async def test_pictures_from_a_text(home: Studio, client: openai.AsyncOpenAI) -> None:
    answer = await client.images.generate(
        model="painter", prompt="a seven", n=2, size="128x64", output_format="webp", output_compression=80, extra_body={"seed": 4}
    )
    assert (answer.size, answer.quality, answer.output_format, answer.background) == ("128x64", "high", "webp", "opaque")
    assert answer.data is not None and len(answer.data) == 2
    for seed, each in enumerate(answer.data, 4):
        data = base64.b64decode(each.b64_json or "")
        assert read_header(data, "picture").width == 128 and metadata_of(data)["seed"] == seed == each.model_extra["seed"]  # type: ignore[index]


async def test_pictures_by_url(home: Studio, client: openai.AsyncOpenAI) -> None:
    answer = await client.images.generate(model="painter", prompt="a seven", response_format="url", quality="low")
    assert answer.data is not None and answer.data[0].b64_json is None
    file = await home.http.get(answer.data[0].url or "")
    assert (file.status_code, metadata_of(file.content)["mode"]) == (200, "turbo")


async def test_partial_pictures_come_before_the_picture(client: openai.AsyncOpenAI) -> None:
    events = []
    async with await client.images.generate(
        model="slow", prompt="x", stream=True, partial_images=2, extra_body={"num_steps": 60, "seed": 9}
    ) as stream:
        events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # type: ignore[union-attr]
    assert read_header(base64.b64decode(events[0].b64_json), "partial").format == "jpeg"
    last = events[-1]
    assert last.type == "image_generation.completed" and (last.output_format, last.size, last.usage.total_tokens) == ("png", "64x64", 0)
    assert metadata_of(base64.b64decode(last.b64_json))["seed"] == 9


async def test_an_edit_with_a_mask(client: openai.AsyncOpenAI) -> None:
    answer = await client.images.edit(
        model="painter", image=("a.png", picture(96, 64)), mask=("m.png", transparent(96, 64)), prompt="x", extra_body={"strength": 0.9}
    )
    assert answer.size == "96x64" and answer.data is not None and answer.data[0].b64_json
    several = await client.images.edit(model="painter", image=[("a.png", picture(96, 64))], prompt="x", n=2, size="64x64")
    assert several.size == "64x64" and several.data is not None and len(several.data) == 2


async def test_a_streamed_edit(client: openai.AsyncOpenAI) -> None:
    async with await client.images.edit(
        model="slow", image=("a.png", picture()), prompt="x", stream=True, partial_images=1, extra_body={"num_steps": 40}
    ) as stream:
        kinds = [event.type async for event in stream]
    assert kinds == ["image_edit.partial_image", "image_edit.completed"]


async def test_what_is_refused_or_fails_is_an_error_of_the_sdk(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as blocked:
        await client.images.generate(model="painter", prompt="something forbidden")
    assert (blocked.value.code, blocked.value.param) == ("moderation_blocked", "prompt")
    with pytest.raises(openai.InternalServerError) as failed:
        await client.images.generate(model="painter", prompt="!raise")
    assert failed.value.code == "model_error"
    with pytest.raises(openai.BadRequestError) as streamed:  # before the first event it is an ordinary answer
        async with await client.images.generate(model="painter", prompt="something forbidden", stream=True) as stream:
            [event async for event in stream]
    assert streamed.value.code == "moderation_blocked"
    with pytest.raises(openai.NotFoundError) as hidden:
        await client.images.generate(model="secret", prompt="x")
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.images.generate(model="nobody", prompt="x")
    assert hidden.value.message.replace("secret", "nobody") == unknown.value.message


async def test_the_models_that_make_pictures(home: Studio) -> None:
    models = (await home.get("/v1/images/models")).json()["models"]
    assert [each["name"] for each in models] == ["painter", "slow"]
    assert models[0]["info"]["schedulers"] == ["euler", "ddim"]
    answer = await home.post(GENERATIONS, {"prompt": "x"})
    assert refused(answer) == (400, "model", None) and "painter, slow" in answer.text


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_what_only_it_waited_for(home: Studio, stream: bool) -> None:
    body = {"model": "slow", "prompt": "x", "num_steps": 200, "stream": stream}
    data = json.dumps(body | ({"partial_images": 3} if stream else {})).encode()
    id, before = f"leaves-{stream}", await home.latest()
    connection = Wire(*await asyncio.open_connection("127.0.0.1", home.port))
    head = f"POST {GENERATIONS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {home.key.secret}\r\nx-request-id: {id}\r\n"
    await connection.send(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
    async with asyncio.timeout(SECONDS):
        while (job := await home.latest()) == before:
            await asyncio.sleep(0.01)
    await home.until(job, "active")
    await connection.close()
    ended = await home.ended(job)
    assert (ended["status"], ended["error"]["reason"]) == ("aborted", "cancelled")
    assert [(line["status"], line["error"]) for line in await home.lines(id)] == [(499, "the client left")]


async def test_a_job_that_another_one_cancels_ends_the_wait(home: Studio) -> None:
    before = await home.latest()
    waiting = asyncio.create_task(home.post(GENERATIONS, {"model": "slow", "prompt": "x", "num_steps": 200}))
    async with asyncio.timeout(SECONDS):
        while (job := await home.latest()) == before:
            await asyncio.sleep(0.01)
    await home.post(f"/v1/jobs/{job}/cancel")
    answer = await waiting
    assert answer.status_code == 400 and "cancelled" in answer.text
    assert answer.headers["x-fairlead-job"] == job


# What is refused


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "prompt", "missing_required_parameter"),
        ({"prompt": 1}, "prompt", "invalid_type"),
        ({"prompt": "x" * 32_001}, "prompt", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 11}, "n", "invalid_value"),
        ({"n": "1"}, "n", "invalid_type"),
        ({"size": "65x64"}, "size", None),
        ({"size": "64x4"}, "size", None),
        ({"size": "4096x4096"}, "size", None),
        ({"size": "large"}, "size", "invalid_value"),
        ({"size": "0x64"}, "size", "invalid_value"),
        ({"size": "64x64x64"}, "size", "invalid_value"),
        ({"quality": "medium"}, "quality", "unsupported_value"),
        ({"quality": "best"}, "quality", "invalid_value"),
        ({"response_format": "png"}, "response_format", "invalid_value"),
        ({"output_format": "gif"}, "output_format", "invalid_value"),
        ({"output_compression": 50}, "output_compression", "invalid_value"),
        ({"output_compression": 101, "output_format": "jpeg"}, "output_compression", "invalid_value"),
        ({"background": "transparent"}, "background", "invalid_value"),
        ({"moderation": "low"}, "moderation", "invalid_value"),
        ({"style": "vivid"}, "style", "unsupported_parameter"),
        ({"input_fidelity": "high"}, "input_fidelity", "unsupported_parameter"),
        ({"colour": "red"}, "colour", "unknown_parameter"),
        ({"image": in_base64(picture())}, "image", "unknown_parameter"),
        ({"partial_images": 1}, "partial_images", "invalid_value"),
        ({"partial_images": 4, "stream": True}, "partial_images", "invalid_value"),
        ({"n": 2, "stream": True}, "n", "invalid_value"),
        ({"response_format": "url", "stream": True}, "response_format", "invalid_value"),
        ({"seed": -1}, "seed", "invalid_value"),
        ({"num_steps": 51}, "num_steps", None),
        ({"num_steps": 0}, "num_steps", "invalid_value"),
        ({"guidance": 101.0}, "guidance", None),
        ({"scheduler": "magic"}, "scheduler", None),
        ({"strength": 0.5}, "strength", None),
        ({"loras": [{"name": "nobody"}]}, "loras", None),
        ({"loras": [{"name": "ink", "scale": 9}]}, "loras[0].scale", "invalid_value"),
        ({"model": "chat"}, "model", None),
        ({"model": "identity"}, "model", None),
    ],
)
async def test_a_parameter_that_is_wrong_is_refused_by_name(home: Studio, body: dict[str, Any], param: str, code: str | None) -> None:
    before = await home.latest()
    asked = {"model": "painter", **({} if body == {} else {"prompt": "x"}), **body}
    answer = await home.post(GENERATIONS, asked)
    assert refused(answer) == (400, param, code), answer.text
    assert await home.latest() == before


async def test_bodies_that_are_none(home: Studio) -> None:
    for body in (b"", b"{", b"[" * 100_000, b'{"prompt": "\xff"}', b"[]"):
        assert refused(await home.post(GENERATIONS, body))[0] == 400
    assert refused(await home.post(GENERATIONS, b"x" * (5 << 20)))[0] == 413
    answer = await home.http.post(GENERATIONS, json={"prompt": "x"})
    assert refused(answer)[::2] == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("parts", "param"),
    [
        ([("prompt", b"", b"x")], "image"),
        ([("image", b"", b"text"), ("prompt", b"", b"x")], "image"),
        ([("image", b"a.png", picture())], "prompt"),
        ([("image", b"a.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"), ("prompt", b"", b"x")], "image"),
        ([("image", b"a.png", b"")], "prompt"),
        ([("image", b"a.png", b""), ("prompt", b"", b"x")], "image"),
        ([("image", b"a.png", picture()[:-1]), ("prompt", b"", b"x")], "image"),
        ([("image", b"a.png", picture() + b"<script>"), ("prompt", b"", b"x")], "image"),
        ([("image", b"a.png", picture()), ("image", b"b.png", picture()), ("prompt", b"", b"x")], "image"),
        ([("image[]", b"a.png", picture()), ("image[]", b"b.png", picture()), ("prompt", b"", b"x")], "image"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("prompt", b"", b"y")], "prompt"),
        ([("image", b"a.png", picture()), ("prompt", b"p.txt", b"x")], "prompt"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("mask", b"m.png", picture())], "mask"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("mask", b"m.png", b"nothing")], "mask"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("mask", b"m.png", b"")], "mask"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("colour", b"", b"red")], "colour"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("second", b"a.png", picture())], "second"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("n", b"", b"many")], "n"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("size", b"", b"65x65")], "size"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("strength", b"", b"2")], "strength"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("loras", b"", b"{")], "loras"),
        ([("image", b"a.png", picture()), ("prompt", b"", b"x"), ("loras", b"", b"[" * 50_000)], "loras"),
    ],
)
async def test_a_form_that_is_wrong_is_refused_by_name(home: Studio, parts: list[tuple[str, bytes, bytes]], param: str) -> None:
    before = await home.latest()
    answer = await home.post(EDITS, form(("model", b"", b"painter"), *parts), content_type=FORM)
    assert refused(answer)[:2] == (400, param), answer.text
    assert await home.latest() == before


GOOD = form(("model", b"", b"painter"), ("prompt", b"", b"x"), ("image", b"a.png", picture()))


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/json", b'{"prompt": "x"}'),
        ("", GOOD),
        ("multipart/form-data", GOOD),
        ("multipart/form-data; boundary=", GOOD),
        ("multipart/form-data; boundary=another", GOOD),
        (FORM, b""),
        (FORM, b"no form at all"),
        (FORM, GOOD[: len(GOOD) // 2]),
        (FORM, GOOD.replace(b"Content-Disposition", b"Content-Nothing")),
        (FORM, GOOD.replace(b'name="image"', b'nome="image"')),
        (FORM + "; charset=undefined", GOOD),
        (FORM, form(*[(f"f{n}", b"", b"x") for n in range(41)])),
        (FORM, form(*[(f"f{n}", b"a.png", b"x") for n in range(5)])),
        (FORM, form(("prompt", b"", b"x" * (2 << 20)))),
        (FORM, b"--frontier\r\n" + b"X: " + b"y" * 100_000 + b"\r\n\r\n"),
        (FORM, b"--frontier\r\n" + b"X: y\r\n" * 10_000 + b"\r\n\r\n"),
    ],
)
async def test_a_form_that_cannot_be_read(home: Studio, content_type: str, body: bytes) -> None:
    before = await home.latest()
    answer = await home.post(EDITS, body, content_type=content_type)
    assert refused(answer)[0] == 400, answer.text
    assert await home.latest() == before


async def test_a_large_form_and_a_bomb_in_one(home: Studio) -> None:
    large = form(("prompt", b"", b"x"), ("image", b"a.png", b"x" * (5 << 20)))
    assert refused(await home.post(EDITS, large, content_type=FORM))[0] == 413
    bomb = bytearray(transparent(8, 8))
    bomb[16:24] = (65_000).to_bytes(4) + (65_000).to_bytes(4)
    for name in ("image", "mask"):
        parts = {"model": b"painter", "prompt": b"x", "image": picture(), name: bytes(bomb)}
        body = form(*[(key, b"a.png" if key in ("image", "mask") else b"", value) for key, value in parts.items()])
        answer = await home.post(EDITS, body, content_type=FORM)
        assert refused(answer)[0] == 413 and "65000x65000" in answer.text


async def test_a_mask_is_painted_where_it_is_transparent(home: Studio) -> None:
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    half.paste((0, 0, 0, 0), (0, 0, 32, 64))
    out = BytesIO()
    half.save(out, "PNG")
    body = form(("model", b"", b"painter"), ("prompt", b"", b"x"), ("image", b"a.png", picture()), ("mask", b"m.png", out.getvalue()))
    answer = await home.post(EDITS, body, content_type=FORM)
    assert answer.status_code == 200
    stored = home.server.jobs.store.data(answer.headers["x-fairlead-job"])  # type: ignore[union-attr]
    start = stored.index(b"\x89PNG", stored.index(b"mask"))
    mask = Image.open(BytesIO(stored[start:])).convert("L")
    assert (mask.getpixel((0, 0)), mask.getpixel((63, 63))) == (255, 0)


async def test_what_is_answered_is_as_the_document_says(home: Studio) -> None:
    document = (await home.get("/openapi.json")).json()
    operation = document["paths"][EDITS]["post"]
    body = operation["requestBody"]["content"]
    assert list(body) == ["multipart/form-data"]
    assert {"image", "prompt"} <= set(document["components"]["schemas"]["EditsBody"]["required"])
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    answer = await home.post(EDITS, GOOD, content_type=FORM)
    Draft202012Validator({**schema, "components": document["components"]}).validate(answer.json())
