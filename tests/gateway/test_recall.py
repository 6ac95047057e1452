"""Answers that need no computing, as a request's path finds them: stored ones, near ones, and those that somebody else waits for."""

import gc
import weakref
from random import Random
from typing import Any

import pytest
from structlog.testing import capture_logs

from fairlead.core.errors import Cancelled, Filtered, LimitExceeded, ModelError, ReplicaDied, Shed
from fairlead.core.generation import Usage
from fairlead.core.policy import CacheSettings, FilterPolicy, GatewaySettings, ModelPolicy, Price, QueueSettings, TenantPolicy
from fairlead.core.routes import Routes
from fairlead.gateway.reuse.response_cache import NotStored, Stored
from tests.gateway.house import Played, SlowLimiter, caller, double, envelope, policies, rows, say, tensor_model, texts, turns, until

both = pytest.mark.parametrize("form", ["submit", "infer"])
KEPT = CacheSettings(mode="deterministic")
TOGETHER = CacheSettings(single_flight=True)
DAILY = {"requests_per_day": 100.0, "tokens_per_day": 1000.0, "money_per_day": 1000.0}
ASKED = {"requests_per_day": 1.0, "tokens_per_day": 0.0, "money_per_day": 1.0}
"""What an answer that needs no computing costs."""
NOTHING = dict.fromkeys(DAILY, 0.0)
BOTH_USED = {"requests_per_day": 1.0, "tokens_per_day": 8.0, "money_per_day": 9.0}
PRICE = Price(per_request=1.0, per_million_input_tokens=1e6, per_million_output_tokens=1e6)


def chat(cache: CacheSettings, **fields: Any) -> GatewaySettings:
    return policies(chat=ModelPolicy(cache=cache, price=PRICE, **fields), double=ModelPolicy(cache=cache))


# Stored


@both
async def test_the_second_asks_and_the_model_does_not_hear_of_it(house):
    front = house(chat(KEPT))
    first = await front.said("hello", "I", " am", caller=caller(limits=DAILY))
    second = await front.answer(say("hello", caller=caller(limits=DAILY)))
    assert first.headers["x-fairlead-cache"] == "miss" and "age" not in first.headers
    assert (second.text, second.headers["x-fairlead-cache"], second.headers["age"]) == ("I am", "hit", "0")
    assert second.responses[0].id == second.request.id and len(front.chat.asked) == 1
    assert front.spent() == {"requests_per_day": 2.0, "tokens_per_day": 8.0, "money_per_day": 10.0}
    assert front.count("reused", "chat", "hit") == 1
    computed, reused = await front.records()
    assert (computed.cached, computed.input_tokens, computed.output_tokens, computed.cost) == (False, 5, 3, 9.0)
    assert (reused.cached, reused.input_tokens, reused.output_tokens, reused.cost) == (True, 0, 0, 1.0)
    assert (reused.outcome, reused.version, reused.compute_seconds) == ("success", "1", 0.0)


@both
async def test_tensors_are_stored_too_and_whoever_changes_its_answer_changes_nobody_elses(house):
    front = house(chat(KEPT))
    (await front.answer(rows(1.0))).responses[0].outputs["y"] = None
    client = await front.answer(rows(1.0))
    assert client.responses[0].outputs["y"].tolist() == [[2.0, 2.0]] and client.headers["x-fairlead-cache"] == "hit"
    assert (await front.answer(rows(3.0))).headers["x-fairlead-cache"] == "miss"


@both
async def test_no_tenant_is_given_anothers_answer_unless_the_policy_says_so(house):
    for shared, outcome in ((False, "miss"), (True, "hit")):
        front = house(chat(CacheSettings(mode="deterministic", shared=shared)))
        await front.answer(rows(caller=caller("acme")))
        assert (await front.answer(rows(caller=caller("umbrella")))).headers["x-fairlead-cache"] == outcome


@both
async def test_a_caller_can_ask_for_a_stored_answer_or_none(house):
    front = house(chat(KEPT))
    question: dict[str, Any] = {"envelope": envelope(cache_control="only-if-cached")}
    error = await front.refusal(say("hello", **question))
    assert isinstance(error, NotStored) and front.chat.asked == []
    await front.said("hello", "yes")
    assert (await front.answer(say("hello", **question))).text == "yes"
    row = (await front.records())[0]
    assert (row.outcome, row.reason, row.status) == ("refused", "not-stored", 504)


