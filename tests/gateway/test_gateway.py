"""The path of a request from its door to its record, in both forms of asking: stories over real parts.

What must hold whatever happens (no hold, turn, flight or task is left, one record of each request) is checked after every one
of them: see `House.check`.
"""

import asyncio
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from structlog.testing import capture_logs

from fairlead.core.caller import ANYONE, Caller
from fairlead.core.errors import (
    Filtered,
    Forbidden,
    InvalidRequest,
    LimitExceeded,
    ModelError,
    NotFound,
    ReplicaDied,
    Shed,
    ShuttingDown,
    Unauthenticated,
    Unavailable,
    Unsupported,
)
from fairlead.core.generation import Generate, Usage
from fairlead.core.policy import (
    AbuseSettings,
    CacheSettings,
    DegradeStep,
    FilterPolicy,
    GatewaySettings,
    ModelPolicy,
    Price,
    QueueSettings,
    RoutingSettings,
    TenantPolicy,
    Upstream,
    rules_of,
)
from fairlead.core.request import Pausable, Raw, Request
from fairlead.core.tensors import Tensors
from fairlead.gateway import abuse
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.limits.budgets import restore
from fairlead.gateway.limits.ledger import Limiter
from fairlead.gateway.limits.meter import Subject
from fairlead.runtime.upstream.fake import Fake, Script
from tests.gateway.house import (
    ACME,
    Client,
    House,
    Played,
    SlowLimiter,
    asking,
    caller,
    policies,
    rows,
    say,
    tensor_model,
    texts,
    turns,
    until,
)

both = pytest.mark.parametrize("form", ["submit", "infer"])
LINE_OF_ONE = QueueSettings(max_in_flight=1)


# Who may


@both
async def test_an_answer_reaches_its_caller_with_its_id_and_leaves_one_record(house):
    front = house()
    client = await front.answer(rows(1.0, 2.0, caller=caller(project="web", qos_class="batch", address="10.1.2.3")))
    (response,) = client.responses
    assert response.id == client.request.id and response.outputs["y"].tolist() == [[2.0, 2.0], [4.0, 4.0]]
    row = await front.record()
    assert (row.tenant, row.project, row.key, row.address) == ("acme", "web", "key-of-acme", "10.1.2.3")
    assert (row.model, row.version, row.kind, row.qos_class, row.request_id) == ("double", "1", "infer", "batch", client.request.id)
    assert (row.outcome, row.status, row.reason, row.rows, row.input_tokens, row.cached) == ("success", 200, "", 2, 0, False)
    assert row.seconds >= row.compute_seconds > 0.0


@both
async def test_whoever_may_not_use_a_model_hears_the_same_as_of_one_that_is_not_there(house):
    front = house()
    outsider = caller(models=(("*",), ("chat",)))
    mine = await front.refusal(rows(caller=outsider))
    nobodys = await front.refusal(rows(model="single", caller=outsider))
    unknown = await front.refusal(rows(model="single"))
    assert type(mine) is type(nobodys) is type(unknown) is NotFound
    assert mine.message.replace("double", "single") == nobodys.message == unknown.message
    assert mine.headers == nobodys.headers == unknown.headers
    assert await front.answer(rows())


@both
async def test_a_class_that_the_caller_may_not_ask_for_is_forbidden(house):
    front = house()
    assert isinstance(await front.refusal(rows(qos_class="interactive")), Forbidden)
    await front.answer(rows(caller=caller(classes=("interactive",)), qos_class="interactive"))
    await front.answer(rows(qos_class="standard"))  # its own
    assert [(row.outcome, row.reason, row.qos_class) for row in await front.records()] == [
        ("refused", "forbidden", ""),
        ("success", "", "interactive"),
        ("success", "", "standard"),
    ]


@both
async def test_a_class_that_nobody_has_heard_of_is_refused_even_where_all_may_be_asked_for(house):
    front = house()
    for who in (ANYONE, caller(classes=("*",))):
        error = await front.refusal(rows(caller=who, qos_class="x" * 1000))
        assert isinstance(error, InvalidRequest) and "interactive, standard, batch" in error.message and "xx" not in error.message
    assert {row.qos_class for row in await front.records()} == {""}


@both
async def test_a_priority_is_for_callers_of_every_class(house):
    front = house()
    assert isinstance(await front.refusal(rows(priority=1)), Forbidden)
    await front.answer(rows(priority=1, caller=caller(classes=("*",))))
    await front.answer(rows(priority=1, caller=ANYONE))


@both
async def test_a_model_may_want_signed_requests_only(house):
    front = house(policies(double=ModelPolicy(require_signature=True)))
    error = await front.refusal(rows())
    assert isinstance(error, Unauthenticated) and "signed" in error.message
    await front.answer(rows(signed_by="key-of-acme"))


@both
async def test_prompts_share_their_prefixes_within_a_tenant_only(house):
    front = house()
    for who in (caller("acme"), caller("umbrella"), ANYONE):
        await front.said("hello", caller=who)
    assert [asked.prompt.salt for asked in front.chat.asked] == ["acme", "umbrella", ""]


@both
async def test_a_server_without_policies_and_books_stays_out_of_the_way(house):
    front = house(books=False)
    client = await front.answer(rows(caller=ANYONE))
    assert client.headers == {} and not isinstance(client.ticket, Pausable)
    assert isinstance(await front.refusal(rows(model="nobody", caller=ANYONE)), NotFound)
    assert front.counts._counts == {}


# The watch

WATCHFUL = AbuseSettings(action="block", threshold=2.0)
NO_BOMBS = FilterPolicy(deny=("bomb",))


async def misbehave(front: House, times: int = 60) -> int:
    """Until it is acted upon; returns how many requests that took."""
    for number in range(times):
        error = await front.refusal(texts("a bomb"))
        if not isinstance(error, Filtered):
            assert isinstance(error, LimitExceeded) and error.reason == "abuse"
            return number
    raise AssertionError("nothing was done about it")


@both
async def test_a_tenant_that_is_blocked_is_refused_and_no_longer_noted(house):
    front = house(policies(abuse=WATCHFUL, shout=ModelPolicy(filters=NO_BOMBS)))
    with capture_logs() as logs:
        num_noted = await misbehave(front)
    assert [(line["event"], line["action"]) for line in logs] == [("abuse", "block")]
    assert front.num_noted() == num_noted
    error = await front.refusal(texts("hello"))
    assert isinstance(error, LimitExceeded) and error.retry_after > 1.0 and front.num_noted() == num_noted
    await front.answer(texts("hello", caller=caller("umbrella")))
    records = await front.records()
    assert [row.reason for row in records] == ["filtered"] * num_noted + ["abuse", "abuse", ""]
    (audit,) = front.audits()
    assert (audit.actor, audit.action, audit.subject) == ("gateway", "abuse.block", "acme") and "filtered" in audit.details["reasons"]


@both
async def test_a_tenant_that_is_throttled_gets_its_share(house):
    front = house(policies(abuse=AbuseSettings(action="throttle", threshold=2.0, throttle_to=0.25), shout=ModelPolicy(filters=NO_BOMBS)))
    with capture_logs():
        await misbehave(front)
    ends = [(await front.ask(texts("hello")).end()).error for _ in range(16)]
    assert sum(error is None for error in ends) == 4


