"""What the gateway writes into a request's timeline, in both forms of asking."""

from typing import Any

import pytest

from fairlead.core.caller import ANYONE
from fairlead.core.errors import InvalidRequest, NotFound, Shed
from fairlead.core.policy import CacheSettings, DegradeStep, FilterPolicy, ModelPolicy, Price, QueueSettings, TenantPolicy
from fairlead.core.request import Request
from fairlead.core.timeline import EVENTS, Timeline
from tests.gateway.house import House, caller, policies, rows, say, texts, turns

both = pytest.mark.parametrize("form", ["submit", "infer"])
LINE_OF_ONE = QueueSettings(max_in_flight=1)


def traced(request: Request) -> Request:
    request.timeline = Timeline(request.id, "http", 0.0)
    return request


def told(request: Request) -> dict[str, Any]:
    """Event → its details."""
    assert request.timeline is not None
    assert all(name in EVENTS for _, name, _ in request.timeline.events)
    return {name: details for _, name, details in request.timeline.events}


async def end(front: House) -> None:
    while front.chat.running:
        front.chat.running[0].end("yes")
        await turns()


@both
async def test_who_asked_and_how_it_ended(house):
    front = house(policies(double=ModelPolicy(price=Price(per_request=0.5))))
    request = traced(rows(1.0, 2.0, caller=caller(qos_class="batch")))
    await front.answer(request)
    timeline = request.timeline
    assert (timeline.kind, timeline.tenant, timeline.key, timeline.qos_class) == ("infer", "acme", "key-of-acme", "batch")
    assert (timeline.outcome, timeline.reason, timeline.cost) == ("success", "", 0.5)
    assert told(request)["admitted"]["class"] == "batch"
    assert told(request)["batched"].rows == 2


@both
async def test_a_server_that_stays_out_of_the_way_says_as_much_as_is_known(house):
    front = house(books=False)
    request = traced(rows(caller=ANYONE))
    await front.answer(request)
    assert (request.timeline.kind, request.timeline.tenant) == ("infer", "default")
    assert list(told(request)) == ["batched", "computed"]


@both
async def test_one_that_waits_in_line_says_behind_how_many(house):
    front = house(policies(chat=ModelPolicy(queue=LINE_OF_ONE)))
    requests = [traced(say("hello")) for _ in range(3)]
    for request in requests:
        front.ask(request)
        await turns()
    await end(front)
    first, second, third = map(told, requests)
    assert "queued" not in first and "turn" in first
    assert second["queued"] == {"ahead": 0, "in_flight": 1}
    assert third["queued"] == {"ahead": 1, "in_flight": 1}
    events = [name for _, name, _ in requests[2].timeline.events]
    assert events.index("queued") < events.index("turn")
    assert requests[2].timeline.kind == "generate"


@both
async def test_one_that_is_refused_says_why(house):
    front = house(policies(chat=ModelPolicy(queue=QueueSettings(max_in_flight=1, max_requests=0 + 1, max_wait=0.005))))
    front.ask(say("hello"))
    await turns()
    late, unknown, wrong = traced(say("hello")), traced(rows(model="nobody")), traced(rows(qos_class="strange", caller=ANYONE))
    for request, kind, reason in (
        (late, Shed, "queue-timeout"),
        (unknown, NotFound, "not-found"),
        (wrong, InvalidRequest, "invalid-request"),
    ):
        assert isinstance(await front.refusal(request), kind)
        assert (request.timeline.outcome, request.timeline.reason) == ("refused", reason)
        assert told(request)["refused"] == {"reason": reason}
        assert request.timeline.tenant == request.caller.tenant
    await end(front)


@both
async def test_one_whose_client_left_says_so(house):
    front = house(policies(chat=ModelPolicy(queue=LINE_OF_ONE)))
    front.ask(say("hello"))
    await turns()
    request = traced(say("hello"))
    waiting = front.ask(request)
    await turns()
    await waiting.leave()
    assert list(told(request))[-2:] == ["queued", "left"]
    assert request.timeline.outcome == "cancelled"
    await end(front)


@both
async def test_one_whose_answer_was_there_says_how(house):
    front = house(policies(double=ModelPolicy(cache=CacheSettings(mode="deterministic"))))
    first, again = traced(rows(1.0)), traced(rows(1.0))
    await front.answer(first)
    await front.answer(again)
    assert "batched" in told(first) and "reused" not in told(first)
    assert told(again)["reused"] == {"outcome": "hit"} and "batched" not in told(again)


@both
async def test_who_joins_another_has_a_timeline_of_its_own(house):
    front = house(policies(chat=ModelPolicy(cache=CacheSettings(single_flight=True))))
    leader, follower = traced(say("hello")), traced(say("hello"))
    front.ask(leader)
    await turns()
    client = front.ask(follower)
    await turns()
    await end(front)
    await client.end()
    assert told(follower)["reused"] == {"outcome": "joined"} and "reused" not in told(leader)
    assert [request.timeline.outcome for request in (leader, follower)] == ["success", "success"]


@both
async def test_filters_say_what_they_found_and_never_the_text(house):
    front = house(policies(shout=ModelPolicy(filters=FilterPolicy(pii="flag", deny=("bomb",)))))
    seen, blocked = traced(texts("mail me: jo@example.com")), traced(texts("a bomb"))
    await front.answer(seen)
    await front.refusal(blocked)
    assert any("email" in rule for rule in told(seen)["checked"]["flagged"])
    assert blocked.timeline.reason == "filtered"
    assert "bomb" not in repr(blocked.timeline) and "jo@example.com" not in repr(seen.timeline)


@both
async def test_limits_and_being_given_less_are_noted(house):
    line = QueueSettings(max_in_flight=1, degrade=(DegradeStep(wait_above=0.0, max_tokens=2),))
    front = house(policies(chat=ModelPolicy(queue=line)))
    limited = caller(policy=TenantPolicy(limits={"requests_per_day": 100}))
    requests = [traced(say("hello", caller=limited)) for _ in range(4)]
    for number, request in enumerate(requests):
        front.ask(request)
        await turns()
        if number == 2:  # how long one takes is known now
            front.chat.running[0].end("yes")
            await turns()
    await end(front)
    assert told(requests[0])["held"] == {"limits": 1} and "degraded" not in told(requests[0])
    assert told(requests[3])["degraded"] == {"what": "max_tokens=2"}
