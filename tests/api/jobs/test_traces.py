"""A job, from the request that submitted it to the receiver of its webhook, as one trace."""

from pathlib import Path

from fairlead.core.timeline import parse_traceparent
from fairlead.jobs.fake_receiver import FakeReceiver
from fairlead.observe.tracing.fake_collector import FakeCollector
from tests.api.jobs.served import studio

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"


async def test_a_jobs_submission_computation_and_webhook_are_one_trace(tmp_path: Path) -> None:
    with FakeCollector() as collector:
        extra = f"traces: {{endpoint: '{collector.url}', interval: 0.02}}"
        async with FakeReceiver() as receiver, studio(tmp_path, extra=extra) as place:
            body = {"model": "painter", "input": {"prompt": "a seven"}, "webhook": {"url": receiver.url}}
            answer = await place.post("/v1/jobs", body, traceparent=TRACEPARENT)
            assert answer.status_code == 202, answer.text
            await place.ended(answer.json()["id"])
            await receiver.until(lambda: bool(receiver.received))

    spans = {span.name: span for span in collector.spans if span.trace_id == TRACE}
    door, job, call = spans["POST /v1/jobs"], spans["job painter"], spans["POST"]
    assert (door.parent_id, job.parent_id, call.parent_id) == (CALLER, door.span_id, door.span_id)
    assert (door.kind, job.kind, call.kind) == ("server", "consumer", "client")
    model = spans["generate_content painter"]
    assert model.parent_id == job.span_id
    assert model.attributes["gen_ai.output.type"] == "image"
    assert spans["engine"].parent_id == model.span_id
    [received] = receiver.received
    assert parse_traceparent(received.headers["traceparent"]) == (TRACE, call.span_id, True)
    assert job.attributes["fairlead.job"] == door.attributes["fairlead.job"] == call.attributes["fairlead.job"]


async def test_the_same_idempotency_key_is_the_same_job_whatever_trace_it_comes_with(tmp_path: Path) -> None:
    async with studio(tmp_path) as place:
        body = {"model": "painter", "input": {"prompt": "a seven", "seed": 1}}
        first = await place.post("/v1/jobs", body, idempotency_key="once", traceparent=TRACEPARENT)
        second = await place.post("/v1/jobs", body, idempotency_key="once", traceparent=TRACEPARENT.replace("b7", "c8"))

    assert (first.status_code, second.status_code) in ((202, 202), (202, 200))
    assert first.json()["id"] == second.json()["id"]


async def test_where_nothing_is_traced_receivers_are_told_nothing_of_it(tmp_path: Path) -> None:
    async with FakeReceiver() as receiver, studio(tmp_path) as place:
        body = {"model": "painter", "input": {"prompt": "a seven"}, "webhook": {"url": receiver.url}}
        answer = await place.post("/v1/jobs", body, traceparent=TRACEPARENT)
        await place.ended(answer.json()["id"])
        await receiver.until(lambda: bool(receiver.received))

    assert "traceparent" not in receiver.received[0].headers
