"""Spans as OTLP's protobuf (opentelemetry-proto 1.x, trace.proto), written by hand: the SDK's objects cost five times as much, in a
process that has requests to answer. A list of spans may be encoded in parts: parts that are put together are one export."""

import struct
from collections.abc import Iterable, Mapping

from fairlead.observe.tracing.spans import Span, Value

SCHEMA = "https://opentelemetry.io/schemas/1.44.0"
KINDS = {"internal": b"\x30\x01", "server": b"\x30\x02", "client": b"\x30\x03", "consumer": b"\x30\x05"}
SAMPLED = 0x01
KNOWN = 0x100
"""Whether the parent is remote is known ..."""
REMOTE = 0x200
"""... and it is."""
_double = struct.Struct("<Bd").pack
_fixed = struct.Struct("<BQ").pack
_flags = struct.Struct("<HI").pack
_keys: dict[str, bytes] = {}
"""Names of attributes, encoded: those of this code, and no others."""


def _varint(number: int) -> bytes:
    if number < 0x80:
        return bytes((number,))
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, data: bytes) -> bytes:
    """Of a field with a length; numbers up to 15."""
    size = len(data)
    return bytes((number << 3 | 2, size)) + data if size < 0x80 else bytes((number << 3 | 2,)) + _varint(size) + data


def _value(value: Value) -> bytes:
    kind = type(value)
    if kind is str:
        return _field(1, value.encode("utf-8", "replace"))  # type: ignore[union-attr]
    if kind is int:
        return b"\x18" + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)  # type: ignore[operator]
    if kind is float:
        return _double(0x21, value)
    if kind is bool:
        return b"\x10\x01" if value else b"\x10\x00"
    return _field(5, b"".join([_field(1, _value(each)) for each in value]))  # type: ignore[union-attr]


def _attributes(number: int, attributes: Mapping[str, Value]) -> bytes:
    out = []
    for name, value in attributes.items():
        key = _keys.get(name)
        if key is None:
            key = _keys[name] = _field(1, name.encode())
        out.append(_field(number, key + _field(2, _value(value))))
    return b"".join(out)


def encoded(span: Span) -> bytes:
    """As a field of ScopeSpans."""
    remote = KNOWN | SAMPLED | (REMOTE if span.remote_parent else 0)
    parts = [_field(1, bytes.fromhex(span.trace_id)), _field(2, bytes.fromhex(span.span_id))]
    if span.state:
        parts.append(_field(3, span.state.encode()))
    if span.parent_id:
        parts.append(_field(4, bytes.fromhex(span.parent_id)))
    parts += (_field(5, span.name.encode("utf-8", "replace")), KINDS[span.kind], _fixed(0x39, span.start), _fixed(0x41, span.end))
    parts.append(_attributes(9, span.attributes))
    for event in span.events:
        parts.append(_field(11, _fixed(0x09, event.at) + _field(2, event.name.encode()) + _attributes(3, event.attributes)))
    for trace_id, span_id in span.links:
        context = _field(1, bytes.fromhex(trace_id)) + _field(2, bytes.fromhex(span_id))
        parts.append(_field(13, context + b"\x35" + (KNOWN | SAMPLED).to_bytes(4, "little")))
    if span.error is not None:
        parts.append(_field(15, _field(2, span.error.encode("utf-8", "replace")) + b"\x18\x02"))
    parts.append(b"\x85\x01" + remote.to_bytes(4, "little"))
    return _field(2, b"".join(parts))


class Resource:
    """This server, as every export names it."""

    def __init__(self, attributes: Mapping[str, str], version: str) -> None:
        self._head = _field(1, _attributes(1, attributes))
        self._scope = _field(1, _field(1, b"fairlead") + _field(2, version.encode()))
        self._schema = _field(3, SCHEMA.encode())

    def export(self, spans: Iterable[bytes]) -> bytes:
        """ExportTraceServiceRequest."""
        return _field(1, self._head + _field(2, self._scope + b"".join(spans) + self._schema))