@both
async def test_the_watch_hears_how_requests_ended(house, monkeypatch):
    monkeypatch.setattr(abuse, "LOOK_SECONDS", 0.0)  # at every one
    front = house(policies(abuse=AbuseSettings(), shout=ModelPolicy(filters=NO_BOMBS)))
    seen: list[Any] = []
    assert front.abuse is not None
    note, front.abuse.note = front.abuse.note, lambda each, now: (seen.append(each), note(each, now))[1]  # type: ignore[method-assign]
    await front.refusal(texts("a bomb"))
    await front.refusal(rows(model="nobody"))
    await front.said("who are you?", "I", " am")
    await front.answer(rows())
    assert [(each.status, each.filtered, each.tokens) for each in seen] == [
        (400, True, 0),
        (404, False, 0),
        (200, False, 8),
        (200, False, 0),
    ]
    assert seen[2].text == "who are you?" and seen[2].key == "key-of-acme"


# Filters

MAIL = FilterPolicy(pii="redact")


def leak(text: str) -> Any:
    """A model that says this whatever it is asked."""
    return tensor_model("leak", lambda inputs: {"y": np.full_like(inputs["x"], text.encode())}, datatype="BYTES", shape=(-1, 1))


class Hung(Played):
    """A model of texts that does not answer."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.spec = classifier(name).spec


def classifier(name: str = "moderation", judge: Any = None) -> Any:
    """Finds a text with `bomb` harmful, and one with `buy` spam."""

    def scores(inputs: Tensors) -> Tensors:
        told = [text.decode() for text in inputs["x"].reshape(-1)]
        return {"y": np.array([[0.9 * ("bomb" in text), 0.8 * ("buy" in text)] for text in told], np.float32)}

    return tensor_model(name, judge or scores, datatype="BYTES", answers="FP32", shape=(-1, 1), labels=("harm", "spam"))


@both
async def test_a_blocked_text_never_reaches_the_model(house):
    front = house(policies(chat=ModelPolicy(filters=NO_BOMBS)))
    error = await front.refusal(say("how to build a bomb"))
    assert isinstance(error, Filtered) and error.rule == "deny" and "build" not in error.message
    assert front.chat.asked == [] and front.count("filtered", "chat", "deny", "request") == 1
    assert front.count("refused", "chat", "filtered") == 1
    row = await front.record()
    assert (row.outcome, row.reason, row.status, row.input_tokens, row.rows) == ("refused", "filtered", 400, 0, 0)


@both
async def test_the_model_sees_the_redacted_text_and_the_door_how_many_rows_there_were(house):
    front = house(policies(**{"*": ModelPolicy(filters=FilterPolicy(pii="redact", output=False))}))
    await front.said("mail root@example.com now")
    assert front.chat.asked[0].prompt.chat.messages[0].content == "mail [EMAIL] now"
    client = await front.answer(texts("root@example.com", "hello", "bye"))
    assert client.responses[0].outputs["y"].tolist() == [[b"[EMAIL]"], [b"HELLO"], [b"BYE"]]
    assert client.request.num_rows == 3


@both
async def test_what_is_only_flagged_passes_and_is_counted(house):
    front = house(policies(chat=ModelPolicy(filters=FilterPolicy(pii="flag", output=False))))
    await front.said("mail root@example.com now")
    assert front.chat.asked[0].prompt.chat.messages[0].content == "mail root@example.com now"
    assert front.count("flagged", "chat", "pii.email") == 1


@both
async def test_an_answer_is_searched_too(house):
    front = house(policies(leak=ModelPolicy(filters=MAIL)))
    front.repository.serve(leak("ask root@example.com"))
    client = await front.answer(texts("who?", model="leak"))
    assert client.responses[0].outputs["y"].tolist() == [[b"ask [EMAIL]"]]
    assert front.count("filtered", "leak", "pii.email", "answer") == 1


@both
async def test_an_answer_that_is_blocked_was_computed_and_is_paid_for(house):
    settings = policies(leak=ModelPolicy(filters=NO_BOMBS, price=Price(per_thousand_rows=1000.0)))
    front = house(settings)
    front.repository.serve(leak("a bomb"))
    error = await front.refusal(texts("what?", model="leak", caller=caller(limits={"rows_per_day": 10})))
    assert isinstance(error, Filtered) and front.spent() == {"rows_per_day": 1.0}
    assert front.count("filtered", "leak", "deny", "answer") == 1 and front.count("filtered", "leak", "deny", "request") == 0
    row = await front.record()
    assert (row.outcome, row.reason, row.rows, row.cost) == ("refused", "filtered", 1, 1.0)


@both
async def test_what_is_blocked_is_not_computed_any_further(house):
    """Even where the first piece is there before the model has returned its ticket."""

    class Eager(Played):
        def submit(self, request: Any, sink: Any) -> Any:
            asked = super().submit(request, sink)
            asked.respond(outputs={"y": np.array([[b"a bomb"]], object)})
            return asked

    front = house(policies(eager=ModelPolicy(filters=NO_BOMBS)))
    front.repository.serve(eager := Eager("eager"))
    assert isinstance(await front.refusal(texts("what?", model="eager")), Filtered)
    assert eager.asked[0].cancelled and eager.running == []


@both
async def test_a_stream_is_searched_across_its_pieces_and_its_head_still_comes_first(house):
    front = house(policies(chat=ModelPolicy(filters=MAIL)))
    client = await front.said("who?", "ask root", "@exam", "ple.com ", "today", caller=caller(limits={"requests_per_day": 5}))
    assert client.text == "ask [EMAIL] today" and client.responses[0].delta.text.startswith("ask")
    assert client.headers["x-ratelimit-remaining-requests"] == "4"
    assert front.count("filtered", "chat", "pii.email", "answer") == 1
    assert (await front.record()).output_tokens == 3


@both
async def test_a_stream_that_is_blocked_ends_there(house):
    front = house(policies(chat=ModelPolicy(filters=NO_BOMBS)))
    client = await front.said("what?", "take ", "a ", "bo", "mb ", "and ", "run")
    assert client.text.strip() == "take a" and client.error is None
    assert [response.delta.finish_reason for response in client.responses if response.delta.finish_reason] == ["content_filter"]
    row = await front.record()
    assert (row.outcome, row.output_tokens) == ("success", 3)


@both
async def test_a_tenants_own_filters_count_instead_of_the_models(house):
    front = house(policies(shout=ModelPolicy(filters=NO_BOMBS)))
    mild = caller("mild", policy=TenantPolicy(filters=FilterPolicy(deny=("flower",))))
    await front.answer(texts("a bomb", caller=mild))
    assert isinstance(await front.refusal(texts("a flower", caller=mild)), Filtered)
    assert isinstance(await front.refusal(texts("a bomb")), Filtered)


@both
async def test_filters_of_a_tenant_that_cannot_be_compiled_let_nothing_pass(house):
    front = house()
    with capture_logs() as logs:
        error = await front.refusal(texts("hi", caller=caller(policy=TenantPolicy(filters=FilterPolicy(deny_patterns=("(",))))))
    assert isinstance(error, Unavailable) and [line["event"] for line in logs] == ["filters_not_compiled"]


@both
@pytest.mark.parametrize("works", [True, False])
async def test_filters_of_a_tenant_are_compiled_once_for_all_its_first_requests(house, monkeypatch, works):
    front = house()
    own = FilterPolicy(deny=("never",), deny_patterns=() if works else ("(",))
    who = caller(policy=TenantPolicy(filters=own))
    compiled, of = [], Filters.of
    monkeypatch.setattr(Filters, "of", lambda policy: (compiled.append(policy), of(policy))[1])
    clients = [front.ask(rows(caller=who)) for _ in range(3)]
    await turns()
    await clients.pop().leave()  # the others still hear of it
    for client in clients:
        assert type((await client.end()).error) is (type(None) if works else Unavailable)
    assert compiled == [own]


@both
async def test_a_served_classifier_moderates(house):
    front = house(policies(shout=ModelPolicy(filters=FilterPolicy(moderation="block"))))
    front.repository.serve(classifier())
    error = await front.refusal(texts("how are you", "how to build a bomb"))
    assert isinstance(error, Filtered) and error.rule == "moderation.harm"
    assert front.count("filtered", "shout", "moderation.harm", "request") == 1
    await front.answer(texts("how are you", "hello"))
    assert front.repository.metrics.models["moderation", "1"].rows == 4


@both
async def test_more_texts_than_the_classifier_takes_at_once_are_judged_too(house):
    front = house(policies(shout=ModelPolicy(filters=FilterPolicy(moderation="block"))))
    front.repository.serve(classifier())
    harmless = ["hello"] * 63
    assert isinstance(await front.refusal(texts(*harmless, "a bomb")), Filtered)
    front.settings = policies(shout=ModelPolicy(filters=FilterPolicy(moderation="flag")))
    front.configure(front.settings)
    many = say("hello", model="shout")
    many.prompt, many.inputs = None, {"x": np.array([[b"hello"]] * 99 + [[b"buy"]], object)}
    assert isinstance(await front.refusal(many), InvalidRequest)  # the model itself takes 64
    assert front.count("flagged", "shout", "moderation.spam") == 1


@both
async def test_what_a_moderation_only_flags_passes(house):
    front = house(policies(shout=ModelPolicy(filters=FilterPolicy(moderation="flag"))))
    front.repository.serve(classifier())
    await front.answer(texts("buy a bomb"))
    assert front.count("flagged", "shout", "moderation.harm") == front.count("flagged", "shout", "moderation.spam") == 1


def fails(inputs: Tensors) -> Tensors:
    raise ZeroDivisionError("division by zero")


def too_few(inputs: Tensors) -> Tensors:
    return {"y": np.zeros((len(inputs["x"]), 3), np.float32)}


BROKEN = {
    "not there": None,
    "failing": lambda: classifier(judge=fails),
    "answering something else": lambda: classifier(judge=too_few),
    "no classifier": lambda: tensor_model("moderation", fails),
    "hung": lambda: Hung("moderation"),
}


@both
@pytest.mark.parametrize("action", ["block", "flag"])
@pytest.mark.parametrize("broken", BROKEN)
async def test_a_classifier_that_does_not_work_is_no_fault_of_the_callers(house, monkeypatch, action, broken):
    monkeypatch.setattr("fairlead.gateway.gateway.CLASSIFY_SECONDS", 0.01)
    front = house(policies(shout=ModelPolicy(filters=FilterPolicy(moderation=action))))
    if BROKEN[broken] is not None:
        front.repository.serve(BROKEN[broken]())
    with capture_logs() as logs:
        client = await front.ask(texts("hello", caller=caller(limits={"requests_per_day": 5}))).end()
    assert [line["event"] for line in logs if line["event"] == "not_moderated"] == ["not_moderated"]
    if action == "block":
        assert type(client.error) is Unavailable and "moderation" not in client.error.message
    else:
        assert client.error is None and front.count("flagged", "shout", "moderation.failed") == 1
    assert (await front.record()).outcome == ("refused" if action == "block" else "success")


# Limits

DAILY = {"requests_per_day": 100.0, "tokens_per_day": 1000.0, "rows_per_day": 100.0, "money_per_day": 1000.0, "concurrent": 10.0}
PRICED = ModelPolicy(price=Price(per_request=1.0, per_million_input_tokens=1e6, per_million_output_tokens=2e6, per_thousand_rows=5000.0))
HELD = {("tenant:acme", "requests_per_day"): 1.0, ("tenant:acme", "tokens_per_day"): 16.0, ("tenant:acme", "concurrent"): 1.0}
"""By `hello`: six tokens of prompt and ten of answer."""


def spent(requests: float = 0, tokens: float = 0, rows: float = 0, money: float = 0) -> dict[str, float]:
    return {"requests_per_day": requests, "tokens_per_day": tokens, "rows_per_day": rows, "money_per_day": money, "concurrent": 0}


@both
async def test_what_a_request_may_need_is_held_and_what_it_used_is_spent(house):
    front = house()
    client = front.ask(say("hello", caller=caller(limits=DAILY)))
    asked = await front.chat.next()
    assert front.held() == HELD
    asked.end("I", " am", usage=Usage(prompt_tokens=5, completion_tokens=2))
    await client.answer()
    assert front.held() == {} and front.spent() == spent(1, 7)
    assert client.headers["x-ratelimit-remaining-tokens"] == "984" and client.headers["x-ratelimit-remaining-requests"] == "99"
    assert 'tenant-concurrent";r=9' in client.headers["RateLimit"]


@both
async def test_rows_are_held_and_spent(house):
    front = house(policies(double=PRICED))
    client = await front.answer(rows(1.0, 2.0, 3.0, caller=caller(limits=DAILY)))
    assert front.spent() == spent(1, 0, 3, 16.0) and client.headers["x-ratelimit-limit-tokens"] == "1000"
    assert (await front.record()).cost == 16.0


@both
async def test_a_model_without_a_batch_dimension_takes_one_row(house):
    front = house()
    front.repository.serve(tensor_model("vector", lambda inputs: {"y": inputs["x"]}, shape=(-1,), max_batch_size=0))
    long = asking("vector", inputs={"x": np.zeros(500, np.float32)}, caller=caller(limits=DAILY))
    await front.answer(long)
    assert front.spent() == spent(1, 0, 1)


@both
async def test_what_fails_by_the_servers_fault_counts_for_nothing(house):
    front = house(policies(chat=PRICED))
    for number, error in enumerate((ModelError("no"), ReplicaDied("gone"), Unavailable("not now")), 1):
        client = front.ask(say("hello", caller=caller(limits=DAILY)))
        (await front.chat.next(number)).fail(error)
        assert (await client.end()).error is not None
        assert front.held() == {} and front.spent() == spent()
    assert [(row.outcome, row.reason, row.cost) for row in await front.records()] == [
        ("failure", "model-error", 0.0),
        ("failure", "replica-died", 0.0),
        ("refused", "unavailable", 0.0),
    ]


@both
async def test_what_is_wrong_with_a_request_counts_as_one_and_costs_nothing(house):
    front = house(policies(double=PRICED))
    who = caller(limits=DAILY)
    assert isinstance(await front.refusal(rows(*range(65), caller=who)), InvalidRequest)
    assert isinstance(await front.refusal(rows(version="9", caller=who)), NotFound)
    assert isinstance(await front.refusal(say("hello", model="double", caller=who)), Unsupported)
    assert front.spent() == spent(3)
    assert {(row.cost, row.rows, row.input_tokens) for row in await front.records()} == {(0.0, 0, 0)}


@both
async def test_who_leaves_in_the_middle_pays_for_what_came_until_then(house):
    front = house(policies(chat=PRICED))
    client = front.ask(say("hello", caller=caller(limits=DAILY)))
    asked = await front.chat.next()
    asked.say("I", " am", " here")
    await until(lambda: len(client.responses) == 3)
    await client.leave()
    assert asked.cancelled and front.spent() == spent(1, 6 + 3, 0, 1 + 6 + 2 * 3)
    row = await front.record()
    assert (row.outcome, row.status, row.reason, row.input_tokens, row.output_tokens) == ("cancelled", 499, "cancelled", 6, 3)
    assert row.cost == 13.0


async def test_a_stream_that_is_closed_by_its_reader_is_one_that_its_client_left(house):
    front = house()
    front.chat.answers = "I| am| here"
    async with aclosing(front.gateway.infer(say("hello", caller=caller(limits=DAILY)))) as responses:
        async for response in responses:
            assert response.delta is not None and response.delta.text == "I"
            break
    assert front.spent() == spent(1, 6 + 1) and front.chat.running == []
    front.clients.append(await front.ask(rows(model="nobody")).end())  # two records
    assert (await front.records())[0].outcome == "cancelled"


@both
async def test_who_leaves_before_the_first_token_pays_for_the_prompt(house):
    front = house()
    client = front.ask(say("hello", caller=caller(limits=DAILY)))
    asked = await front.chat.next()
    await client.leave()
    assert asked.cancelled and front.spent() == spent(1, 6)


@both
async def test_a_stream_that_breaks_in_the_middle_is_paid_for_as_far_as_it_came(house):
    front = house()
    client = front.ask(say("hello", caller=caller(limits=DAILY)))
    asked = await front.chat.next()
    asked.say("I", " am")
    asked.fail(ReplicaDied("gone"))
    await client.end()
    assert isinstance(client.error, ReplicaDied) and client.text == "I am" and front.spent() == spent(1, 8)
    assert "x-ratelimit-limit-requests" not in client.error.headers  # its head was told already
    assert ((row := await front.record()).outcome, row.reason, row.output_tokens) == ("failure", "replica-died", 2)


@both
async def test_a_request_is_held_against_everything_that_has_a_limit(house):
    front = house(policies(double=ModelPolicy(limits={"requests_per_day": 3})))
    who = caller(limits={"requests_per_day": 5}, project="web", project_limits={"requests_per_day": 4}, key_limits={"requests_per_day": 2})
    everybody = ("tenant:acme", "project:acme/web", "key:key-of-acme", "model:double")
    for _ in range(2):
        client = await front.answer(rows(caller=who))
    assert client.headers["x-ratelimit-remaining-requests"] == "0"  # of the tightest
    error = await front.refusal(rows(caller=who))
    assert isinstance(error, LimitExceeded) and error.reason == "budget-requests" and "key" in error.message
    assert {subject: front.spent(subject) for subject in everybody} == {key: {"requests_per_day": 2.0} for key in everybody}
    await front.answer(rows(caller=caller("other")))
    assert isinstance(await front.refusal(rows(caller=caller("other"))), LimitExceeded)  # of the model
    assert front.count("refused", "double", "budget-requests") == 2


@both
async def test_requests_that_ask_no_model_count_with_those_that_do(house):
    front = house()
    who = caller(limits={"requests_per_day": 3, "tokens_per_day": 1, "concurrent": 1}, key_limits={"requests_per_day": 2})
    used = {"requests_per_day": 1.0, "tokens_per_day": 0.0, "concurrent": 0}
    async with front.gateway.counted(who) as headers:
        assert headers["x-ratelimit-remaining-requests"] == "1"
        with pytest.raises(LimitExceeded, match="under way"):
            async with front.gateway.counted(who):
                pass
    assert front.spent() == used
    with pytest.raises(Unavailable):
        async with front.gateway.counted(who):
            raise Unavailable("the store is gone")
    assert front.spent() == used
    with pytest.raises(NotFound):
        async with front.gateway.counted(who):
            raise NotFound("no such file")
    assert front.spent() == {**used, "requests_per_day": 2.0}
    assert (await front.refusal(rows(caller=who))).reason == "budget-requests"
    with pytest.raises(LimitExceeded, match="key"):
        async with front.gateway.counted(who):
            pass
    assert [front.count("refused", "", reason) for reason in ("limit-concurrent", "budget-requests")] == [1, 1]


@both
async def test_another_limit_of_a_project_counts_from_the_next_request_on(house):
    front = house()
    policy = TenantPolicy()
    who = caller(project="web", policy=policy, project_limits={"requests_per_day": 1}, key_limits={})
    await front.answer(rows(caller=who))
    assert isinstance(await front.refusal(rows(caller=who)), LimitExceeded)
    more = Caller(**{name: getattr(who, name) for name in who.__struct_fields__} | {"project_limits": {"requests_per_day": 2}})
    await front.answer(rows(caller=more))


@both
async def test_prompts_of_one_request_are_one_request(house):
    front = house(policies(chat=PRICED))
    for num_requests in (1, 0, 0):
        await front.said("hello", caller=caller(limits=DAILY), num_requests=num_requests)
    assert front.spent() == spent(1, 24, 0, 1 + 15 + 18)


@both
async def test_after_a_restart_exactly_that_much_of_the_budgets_is_spent(house):
    front = house(policies(chat=ModelPolicy(limits=DAILY, price=PRICED.price)))
    for num_requests in (1, 0, 0):
        await front.said("hello", caller=caller(limits=DAILY), num_requests=num_requests)
    before = {subject: front.spent(subject) for subject in ("tenant:acme", "model:chat")}
    now = (await front.records())[0].time
    limits, rules = Limiter(), rules_of(DAILY)
    await restore(limits, front.store, {(rule.unit, rule.window) for rule in rules}, now)
    for subject, spent_before in before.items():
        standings = await limits.standing([Subject(subject, rules)], now)
        assert {each.rule.name: each.spent for each in standings} == pytest.approx(spent_before)
    assert before["model:chat"]["requests_per_day"] == 1


@both
async def test_the_head_tells_of_limits_whether_it_is_an_answers_or_an_errors(house):
    front = house()
    who = caller(limits={"requests_per_day": 2})
    streamed = await front.said("hello", "I", " am", caller=who)
    assert streamed.headers["x-ratelimit-remaining-requests"] == "1"
    client = front.ask(say("hello", caller=who))
    (await front.chat.next(2)).fail(ModelError("no"))
    assert (await client.end()).headers["x-ratelimit-remaining-requests"] == "0"
    await front.said("hello", caller=who)
    refused = await front.refusal(say("hello", caller=who))
    assert isinstance(refused, LimitExceeded) and refused.headers["x-ratelimit-remaining-requests"] == "0"


@both
async def test_an_error_that_several_hear_of_is_not_written_upon(house):
    shared = ReplicaDied("the process is gone")

    def die(inputs: Tensors) -> Tensors:
        raise shared

    front = house()
    front.repository.serve(tensor_model("mortal", die))
    everybody = [caller(tenant, limits={"requests_per_day": number}) for number, tenant in enumerate(("a", "b", "c"), 5)] + [caller("d")]
    clients = [front.ask(rows(model="mortal", caller=who)) for who in everybody]
    ends = [(await client.end()).error for client in clients]
    assert [error.headers.get("x-ratelimit-limit-requests") for error in ends if error] == ["5", "6", "7", None]
    assert all(isinstance(error, ReplicaDied) and error.message == shared.message for error in ends) and shared.headers == {}


@both
async def test_limits_that_are_counted_elsewhere_are_waited_for(house):
    limits = SlowLimiter()
    limits.open.clear()
    front = house(limits=limits)
    client = front.ask(rows(caller=caller(limits=DAILY)))
    await turns()
    assert not client.ended.is_set() and front.held() == {}
    limits.open.set()
    assert (await client.end()).error is None and front.spent() == spent(1, 0, 1)
    assert isinstance(await front.refusal(rows(caller=caller(limits={"requests_per_day": 0}))), LimitExceeded)


@both
async def test_compute_is_the_time_that_the_engine_tells_and_else_that_from_its_turn_on(house):
    front = house(policies(chat=ModelPolicy(price=Price(per_compute_second=8.0))))
    who = caller(limits={"compute_seconds_per_day": 100.0, "money_per_day": 1000.0})
    await front.said("hello", usage=Usage(prompt_tokens=5, compute_seconds=0.25), caller=who)
    assert front.spent() == {"compute_seconds_per_day": 0.25, "money_per_day": 2.0}
    await front.said("hello", caller=who)
    told, taken = await front.records()
    assert (told.compute_seconds, told.cost) == (0.25, 2.0) and 0 < taken.compute_seconds < taken.seconds


@both
async def test_prices_count_where_no_limit_does(house):
    front = house(policies(chat=PRICED))
    await front.said("hello", usage=Usage(prompt_tokens=5, completion_tokens=3, cached_tokens=2))
    left = front.ask(say("hello"))
    (await front.chat.next(2)).say("I")
    await until(lambda: left.responses)
    await left.leave()
    first, second = await front.records()
    assert (first.cost, first.input_tokens, first.cached_tokens, first.output_tokens) == (1 + 5 + 6, 5, 2, 3)
    assert (second.cost, second.input_tokens, second.output_tokens) == (1 + 6 + 2, 6, 1)


@both
async def test_the_records_hold_nothing_that_a_stranger_made_up(house):
    front = house()
    for number in range(3):
        await front.refusal(rows(model=f"guess-{number}"))
    long = rows(caller=ACME)
    long.id = "a\0b\ud800" + "x" * 5000
    await front.answer(long)
    *refused, answered = await front.records()
    assert {(row.model, row.reason) for row in refused} == {("", "not-found")} and front.count("refused", "", "not-found") == 3
    assert answered.request_id.startswith("abx") and len(answered.request_id) < 300
    assert front.courses.queues == {}


# The waiting line


async def all_asked(front: House) -> list[str]:
    """Answer `chat`'s requests one after another, until nobody asks; returns whose turn it was."""
    order = []
    while front.chat.running:
        asked = front.chat.running[0]
        order.append(asked.request.id)
        asked.end("yes")
        await turns()
    return order


