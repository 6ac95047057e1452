"""Responses that are kept: OpenAI's own SDK against servers that share a store, and engines in processes of their own."""

import asyncio
import json
import threading
import time
from contextlib import suppress
from typing import Any

import httpx2
import openai
import pytest
import pytest_asyncio
from msgspec import structs
from openai.types.responses import ResponseItemList
from pydantic import BaseModel

from fairlead.core.errors import Unavailable
from fairlead.core.policy import ResponseSettings
from fairlead.store.responses import ResponseRow, ResponseStore
from tests.api.openai.responses_served import SECONDS, client_of, keeping, posted

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOOL = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}, "strict": False}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("responses")
    specs = {"talker": "llm: {max_model_len: 256}", "slow": "parameters: {step_seconds: 0.005, max_model_len: 100000}"}
    async with keeping(folder / "models", f"sqlite:///{folder}/fairlead.db", **specs) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def url(place):
    return await place.add()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(url):
    async with client_of(url) as client:
        yield client


async def until(condition: Any) -> Any:
    """What it comes to in the end."""
    async with asyncio.timeout(SECONDS):
        while not (found := await condition()):
            await asyncio.sleep(0.02)
        return found


async def missing(asked: Any) -> str:
    """The message of a 404."""
    with pytest.raises(openai.NotFoundError) as error:
        await asked
    assert error.value.body["type"] == "invalid_request_error"
    return error.value.message


# Kept, and gone on from


async def test_an_answer_can_be_asked_for_again(client):
    answer = await client.responses.create(model="talker", input="to be or not to be", metadata={"act": "3"})
    assert (answer.output_text, answer.status, answer.store) == ("to be or not to be", "completed", True)
    again = await client.responses.retrieve(answer.id)
    assert again.to_dict() == answer.to_dict()
    assert again.metadata == {"act": "3"}


async def test_a_streamed_one_too_and_no_sooner_is_it_complete_than_it_is_kept(client):
    async with client.responses.stream(model="talker", input="!reason hm !answer to be") as stream:
        async for event in stream:
            if event.type == "response.completed":
                kept = await client.responses.retrieve(event.response.id)
                assert [item.id for item in kept.output] == [item.id for item in event.response.output]
                break
        else:
            raise AssertionError
    assert (kept.status, [item.type for item in kept.output]) == ("completed", ["reasoning", "message"])


async def test_a_conversation_goes_on(client):
    first = await client.responses.create(model="talker", input="now !call add {}", tools=[TOOL], instructions="Be brief.")
    (called,) = [item for item in first.output if item.type == "function_call"]
    output = {"type": "function_call_output", "call_id": called.call_id, "output": "forty two"}
    second = await client.responses.create(model="talker", input=[output], previous_response_id=first.id)
    assert (second.output_text, second.previous_response_id, second.instructions) == ("forty two", first.id, None)
    third = await client.responses.create(model="talker", input="thanks", previous_response_id=second.id)
    items = [item async for item in client.responses.input_items.list(third.id, order="asc", limit=2)]
    assert [item.type for item in items] == ["message", "message", "function_call", "function_call_output", "message", "message"]
    assert items[2].id == called.id and items[4].id == second.output[0].id
    assert third.usage.input_tokens > second.usage.input_tokens > 1


async def test_how_long_a_conversation_is(client):
    asked = {"model": "talker", "input": "to be or not to be", "instructions": "Be brief.", "tools": [TOOL]}
    first = await client.responses.create(**asked, include=["file_search_call.results"])
    counted = await client.responses.input_tokens.count(**asked)
    assert (counted.object, counted.input_tokens) == ("response.input_tokens", first.usage.input_tokens)
    more = {"model": "talker", "input": "that is the question", "previous_response_id": first.id}
    second = await client.responses.create(**more)
    assert (await client.responses.input_tokens.count(**more)).input_tokens == second.usage.input_tokens
    only = await client.responses.input_tokens.count(model="talker", previous_response_id=first.id)
    assert 0 < only.input_tokens < second.usage.input_tokens
    for wrong, param in (({}, "input"), ({"input": "x", "truncation": "auto"}, "truncation"), ({"input": "x", "stream": True}, "stream")):
        with pytest.raises(openai.BadRequestError) as error:
            await client.responses.input_tokens.with_raw_response.count(model="talker", extra_body=wrong)
        assert error.value.param == param


