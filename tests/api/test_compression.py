"""Compressed bodies: what they say is undone, and a bomb costs no more than the limit."""

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fairlead.api.compression import Inflater, accepted_encoding, compress, content_encoding, decompress
from fairlead.core.errors import InvalidRequest, TooLarge, Unsupported

LIMIT = 1 << 20


def bare(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


@given(st.binary(max_size=5000), st.integers(1, 300))
def test_gzip_zlib_and_bare_deflate_come_back(data, repeat):
    data *= repeat
    assert decompress(gzip.compress(data), "gzip", 1 << 23) == data
    assert decompress(zlib.compress(data), "deflate", 1 << 23) == data
    assert decompress(bare(data), "deflate", 1 << 23) == data


@given(st.lists(st.binary(max_size=100)), st.sampled_from(["gzip", "deflate"]))
def test_what_we_compress_others_can_read(parts, encoding):
    undo = gzip.decompress if encoding == "gzip" else zlib.decompress
    assert undo(compress([memoryview(part) for part in parts], encoding)) == b"".join(parts)


def test_a_body_at_the_limit_passes_and_one_byte_more_does_not():
    assert len(decompress(gzip.compress(bytes(LIMIT)), "gzip", LIMIT)) == LIMIT
    with pytest.raises(TooLarge, match="after decompression"):
        decompress(gzip.compress(bytes(LIMIT + 1)), "gzip", LIMIT)


def test_a_bomb_is_refused_before_it_goes_off():
    stream = zlib.compressobj(9)
    bomb = b"".join([*(stream.compress(bytes(1 << 20)) for _ in range(256)), stream.flush()])
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decompress(bomb, "deflate", LIMIT)
        assert tracemalloc.get_traced_memory()[1] < 8 * LIMIT
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_damaged_bodies_are_refused(encoding):
    data = compress([bytes(range(256)) * 4000], encoding)
    for damaged in (data[:-1], data[: len(data) // 2], data[:3], b"", data[:40] + b"\xff\xff" + data[42:], b"not compressed at all"):
        with pytest.raises(InvalidRequest, match="decompress"):
            decompress(damaged, encoding, LIMIT * 8)
    with pytest.raises(InvalidRequest, match="extra bytes"):
        decompress(data + b"x", encoding, LIMIT * 8)


def test_an_inflater_works_in_steps():
    data = bytes(100_000)
    inflater = Inflater(gzip.compress(data), "gzip", LIMIT)
    assert not inflater.step(1000)
    assert inflater.finish() == data


@pytest.mark.parametrize(
    ("header", "encoding"), [("gzip", "gzip"), (" GZIP ", "gzip"), ("x-gzip", "gzip"), ("deflate", "deflate"), ("identity", ""), ("", "")]
)
def test_content_encodings_that_are_known(header, encoding):
    assert content_encoding(header) == encoding


@pytest.mark.parametrize("header", ["br", "gzip, deflate", "zstd"])
def test_content_encodings_that_are_not(header):
    with pytest.raises(Unsupported):
        content_encoding(header)


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("deflate;q=0.9, gzip;q=0.5", "deflate"),
        ("gzip;q=0", ""),
        ("identity", ""),
        ("identity, gzip;q=0.5", ""),
        ("*", "gzip"),
        ("*;q=0", ""),
        ("gzip;q=0, *;q=0.1", "deflate"),
        ("br;q=1, *;q=0", ""),
        ("gzip;q=oops", ""),
        ("", ""),
        (";;,,=", ""),
    ],
)
def test_the_preferred_encoding_is_chosen(header, encoding):
    assert accepted_encoding(header) == encoding