@both
async def test_a_model_is_given_as_many_requests_as_its_line_allows(house):
    front = house(policies(chat=ModelPolicy(queue=QueueSettings(max_in_flight=3))))
    clients = [front.ask(say("hello")) for _ in range(10)]
    for left in range(10, 0, -1):
        await turns()
        assert len(front.chat.running) == front.queue().num_in_flight == min(left, 3)
        front.chat.running[-1].end("yes")
    assert [(await client.end()).text for client in clients] == ["yes"] * 10


@both
async def test_an_engine_says_itself_how_many_it_computes(house):
    front = house(max_in_flight=2)
    for _ in range(4):
        front.ask(say("hello"))
    await turns()
    assert (front.queue().num_in_flight, front.queue().num_waiting) == (2, 2)
    assert len(await all_asked(front)) == 4


@both
async def test_a_tenant_that_floods_does_not_keep_the_other_waiting(house):
    front = house(policies(chat=ModelPolicy(queue=LINE_OF_ONE)))
    for number in range(8):
        front.ask(say("hello", id=f"flood {number}"))
    await turns()
    for number in range(2):
        front.ask(say("hello", id=f"light {number}", caller=caller("light")))
    await turns()
    assert [each.partition(" ")[0] for each in await all_asked(front)][:5] == ["flood", "light", "flood", "light", "flood"]


