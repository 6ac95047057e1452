"""Content-Encoding and Accept-Encoding: gzip and deflate, never more than a limit."""

import zlib
from collections.abc import Iterable
from functools import lru_cache

from fairlead.core.errors import InvalidRequest, TooLarge, Unsupported

ENCODINGS = {"gzip": "gzip", "x-gzip": "gzip", "deflate": "deflate"}
WBITS = {"gzip": 31, "deflate": zlib.MAX_WBITS}
Data = bytes | bytearray | memoryview
BITE_BYTES = 1 << 16
LEVEL = 1
"""Tensors hardly shrink further at more than twice the time."""


def content_encoding(value: str) -> str:
    """What a Content-Encoding header asks to undo: "gzip", "deflate" or "" for nothing. Raises Unsupported."""
    encoding = value.strip().lower()
    if encoding in ("", "identity"):
        return ""
    try:
        return ENCODINGS[encoding]
    except KeyError:
        raise Unsupported(f"Content-Encoding '{value}' is not supported; use gzip, deflate or none") from None


@lru_cache(maxsize=256)
def accepted_encoding(value: str) -> str:
    """The encoding that an Accept-Encoding header prefers among ours; "" to send the body as it is."""
    quality: dict[str, float] = {}
    for item in value.lower().split(","):
        name, *parameters = (part.strip() for part in item.split(";"))
        q = 1.0
        for parameter in parameters:
            key, _, number = parameter.partition("=")
            if key.strip() == "q":
                try:
                    q = float(number)
                except ValueError:
                    q = 0.0
        quality[ENCODINGS.get(name, name)] = q
    other = quality.get("*", 0.0)
    best = max(("gzip", "deflate"), key=lambda name: quality.get(name, other))
    best_quality = quality.get(best, other)
    return best if best_quality > 0 and best_quality >= quality.get("identity", 0.0) else ""


class Inflater:
    """Decompresses one body in as many steps as the caller likes, up to `limit` bytes in all."""

    def __init__(self, data: Data, encoding: str, limit: int) -> None:
        self.limit = limit
        self.finished = False
        self._data = memoryview(data)
        self._at = 0
        self._parts: list[bytes] = []
        self._size = 0
        # the name `deflate` means zlib's format, yet some clients send the bare stream
        bare = encoding == "deflate" and not _has_zlib_header(self._data)
        self._stream = zlib.decompressobj(-zlib.MAX_WBITS if bare else WBITS[encoding])

    def step(self, max_bytes: int) -> bool:
        """Produce about so many bytes; true when the body is whole.

        Raises TooLarge beyond the limit, before the excess is made; InvalidRequest for bad or cut off data.
        """
        stream, target = self._stream, self._size + max_bytes
        while not self.finished and self._size < target:
            # zlib hands back what it did not consume as a copy: small bites keep that cheap
            bite: Data = stream.unconsumed_tail
            if not bite:
                bite = self._data[self._at : self._at + BITE_BYTES]
                self._at += len(bite)
            try:
                part = stream.decompress(bite, min(target, self.limit + 1) - self._size)
            except zlib.error as error:
                raise InvalidRequest(f"request body does not decompress: {error}") from None
            self._parts.append(part)
            self._size += len(part)
            if self._size > self.limit:
                raise TooLarge(f"request body is larger than {self.limit} bytes after decompression")
            if stream.eof:
                if stream.unused_data or self._at < len(self._data):
                    raise InvalidRequest("request body has extra bytes after its compressed data")
                self.finished = True
            elif not bite and not part:
                raise InvalidRequest("request body does not decompress: the compressed data is cut off")
        return self.finished

    def finish(self) -> bytes:
        """The whole body; nearly all of the time it takes is spent without the GIL."""
        while not self.finished:
            self.step(1 << 20)
        return b"".join(self._parts)


def _has_zlib_header(data: memoryview) -> bool:
    return len(data) >= 2 and data[0] & 0x0F == 8 and (data[0] << 8 | data[1]) % 31 == 0


def decompress(data: Data, encoding: str, limit: int) -> bytes:
    return Inflater(data, encoding, limit).finish()


def compress(parts: Iterable[Data], encoding: str) -> bytes:
    """One body from its parts."""
    stream = zlib.compressobj(LEVEL, zlib.DEFLATED, WBITS[encoding])
    out = [stream.compress(part) for part in parts]
    out.append(stream.flush())
    return b"".join(out)
