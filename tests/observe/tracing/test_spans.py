"""From a timeline to its spans."""

import pytest

from fairlead.observe.tracing.exporter import Kept
from fairlead.observe.tracing.spans import MAX_LINKS, Span, batch_span, spans_of
from fairlead.observe.tracing.tracing import build
from tests.observe.tracing.timelines import CALLERS, PARENT, TRACE, batch_note, batched, chat, timeline

OFFSET = 1_800_000_000.0
ROOT = "POST /v1/chat/completions"


def tree(spans: list[Span]) -> dict[str, str]:
    """Name → its parent's name."""
    names = {span.span_id: span.name for span in spans}
    return {span.name: names.get(span.parent_id, "") for span in spans}


def named(spans: list[Span], name: str) -> Span:
    return next(span for span in spans if span.name == name)


def seconds(span: Span) -> float:
    return (span.end - span.start) / 1e9


def test_a_chat_is_told_from_the_door_to_the_engines_steps() -> None:
    spans = spans_of(chat(), OFFSET, "chance")

    assert tree(spans) == {
        ROOT: "",
        "read": ROOT,
        "queue": ROOT,
        "chat llama": ROOT,
        "engine": "chat llama",
        "waiting": "engine",
        "prefill": "engine",
        "decode": "engine",
    }
    assert named(spans, "queue").attributes == {"fairlead.ahead": 3, "fairlead.in_flight": 4}
    assert seconds(named(spans, "queue")) == pytest.approx(0.997)
    assert seconds(named(spans, "decode")) == pytest.approx(0.8)
    assert len({span.span_id for span in spans}) == len(spans)
    assert {span.trace_id for span in spans} == {spans[0].trace_id}


def test_a_model_is_told_in_the_words_of_the_genai_conventions() -> None:
    made = chat()

    model = named(spans_of(made, OFFSET), "chat llama").attributes

    assert model == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fairlead",
        "gen_ai.request.model": "llama",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stream": True,
        "gen_ai.output.type": "text",
        "gen_ai.response.id": "r-1",
        "gen_ai.response.model": "llama@1",
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.response.time_to_first_chunk": pytest.approx(1.2),
        "gen_ai.usage.input_tokens": 11,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "fairlead.attempt": 1,
        "fairlead.model": "llama",
        "fairlead.place": "llama@1#0",
        "fairlead.version": "1",
    }


def test_the_request_is_a_server_span_with_its_callers_as_parent() -> None:
    [root] = spans_of(timeline(traceparent=CALLERS, tenant="acme", bytes_in=12), OFFSET, "parent")

    assert (root.trace_id, root.parent_id, root.remote_parent, root.kind) == (TRACE, PARENT, True, "server")
    assert root.start == 1_800_000_100 * 10**9 and seconds(root) == 1.0
    assert root.attributes["http.request.method"] == "POST"
    assert root.attributes["http.route"] == "/v2/models/{model}/infer"
    assert root.attributes["url.path"] == "/v2/models/fraud/infer"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["fairlead.tenant"] == "acme"
    assert root.attributes["fairlead.kept"] == "parent"
    assert root.error is None


def test_a_grpc_call_is_told_in_the_words_of_rpc() -> None:
    path = "/inference.GRPCInferenceService/ModelInfer"
    [root] = spans_of(timeline(protocol="grpc", path=path, status=14, outcome="refused", reason="queue-full"), OFFSET)

    assert root.name == path[1:]
    assert root.attributes["rpc.system.name"] == "grpc"
    assert root.attributes["rpc.method"] == path[1:]
    assert root.attributes["rpc.response.status_code"] == "UNAVAILABLE"
    assert root.attributes["error.type"] == "queue-full"
    assert root.error is None  # the caller's fault, or nobody's


def test_our_failures_are_errors() -> None:
    made = timeline(status=500, outcome="failure", reason="model-error", error="it broke")
    made.events = [(100.1, "batched", batch_note())]

    spans = spans_of(made, OFFSET)

    assert [(span.name, span.error) for span in spans] == [
        (spans[0].name, "it broke"),
        ("infer fraud", "it broke"),
        ("batch wait", None),
        ("compute", None),
    ]
    assert spans[0].attributes["error.type"] == "model-error"