@both
async def test_a_higher_class_goes_first(house):
    front = house(policies(chat=ModelPolicy(queue=LINE_OF_ONE)))
    for qos_class in ("standard", "batch", "standard", "interactive"):
        front.ask(say("hello", id=qos_class, qos_class=qos_class, caller=caller(classes=("*",))))
        await turns()
    assert await all_asked(front) == ["standard", "interactive", "standard", "batch"]


@both
async def test_a_full_line_refuses_the_sheddable_first(house):
    front = house(policies(chat=ModelPolicy(queue=QueueSettings(max_in_flight=1, max_requests=1))))
    running = front.ask(say("hello"))
    await turns()
    batch = front.ask(say("hello", caller=caller("nightly", qos_class="batch", limits=DAILY)))
    await turns()
    waiting = front.ask(say("hello"))
    error = (await batch.end()).error
    assert isinstance(error, Shed) and error.reason == "evicted" and error.headers["x-ratelimit-limit-requests"] == "100"
    assert front.spent("tenant:nightly") == spent()
    full = await front.refusal(say("hello"))
    assert isinstance(full, Shed) and full.reason == "queue-full"
    await all_asked(front)
    assert running.error is waiting.error is None
    assert front.count("refused", "chat", "evicted") == front.count("refused", "chat", "queue-full") == 1


