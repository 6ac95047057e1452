"""Our HPACK decoder, held against the `hpack` library's encoder and decoder."""

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.api.grpc.headers import MAX_TABLE_BYTES, HeaderDecoder, TooLong, Undecodable

KNOWN = [(b":method", b"POST"), (b":path", b"/"), (b"te", b"trailers"), (b"grpc-timeout", b"20S"), (b"x-request-id", b"a-1")]
fields = st.one_of(st.sampled_from(KNOWN), st.tuples(st.binary(min_size=1, max_size=12), st.binary(max_size=40)))
blocks = st.lists(
    st.tuples(st.lists(st.tuples(fields, st.booleans()), max_size=8), st.booleans(), st.one_of(st.none(), st.integers(0, 4096))), max_size=8
)


@given(blocks)
@settings(deadline=None, max_examples=200)
def test_it_reads_what_hpack_writes(blocks):
    encoder, decoder = hpack.Encoder(), HeaderDecoder(1 << 16)
    known = {}
    for headers, huffman, size in blocks:
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode([(name, value, sensitive) for (name, value), sensitive in headers], huffman=huffman)
        before = decoder.generation
        assert decoder.decode(block) == [field for field, _ in headers]
        if decoder.generation == before:
            known[before, block] = headers
        assert all(decoder.decode(same) == [f for f, _ in meant] for (g, same), meant in known.items() if g == decoder.generation)


@given(st.lists(st.binary(max_size=30), max_size=5))
@settings(deadline=None, max_examples=500)
def test_noise_means_what_it_means_to_hpack(blocks):
    theirs, ours = hpack.Decoder(), HeaderDecoder(1 << 16)
    for block in blocks:
        try:
            expected = [tuple(field) for field in theirs.decode(block, raw=True)]
        except (hpack.HPACKError, IndexError):
            with pytest.raises(Undecodable):
                ours.decode(block)
            return
        assert ours.decode(block) == expected


def test_a_list_that_is_too_long_stops_before_it_is_built():
    decoder = HeaderDecoder(1000)
    decoder.decode(b"\x40\x01a\x7f\xa1\x01" + b"b" * 288)
    with pytest.raises(TooLong):
        decoder.decode(b"\xbe" * 1_000_000)


@pytest.mark.parametrize(
    "block",
    [
        b"\x80",
        b"\x82\x20",
        b"\x3f\xe2\x1f",
        b"\xff\xff\xff\xff\xff\xff\xff",
        b"\x40\x05ab",
        b"\x40",
        b"\x00\x81\x00\x00",
    ],
    ids=["index 0", "a late resize", "a large table", "a long integer", "a short string", "nothing", "bad Huffman"],
)
def test_what_is_no_block_is_told_apart(block):
    with pytest.raises(Undecodable):
        HeaderDecoder(1 << 16).decode(block)


def test_the_table_shrinks_and_grows_within_its_bound():
    decoder = HeaderDecoder(1 << 16)
    for i in range(300):
        decoder.decode(b"\x40\x01a\x03%03d" % i)
    assert decoder._size <= MAX_TABLE_BYTES
    assert decoder.decode(b"\xbe") == [(b"a", b"299")]
    decoder.decode(b"\x20")
    with pytest.raises(Undecodable):
        decoder.decode(b"\xbe")
