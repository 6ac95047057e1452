"""What is stored, for how long, how much of it, and what comes back."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from fairlead.core.generation import Delta, TokenLogprob, ToolCall, Usage
from fairlead.core.policy import CacheSettings, ReuseSettings
from fairlead.core.request import Response
from fairlead.gateway.reuse.response_cache import Recorder, ResponseCache, Stored, copy_of
from tests.gateway.reuse.questions import delta, told

POLICY = CacheSettings(mode="deterministic", ttl=60.0, stale_seconds=30.0)


def recorded(*responses: Response, now: float = 0.0, max_bytes: int = 1 << 20, policy: CacheSettings = POLICY) -> Stored | None:
    recorder = Recorder("m", "1", max_bytes)
    for response in responses:
        recorder.add(response)
    return recorder.finish(now, policy)


def answer(text: str = "yes", model: str = "m", now: float = 0.0) -> Stored:
    stored = recorded(told(text), now=now)
    assert stored is not None
    stored.responses[0].model = model
    return stored


def cache(max_bytes: int = 1 << 20) -> ResponseCache:
    return ResponseCache(ReuseSettings(max_bytes=max_bytes))


# For how long


def test_an_answer_is_fresh_then_stale_then_gone():
    c = cache()
    c.put(b"k", answer(now=100.0))
    assert c.get(b"k", 159.9) is not None
    assert c.get(b"k", 160.0) is None
    assert c.get(b"k", 160.0, stale_ok=True) is not None
    assert c.get(b"k", 190.0, stale_ok=True) is None
    assert (len(c), c.num_bytes) == (0, 0)


def test_a_caller_may_want_it_younger():
    c = cache()
    c.put(b"k", answer(now=100.0))
    assert c.get(b"k", 110.0, max_age=10.0) is not None
    assert c.get(b"k", 110.1, max_age=10.0) is None
    assert c.get(b"k", 100.1, max_age=0.0) is None
    assert c.get(b"k", 170.0, max_age=1000.0) is None  # but not older than the policy allows


def test_the_head_of_the_answer_says_where_it_came_from_and_how_old_it_is():
    assert answer(now=100.0).headers("hit", 112.7) == {"x-fairlead-cache": "hit", "age": "12"}
    assert answer(now=100.0).headers("stale", 99.0)["age"] == "0"  # another gateway's clock


# How much


def test_what_was_not_asked_for_longest_goes_first():
    size = answer().nbytes
    c = cache(3 * size)
    for key in (b"a", b"b", b"c"):
        c.put(key, answer())
    assert c.get(b"a", 1.0) is not None
    c.put(b"d", answer())
    assert [c.get(key, 1.0) is not None for key in (b"a", b"b", b"c", b"d")] == [True, False, True, True]
    assert c.num_evicted == 1


def test_an_answer_that_would_fill_the_cache_is_not_stored():
    c = cache(2000)
    c.put(b"a", answer())
    c.put(b"b", answer("x" * 2000))
    assert c.get(b"b", 1.0) is None and c.get(b"a", 1.0) is not None
    c.put(b"a", answer("x" * 2000))  # and what it would replace is out of date
    assert c.get(b"a", 1.0) is None and c.num_bytes == 0


def test_the_answers_of_a_model_are_dropped_together():
    c = cache()
    c.put(b"a", answer(model="m"))
    c.put(b"b", answer(model="n"))
    c.put(b"c", answer(model="m"))
    assert (c.drop("m"), c.drop("m")) == (2, 0)
    assert c.get(b"a", 1.0) is None and c.get(b"b", 1.0) is not None


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("pgd"), st.integers(0, 9), st.integers(0, 800), st.floats(0, 20)), max_size=60))
def test_the_bytes_are_what_is_there_and_never_more_than_the_bound(steps: list[tuple[str, int, int, float]]):
    c, now = cache(3000), 0.0
    for what, key, length, seconds in steps:
        now += seconds
        model = f"m{key % 3}"
        if what == "p":
            c.put(b"%d" % key, answer("x" * length, model=model, now=now))
        elif what == "g":
            c.get(b"%d" % key, now, stale_ok=bool(length % 2))
        else:
            c.drop(model)
        assert c.num_bytes == sum(stored.nbytes for stored, _ in c._entries.values()) <= 3000
        assert {key for keys in c._keys.values() for key in keys} == set(c._entries)


# What is stored


def test_a_stream_is_stored_as_whole_choices_with_the_usage_last():
    one = TokenLogprob(token_id=1, token="a", data=b"a", logprob=-0.5, rank=1)
    stored = recorded(
        delta("Hel", 0, token_ids=[1], logprobs=[one]),
        delta("By", 1, token_ids=[2]),
        delta("lo", 0, token_ids=[3], logprobs=[one, one]),
        told("!", index=0, stop_reason="\n"),
        delta("e", 1, finish_reason="length"),
    )
    assert stored is not None and stored.usage == Usage(prompt_tokens=3, completion_tokens=2)
    first, last = (response.delta for response in stored.replay())
    assert first is not None and last is not None
    assert (first.index, first.text, first.token_ids, first.finish_reason) == (1, "Bye", [2], "length")
    assert (last.index, last.text, last.token_ids, last.finish_reason, last.stop_reason) == (0, "Hello!", [1, 3], "stop", "\n")
    assert last.logprobs == [one, one, one] and first.logprobs is None
    assert last.usage == stored.usage and first.usage is None


def test_reasoning_and_calls_of_tools_are_stored_whole_and_shared_with_nobody():
    pieces = [
        Delta(reasoning="h"),
        Delta(reasoning="m", tool_calls=[ToolCall(index=0, id="c", name="f", arguments="{")]),
        Delta(tool_calls=[ToolCall(index=0, arguments="}")], finish_reason="tool_calls", usage=Usage(completion_tokens=3)),
    ]
    stored = recorded(*(Response(model="m", version="1", delta=piece) for piece in pieces))
    assert stored is not None
    (whole,) = stored.responses
    call = ToolCall(index=0, id="c", name="f", arguments="{}")
    assert (whole.delta.reasoning, whole.delta.tool_calls, whole.delta.finish_reason) == ("hm", [call], "tool_calls")
    copy_of(whole).delta.tool_calls[0].arguments += "!"
    assert whole.delta.tool_calls == [call]


def test_a_whole_answer_is_given_to_a_stream_as_it_is():
    stored = recorded(told("Hello"))
    assert stored is not None
    (response,) = stored.replay()
    assert response.delta is not None and response.delta.text == "Hello" and response.delta.usage is not None


def test_an_embedding_comes_back():
    vector = np.array([0.25, float("nan")], "<f4").tobytes()
    stored = recorded(Response(model="m", version="1", delta=Delta(vector=vector, usage=Usage(prompt_tokens=4))))
    assert stored is not None
    assert next(stored.replay()).delta.vector == vector  # type: ignore[union-attr]


def test_tensors_are_stored_as_copies_that_nobody_can_change():
    batch = np.arange(6, dtype=np.float32).reshape(3, 2)
    names = np.array([b"a", b"b", b"c"], object)
    stored = recorded(Response(model="m", version="1", outputs={"y": batch[1:2], "n": names[:1]}, id="somebody's"))
    assert stored is not None
    batch[:] = -1.0
    names[:] = b"evil"
    for _ in range(2):
        (response,) = stored.replay()
        assert response.id == ""
        assert response.outputs["y"].tolist() == [[2.0, 3.0]] and response.outputs["n"].tolist() == [b"a"]
        assert response.outputs["y"].base is None
        with pytest.raises(ValueError, match="read-only"):
            response.outputs["y"][0, 0] = 7.0
        # what a reader may do with its own
        response.outputs.clear()
        response.headers["x"] = "y"
        response.parameters["z"] = 1


def test_what_one_reader_does_to_a_piece_is_not_seen_by_the_next():
    stored = recorded(told("Hello", token_ids=[1]))
    assert stored is not None
    first = next(stored.replay())
    assert first.delta is not None
    first.delta.text += " and more"
    first.delta.token_ids.append(2)
    again = next(stored.replay())
    assert again.delta is not None and (again.delta.text, again.delta.token_ids) == ("Hello", [1])


def test_what_an_engine_does_to_a_piece_afterwards_is_not_stored():
    recorder, piece = Recorder("m", "1", 1 << 20), delta("a", token_ids=[1])
    recorder.add(piece)
    assert piece.delta is not None
    piece.delta.text += "b"
    piece.delta.token_ids += [2]
    recorder.add(told("c"))
    stored = recorder.finish(0.0, POLICY)
    assert stored is not None and stored.responses[0].delta is not None
    assert (stored.responses[0].delta.text, stored.responses[0].delta.token_ids) == ("ac", [1])


def test_pieces_of_another_servers_answer_are_joined_with_what_says_how_to_read_them():
    head = {"Content-Type": "text/event-stream", "openai-processing-ms": "7", "retry-after": "1"}
    pieces = [Response(model="m", version="1", raw=data) for data in (b"data: a\n\n", b"data: b\n\n")]
    pieces[0].headers = head
    pieces[1].usage = Usage(prompt_tokens=1)
    stored = recorded(*pieces)
    assert stored is not None and stored.usage == Usage(prompt_tokens=1)
    (response,) = stored.replay()
    assert (response.raw, response.headers) == (b"data: a\n\ndata: b\n\n", {"Content-Type": "text/event-stream"})


@pytest.mark.parametrize(
    "responses",
    [
        [],
        [Response(model="m", version="1", raw=b"no", status=400)],
        [Response(model="m", version="1", raw=b"ok"), Response(model="m", version="1", raw=b"no", status=500)],
        [Response(model="m", version="1", outputs={"y": np.zeros(1)}), Response(model="m", version="1", outputs={"y": np.zeros(1)})],
        [delta("x"), delta("", finish_reason="abort")],
        [delta("x" * 3000)],
        [delta("x" * 400) for _ in range(10)],
        [Response(model="m", version="2", raw=b"of another version")],
        [Response(model="fallback", version="1", raw=b"of another model")],
    ],
    ids=["nothing", "error", "late error", "tensors", "aborted", "large", "large together", "other version", "other model"],
)
def test_answers_that_are_not_whole_right_and_of_the_model_asked_are_not_stored(responses: list[Response]):
    assert recorded(*responses, max_bytes=2000) is None


def test_rate_limits_and_marks_of_one_caller_are_not_told_to_the_next():
    response = told("hi")
    response.headers = {"x-ratelimit-remaining-requests": "3", "x-fairlead-degraded": "max_tokens=3"}
    stored = recorded(response)
    assert stored is not None and next(stored.replay()).headers == {}


def test_a_copy_shares_nothing_that_can_be_changed():
    response = told("hi", token_ids=[1])
    own = copy_of(response)
    assert own == response and own is not response and own.delta is not response.delta
    assert structs.asdict(own).keys() == structs.asdict(response).keys()