@both
async def test_who_waits_too_long_is_refused_and_gives_back_what_it_held(house):
    front = house(policies(chat=ModelPolicy(queue=QueueSettings(max_in_flight=1, max_wait=0.005))))
    running = front.ask(say("hello"))
    await turns()
    error = await front.refusal(say("hello", caller=caller(limits=DAILY)))
    assert isinstance(error, Shed) and error.reason == "queue-timeout" and error.retry_after >= 1.0
    assert front.spent() == spent() and front.held() == {}
    await all_asked(front)
    assert running.error is None and len(front.chat.asked) == 1


@both
async def test_a_request_says_itself_how_long_it_may_wait(house):
    front = house(policies(chat=ModelPolicy(queue=LINE_OF_ONE)))
    front.ask(say("hello"))
    await turns()
    error = await front.refusal(say("hello", timeout=0.001))
    assert isinstance(error, Shed) and error.reason == "queue-timeout"
    await all_asked(front)


@both
async def test_who_leaves_while_waiting_frees_its_place_and_what_it_held(house):
    front = house(policies(chat=ModelPolicy(queue=QueueSettings(max_in_flight=1, max_requests=1))))
    front.ask(say("hello"))
    await turns()
    waiting = front.ask(say("hello", caller=caller(limits=DAILY)))
    await turns()
    assert front.queue().num_waiting == 1 and front.held() == HELD
    await waiting.leave()
    assert front.queue().num_waiting == 0 and front.held() == {} and front.spent() == spent()
    last = front.ask(say("hello"))  # there is room
    await turns()
    assert len(await all_asked(front)) == 2 and last.text == "yes"
    assert [row.outcome for row in await front.records()] == ["cancelled", "success", "success"]


