"""Shadows: copies that another version answers, which nobody waits for and nobody pays for; and what is recorded."""

import threading

import numpy as np
import pytest
from msgspec import structs

from fairlead.core.errors import ModelError, QueueFull, ShuttingDown
from fairlead.core.generation import Chat, Delta, Embed, Generate, Message, Paint, Sampling, TokenLogprob, Usage
from fairlead.core.policy import FilterPolicy, ModelPolicy, QueueSettings, RoutingSettings
from fairlead.core.request import Request
from fairlead.core.routes import Routes
from fairlead.core.specs import BatchingSpec, ModelSpec
from fairlead.core.watch import Pair, ShadowRule, Watch
from fairlead.gateway.shadow import COPIES, LOWEST, Recording, continued, scoring
from tests.gateway.house import SECONDS, WORDS, House, Played, policies, rows, say, tensor_model, texts, turns, until

both = pytest.mark.parametrize("form", ["submit", "infer"])


def triple(inputs):
    return {"y": inputs["x"] * 3}


def broken(inputs):
    raise ModelError("out of order")


class Shadowed:
    """A gateway one of whose models has a shadow, and the pairs that came of it."""

    def __init__(self, front: House, *, model: str = "double", function=triple, **rule) -> None:
        self.front = front
        self.shadows = front.gateway.shadows
        self.model = model
        self.pairs = []
        self.shadows.on_pair = self.pairs.append
        if model == "double":
            front.repository.serve(tensor_model("double", function, version="2"))
            self.second = None
        else:
            self.second = Played(model, version="2")
            front.repository.serve(self.second)
        front.dispatch.routes = Routes({model: (("1", 1.0), ("2", 0.0))})
        self.shadows.set({model: ShadowRule(**{"version": "2", "share": 1.0, **rule})})

    def count(self, outcome: str) -> int:
        return self.front.counts.get(COPIES, self.model, outcome)

    async def pair(self, number: int = 1):
        await until(lambda: len(self.pairs) >= number)
        return self.pairs[number - 1]

    async def over(self) -> None:
        await until(lambda: not self.shadows.num_in_flight and not self.shadows.reading)


# Both answers


@both
async def test_both_versions_answer_and_the_caller_gets_the_champions(house):
    front = house()
    shadowed = Shadowed(front)
    client = await front.answer(rows(2.0, 5.0, log_id="the-id"))
    assert client.responses[0].version == "1" and client.responses[0].outputs["y"].tolist() == [[4, 4], [10, 10]]
    pair = await shadowed.pair()
    assert (pair.champion_version, pair.candidate_version, pair.error) == ("1", "2", "")
    assert pair.request.inputs["x"].tolist() == [[2, 2], [5, 5]]
    assert pair.champion[0].outputs["y"].tolist() == [[4, 4], [10, 10]]
    assert pair.candidate[0].outputs["y"].tolist() == [[6, 6], [15, 15]]
    assert pair.champion_seconds > 0 and pair.candidate_seconds > 0
    assert shadowed.count("answered") == 1


@both
async def test_nothing_is_copied_before_the_answer_is_there(house):
    front = house()
    shadowed = Shadowed(front, model="chat")
    client = front.ask(say("hello"))
    asked = await front.chat.next()
    asked.say("Good")
    await turns()
    assert shadowed.second.asked == []
    asked.end("day")
    await client.end()
    copied = await shadowed.second.next()
    assert client.text == "Goodday"
    copied.end("Good", "night")
    pair = await shadowed.pair()
    assert "".join(each.delta.text for each in pair.champion) == "Goodday"
    assert "".join(each.delta.text for each in pair.candidate) == "Goodnight"


@both
async def test_the_pieces_of_an_answer_are_kept_as_they_came_although_its_reader_changes_them(house):
    front = house()
    shadowed = Shadowed(front, model="chat")
    client = front.ask(say("hello"))
    asked = await front.chat.next()
    first = Delta(text="Good", token_ids=[1])
    asked.respond(delta=first)
    await turns()
    first.text += " (changed)"
    first.token_ids.append(7)
    asked.end("day")
    await client.end()
    (await shadowed.second.next()).end()
    pair = await shadowed.pair()
    assert (pair.champion[0].delta.text, pair.champion[0].delta.token_ids) == ("Good", [1])