async def test_input_items_come_in_pages(client):
    answer = await client.responses.create(model="talker", input=[{"role": "user", "content": f"line {n}"} for n in range(5)])
    page = await client.responses.input_items.list(answer.id, limit=2)
    ResponseItemList.model_validate(page.to_dict())
    texts = [item.content[0].text async for item in client.responses.input_items.list(answer.id, limit=2)]
    assert ([item.content[0].text for item in page.data], page.has_more) == (["line 4", "line 3"], True)
    assert texts == [f"line {n}" for n in (4, 3, 2, 1, 0)]
    rest = await client.responses.input_items.list(answer.id, after=page.data[-1].id, order="desc", limit=100)
    assert (len(rest.data), rest.has_more) == (3, False)
    for wrong in ({"limit": 0}, {"limit": 101}, {"after": "msg_0"}, {"order": "up"}, {"include": ["x"]}):
        with pytest.raises(openai.BadRequestError) as error:
            await client.responses.input_items.list(answer.id, **wrong)
        assert error.value.param in (*wrong, "include[]")


async def test_an_item_stands_for_itself_by_its_id(client):
    first = await client.responses.create(model="talker", input="!reason hm !answer to be")
    references = [{"type": "item_reference", "id": item.id} for item in first.output]
    items = [{"role": "user", "content": "to be"}, *references, {"role": "user", "content": "or not"}]
    second = await client.responses.create(model="talker", input=items)
    told = [item async for item in client.responses.input_items.list(second.id, order="asc")]
    assert [item.to_dict() for item in told[1:3]] == [item.to_dict() for item in first.output]
    with pytest.raises(openai.BadRequestError) as error:
        await client.responses.create(model="talker", input=[*references, references[0]])
    assert error.value.param == "input[2].id"


async def test_what_is_not_to_be_kept_is_not(client, place):
    answer = await client.responses.create(model="talker", input="psst", store=False)
    assert (answer.output_text, answer.store) == ("psst", False)
    assert "not found" in await missing(client.responses.retrieve(answer.id))
    with pytest.raises(openai.BadRequestError) as error:
        await client.responses.create(model="talker", input="x", previous_response_id=answer.id)
    assert (error.value.param, error.value.code) == ("previous_response_id", "previous_response_not_found")
    with pytest.raises(openai.BadRequestError) as error:
        await client.responses.create(model="talker", input=[{"type": "item_reference", "id": answer.output[0].id}])
    assert (error.value.param, error.value.code) == ("input[0].id", "item_not_found")


async def test_a_parsed_answer(client):
    class Sum(BaseModel):
        total: int

    answer = await client.responses.parse(model="talker", input='{"total": 3}', text_format=Sum)
    assert answer.output_parsed == Sum(total=3)


async def test_a_deleted_one_is_gone_and_so_is_what_went_on_from_it(client):
    first = await client.responses.create(model="talker", input="one")
    second = await client.responses.create(model="talker", input="two", previous_response_id=first.id)
    await client.responses.delete(first.id)
    for asked in (client.responses.retrieve(first.id), client.responses.delete(first.id), client.responses.cancel(first.id)):
        await missing(asked)
    assert (await client.responses.retrieve(second.id)).output_text == "two"
    with pytest.raises(openai.BadRequestError) as error:
        await client.responses.create(model="talker", input="three", previous_response_id=second.id)
    assert first.id in error.value.message


async def test_tenants_know_nothing_of_each_other(client, url):
    mine = await client.responses.create(model="talker", input="secret")
    async with client_of(url, "other") as other:
        for asked in (
            other.responses.retrieve(mine.id),
            other.responses.delete(mine.id),
            other.responses.cancel(mine.id),
            other.responses.input_items.list(mine.id),
        ):
            await missing(asked)
        with pytest.raises(openai.BadRequestError):
            await other.responses.create(model="talker", input="x", previous_response_id=mine.id)
        with pytest.raises(openai.BadRequestError):
            await other.responses.create(model="talker", input=[{"type": "item_reference", "id": mine.output[0].id}])
    assert (await client.responses.retrieve(mine.id)).output_text == "secret"