@both
async def test_the_turn_of_whoever_fails_or_leaves_goes_to_the_next(house):
    front = house(policies(chat=ModelPolicy(queue=LINE_OF_ONE)))
    clients = [front.ask(say("hello")) for _ in range(4)]
    await turns()
    front.chat.running[0].fail(ModelError("no"))
    await turns()
    await clients[1].leave()
    await turns()
    front.chat.running[0].fail(ReplicaDied("gone"))
    await turns()
    assert len(await all_asked(front)) == 1 and clients[3].text == "yes"


@both
async def test_the_line_counts_what_was_really_served(house):
    front = house(policies(chat=ModelPolicy(queue=LINE_OF_ONE), double=ModelPolicy(queue=LINE_OF_ONE)))
    served: list[float | None] = []
    leave, front.gateway.leave = front.gateway.leave, lambda queue, item, work: (served.append(work), leave(queue, item, work))[1]  # type: ignore[method-assign]
    await front.answer(rows(1.0, 2.0, 3.0))
    await front.said("hello", usage=Usage(prompt_tokens=9, completion_tokens=4, cached_tokens=8))
    left = front.ask(say("hello"))
    (await front.chat.next(2)).say("I", " am")
    await until(lambda: len(left.responses) == 2)
    await left.leave()
    client = front.ask(say("hello"))
    (await front.chat.next(3)).fail(ModelError("no"))
    await client.end()
    assert served == [3.0, 1.0 + 2 * 4, 6.0 + 2 * 2, None]


@both
async def test_a_server_that_stops_lets_nobody_wait(house):
    front = house(policies(chat=ModelPolicy(queue=LINE_OF_ONE)))
    clients = [front.ask(say("hello")) for _ in range(3)]
    await turns()
    front.gateway.stopping = True
    front.gateway.drop_waiting()
    assert [type((await client.end()).error) for client in clients[1:]] == [ShuttingDown, ShuttingDown]
    assert isinstance(await front.refusal(say("hello")), ShuttingDown)
    assert isinstance(await front.refusal(rows(caller=ANYONE)), ShuttingDown)
    assert len(await all_asked(front)) == 1 and clients[0].error is None


@both
async def test_more_room_is_for_those_who_wait_at_once(house):
    front = house(policies(chat=ModelPolicy(queue=LINE_OF_ONE)))
    for _ in range(3):
        front.ask(say("hello"))
    await turns()
    front.configure(policies(chat=ModelPolicy(queue=QueueSettings(max_in_flight=2))))
    await turns()
    assert len(front.chat.running) == 2
    front.configure(policies())  # any number
    await turns()
    assert len(front.chat.running) == 3
    await all_asked(front)


@both
async def test_who_waits_for_a_model_that_is_taken_away_hears_of_it(house):
    front = house(max_in_flight=1)
    clients = [front.ask(say("hello")) for _ in range(3)]
    await turns()
    front.courses._max_in_flight = lambda model: 0
    front.repository.withdraw("chat")
    await front.answer(rows())  # somebody looks
    assert [type((await client.end()).error) for client in clients[1:]] == [NotFound, NotFound]
    await all_asked(front)
    assert clients[0].error is None


# Asking for less


async def crowd(front: House) -> None:
    """One is computed, another waits, and it is known how long that takes."""
    front.ask(say("first"))
    front.ask(say("second"))
    front.ask(say("third"))
    await turns()
    front.chat.running[0].end("yes")
    await turns()
    assert front.queue().num_waiting == 1


def short_of(**what: Any) -> ModelPolicy:
    return ModelPolicy(
        queue=QueueSettings(max_in_flight=1, degrade=(DegradeStep(wait_above=0.0, **what),)),
        cache=CacheSettings(mode="deterministic", ttl=0.000001, stale_seconds=3600.0),
    )


@both
async def test_while_the_wait_is_long_answers_are_shorter_and_say_so(house):
    front = house(policies(chat=short_of(max_tokens=3)))
    await crowd(front)
    client = front.ask(say("hello", sampling={"max_tokens": 100, "min_tokens": 50}))
    modest = front.ask(say("hello", sampling={"max_tokens": 2}))
    await turns()
    await all_asked(front)
    sampling = next(asked.prompt.sampling for asked in front.chat.asked if asked.request.id == client.request.id)
    assert (sampling.max_tokens, sampling.min_tokens) == (3, 3)
    assert client.headers["x-fairlead-degraded"] == "max_tokens=3" and "x-fairlead-degraded" not in modest.headers
    assert front.count("degraded", "chat", "standard") == 1


@both
async def test_another_model_may_answer_while_the_wait_is_long(house):
    front = house(policies(chat=short_of(model="small")))
    small = Played("small", "quick")
    front.repository.serve(small)
    await crowd(front)
    client = await front.answer(say("hello"))
    assert client.text == "quick" and client.headers["x-fairlead-degraded"] == "model=small"
    elsewhere = front.ask(say("hello", caller=caller(models=(("chat",),))))  # which may not use `small`
    await turns()
    await all_asked(front)
    assert elsewhere.text == "yes" and len(small.asked) == 1
    assert {(row.model, row.outcome) for row in await front.records()} == {("chat", "success"), ("small", "success")}


def small_with(**policy: Any) -> GatewaySettings:
    return policies(chat=short_of(model="small"), small=ModelPolicy(**policy))


async def degraded(front: House, *questions: Request) -> list[Client]:
    """While `chat` has others to compute; `small` answers at once."""
    front.repository.serve(Played("small", "call a@b.example "))
    await crowd(front)
    clients = []
    for question in questions:
        clients.append(front.ask(question))
        await turns(40)
    await all_asked(front)
    return clients


def instead(client: Client) -> bool:
    """Whether `small` answered."""
    assert client.error is None
    return client.headers.get("x-fairlead-degraded", client.headers.get("x-fairlead-fallback")) in ("model=small", "small")


@both
@pytest.mark.parametrize("limits", [Limiter, SlowLimiter])
async def test_the_other_model_is_asked_within_its_own_limits(house, limits):
    front = house(small_with(limits={"requests_per_day": 1.0, "tokens_per_day": 100.0}), limits=limits())
    first, second = await degraded(front, say("hello"), say("hello again"))
    assert instead(first) and not instead(second) and second.text == "yes"
    assert front.spent("model:small") == {"requests_per_day": 1, "tokens_per_day": 8}


@both
async def test_the_other_model_is_asked_through_its_own_filters(house):
    front = house(small_with(filters=FilterPolicy(deny=("forbidden",), pii="redact")))
    refused, passed = await degraded(front, say("forbidden for c@d.example"), say("mail c@d.example"))
    assert not instead(refused) and instead(passed) and passed.text == "call [EMAIL] "
    asked = {asked.request.id: asked.prompt.chat.messages[0].content for asked in front.chat.asked}
    assert asked[refused.request.id] == "forbidden for c@d.example"
    assert passed.request.prompt.chat.messages[0].content == "mail [EMAIL]"


