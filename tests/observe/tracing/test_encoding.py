"""Spans as protobuf: what goes in comes out of OpenTelemetry's own classes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from fairlead.observe.tracing.encoding import Resource, encoded
from fairlead.observe.tracing.fake_collector import spans_in
from fairlead.observe.tracing.spans import Kind, Span, Told, Value

TRACE, SPAN, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", "00f067aa0ba902b7"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
VALUES = st.one_of(
    TEXT,
    st.booleans(),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.floats(allow_nan=False),
    st.lists(TEXT, max_size=3).map(tuple),
)
TIMES = st.integers(0, (1 << 63) - 1)


@given(
    name=TEXT,
    attributes=st.dictionaries(st.sampled_from(["a", "gen_ai.request.model", "b" * 200]), VALUES),
    kind=st.sampled_from(["server", "client", "internal", "consumer"]),
    start=TIMES,
    end=TIMES,
    error=st.none() | TEXT,
    number=st.integers(0, 5),
)
def test_any_span_is_read_as_it_was_written(
    name: str, attributes: dict[str, Value], kind: Kind, start: int, end: int, error: str | None, number: int
) -> None:
    span = Span(name=name, trace_id=TRACE, span_id=SPAN, parent_id=PARENT, kind=kind, start=start, end=end, attributes=attributes)
    span.error = error
    span.state = "vendor=1"
    span.events = [Told("first", start, {"a": "x"})] * number
    span.links = [(TRACE, PARENT)] * number

    [seen] = spans_in(Resource({"service.name": "x"}, "1").export([encoded(span)]))

    assert (seen.name, seen.trace_id, seen.span_id, seen.parent_id, seen.state) == (name, TRACE, SPAN, PARENT, "vendor=1")
    assert (seen.kind, seen.error) == (kind, error)
    assert (seen.start, seen.end) == (start / 1e9, end / 1e9)
    assert seen.attributes == {key: list(value) if isinstance(value, tuple) else value for key, value in attributes.items()}
    assert {key: type(value) for key, value in seen.attributes.items()} == {
        key: list if isinstance(value, tuple) else type(value) for key, value in attributes.items()
    }
    assert seen.events == ("first",) * number and seen.links == ((TRACE, PARENT),) * number
    assert seen.resource == {"service.name": "x"}


@pytest.mark.parametrize(("remote", "flags"), [(False, 0x101), (True, 0x301)])
def test_whether_the_parent_is_another_processs_is_said(remote: bool, flags: int) -> None:
    span = Span(name="s", trace_id=TRACE, span_id=SPAN, parent_id=PARENT, start=1, end=2, remote_parent=remote, links=[(TRACE, SPAN)])
    request = ExportTraceServiceRequest.FromString(Resource({}, "1").export([encoded(span), encoded(span)]))

    [scope] = request.resource_spans[0].scope_spans
    assert [each.flags for each in scope.spans] == [flags, flags]
    assert scope.spans[0].links[0].flags == 0x101
    assert (scope.scope.name, scope.scope.version) == ("fairlead", "1") and scope.schema_url