@both
async def test_tensors_are_copies_whatever_becomes_of_those_they_were(house):
    front = house()
    outputs = np.zeros((1, 2), np.float32)

    def reused(inputs):
        outputs[:] = inputs["x"] * 2
        inputs["x"][:] = -1.0  # some models compute in place
        return {"y": outputs}

    front.repository.serve(tensor_model("double", reused))
    shadowed = Shadowed(front)
    request = rows(4.0)
    await front.answer(request)
    outputs[:] = -7.0
    pair = await shadowed.pair()
    assert pair.request.inputs["x"].tolist() == [[4, 4]]
    assert pair.champion[0].outputs["y"].tolist() == [[8, 8]]
    assert pair.candidate[0].outputs["y"].tolist() == [[12, 12]]


@both
async def test_views_of_a_body_are_copied_once_it_is_answered(house):
    front = house()
    shadowed = Shadowed(front)
    body = bytearray(np.full((1, 2), 4.0, np.float32).tobytes())
    view = np.frombuffer(memoryview(body).toreadonly(), np.float32).reshape(1, 2)
    request = rows(4.0)
    request.inputs = {"x": view}
    await front.answer(request)
    body[:] = bytes(len(body))
    assert (await shadowed.pair()).request.inputs["x"].tolist() == [[4, 4]]


# Which


@both
async def test_a_share_is_copied(house):
    front = house()
    shadowed = Shadowed(front, share=0.25)
    front.gateway.shadows.random = iter([0.1, 0.3, 0.9, 0.2] * 5).__next__
    for _ in range(20):
        await front.answer(rows(1.0))
        await shadowed.over()
    assert len(shadowed.pairs) == 10


@both
async def test_named_versions_the_candidates_own_answers_and_refusals_are_not_copied(house):
    front = house()
    shadowed = Shadowed(front)
    await front.answer(rows(1.0, version="1"))
    front.dispatch.routes = Routes({"double": (("1", 0.0), ("2", 1.0))})
    await front.answer(rows(1.0))
    front.repository.serve(tensor_model("double", broken))
    front.dispatch.routes = Routes({"double": (("1", 1.0), ("2", 0.0))})
    await front.refusal(rows(1.0))
    await shadowed.over()
    assert shadowed.pairs == []


@both
async def test_what_a_fallback_answered_is_not_copied(house):
    front = house(policies(double=ModelPolicy(routing=RoutingSettings(fallback=("same",)))))
    front.repository.serve(tensor_model("double", broken), tensor_model("same", lambda inputs: {"y": inputs["x"]}))
    shadowed = Shadowed(front)
    await front.answer(rows(1.0))
    await shadowed.over()
    assert shadowed.pairs == []


@both
async def test_an_answer_whose_caller_left_is_not_copied(house):
    front = house()
    shadowed = Shadowed(front, model="chat")
    client = front.ask(say("hello"))
    (await front.chat.next()).say("I")
    await turns()
    await client.leave()
    await shadowed.over()
    assert shadowed.second.asked == []


# Nobody's


@both
async def test_a_copy_is_in_no_book_no_limit_and_no_window(house):
    front = house()
    shadowed = Shadowed(front)
    front.gateway.watches.set({"double": Watch(feedback=True)})
    for _ in range(5):
        await front.answer(rows(1.0, log_id="r"))
        await shadowed.over()
    assert len(shadowed.pairs) == 5
    (window,) = front.gateway.watches.take(2000.0)
    assert window.of("1").requests == 5 and "2" not in window.tallies
    assert {row.version for row in front.gateway.watches.take_exposures()} == {"1"}
    # that each client left one record, and nobody else did, is checked when the house is closed


@both
async def test_a_copy_does_not_tell_who_asked(house):
    front = house()
    shadowed = Shadowed(front, model="chat")
    client = front.ask(say("hello", session="s", id="own"))
    (await front.chat.next()).end("hi")
    await client.end()
    copied = await shadowed.second.next()
    copied.end("hi")
    pair = await shadowed.pair()
    for request in (copied.request, pair.request):
        assert request.caller.tenant != "acme" and not request.session and request.envelope is None and request.booked is None
    assert pair.request.prompt.salt == ""
    assert copied.prompt.salt == "acme"  # its blocks are beside no other tenant's


@both
async def test_a_copy_is_of_the_lowest_priority_and_asks_for_all_at_once(house):
    front = house()
    shadowed = Shadowed(front, model="chat")
    for levels, priority in ((0, LOWEST), (4, 4)):
        shadowed.second.spec = ModelSpec(name="chat", batching=BatchingSpec(priority_levels=levels))
        number = len(front.chat.asked)
        client = front.ask(say("hello"))
        (await front.chat.next(number + 1)).end()
        await client.end()
        copied = await shadowed.second.next(number + 1)
        assert copied.request.priority == priority and not copied.prompt.stream
        copied.end()
        await shadowed.over()