@both
async def test_what_the_model_that_was_asked_for_filters_is_filtered_whoever_answers(house):
    chat = structs.replace(short_of(model="small"), filters=FilterPolicy(pii="redact"))
    front = house(policies(chat=chat, small=ModelPolicy(filters=FilterPolicy(deny_patterns=("call",)))))
    (client,) = await degraded(front, say("hello"))
    assert client.responses[-1].delta.finish_reason == "content_filter"
    front = house(policies(chat=chat, small=ModelPolicy(filters=FilterPolicy(deny=("forbidden",)))))
    (client,) = await degraded(front, say("hello"))
    assert instead(client) and client.text == "call [EMAIL] "


@both
async def test_the_other_model_is_asked_in_its_own_line_unless_that_is_as_long(house):
    front = house(small_with(queue=QueueSettings(max_in_flight=1, max_requests=1)))
    front.repository.serve(small := Played("small"))
    await crowd(front)
    clients = [front.ask(say(f"hello {number}")) for number in range(3)]
    await turns(40)
    assert (len(small.running), front.queue("small").num_waiting, front.queue().num_waiting) == (1, 1, 2), "the third waits for `chat`"
    for number in (1, 2):
        (await small.next(number)).end("quick")
    await all_asked(front)
    assert [instead(client) for client in clients] == [True, True, False]


async def test_a_model_that_wants_signed_requests_stands_in_for_those_only(house):
    front = house(small_with(require_signature=True))
    unsigned, signed = await degraded(front, say("hello"), say("hello again", signed_by="k"))
    assert not instead(unsigned) and instead(signed)


# Instead of a model that fails


def falling_back(**policy: Any) -> GatewaySettings:
    routing = RoutingSettings(retries=0, fallback=("small",))
    return policies(chat=ModelPolicy(routing=routing, queue=LINE_OF_ONE, limits=DAILY), small=ModelPolicy(**policy))


async def failed(front: House, question: Request) -> Client:
    """`chat` takes a request and dies."""
    number = len(front.chat.asked)
    client = front.ask(question)
    (await front.chat.next(number + 1)).fail(ReplicaDied("it died"))
    await turns(40)
    return client


@both
async def test_a_fallback_is_asked_within_its_own_limits(house):
    front = house(falling_back(limits={"requests_per_day": 1.0, "tokens_per_day": 100.0}))
    front.repository.serve(Played("small", "quick"))
    first = await failed(front, say("hello"))
    assert instead(first) and first.text == "quick"
    assert isinstance((await failed(front, say("hello"))).error, ReplicaDied), "as if there were no fallback"
    assert front.spent("model:small") == {"requests_per_day": 1, "tokens_per_day": 8}
    assert front.spent("model:chat") == spent(1, 8)


@both
async def test_a_fallback_that_fails_too_has_used_nothing(house):
    front = house(falling_back(limits=DAILY))
    front.repository.serve(small := Played("small"))
    client = await failed(front, say("hello"))
    (await small.next()).fail(ReplicaDied("it died, too"))
    assert isinstance((await client.end()).error, ReplicaDied)
    assert front.spent("model:small") == front.spent("model:chat") == spent()


@both
async def test_a_fallback_is_asked_through_its_own_filters(house):
    front = house(falling_back(filters=FilterPolicy(deny=("forbidden",), pii="redact")))
    front.repository.serve(small := Played("small", "call a@b.example "))
    assert isinstance((await failed(front, say("forbidden"))).error, ReplicaDied)
    client = await failed(front, say("mail c@d.example"))
    assert instead(client) and client.text == "call [EMAIL] "
    assert [asked.prompt.chat.messages[0].content for asked in small.asked] == ["mail [EMAIL]"]


@both
async def test_a_fallback_gives_a_turn_that_is_free_and_the_failed_model_has_its_own_back(house):
    front = house(falling_back(queue=LINE_OF_ONE))
    front.repository.serve(small := Played("small"))
    first = await failed(front, say("hello"))
    assert (front.queue().num_in_flight, front.queue("small").num_in_flight) == (0, 1)
    second = await failed(front, say("hello again"))
    assert isinstance(second.error, ReplicaDied) and len(small.asked) == 1, "nobody waits there while `small` is busy"
    (await small.next()).end("quick")
    assert instead(await first.end())
    assert front.queue("small").num_in_flight == 0


@both
@pytest.mark.parametrize("asks", ["a shared limit", "a classifier"])
async def test_a_fallback_is_passed_over_where_it_would_have_to_be_waited_for(house, asks):
    if asks == "a classifier":
        front = house(falling_back(filters=FilterPolicy(moderation="block"), limits=DAILY))
    else:
        front = house(falling_back(limits=DAILY), limits=SlowLimiter())
    front.repository.serve(small := Played("small", "quick"))
    assert isinstance((await failed(front, say("hello"))).error, ReplicaDied)
    assert small.asked == [] and front.spent("model:small") in ({}, spent())


@both
async def test_whoever_joined_a_request_is_not_answered_past_a_fallbacks_filters(house):
    chat = ModelPolicy(routing=RoutingSettings(retries=0, fallback=("small",)), cache=CacheSettings(single_flight=True))
    front = house(policies(chat=chat, small=ModelPolicy(filters=FilterPolicy(deny=("forbidden",)))))
    front.repository.serve(small := Played("small", "forbidden"))
    first, second = front.ask(say("hello")), front.ask(say("hello"))
    (await front.chat.next()).fail(ReplicaDied("it died"))
    for client in (first, second):
        assert isinstance((await client.end()).error, ReplicaDied)
    assert small.asked == []


@both
async def test_who_leaves_while_a_fallback_answers_gives_everything_back(house):
    front = house(falling_back(queue=LINE_OF_ONE, limits=DAILY))
    front.repository.serve(small := Played("small"))
    client = await failed(front, say("hello"))
    (await small.next()).say("quick")
    await turns()
    await client.leave()
    await turns()
    assert small.running == [] and front.spent("model:small")["tokens_per_day"] == 7


@both
async def test_an_answer_that_is_no_longer_fresh_will_do_while_the_wait_is_long(house):
    front = house(policies(chat=short_of(cached=True)))
    await front.said("hello", "old", " news")
    await crowd(front)
    client = await front.answer(say("hello", caller=caller(limits=DAILY)))
    assert client.text == "old news" and client.headers["x-fairlead-degraded"] == "cached"
    assert client.headers["x-fairlead-cache"] == "stale" and client.headers["age"] == "0"
    assert front.spent() == spent(1) and front.count("reused", "chat", "stale") == 1
    other = front.ask(say("what else?"))  # of which nothing is known
    await turns()
    await all_asked(front)
    assert other.text == "yes" and "x-fairlead-degraded" not in other.headers
    assert [row.cached for row in await front.records()].count(True) == 1


@both
async def test_an_answer_that_was_made_shorter_is_nobody_elses(house):
    settings = policies(chat=short_of(max_tokens=3))
    front = house(settings)
    await crowd(front)
    shorter = front.ask(say("hello"))
    await turns()
    await all_asked(front)
    assert shorter.headers["x-fairlead-degraded"] == "max_tokens=3"
    assert len(front.gateway.recalls.cache) == 3 and (await front.said("hello", "long")).text == "long"
    assert len(front.gateway.recalls.cache) == 4