async def test_what_is_computed_for_one_tenant_is_not_there_for_another(client, url):
    mine = await client.responses.create(model="slow", input="!forever on and on", background=True)
    async with client_of(url, "other") as other:
        for asked in (other.responses.retrieve(mine.id), other.responses.delete(mine.id), other.responses.cancel(mine.id)):
            await missing(asked)
    assert (await client.responses.cancel(mine.id)).status == "cancelled"


@pytest.mark.parametrize("kind", [["message"], {"a": 1}, 5, True])
async def test_an_item_of_no_type(url, kind):
    status, error = await posted(url, {"model": "talker", "input": [{"type": kind, "role": "user", "content": "x"}]})
    assert (status, error["error"]["param"]) == (400, "input[0].type")


@pytest.mark.parametrize("id", ["resp_0", "%00", "resp_%ff", "a" * 3000])
async def test_ids_that_nobody_gave(url, id):
    async with httpx2.AsyncClient(timeout=SECONDS) as client:
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items")):
            answer = await client.request(method, f"{url}/responses/{id}{path}", headers={"authorization": "Bearer acme"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (404, "invalid_request_error")


# In the background


async def test_in_the_background(client):
    answer = await client.responses.create(model="talker", input="to be", background=True)
    assert (answer.status, answer.background, answer.output) == ("queued", True, [])

    async def ended() -> Any:
        now = await client.responses.retrieve(answer.id)
        return now if now.status not in ("queued", "in_progress") else None

    done = await until(ended)
    assert (done.status, done.output_text, done.usage.output_tokens) == ("completed", "to be", 2)
    assert (await client.responses.cancel(answer.id)).status == "completed"


async def test_what_goes_wrong_in_the_background_is_told_by_the_answer(client):
    answer = await client.responses.create(model="talker", input="word " * 300, background=True)

    async def failed() -> Any:
        now = await client.responses.retrieve(answer.id)
        return now if now.status == "failed" else None

    done = await until(failed)
    assert done.error.code == "context_length_exceeded"


async def test_a_stream_in_the_background_is_read_again_from_anywhere(client, place):
    seen = []
    stream = await client.responses.create(model="slow", input="one two three four five six", background=True, stream=True)
    async with stream:
        async for event in stream:
            seen.append(event)
            if event.type == "response.output_text.delta":
                break  # the client leaves, the answer goes on
    assert [event.type for event in seen[:3]] == ["response.created", "response.queued", "response.in_progress"]
    id = seen[0].response.id
    rest = [event async for event in await client.responses.retrieve(id, stream=True, starting_after=seen[-1].sequence_number)]
    numbers = [event.sequence_number for event in (*seen, *rest)]
    assert (numbers, rest[-1].type) == (list(range(len(numbers))), "response.completed")
    again = [event async for event in await client.responses.retrieve(id, stream=True)]
    assert [event.to_dict() for event in again] == [event.to_dict() for event in (*seen, *rest)]
    assert [event async for event in await client.responses.retrieve(id, stream=True, starting_after=numbers[-1])] == []
    plain = await client.responses.create(model="talker", input="x")
    with pytest.raises(openai.BadRequestError) as error:
        await client.responses.retrieve(plain.id, stream=True)
    assert error.value.param == "stream"


async def test_one_in_the_background_is_cancelled(client):
    answer = await client.responses.create(model="slow", input="!forever on and on", background=True)
    stopped = await client.responses.cancel(answer.id)
    assert (stopped.status, stopped.id) == ("cancelled", answer.id)
    assert (await client.responses.cancel(answer.id)).status == "cancelled"
    assert (await client.responses.retrieve(answer.id)).status == "cancelled"


async def test_one_that_streams_is_cancelled_by_its_id(client):
    stream = await client.responses.create(model="slow", input="!forever on and on", stream=True)
    first = await anext(aiter(stream))
    stopped, events = await asyncio.gather(client.responses.cancel(first.response.id), _rest(stream))
    assert (events[-1].type, events[-1].response.status) == ("response.incomplete", "cancelled")
    assert stopped.to_dict() == events[-1].response.to_dict()
    assert (await client.responses.retrieve(first.response.id)).status == "cancelled"


async def _rest(stream: Any) -> list[Any]:
    async with stream:
        return [event async for event in stream]


async def test_one_that_is_complete_cannot_be_cancelled(client):
    answer = await client.responses.create(model="talker", input="x")
    with pytest.raises(openai.BadRequestError) as error:
        await client.responses.cancel(answer.id)
    assert "synchronous" in error.value.message


async def test_a_client_that_leaves_its_stream_cancels_it(client, place):
    stream = await client.responses.create(model="slow", input="!forever on and on", stream=True)
    id = (await anext(aiter(stream))).response.id
    await stream.close()

    async def cancelled() -> bool:
        row = await asyncio.to_thread(place.store.responses.get, id, "acme")
        return row is not None and row.status == "cancelled"

    await until(cancelled)
    assert (await client.responses.retrieve(id)).status == "cancelled"


async def test_one_that_is_deleted_while_it_is_computed_is_stopped(client, place):
    answer = await client.responses.create(model="slow", input="!forever on and on", background=True)
    await client.responses.delete(answer.id)

    async def gone() -> bool:
        return not any(answer.id in kept.running for kept in place.kepts)

    await until(gone)
    await missing(client.responses.retrieve(answer.id))


class SlowToEnd(ResponseStore):
    """Writes no end before it is let."""

    def __init__(self, place: Any) -> None:
        super().__init__(place.store.responses._transactions, place.store.responses._sql)
        self.asked, self.let = threading.Event(), threading.Event()

    def end(self, *args: Any, **more: Any) -> bool:
        self.asked.set()
        assert self.let.wait(SECONDS)
        return super().end(*args, **more)


async def test_nobody_sees_an_end_that_is_not_written(place):
    async with client_of(await place.add(), "slow-to-end") as client:
        kept = place.kepts[-1]
        store = kept.store = SlowToEnd(place)
        answer = await client.responses.create(model="talker", input="x", background=True)
        assert await asyncio.to_thread(store.asked.wait, SECONDS)
        asking = asyncio.create_task(kept.get(answer.id, "slow-to-end"))
        for _ in range(3):
            await asyncio.sleep(0)
        try:
            assert not asking.done()
        finally:
            store.let.set()
        assert (await asking).status == "completed"
        assert (await client.responses.create(model="talker", input="y", previous_response_id=answer.id)).status == "completed"


class Undeleting(ResponseStore):
    def delete(self, id: str, tenant: str) -> bool:
        raise Unavailable("the store does not answer")


async def test_one_that_cannot_be_removed_takes_no_room_for_ever(place):
    async with client_of(await place.add(ResponseSettings(max_bytes=1200, tenant_background=1)), "undeleting") as client:
        kept = place.kepts[-1]
        kept.store = Undeleting(place.store.responses._transactions, place.store.responses._sql)
        await client.responses.create(model="slow", input="word " * 150, background=True)

        async def over() -> bool:
            return not kept.running

        await until(over)


# Several servers, and none


async def test_one_server_cancels_what_another_computes(client, place):
    there = place.kepts[0]
    async with client_of(await place.add()) as elsewhere:
        answer = await client.responses.create(model="slow", input="!forever on and on", background=True)

        async def begun() -> bool:
            return (await elsewhere.responses.retrieve(answer.id)).status == "in_progress"

        await until(begun)
        cancelling = asyncio.create_task(elsewhere.responses.cancel(answer.id))
        while not cancelling.done():
            await there.look()
            await asyncio.sleep(0.02)
        assert (await cancelling).status == "cancelled"
        with suppress(openai.NotFoundError):
            await elsewhere.responses.delete(answer.id)


async def test_what_a_server_left_when_it_died_has_failed(client, place):
    answer = await client.responses.create(model="talker", input="to be")
    row = await asyncio.to_thread(place.store.responses.get, answer.id, "acme")
    body = json.dumps({**json.loads(row.body), "status": "in_progress", "output": [], "completed_at": None}).encode()
    left = structs.replace(
        row,
        id="resp_left",
        status="in_progress",
        ended=None,
        server="dead",
        lease_until=time.time() - 1.0,
        body=body.replace(row.id.encode(), b"resp_left"),
    )
    await asyncio.to_thread(place.store.responses.add, left, (), tenant_bytes=1 << 30)
    found = await client.responses.retrieve("resp_left")
    assert (found.status, found.error.code) == ("failed", "server_error")
    await place.kepts[0].look()
    swept = await asyncio.to_thread(place.store.responses.get, "resp_left", "acme")
    assert isinstance(swept, ResponseRow) and (swept.status, swept.ended is not None) == ("failed", True)
    assert (await client.responses.retrieve("resp_left")).to_dict() == found.to_dict()


async def test_a_server_that_stops_ends_what_it_computes(place):
    async with client_of(await place.add()) as client:
        kept = place.kepts[-1]
        answer = await client.responses.create(model="slow", input="!forever on and on", background=True)
        await kept.stop(0.0)
        stopped = await client.responses.retrieve(answer.id)
    assert (stopped.status, stopped.error.message) == ("failed", "the server stopped")


async def test_bounds(place):
    settings = ResponseSettings(max_bytes=2500, max_context_bytes=3000, tenant_background=1)
    async with client_of(await place.add(settings), "small") as client:
        large = "word " * 550
        with pytest.raises(openai.APIStatusError) as error:
            await client.responses.create(model="slow", input=large, store=True)
        assert error.value.status_code == 413
        answer = await client.responses.create(model="slow", input=large, max_output_tokens=1)
        assert answer.store is False
        grown = await client.responses.create(model="slow", input="word " * 200)
        assert (grown.store, grown.status) == (False, "completed")
        await missing(client.responses.retrieve(grown.id))
        first = await client.responses.create(model="slow", input="word " * 80, max_output_tokens=1)
        second = await client.responses.create(model="slow", input="word " * 80, max_output_tokens=1, previous_response_id=first.id)
        with pytest.raises(openai.BadRequestError) as error:
            await client.responses.create(model="slow", input="x", previous_response_id=second.id)
        assert error.value.param == "previous_response_id"
        running = await client.responses.create(model="slow", input="!forever on and on", background=True)
        with pytest.raises(openai.RateLimitError):
            await client.responses.create(model="slow", input="x", background=True)
        await client.responses.cancel(running.id)


async def test_what_is_too_old_is_removed(place):
    async with client_of(await place.add(ResponseSettings(retention_days=1e-9))) as client:
        answer = await client.responses.create(model="talker", input="x")
        await place.kepts[-1].look()
        await missing(client.responses.retrieve(answer.id))


async def test_a_server_that_keeps_nothing_says_so(place):
    url = await place.add(ResponseSettings(omit_tools=("web_search",)), keep=False)
    async with client_of(url) as client:
        answer = await client.responses.create(model="talker", input="x", tools=[{"type": "web_search"}, TOOL])
        assert (answer.store, [tool.type for tool in answer.tools]) == (False, ["function"])
        await missing(client.responses.retrieve(answer.id))
    for wrong in ({"store": True}, {"background": True}, {"previous_response_id": answer.id}):
        status, error = await posted(url, {"model": "talker", "input": "x", **wrong})
        assert (status, error["error"]["param"]) == (400, next(iter(wrong)))


async def test_background_needs_to_be_kept(url):
    status, error = await posted(url, {"model": "talker", "input": "x", "background": True, "store": False})
    assert (status, error["error"]["param"]) == (400, "background")
    status, error = await posted(url, {"model": "talker", "input": [], "background": True})
    assert status == 400


async def test_retrieving_takes_no_other_parameters(client, url):
    answer = await client.responses.create(model="talker", input="x")
    async with httpx2.AsyncClient(timeout=SECONDS) as http:
        for query in ("nonsense=1", "starting_after=1", "stream=true&starting_after=x", "stream=banana", "stream=true&starting_after=-1"):
            got = await http.get(f"{url}/responses/{answer.id}?{query}", headers={"authorization": "Bearer acme"})
            assert (got.status_code, got.json()["error"]["type"]) == (400, "invalid_request_error")