@both
async def test_where_no_answer_may_be_stored_there_is_none_to_ask_for(house):
    """By the policy's traffic, or by what control publishes, it is not known which version answers."""
    front = house(policies(double=ModelPolicy(cache=KEPT, traffic={"1": 0.5, "2": 0.5})))
    front.repository.serve(tensor_model("double", double, version="2"))
    only = envelope(cache_control="only-if-cached")
    for _ in range(2):
        assert "x-fairlead-cache" not in (await front.answer(rows())).headers
    assert isinstance(await front.refusal(rows(envelope=only)), NotStored)
    assert (await front.answer(rows(version="2"))).headers["x-fairlead-cache"] == "miss"
    assert (await front.answer(rows(version="2"))).headers["x-fairlead-cache"] == "hit"
    front.configure(policies(double=ModelPolicy(cache=KEPT)))
    assert (await front.answer(rows())).headers["x-fairlead-cache"] == "hit"
    front.dispatch.routes = Routes(shares={"double": (("1", 0.5), ("2", 0.5))})
    assert "x-fairlead-cache" not in (await front.answer(rows())).headers


@both
async def test_a_caller_can_keep_out_of_the_cache(house):
    front = house(chat(KEPT))
    assert "x-fairlead-cache" not in (await front.answer(rows(envelope=envelope(cache_control="no-store")))).headers
    assert (await front.answer(rows())).headers["x-fairlead-cache"] == "miss"
    assert (await front.answer(rows(envelope=envelope(cache_control="no-cache")))).headers["x-fairlead-cache"] == "miss"
    assert (await front.answer(rows(envelope=envelope(cache_control="max-age=60")))).headers["x-fairlead-cache"] == "hit"


@both
async def test_what_is_drawn_at_random_is_shared_by_those_only_who_say_that_it_may_be(house):
    front = house(chat(CacheSettings(mode="all")))
    warm: dict[str, Any] = {"sampling": {"temperature": 1.0}, "envelope": envelope(cache_control="max-age=60")}
    await front.said("hello", "one", **warm)
    assert (await front.answer(say("hello", **warm))).text == "one"
    assert (await front.said("hello", "two", sampling={"temperature": 1.0})).text == "two"


@both
async def test_an_answer_that_failed_or_was_not_heard_to_its_end_is_not_stored(house):
    front = house(chat(KEPT))
    for number, error in enumerate((ModelError("no"), ReplicaDied("gone")), 1):
        client = front.ask(say("hello"))
        asked = await front.chat.next(number)
        asked.say("I")
        asked.fail(error)
        await client.end()
    left = front.ask(say("hello"))
    (await front.chat.next(3)).say("I")
    await until(lambda: left.responses)
    await left.leave()
    assert (await front.said("hello", "whole")).text == "whole" and len(front.gateway.recalls.cache) == 1


@both
async def test_a_stored_answer_passes_the_filters_of_whoever_gets_it(house):
    front = house(chat(CacheSettings(mode="deterministic", shared=True)))
    careful = caller("careful", policy=TenantPolicy(filters=FilterPolicy(pii="redact")))
    strict = caller("strict", policy=TenantPolicy(filters=FilterPolicy(pii="block")))
    plain = await front.said("who?", "ask root@example.com ", "today")
    redacted = await front.answer(say("who?", caller=careful))
    blocked = await front.ask(say("who?", caller=strict)).end()
    assert (plain.text, redacted.text) == ("ask root@example.com today", "ask [EMAIL] today")
    assert redacted.headers["x-fairlead-cache"] == "hit"
    assert "root" not in blocked.text and len(front.chat.asked) == 1
    first = await front.said("and who else?", "root@example.com", caller=careful)
    assert first.text == "[EMAIL]" and (await front.answer(say("and who else?"))).text == "root@example.com"


@both
async def test_what_the_filters_make_of_a_question_is_what_is_looked_up(house):
    front = house(chat(KEPT, filters=FilterPolicy(pii="redact")))
    await front.said("mail root@example.com", "done")
    assert (await front.answer(say("mail admin@example.com"))).headers["x-fairlead-cache"] == "hit"


@both
async def test_the_answers_of_a_version_go_with_it_even_where_the_next_has_its_number(house):
    front = house(chat(KEPT))
    await front.answer(rows())
    under_way = front.ask(say("hello"))
    asked = await front.chat.next()
    replaced = Played("chat")
    front.repository.serve(tensor_model("double", lambda inputs: {"y": inputs["x"] * 3}), replaced)
    tripled = await front.answer(rows())
    assert tripled.headers["x-fairlead-cache"] == "miss" and tripled.responses[0].outputs["y"].tolist() == [[3.0, 3.0]]
    assert (await front.answer(rows())).headers["x-fairlead-cache"] == "hit"
    new = front.ask(say("hello"))
    (await replaced.next()).end("new")
    assert (await new.end()).text == "new"
    asked.end("old")  # computed by the one that is gone, and ready only now
    assert (await under_way.end()).text == "old"
    assert (await front.answer(say("hello"))).text == "new"