@both
async def test_only_the_classes_that_a_step_names_are_asked_for_less(house):
    front = house(policies(chat=short_of(max_tokens=3, classes=("batch",))))
    await crowd(front)
    standard = front.ask(say("hello"))
    await turns()
    batch = front.ask(say("hello", caller=caller(qos_class="batch")))
    await turns()
    await all_asked(front)
    assert "x-fairlead-degraded" not in standard.headers and batch.headers["x-fairlead-degraded"] == "max_tokens=3"


# Leaving


def everything() -> GatewaySettings:
    """A line, limits, filters of questions and answers, moderation, shared answers: whatever can make a request wait or hold something."""
    return policies(
        chat=ModelPolicy(
            queue=LINE_OF_ONE,
            filters=FilterPolicy(moderation="block", pii="redact"),
            cache=CacheSettings(mode="deterministic", single_flight=True, semantic_model="embedder"),
            limits={"concurrent": 100},
            price=Price(per_request=1.0),
        )
    )


@both
@pytest.mark.parametrize("company", ["alone", "behind another", "behind the same", "before the same"])
async def test_whoever_leaves_at_whatever_moment_leaves_nothing_behind(house, company):
    limits = SlowLimiter()
    front = house(everything(), limits=limits)
    front.repository.serve(classifier(), Played("embedder"))
    who = caller(limits=dict.fromkeys(DAILY, 1e6))
    stages = set()
    for moment in range(60):
        limits.open.clear() if moment % 3 == 0 else limits.open.set()
        others = [front.ask(say("the same" if "same" in company else "another"))] if "behind" in company else []
        await turns(moment % 7)
        client = front.ask(say("the same", caller=who))
        if company == "before the same":
            others = [front.ask(say("the same", caller=who)) for _ in range(2)]
        await turns(moment + 1)
        stages.add((len(front.held()), front.queue().num_waiting if front.courses.queues else 0, len(front.chat.running)))
        if moment % 2:
            for asked in list(front.chat.running):
                asked.say("I ")
        await client.leave()
        limits.open.set()
        while not all(other.ended.is_set() for other in others):
            await turns(1)
            for asked in list(front.chat.running):
                asked.end("am")
        assert [(other.error, other.text[-2:]) for other in others] == [(None, "am")] * len(others)
        await front.check()
        assert {task for task in asyncio.all_tasks() if task is not asyncio.current_task()} <= front._tasks
        front.gateway.recalls.cache.drop("chat")
    assert len(stages) >= 2


async def test_a_request_that_was_begun_in_a_task_does_not_take_that_task_with_it(house, monkeypatch):
    """Doors begin signed requests in a task of their own, which ends at once: a timeout around it would never go off, or hit another."""
    monkeypatch.setattr("fairlead.gateway.gateway.CLASSIFY_SECONDS", 0.01)
    front = house(policies(shout=ModelPolicy(filters=FilterPolicy(moderation="block"))))
    front.repository.serve(Hung("moderation"))

    async def door() -> Any:
        client = front.ask(texts("hello"))
        await turns()
        return client

    task = asyncio.create_task(door())
    with capture_logs():
        assert isinstance((await (await task).end()).error, Unavailable)


async def test_a_filter_that_fails_ends_its_own_request_only(house, monkeypatch):
    front = house(policies(shout=ModelPolicy(filters=MAIL)))

    def broken(self: Any, response: Any) -> Any:
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr("fairlead.gateway.filters.output.OutputFilter.push", broken)
    with capture_logs() as logs:
        error = await front.refusal(texts("hello"))
    assert type(error) is ModelError and error.message == "internal error" and [line["event"] for line in logs] == ["request_failed"]
    monkeypatch.undo()
    await front.answer(texts("hello"))


# Other servers

QUESTION = b'{"model":"far","messages":[{"role":"user","content":"hello"}]}'
STREAMED = QUESTION[:-1] + b',"stream":true,"stream_options":{"include_usage":true}}'


@pytest.fixture
async def far():
    """A server of the OpenAI protocol."""
    server = await Fake(Script(chunks=4)).start()
    yield server
    await server.stop()


def elsewhere(far: Fake, **fields: Any) -> GatewaySettings:
    routing = RoutingSettings(retries=0)
    return policies(far=ModelPolicy(**{"upstreams": (Upstream(url=far.url),), "routing": routing, "price": PRICED.price, **fields}))


@both
async def test_what_another_server_used_is_spent(house, far):
    front = house(elsewhere(far))
    for stream, body in ((False, QUESTION), (True, STREAMED)):
        who = caller(limits=DAILY)
        client = await front.answer(
            asking("far", raw=Raw(path="/v1/chat/completions", body=body, stream=stream, prompt_chars=5), caller=who)
        )
        assert b"chat.completion" in client.responses[0].raw and client.headers["x-ratelimit-limit-requests"] == "100"
    first, second = await front.records()
    assert (first.kind, first.outcome, first.output_tokens, first.version) == ("generate", "success", 4, "")
    assert second.output_tokens == 4 and front.spent()["requests_per_day"] == 2
    assert front.spent()["tokens_per_day"] == first.input_tokens + second.input_tokens + 8


@both
@pytest.mark.parametrize(("status", "counted"), [(500, 0), (429, 0), (400, 1), (404, 1)])
async def test_another_servers_error_is_passed_on_and_is_no_success(house, far, status, counted):
    front = house(elsewhere(far))
    far.script = Script(fault="status", status=status)
    client = await front.answer(asking("far", raw=Raw(path="/v1/chat/completions", body=QUESTION), caller=caller(limits=DAILY)))
    assert client.responses[0].status == status and front.spent() == spent(counted)
    row = await front.record()
    assert (row.outcome, row.reason, row.status, row.cost) == ("failure", "upstream-error", status, 0.0)


async def test_who_reads_slowly_can_hold_the_answer_back(house, far):
    front = house(elsewhere(far))
    far.script = Script(chunks=20, pace=0.001)
    client = front.ask(asking("far", raw=Raw(path="/v1/chat/completions", body=STREAMED, stream=True)))
    assert isinstance(client.ticket, Pausable)
    await until(lambda: client.responses)
    client.ticket.pause()
    await turns()
    client.ticket.resume()
    await client.answer()
    client.ticket.pause()  # too late is no harm


@both
async def test_a_fallback_stands_in_for_a_model_that_is_only_named(house):
    front = house(policies(retired=ModelPolicy(routing=RoutingSettings(fallback=("double",)), limits={"requests_per_day": 5})))
    client = await front.answer(rows(model="retired"))
    assert client.headers["x-fairlead-fallback"] == "double" and client.headers["x-ratelimit-remaining-requests"] == "4"
    assert (await front.record()).model == "retired"


async def test_a_model_in_the_form_of_tensors_has_its_tenants_salt():
    from fairlead.core.generation import EngineInfo
    from fairlead.runtime.text_tensors import text_form

    info = EngineInfo(tasks=("generate",), max_model_len=10, vocab_size=10)
    salts = [text_form(asking("chat", inputs={"text_input": np.array([b"hi"], object)}, caller=who), info).prompt for who in (ACME, ANYONE)]
    assert [prompt.salt for prompt in salts if isinstance(prompt, Generate)] == ["acme", ""]
