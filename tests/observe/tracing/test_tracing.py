"""From finished requests to a collector that understands OTLP, and to one that does not answer."""

import asyncio
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from fairlead.core.errors import ConfigError
from fairlead.core.generation import Generate, Sampling
from fairlead.core.request import Request
from fairlead.core.timeline import Timeline
from fairlead.core.tracing import TraceSettings
from fairlead.observe.counts import Counts
from fairlead.observe.tracing.fake_collector import FakeCollector, Seen, spans_in
from fairlead.observe.tracing.outlets import Outlet, outlet_of
from fairlead.observe.tracing.target import Target, resource_of, target_of, with_path
from fairlead.observe.tracing.tracing import Tracing
from tests.gateway.identity.authority import Authority
from tests.observe.tracing.timelines import CALLERS, NOT_SAMPLED, PARENT, TRACE, batch_note, batched, chat, timeline

COUNT = "fairlead_traces_total"
QUICK = 0.02


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def collector() -> Iterator[FakeCollector]:
    with FakeCollector() as running:
        yield running


def tracing(url: str, **settings: object) -> Tracing:
    made = Tracing.of(TraceSettings(endpoint=url, **{"interval": QUICK, "max_per_second": 0.0, **settings}), Counts())  # type: ignore[arg-type]
    assert made is not None
    return made


def outlet_to(url: str) -> Outlet:
    target = target_of(TraceSettings(endpoint=url))
    assert target is not None
    return outlet_of(target)