def test_each_place_that_was_asked_is_a_span_whose_id_it_was_told() -> None:
    made = timeline(sample=1.0, ended=0.0)
    sent: list[str] = []
    for number, place in enumerate(("http://a:8000", "http://b:9000/v1"), 1):
        made.note(100.0 + number / 10, "sent", {"place": place, "version": "", "attempt": number})
        sent.append(made.outgoing())
        if number == 1:
            made.note(100.15, "failed", {"place": place, "error": "unreachable"})
            made.note(100.16, "retried", {"reason": "unreachable"})
    made.ended = 101.0

    root, first, second = spans_of(made, OFFSET)

    assert [each.split("-")[1:] for each in sent] == [
        [root.trace_id, first.span_id, "01"],
        [root.trace_id, second.span_id, "01"],
    ]
    assert (first.kind, second.kind) == ("client", "client")
    assert (first.error, second.error) == ("", None)
    assert first.attributes["error.type"] == "unreachable"
    assert seconds(first) == pytest.approx(0.05)
    assert (second.attributes["server.address"], second.attributes["server.port"]) == ("b", 9000)
    assert [event.name for event in root.events] == ["failed", "retried"]


def test_members_are_linked_to_their_batch_which_is_told_once_and_knows_them() -> None:
    note = batch_note()
    members = [batched(100.0 + number / 1000, note, f"r-{number}") for number in range(3)]

    spans = [span for some in build([Kept(member, OFFSET, "chance") for member in members]) for span in some]
    later = [span for some in build([Kept(batched(100.01, note, "r-9"), OFFSET, "chance")]) for span in some]

    [batch] = [span for span in spans if span.name == "batch fraud"]
    assert batch.links == [(member.trace_id, member.span_id) for member in members]
    assert batch.attributes["fairlead.batch.close_reason"] == "full"
    assert seconds(batch) == pytest.approx(0.05)
    for compute in (span for span in (*spans, *later) if span.name == "compute"):
        assert compute.links == [(batch.trace_id, batch.span_id)]
    assert "batch fraud" not in {span.name for span in later}


def test_where_a_request_waited_before_its_batch_is_seen() -> None:
    spans = spans_of(batched(100.0, batch_note()), OFFSET)

    assert tree(spans) == {
        "POST /v2/models/{model}/infer": "",
        "read": "POST /v2/models/{model}/infer",
        "infer fraud": "POST /v2/models/{model}/infer",
        "batch wait": "infer fraud",
        "compute": "infer fraud",
        "encode": "POST /v2/models/{model}/infer",
    }
    assert seconds(named(spans, "batch wait")) == pytest.approx(0.019, abs=1e-6)
    assert seconds(named(spans, "infer fraud")) == pytest.approx(0.069, abs=1e-6)
    assert seconds(named(spans, "encode")) == pytest.approx(0.03)


def test_links_are_bounded() -> None:
    note = batch_note()
    note.trace_id, note.span_id = "1" * 32, "2" * 16
    assert len(batch_span(note, [("3" * 32, "4" * 16)] * 1000, OFFSET).links) == MAX_LINKS


def test_a_fallback_names_the_model_that_was_asked_then() -> None:
    made = timeline(kind="generate", path="/v1/completions", model="big")
    made.events = [
        (100.1, "sent", {"place": "big@1#0", "version": "1", "attempt": 1}),
        (100.2, "failed", {"place": "big@1#0", "error": "replica died"}),
        (100.2, "fallback", {"model": "small"}),
        (100.2, "sent", {"place": "small@1#0", "version": "1", "attempt": 2}),
    ]
    assert [span.name for span in spans_of(made, OFFSET)[1:]] == ["text_completion big", "text_completion small"]


def test_names_of_any_characters_are_told_as_far_as_they_can_be() -> None:
    odd = "\ud800<script>\x00 ünï" + "x" * 5000
    made = timeline(model=odd, tenant=odd, kind="generate", path="/v1/completions", error=odd, outcome="failure", request_id=odd)
    made.events = [(100.1, "sent", {"place": odd, "version": odd, "attempt": 1}), (100.2, "reused", {"outcome": odd, "n": 1 << 80})]

    for span in spans_of(made, OFFSET):
        assert len(span.name) < 600
        span.name.encode()
        for value in span.attributes.values():
            str(value).encode()


def test_what_has_no_events_and_no_time_is_a_span_all_the_same() -> None:
    [root] = spans_of(timeline(path="", model="", seconds=-5.0, outcome="refused", reason="not-found", status=404), OFFSET)
    assert root.name == "POST" and root.end == root.start


def test_a_call_of_a_webhook_tells_who_was_called_and_not_where() -> None:
    made = timeline("whk_1", protocol="webhook", path="https://hooks.example/secret?token=1", traceparent=CALLERS, status=503)
    made.job, made.error, made.outcome = "job_1", "answered 503", "failure"

    [call] = spans_of(made, OFFSET)

    assert (call.name, call.kind, call.parent_id, call.error) == ("POST", "client", PARENT, "answered 503")
    assert call.attributes["server.address"] == "hooks.example"
    assert "secret" not in repr(call)
