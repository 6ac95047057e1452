"""A version on its way from one machine to another: a tar of its files and its `model.yaml`, written and read as a stream."""

import errno
import tarfile
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, cast

from fairlead.control.artefacts import MAX_FILES, Artefacts
from fairlead.control.digest import CHUNK_BYTES, spec_text
from fairlead.core.errors import InvalidRequest, TooLarge, Unreachable
from fairlead.runtime.source import SPEC_FILE

MAX_HEADER_BYTES = 1 << 20
"""Of a long name, or of what else comes before a member: it is read in one piece."""
BLOCK = tarfile.BLOCKSIZE
_HEADERS = frozenset((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK))
_OF_NAMES = frozenset((errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EEXIST, errno.ENOTDIR, errno.EISDIR))
"""Errors that are the upload's fault; others are this machine's."""
END = bytes(2 * BLOCK)


def tar_size(num_bytes: int) -> int:
    """What a tar of so many bytes has at most."""
    return num_bytes + MAX_FILES * 16 * BLOCK + len(END)


def packed(artefacts: Artefacts) -> Iterator[bytes]:
    """In chunks."""
    spec = spec_text(artefacts.spec).encode()
    yield _header(SPEC_FILE, len(spec)) + spec + _padding(len(spec))
    for path, part in artefacts.parts.items():
        yield _header(path, part.num_bytes)
        yield from artefacts.read(path)
        yield _padding(part.num_bytes)
    yield END


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.PAX_FORMAT)


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def unpack(stream: BufferedReader, folder: Path, max_bytes: int) -> None:
    """Plain files and folders, into an empty folder and nowhere else. Raises InvalidRequest, TooLarge, Unreachable."""
    reader = _Reader(stream)
    left, count = max_bytes, 0
    try:
        with tarfile.open(fileobj=cast(IO[bytes], reader), mode="r|", bufsize=CHUNK_BYTES, tarinfo=_Member) as archive:
            for member in archive:
                count += 1
                left -= member.size
                if count > 2 * MAX_FILES:
                    raise TooLarge(f"the upload holds more than {2 * MAX_FILES} entries")
                if left < 0:
                    raise TooLarge(f"the upload holds more than a version may have ({max_bytes} bytes: `control.registry.max_bytes`)")
                _take(archive, member, folder)
        while reader.read(CHUNK_BYTES):
            pass
    except tarfile.FilterError as error:
        raise InvalidRequest(f"the upload holds a file whose path is not taken: {error.tarinfo.name!a}") from None
    except OSError as error:
        if error.errno in _OF_NAMES:
            raise InvalidRequest(f"the upload holds a file that cannot be kept: {error.strerror}") from None
        raise Unreachable(f"the upload cannot be kept: {error.strerror or error}", reason="artifact-store") from None
    except (tarfile.TarError, EOFError, UnicodeError, ValueError) as error:
        raise InvalidRequest(f"the upload is no tar, or is cut off ({error})") from None
    if reader.tail.strip(b"\0"):
        raise InvalidRequest("the upload is cut off: it does not end as a tar does")


def _take(archive: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    filtered = tarfile.data_filter(member, str(folder))
    target = folder / filtered.name
    if not member.isdir() and (not member.isreg() or member.issparse()):
        raise InvalidRequest(f"the upload holds {member.name!a}, which is no plain file: put the file itself there")
    try:
        if member.isdir():
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            return
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = archive.extractfile(member)
        assert content is not None
        with content, target.open("xb") as file:
            size = 0
            while chunk := content.read(CHUNK_BYTES):
                file.write(chunk)
                size += len(chunk)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise InvalidRequest(f"the upload holds {member.name!a} twice") from None
    if size != member.size:
        raise InvalidRequest(f"the upload is cut off in {member.name!a}")


class _Member(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in _HEADERS and member.size > MAX_HEADER_BYTES:
            raise InvalidRequest("the upload holds a name, or what else describes a file, of more than 1 MiB")
        return member


class _Reader:
    """Reads a stream, and knows how it ended."""

    def __init__(self, stream: BufferedReader) -> None:
        self.stream = stream
        self.tail = b""

    def read(self, size: int) -> bytes:
        data = self.stream.read1(size)  # what is there: the file system need not wait for the network
        self.tail = (self.tail + data[-BLOCK:])[-BLOCK:]
        return data