async def test_the_filtered_request_is_copied(house):
    front = house(policies(shout=ModelPolicy(filters=FilterPolicy(pii="redact"))))
    front.repository.serve(tensor_model("shout", lambda inputs: {"y": inputs["x"]}, datatype="BYTES", shape=(-1, 1), version="2"))
    shadows, pairs = front.gateway.shadows, []
    shadows.on_pair = pairs.append
    front.dispatch.routes = Routes({"shout": (("1", 1.0), ("2", 0.0))})
    shadows.set({"shout": ShadowRule(version="2", share=1.0)})
    await front.answer(texts("write to ann@example.com"))
    await until(lambda: pairs)
    assert b"example" not in pairs[0].request.inputs["x"].tobytes() and b"[EMAIL]" in pairs[0].request.inputs["x"][0, 0]


# No copy


async def test_no_more_than_a_few_at_once(house):
    front = house()
    shadowed = Shadowed(front, model="chat", max_in_flight=2)
    for number in range(4):
        client = front.ask(say("hello"))
        (await front.chat.next(number + 1)).end("hi")
        await client.end()
    await shadowed.second.next(2)
    await turns()
    assert len(shadowed.second.running) == 2 and shadowed.count("full") == 2
    for asked in list(shadowed.second.running):
        asked.end("hi")
    await shadowed.pair(2)


async def test_no_copy_while_requests_wait_for_the_model(house):
    front = house(policies(chat=ModelPolicy(queue=QueueSettings(max_in_flight=1))))
    shadowed = Shadowed(front, model="chat")
    clients = [front.ask(say(text)) for text in ("one", "two", "three")]
    (await front.chat.next(1)).end("hi")
    await clients[0].end()
    await shadowed.over()
    assert shadowed.count("busy") == 1  # one still waits
    for number in (2, 3):
        (await front.chat.next(number)).end("hi")
        await clients[number - 1].end()
    (await shadowed.second.next()).end("hi")
    assert (await shadowed.pair()).request.prompt.chat.messages[0].content == "two"
    (await shadowed.second.next(2)).end("hi")
    await shadowed.pair(2)


async def test_no_copy_where_the_candidate_has_a_queue_of_its_own(house):
    front = house()
    shadowed = Shadowed(front, model="chat")
    shadowed.second.metrics.queue = lambda: (1, 1)
    client = front.ask(say("hello"))
    (await front.chat.next()).end("hi")
    await client.end()
    await shadowed.over()
    assert shadowed.count("busy") == 1 and shadowed.second.asked == []


async def test_no_copy_of_what_is_too_large(house):
    front = house()
    shadowed = Shadowed(front, max_bytes=500)
    await front.answer(rows(*range(64)))
    assert shadowed.count("large") == 1
    shadowed = Shadowed(front, model="chat", max_bytes=1000)
    client = front.ask(say("hello"))
    (await front.chat.next()).end("word " * 1000)
    await client.end()
    assert shadowed.count("large") == 1
    client = front.ask(say("hello"))
    (await front.chat.next(2)).end("hi")
    await client.end()
    (await shadowed.second.next()).end("word " * 1000)
    await shadowed.over()
    assert shadowed.count("large") == 2 and shadowed.pairs == []


async def test_a_prompt_is_as_large_as_its_texts(house):
    front = house()
    shadowed = Shadowed(front, model="chat", max_bytes=20_000)
    taken = []
    shadowed.shadows.record("chat", Recording(lambda request, responses: taken.append(request), max_bytes=20_000))
    client = front.ask(say("word " * 5000))
    (await front.chat.next()).end("hi")
    await client.end()
    await shadowed.over()
    assert shadowed.count("large") == 1 and taken == [] and shadowed.second.asked == []


@pytest.mark.parametrize(
    "prompt",
    [
        Generate(text="x" * 5000),
        Generate(chat=Chat(messages=[Message(role="user", content="hi"), Message(role="user", content="x" * 5000)])),
        Generate(chat=Chat(messages=[], tools=[{"function": {"parameters": {"deep": [1, ["x" * 5000]]}}}])),
        Generate(token_ids=[7] * 200),
        Embed(text="x" * 5000),
        Paint(text="x", image=b"x" * 5000),
    ],
)
def test_a_pair_is_as_large_as_its_prompt(prompt):
    def pair(prompt):
        return Pair(
            model="m",
            request=Request(model="m", prompt=prompt),
            champion_version="1",
            candidate_version="2",
            champion=(),
            champion_seconds=0.1,
            candidate_seconds=0.1,
        )

    assert 5000 < pair(prompt).nbytes < 10_000
    assert pair(Generate(text="hi")).nbytes < 500