class Shared(dict[bytes, Stored]):
    """As gateways share answers in Redis, without it."""

    async def get(self, key: bytes) -> Stored | None:  # type: ignore[override]
        return dict.get(self, key)

    def put(self, key: bytes, stored: Stored, now: float) -> None:
        self[key] = stored

    async def close(self) -> None:
        pass


async def test_gateways_share_answers_of_the_same_artefact_and_not_of_another_one_with_its_number(house):
    shared, fronts = Shared(), [house(chat(KEPT)) for _ in range(3)]
    for front, edition in zip(fronts, ("old", "old", "new"), strict=True):
        front.repository._models["double"].editions[1] = edition
        front.gateway.recalls.redis = shared
    assert [(await front.answer(rows())).headers["x-fairlead-cache"] for front in fronts] == ["miss", "hit", "miss"]


async def test_a_version_that_is_unloaded_is_not_kept_in_memory(house):
    front = house(chat(KEPT))
    await front.answer(rows())
    gone = weakref.ref(front.repository.find("double"))
    front.repository.withdraw("double")
    front.double = None
    await front.refusal(rows())
    await until(lambda: (gc.collect(), gone())[1] is None)


# Nearly the same question

NEAR = CacheSettings(mode="deterministic", semantic_model="embedder", semantic_threshold=0.9)


@both
async def test_a_stored_answer_to_nearly_the_same_question_will_do(house):
    front = house(chat(NEAR))
    front.repository.serve(Played("embedder"))
    await front.said("how do I moor a small boat", "with a line")
    near = await front.answer(say("how do I moor a boat small"))
    assert (near.text, near.headers["x-fairlead-cache"]) == ("with a line", "semantic")
    assert front.count("reused", "chat", "semantic") == 1
    assert (await front.said("why is the sky blue", "it scatters")).headers["x-fairlead-cache"] == "miss"
    other = await front.said("how do I moor a boat small", "ask", caller=caller("umbrella"))
    assert (other.text, other.headers["x-fairlead-cache"]) == ("ask", "miss")


@both
@pytest.mark.parametrize("embedder", [None, "hung", "failing"])
async def test_an_embedder_that_does_not_work_is_a_miss(house, monkeypatch, embedder):
    monkeypatch.setattr("fairlead.gateway.reuse.semantic.EMBED_SECONDS", 0.005)
    front = house(chat(NEAR))
    if embedder == "hung":
        front.repository.serve(tensorless := Played("embedder"))
        tensorless.submit = lambda request, sink: Played.submit(Played("nobody"), say("hello"), sink)  # type: ignore[method-assign]
    elif embedder == "failing":
        front.repository.serve(tensor_model("embedder", double))
    with capture_logs() as logs:
        client = await front.said("hello", "yes")
    assert client.text == "yes" and [line["log_level"] for line in logs] == ["warning"]
    assert (await front.answer(say("hello"))).headers["x-fairlead-cache"] == "hit"


# Under way


@both
async def test_identical_requests_under_way_are_computed_once(house):
    front = house(chat(TOGETHER))
    who = caller(limits=DAILY)
    first = front.ask(say("hello", caller=who))
    asked = await front.chat.next()
    asked.say("I ")
    await turns()
    second, third = front.ask(say("hello", caller=who)), front.ask(say("hello", caller=who, stream=False))
    other = front.ask(say("what else?"))
    await turns()
    asked.say("am ")
    asked.end("here")
    (await front.chat.next(2)).end("nothing")
    clients = [await client.end() for client in (first, second, third, other)]
    assert [client.text for client in clients] == ["I am here"] * 3 + ["nothing"]
    assert [client.headers.get("x-fairlead-cache") for client in clients] == [None, "joined", "joined", None]
    assert all({response.id for response in client.responses} == {client.request.id} for client in clients)
    assert len(front.chat.asked) == 2 and front.count("reused", "chat", "joined") == 2
    assert front.spent() == {"requests_per_day": 3.0, "tokens_per_day": 8.0, "money_per_day": 11.0}
    assert sorted((row.cached, row.output_tokens) for row in await front.records()) == [(False, 3), (False, 3), (True, 0), (True, 0)]