def unreachable() -> str:
    """Nobody listens there."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}"


async def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_request_arrives_at_the_collector_as_it_was_noted(collector: FakeCollector) -> None:
    traces = tracing(collector.url, service="front", attributes={"deployment.environment.name": "test"}, headers={"X-Key": "s3cret"})
    traces.start()
    made = chat()
    made.traceparent = CALLERS

    traces([made])
    await traces.stop()

    spans = {span.name: span for span in collector.spans}
    root, model = spans["POST /v1/chat/completions"], spans["chat llama"]
    assert (root.trace_id, root.parent_id, root.kind) == (TRACE, PARENT, "server")
    assert {span.trace_id for span in collector.spans} == {TRACE}
    assert (model.parent_id, spans["engine"].parent_id, spans["prefill"].parent_id) == (
        root.span_id,
        model.span_id,
        spans["engine"].span_id,
    )
    assert model.attributes["gen_ai.response.finish_reasons"] == ["stop"]
    assert root.resource["service.name"] == "front"
    assert root.resource["deployment.environment.name"] == "test"
    assert abs(root.end - (time.time() - time.perf_counter() + made.ended)) < 60.0
    assert root.end - root.start == pytest.approx(2.0, abs=1e-5)
    assert "first" in root.events
    [headers] = collector.headers
    assert (headers[":path"], headers["content-type"], headers["x-key"]) == ("/v1/traces", "application/x-protobuf", "s3cret")
    assert traces.counts.get(COUNT, "exported") == 1


async def test_a_collector_of_the_grpc_protocol_is_told_the_same() -> None:
    received: list[Seen] = []

    def export(data: bytes, context: grpc.ServicerContext) -> bytes:
        received.extend(spans_in(data))
        assert dict(context.invocation_metadata())["x-key"] == "s3cret"
        return b""

    server = grpc.server(ThreadPoolExecutor(1))
    method = grpc.unary_unary_rpc_method_handler(export)
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        traces = tracing(f"http://127.0.0.1:{port}", protocol="grpc", headers={"X-Key": "s3cret"})
        traces.start()
        traces([chat()])
        await traces.stop()
    finally:
        server.stop(None).wait(10.0)

    assert {span.name for span in received} >= {"POST /v1/chat/completions", "chat llama", "prefill"}
    assert traces.counts.get(COUNT, "exported") == 1


async def test_members_of_a_batch_are_linked_to_it_in_the_collector_too(collector: FakeCollector) -> None:
    traces = tracing(collector.url)
    traces.start()
    note = batch_note()

    traces([batched(100.0, note, "a"), batched(100.001, note, "b")])
    await traces.stop()

    [batch] = [span for span in collector.spans if span.name == "batch fraud"]
    roots = [(span.trace_id, span.span_id) for span in collector.spans if span.kind == "server"]
    assert set(batch.links) == set(roots) and len(roots) == 2
    assert [span.links for span in collector.spans if span.name == "compute"] == [((batch.trace_id, batch.span_id),)] * 2


async def test_a_member_that_left_does_not_tell_of_a_batch_that_lasts(collector: FakeCollector) -> None:
    traces = tracing(collector.url)
    traces.start()
    note = batch_note()
    ended, note.ended = note.ended, 0.0
    traces([batched(100.0, note, "a")])
    await until(lambda: bool(collector.spans))
    note.ended = ended

    traces([batched(100.001, note, "b")])
    await traces.stop()

    [batch] = [span for span in collector.spans if span.name == "batch fraud"]
    assert batch.end > batch.start and len(batch.links) == 1


async def test_those_that_are_told_of_kept_traces_find_them_at_the_collector(collector: FakeCollector) -> None:
    traces = tracing(collector.url, sample=0.3, slowest=0.0)
    told: list[Timeline] = []
    traces.kept.append(told.append)
    traces.start()

    traces([timeline(str(number)) for number in range(50)])
    traces([timeline("failed", outcome="failure", traceparent=NOT_SAMPLED)])
    await traces.stop()

    assert "failed" in {each.request_id for each in told} and 1 < len(told) < 51
    assert {each.trace_id for each in told} == {span.trace_id for span in collector.spans}


async def test_a_clock_that_is_set_while_the_server_runs_moves_no_span_out_of_its_trace(collector: FakeCollector) -> None:
    clock = [1_000_000_000.0]
    traces = Tracing(TraceSettings(interval=QUICK), Counts(), outlet_to(collector.url), now=lambda: clock[0])
    traces.start()
    now = time.perf_counter()

    traces([timeline("before", arrived=now - 1)])
    clock[0] += 3600.0
    traces([timeline("after", arrived=now - 1)])
    await traces.stop()

    before, after = sorted(collector.spans, key=lambda span: span.start)
    assert after.start - before.start == pytest.approx(3600.0, abs=5.0)
    assert [span.end - span.start for span in (before, after)] == pytest.approx([1.0, 1.0], abs=1e-5)


async def test_an_invalid_traceparent_begins_a_new_trace(collector: FakeCollector) -> None:
    traces = tracing(collector.url)
    traces.start()
    bad = ["junk", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01", CALLERS + "-more", CALLERS.upper()]

    traces([timeline(str(number), traceparent=each) for number, each in enumerate(bad)])
    await traces.stop()

    assert len({span.trace_id for span in collector.spans} - {TRACE}) == len(bad)
    assert {span.parent_id for span in collector.spans} == {""}


async def test_odd_names_do_not_keep_their_neighbours_from_the_collector(collector: FakeCollector) -> None:
    traces = tracing(collector.url)
    traces.start()
    odd = "\ud800\x00 {}\n" + "é" * 10_000

    traces([timeline("odd", model=odd, tenant=odd, path=odd, kind="generate"), timeline("even")])
    await traces.stop()

    assert {span.attributes["fairlead.request_id"] for span in collector.spans} == {"odd", "even"}


async def test_a_collector_that_is_away_costs_requests_nothing_and_comes_back(collector: FakeCollector) -> None:
    url = unreachable()
    traces = tracing(url, timeout=0.2, max_queue=10)
    traces.start()

    for number in range(2000):
        traces([timeline(str(number))])
    await until(lambda: traces.counts.get(COUNT, "failed") > 0)
    dropped = traces.counts.get(COUNT, "dropped")
    traces._exporter.outlet = outlet_to(collector.url)
    await until(lambda: not traces._exporter._waiting)
    traces([timeline("again")])
    await until(lambda: traces.counts.get(COUNT, "exported") > 0)
    await traces.stop()

    assert dropped > 0
    assert "again" in {span.attributes["fairlead.request_id"] for span in collector.spans}
    assert sum(traces.counts.get(COUNT, outcome) for outcome in ("exported", "failed", "dropped", "rate")) == 2001


async def test_a_collector_that_hangs_holds_up_neither_requests_nor_the_end() -> None:
    with FakeCollector(hangs=True) as collector:
        traces = tracing(collector.url, timeout=60.0, max_queue=16)
        traces.start()
        traces([timeline("first")])
        await until(lambda: bool(collector.headers))

        for number in range(500):
            traces([timeline(str(number))])
        assert len(traces._exporter._waiting) == 16
        assert traces.counts.get(COUNT, "dropped") == 484

        traces._exporter.stop(0.1)  # and it does end
        await asyncio.sleep(0)
        assert traces.counts.get(COUNT, "dropped") == 500


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 ", b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"], ids=["head", "body"])
async def test_a_collector_that_answers_a_byte_at_a_time_has_no_longer_than_another(head: bytes) -> None:
    gone = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            while True:
                writer.write(b"x")
                await writer.drain()
                await asyncio.sleep(0.02)
        except OSError:
            gone.set()
        finally:
            writer.close()

    async with await asyncio.start_server(drip, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        outlet = outlet_of(Target(url=f"http://127.0.0.1:{port}/v1/traces", timeout=0.3))
        async with asyncio.timeout(30):
            assert "timed out" in await asyncio.to_thread(outlet.send, b"x")
            await gone.wait()


async def test_a_collector_that_refuses_is_asked_once_and_counted() -> None:
    with FakeCollector(400) as collector:
        traces = tracing(collector.url)
        traces.start()
        traces([timeline("1"), timeline("2")])
        await traces.stop()

        assert traces.counts.get(COUNT, "failed") == 2 and len(collector.headers) == 1


async def test_a_collector_that_is_busy_is_asked_again() -> None:
    with FakeCollector(503, 429, 200) as collector:
        traces = tracing(collector.url)
        traces.start()
        traces([timeline("1")])
        await traces.stop()

        assert traces.counts.get(COUNT, "exported") == 1 and len(collector.spans) == 1


async def test_a_collectors_certificate_is_held_against_its_authority(tmp_path: Path) -> None:
    ours, strangers = Authority(tmp_path, "ours"), Authority(tmp_path, "strangers")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*ours.server())
    with FakeCollector(tls=context) as collector:
        traces = tracing(collector.url, ca=str(ours.path))
        distrusting = tracing(collector.url, ca=str(strangers.path), timeout=0.2)
        for each in (traces, distrusting):
            each.start()
            each([timeline()])
            await each.stop()

        assert (traces.counts.get(COUNT, "exported"), distrusting.counts.get(COUNT, "failed")) == (1, 1)
        assert len(collector.spans) == 1


async def test_too_many_a_second_are_counted_and_failed_ones_go_first(collector: FakeCollector) -> None:
    traces = tracing(collector.url, max_per_second=5.0)
    traces.start()

    traces([timeline(str(number)) for number in range(100)])
    traces([timeline("failed", outcome="failure")])
    await traces.stop()

    kept = {span.attributes["fairlead.request_id"] for span in collector.spans}
    assert "failed" in kept and len(kept) == 6
    assert traces.counts.get(COUNT, "rate") == 95


def test_what_is_asked_of_others_for_a_request_belongs_to_its_trace(collector: FakeCollector) -> None:
    traces = tracing(collector.url, sample=0.0)
    made = timeline(ended=0.0, traceparent=CALLERS)
    request = Request(
        model="m",
        trace=CALLERS,
        timeline=made,
        prompt=Generate(text="hi", sampling=Sampling(max_tokens=3, stop=("x",), logit_bias={7: 1.0})),
    )
    assert request.traceparent == CALLERS  # nobody traces it yet

    traces.begin(request)

    version, trace, parent, flags = request.traceparent.split("-")
    assert (version, trace, flags) == ("00", TRACE, "01") and parent not in (PARENT, made.span_id)
    assert made.asked == Sampling(max_tokens=3), "what is long, and texts, are not kept"


def test_the_flag_that_goes_on_is_the_callers_or_that_of_chance() -> None:
    assert timeline(sample=1.0, traceparent=NOT_SAMPLED).context()[-2:] == "00"
    assert timeline(sample=0.0, traceparent=CALLERS).context()[-2:] == "01"
    assert timeline(sample=1.0).context()[-2:] == "01"
    assert timeline(sample=0.0).context()[-2:] == "00"


def test_nothing_is_traced_unless_a_collector_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Tracing.of(TraceSettings(), Counts()) is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4318")
    assert Tracing.of(TraceSettings(), Counts()) is not None
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    assert Tracing.of(TraceSettings(), Counts()) is None
    monkeypatch.delenv("OTEL_TRACES_EXPORTER")
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert Tracing.of(TraceSettings(), Counts()) is None


async def test_the_standard_environment_says_what_the_settings_do_not(collector: FakeCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=from-the-environment")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "named")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=search")
    traces = Tracing.of(TraceSettings(interval=QUICK), Counts())
    assert traces is not None
    traces.start()

    traces([timeline()])
    await traces.stop()

    [span] = collector.spans
    assert (span.resource["service.name"], span.resource["team"]) == ("named", "search")
    assert collector.headers[0]["x-key"] == "from-the-environment"
    assert collector.headers[0]["content-encoding"] == "gzip"


def test_what_is_missing_is_named_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc", None)
    with pytest.raises(ConfigError, match=r"pip install 'fairlead\[traces-grpc\]'"):
        Tracing.of(TraceSettings(endpoint="http://c", protocol="grpc"), Counts())

    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    assert Tracing.of(TraceSettings(), Counts()) is None  # nobody asked this server for it by name


def test_settings_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    for settings, said in (
        (TraceSettings(endpoint="localhost:4318"), "must be a URL"),
        (TraceSettings(endpoint="http://[bad"), "must be a URL"),
        (TraceSettings(endpoint="http://user:pass@c"), "no user and password"),
        (TraceSettings(endpoint="http://c", headers={"x": "a\r\nb: c"}), "`traces.headers`: 'x'"),
        (TraceSettings(endpoint="http://c", headers={"a b": "c"}), "`traces.headers`: 'a b'"),
        (TraceSettings(endpoint="http://c", ca=str(tmp_path / "none.pem")), "none.pem"),
        (TraceSettings(endpoint="http://c", protocol="grpc", ca=str(tmp_path / "none.pem")), "none.pem"),
    ):
        with pytest.raises(ConfigError, match=said):
            Tracing.of(settings, Counts())


def test_an_endpoint_is_a_collectors_address_or_the_very_path() -> None:
    assert with_path("http://c:4318") == with_path("http://c:4318/") == with_path("http://c:4318/v1/traces") == "http://c:4318/v1/traces"
    assert with_path("https://c/otlp?x=1") == "https://c/otlp/v1/traces?x=1"


def test_the_environment_is_read_as_the_specification_has_it() -> None:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://all:4318",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://traces:4318/here",
        "OTEL_EXPORTER_OTLP_HEADERS": "a=1, b=two%20words,junk",
        "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT": "2500",
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=named,team=search%2Fads",
    }
    target = target_of(TraceSettings(), environment)
    assert target is not None
    assert (target.url, target.headers, target.timeout) == ("http://traces:4318/here", {"a": "1", "b": "two words"}, 2.5)

    stronger = target_of(TraceSettings(endpoint="http://c", headers={"k": "v"}, timeout=1.0), environment)
    assert stronger is not None
    assert (stronger.url, stronger.headers, stronger.timeout) == ("http://c/v1/traces", {"k": "v"}, 1.0)
    told = resource_of(TraceSettings(attributes={"team": "ours"}), "1.2", environment)
    assert (told["service.name"], told["team"], told["service.version"]) == ("named", "ours", "1.2")

    for name, value in (("TIMEOUT", "soon"), ("PROTOCOL", "http/json"), ("ENDPOINT", "c:4318")):
        with pytest.raises(ConfigError):
            target_of(TraceSettings(), {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", f"OTEL_EXPORTER_OTLP_{name}": value})