async def test_texts_in_tensors_are_as_large_as_they_are(house):
    front = house()
    front.repository.serve(
        tensor_model("shout", lambda inputs: {"y": np.array([[b"x" * 5000]], object)}, datatype="BYTES", shape=(-1, 1)),
        tensor_model("shout", lambda inputs: {"y": inputs["x"]}, datatype="BYTES", shape=(-1, 1), version="2"),
    )
    front.dispatch.routes = Routes({"shout": (("1", 1.0), ("2", 0.0))})
    shadows = front.gateway.shadows
    shadows.set({"shout": ShadowRule(version="2", share=1.0, max_bytes=4000)})
    await front.answer(texts("y" * 5000))
    await front.answer(texts("y"))
    assert front.counts.get(COPIES, "shout", "large") == 2 and not shadows.num_in_flight


async def test_no_copy_for_a_version_that_is_not_there(house):
    front = house()
    shadowed = Shadowed(front, version="9")
    await front.answer(rows(1.0))
    await shadowed.over()
    assert shadowed.count("missing") == 1


async def test_no_copy_while_the_server_stops(house):
    front = house()
    shadowed = Shadowed(front, model="chat")
    client = front.ask(say("hello"))
    front.gateway.stopping = True
    (await front.chat.next()).end("hi")
    await client.end()
    await shadowed.over()
    assert shadowed.count("busy") == 1 and shadowed.second.asked == []


async def test_stopping_gives_up_what_is_under_way(house):
    front = house()
    shadowed = Shadowed(front, model="chat")
    client = front.ask(say("hello"))
    (await front.chat.next()).end("hi")
    await client.end()
    copied = await shadowed.second.next()
    await shadowed.shadows.stop()
    assert copied.cancelled and not shadowed.shadows.num_in_flight and shadowed.pairs == []


# How the candidate fares


@both
async def test_a_candidate_that_fails_is_told_of(house):
    front = house()
    shadowed = Shadowed(front, function=broken)
    await front.answer(rows(1.0))
    pair = await shadowed.pair()
    assert "out of order" in pair.error and pair.candidate == () and shadowed.count("failed") == 1


async def test_a_candidate_that_takes_too_long_is_told_of_and_stopped(house):
    front = house()
    shadowed = Shadowed(front, model="chat", timeout=1e-3)
    client = front.ask(say("hello"))
    (await front.chat.next()).end("hi")
    await client.end()
    pair = await shadowed.pair()
    assert pair.error == "no answer within 0.001 s" and shadowed.second.asked[0].cancelled


@pytest.mark.parametrize("error", [QueueFull("full"), ShuttingDown("unloading")])
async def test_a_candidate_that_has_no_room_has_not_failed(house, error):
    front = house()
    shadowed = Shadowed(front, model="chat")
    client = front.ask(say("hello"))
    (await front.chat.next()).end("hi")
    await client.end()
    (await shadowed.second.next()).fail(error)
    await shadowed.over()
    assert shadowed.count("refused") == 1 and shadowed.pairs == []


async def test_who_reads_pairs_may_fail_and_be_slow(house, monkeypatch):
    front = house()
    shadowed = Shadowed(front)
    go_on, begun, seen = threading.Event(), threading.Event(), []

    def read(pair):
        begun.set()
        go_on.wait(SECONDS)
        seen.append(pair)
        raise RuntimeError("a bug")

    async def ask():
        await front.answer(rows(1.0))
        await until(lambda: not shadowed.shadows.num_in_flight)

    shadowed.shadows.on_pair = read
    monkeypatch.setattr("fairlead.gateway.shadow.MAX_WAITING", 3)
    await ask()
    await until(begun.is_set)
    for _ in range(7):
        await ask()
    go_on.set()
    await shadowed.over()
    assert len(seen) == 4  # one is being read, three wait
    assert shadowed.count("answered") == 4 and shadowed.count("full") == 4


# Scores


def told(text: str, logprob: float) -> TokenLogprob:
    return TokenLogprob(1, text, text.encode(), logprob, 1)