@both
async def test_identical_tensors_are_computed_once_by_different_tenants_only_where_shared(house):
    for shared, num_computed in ((False, 2), (True, 1)):
        front = house(policies(double=ModelPolicy(cache=CacheSettings(single_flight=True, shared=shared))))
        clients = [front.ask(rows(caller=caller(tenant))) for tenant in ("acme", "umbrella")]
        for client in clients:
            (response,) = await client.answer()
            assert response.outputs["y"].tolist() == [[2.0, 2.0]]
        assert front.repository.metrics.models["double", "1"].rows == num_computed


@both
async def test_the_client_of_the_first_may_leave_and_the_others_have_their_answer(house):
    front = house(chat(TOGETHER))
    first = front.ask(say("hello", caller=caller(limits=DAILY)))
    asked = await front.chat.next()
    asked.say("I ")
    second = front.ask(say("hello", caller=caller(limits=DAILY)))
    await turns()
    await first.leave()
    assert not asked.cancelled and front.held() != {}
    asked.end("am")
    assert (await second.end()).text == "I am" and front.held() == {}
    assert front.spent() == {"requests_per_day": 2.0, "tokens_per_day": 8.0, "money_per_day": 10.0}
    assert sorted((row.outcome, row.output_tokens, row.cached) for row in await front.records()) == [
        ("cancelled", 3, False),
        ("success", 0, True),
    ]


@both
async def test_the_last_who_leaves_stops_the_computation(house):
    front = house(chat(TOGETHER))
    clients = [front.ask(say("hello", caller=caller(limits=DAILY))) for _ in range(3)]
    asked = await front.chat.next()
    asked.say("I")
    await turns()
    for client in clients:
        assert not asked.cancelled
        await client.leave()
    await turns()
    assert asked.cancelled and front.spent() == {"requests_per_day": 3.0, "tokens_per_day": 7.0, "money_per_day": 10.0}


@both
async def test_a_limit_that_refuses_the_first_is_no_answer_for_the_second(house):
    """Both wait until Redis has been asked; then the first hears of its own limit."""
    limits = SlowLimiter()
    limits.open.clear()
    front = house(chat(CacheSettings(single_flight=True, shared=True)), limits=limits)
    first = front.ask(say("hello", caller=caller("poor", limits={"requests_per_day": 0})))
    await turns()
    second = front.ask(say("hello"))
    third = front.ask(say("hello"))
    await turns()
    limits.open.set()
    assert isinstance((await first.end()).error, LimitExceeded)
    (await front.chat.next()).end("yes")
    assert [(await client.end()).text for client in (second, third)] == ["yes", "yes"] and len(front.chat.asked) == 1
    assert "x-fairlead-cache" not in second.headers and third.headers["x-fairlead-cache"] == "joined"


@both
async def test_a_line_that_refuses_the_first_is_no_answer_for_the_second(house):
    front = house(chat(TOGETHER, queue=QueueSettings(max_in_flight=1, max_wait=60.0)))
    before = front.ask(say("something else"))
    await turns()
    first = front.ask(say("hello", timeout=0.001))
    second = front.ask(say("hello"))
    assert isinstance((await first.end()).error, Shed)
    front.chat.running[0].end("done")
    (await front.chat.next(2)).end("yes")
    assert (await before.end()).text == "done" and (await second.end()).text == "yes"


@both
async def test_who_waits_too_long_for_the_first_is_refused(house):
    front = house(chat(TOGETHER, queue=QueueSettings(max_in_flight=1, max_wait=0.005)))
    before = front.ask(say("something else"))
    await turns()
    waiting = [front.ask(say("hello")) for _ in range(2)]
    assert {(await client.end()).error.reason for client in waiting} == {"queue-timeout"}
    front.chat.running[0].end("done")
    await before.end()


@both
async def test_who_joined_and_is_refused_by_its_own_limit_keeps_nobodys_answer_going(house):
    limits = SlowLimiter()
    front = house(chat(CacheSettings(single_flight=True, shared=True)), limits=limits)
    first = front.ask(say("hello"))
    asked = await front.chat.next()
    poor = await front.ask(say("hello", caller=caller("poor", limits={"requests_per_day": 0}))).end()
    assert isinstance(poor.error, LimitExceeded)
    await first.leave()
    await turns()
    assert asked.cancelled