async def test_both_say_how_likely_the_champions_answer_is(house):
    front = house()
    shadowed = Shadowed(front, model="chat", score=True)
    client = front.ask(say("hello", sampling={"temperature": 0.7}))
    (await front.chat.next()).end("Good", " day")
    await client.end()
    (await shadowed.second.next()).end("Hi")
    scored = await front.chat.next(2)
    assert [(each.role, each.content) for each in scored.prompt.chat.messages] == [("user", "hello"), ("assistant", "Good day")]
    assert scored.prompt.sampling.max_tokens == 0 and scored.prompt.sampling.prompt_logprobs == 0
    scored.respond(delta=Delta(prompt_logprobs=[None, told("Good day", -1.0)], finish_reason="length", usage=Usage(prompt_tokens=2)))
    scored.close(None)
    other = await shadowed.second.next(2)
    assert other.prompt == scored.prompt
    other.respond(delta=Delta(prompt_logprobs=[None, told("Good day", -3.0)], finish_reason="length", usage=Usage(prompt_tokens=2)))
    other.close(None)
    pair = await shadowed.pair()
    assert [each.delta.prompt_logprobs[1].logprob for each in pair.scores] == [-1.0, -3.0]


def test_what_is_scored():
    def answer(text, ids=(1, 2)):
        from fairlead.core.request import Response

        return [Response(model="m", version="1", delta=Delta(text=text, token_ids=list(ids)))]

    assert scoring(Generate(text="Once"), answer(" upon")).text == "Once upon"
    assert scoring(Generate(token_ids=[7, 8]), answer("x")).token_ids == [7, 8, 1, 2]
    for prompt in (Generate(text="Once"), Generate(token_ids=[7]), Generate(chat=Chat(messages=[]))):
        scored = scoring(structs.replace(prompt, adapter="pirate"), answer("x"))
        assert isinstance(scored, Generate) and scored.adapter == "pirate"
    assert scoring(Generate(text="Once", sampling=Sampling(n=2)), answer("x")) is None
    assert scoring(Generate(text="Once"), answer("", ())) is None
    assert scoring(None, answer("x")) is None
    begun = Chat(messages=[Message(role="user", content="hi"), Message(role="assistant", content="Go")], continue_final_message=True)
    assert continued(begun, "od").messages[-1].content == "Good"


# Recording


@both
async def test_requests_and_answers_are_offered_to_who_records(house):
    front = house()
    taken = []
    shadows = front.gateway.shadows
    shadows.record("double", Recording(lambda request, responses: taken.append((request, responses))))
    await front.answer(rows(2.0))
    await until(lambda: taken)
    (request, responses), *_ = taken
    assert request.inputs["x"].tolist() == [[2, 2]] and responses[0].outputs["y"].tolist() == [[4, 4]]
    assert request.caller.tenant != "acme"
    shadows.record("double", None)
    await front.answer(rows(2.0))
    await turns()
    assert len(taken) == 1 and front.counts.get(COPIES, "double", "answered") == 0


@both
async def test_only_what_the_champion_answered_is_offered(house):
    front = house()
    shadowed = Shadowed(front, share=0.0)
    champion, taken = ["1"], []
    offered = Recording(lambda request, responses: taken.append(responses[0].version), champion=lambda: champion[0])
    shadowed.shadows.record("double", offered)
    await front.answer(rows(1.0))
    front.dispatch.routes = Routes({"double": (("1", 0.0), ("2", 1.0))})
    await front.answer(rows(2.0))
    await shadowed.over()
    assert taken == ["1"]
    champion[0] = "2"  # promoted
    await front.answer(rows(3.0))
    await shadowed.over()
    assert taken == ["1", "2"]


async def test_a_share_and_no_more_than_so_many_bytes_are_offered(house):
    front = house()
    taken: list[Request] = []
    shadows = front.gateway.shadows
    shadows.random = iter([0.4, 0.6, 0.4]).__next__
    shadows.record("double", Recording(lambda request, responses: taken.append(request), share=0.5, max_bytes=500))
    await front.answer(rows(1.0))
    await front.answer(rows(2.0))
    await front.answer(rows(*range(64)))
    await until(lambda: not shadows.reading)
    assert [each.inputs["x"][0, 0] for each in taken] == [1.0]


async def test_a_recording_and_a_shadow_share_one_capture(house):
    front = house()
    shadowed = Shadowed(front)
    taken = []
    shadowed.shadows.record("double", Recording(lambda request, responses: taken.append(responses)))
    await front.answer(rows(2.0))
    pair = await shadowed.pair()
    assert taken[0] == pair.champion


async def test_what_is_asked_at_temperature_0_is_asked_so_again(house):
    front = house()
    shadowed = Shadowed(front, model="chat")
    client = front.ask(say("hello", sampling={"temperature": 0.0, "max_tokens": 7, "seed": 3}))
    (await front.chat.next()).end("hi", usage=WORDS)
    await client.end()
    copied = await shadowed.second.next()
    assert copied.prompt.sampling == client.request.prompt.sampling
    copied.end("hi")
    await shadowed.pair()