@both
async def test_what_fails_in_computing_is_told_to_everybody_in_a_copy_of_their_own(house):
    front = house(chat(CacheSettings(mode="deterministic", single_flight=True, shared=True)))
    limited = [caller(tenant, limits={"requests_per_day": number}) for number, tenant in enumerate(("a", "b"), 5)]
    clients = [front.ask(say("hello", caller=who)) for who in limited]
    await turns()
    (await front.chat.next()).fail(shared := ReplicaDied("gone"))
    errors = [(await client.end()).error for client in clients]
    assert [(type(error), error.headers["x-ratelimit-limit-requests"]) for error in errors if error] == [
        (ReplicaDied, "5"),
        (ReplicaDied, "6"),
    ]
    assert shared.headers == {} and len(front.gateway.recalls.cache) == 0
    assert front.spent("tenant:a") == {"requests_per_day": 0.0} and front.spent("tenant:b") == {"requests_per_day": 1.0}


@both
async def test_the_filter_of_the_first_does_not_end_the_others_answer(house):
    policy = TenantPolicy(filters=FilterPolicy(deny=("bomb",)), limits={"tokens_per_day": 100})
    front = house(policies(leak=ModelPolicy(cache=CacheSettings(single_flight=True, shared=True)), tenants={"strict": policy}))
    leak, strict = Played("leak"), caller("strict", policy=policy)
    front.repository.serve(leak)
    first = front.ask(say("what?", model="leak", caller=strict))
    second = front.ask(say("what?", model="leak"))
    await turns()
    (await leak.next()).end("a ", "bomb ", "it ", "is", usage=Usage(prompt_tokens=4, completion_tokens=4))
    assert (await second.end()).text == "a bomb it is" and "bomb" not in (await first.end()).text
    assert front.spent("tenant:strict") == {"tokens_per_day": 8.0}


@both
async def test_the_record_of_the_first_says_how_it_ended_for_its_caller(house):
    """Its filter blocks the answer, which is computed to its end for the other."""
    policy = TenantPolicy(filters=FilterPolicy(pii="block"))
    front = house(policies(leak=ModelPolicy(cache=CacheSettings(single_flight=True, shared=True)), tenants={"strict": policy}))
    front.repository.serve(tensor_model("leak", lambda inputs: {"y": inputs["x"] + b".com"}, datatype="BYTES", shape=(-1, 1)))
    first = front.ask(texts("root@example", model="leak", caller=caller("strict", policy=policy)))
    second = front.ask(texts("root@example", model="leak"))
    assert isinstance((await first.end()).error, Filtered)
    assert (await second.end()).responses[0].outputs["y"].tolist() == [[b"root@example.com"]]
    assert sorted((row.tenant, row.outcome, row.reason, row.rows, row.cached) for row in await front.records()) == [
        ("acme", "success", "", 0, True),
        ("strict", "refused", "filtered", 1, False),
    ]


@both
async def test_an_answer_that_others_joined_is_stored_once_and_for_all(house):
    front = house(chat(CacheSettings(mode="deterministic", single_flight=True)))
    clients = [front.ask(say("hello")) for _ in range(3)]
    await turns()
    (await front.chat.next()).end("yes")
    assert [(await client.end()).text for client in clients] == ["yes"] * 3
    assert (await front.answer(say("hello"))).headers["x-fairlead-cache"] == "hit" and len(front.chat.asked) == 1


@both
@pytest.mark.parametrize("seed", range(12))
async def test_whoever_comes_and_goes_whoever_stays_has_the_whole_answer(house, seed):
    rng = Random(seed)
    front = house(chat(CacheSettings(single_flight=True, shared=True), queue=QueueSettings(max_in_flight=1)))
    clients, left = [], []
    for _ in range(60):
        lot = rng.random()
        if lot < 0.3:
            clients.append(front.ask(say(rng.choice(("hello", "bye")), caller=caller(rng.choice("ab"), limits=DAILY))))
        elif lot < 0.5 and clients:
            client = clients.pop(rng.randrange(len(clients)))
            await turns(1)
            left.append(client)
            await client.leave()
        elif lot < 0.8 and front.chat.running:
            asked = front.chat.running[-1]
            asked.say("word ") if rng.random() < 0.8 else asked.end("end")
        await turns(rng.randrange(8))
        assert len(front.chat.running) <= 1
    while not all(client.ended.is_set() for client in clients):
        await turns(1)
        for asked in list(front.chat.running):
            asked.end("end")
    assert all(client.error is None and client.text.endswith("end") and client.text.count("end") == 1 for client in clients)
    assert all(client.error is None or isinstance(client.error, Cancelled) for client in left)
