"""One incident's archive: written beside its place and put there when it is whole, for its owner's eyes only."""

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from fairlead.observe.incidents.exhibits import Exhibit

SPARE = 0.25
"""Part of the room that is kept back for the post-mortem, which comes last."""


def written(content: object) -> bytes:
    match content:
        case bytes():
            return content
        case str():
            return content.encode("utf-8", "replace")
    try:
        encoded = msgspec.json.encode(content, enc_hook=str)
    except UnicodeEncodeError:  # half characters, as names of files may hold
        plain = msgspec.to_builtins(content, str_keys=True, enc_hook=str)
        encoded = json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace")
    return msgspec.json.format(encoded, indent=1)


class Archive:
    """Blocks: for a thread. Raises OSError."""

    def __init__(self, path: Path, folder: str, max_bytes: int, mtime: float) -> None:
        """`folder`: that everything lies in. `max_bytes`: of all files, before they are compressed."""
        self.path = path
        self.files: list[str] = []
        self.missing: list[tuple[str, str]] = []
        self._folder = folder
        self._room = max_bytes
        self._spare = int(max_bytes * SPARE)
        self._mtime = mtime
        self._beside = path.with_name(f".{path.name}.part")
        # whoever is told of the path later must not find a file that others may read
        descriptor = os.open(self._beside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
        self._file = os.fdopen(descriptor, "wb")
        self._tar = tarfile.open(fileobj=self._file, mode="w:gz", compresslevel=6)  # noqa: SIM115, closed by `close`

    def add(self, name: str, content: bytes, *, last: bool = False) -> bool:
        """Whether there was room for it."""
        if len(content) > self._room - (0 if last else self._spare):
            self.missing.append((name, f"its {len(content)} bytes are more than there is room for"))
            return False
        info = tarfile.TarInfo(f"{self._folder}/{name}")
        info.size, info.mode, info.mtime = len(content), 0o600, int(self._mtime)
        self._tar.addfile(info, io.BytesIO(content))
        self._room -= len(content)
        self.files.append(name)
        return True

    def add_all(self, exhibits: Iterable[tuple[str, Exhibit]]) -> None:
        """The smallest first: what is too large leaves the others their room."""
        contents = [(name, written(exhibit.content)) for name, exhibit in exhibits]
        for name, content in sorted(contents, key=lambda each: len(each[1])):
            self.add(name, content)

    def add_spread(self, files: Sequence[tuple[str, Path]]) -> None:
        """Those of one kind; where not all have room, as many as do, spread evenly from the first to the last."""
        sizes = [path.stat().st_size for _, path in files]
        step = 1
        while sum(sizes[::step]) > self._room - self._spare and step < len(files):
            step *= 2
        if step > 1:
            self.missing.append((f"{len(files) - len(files[::step])} samples", "all of them are more than there is room for"))
        for name, path in files[::step]:
            self.add(name, path.read_bytes())

    def close(self) -> None:
        """It is whole."""
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._beside, self.path)

    def abandon(self) -> None:
        with suppress(OSError, ValueError):
            self._file.close()
        self._beside.unlink(missing_ok=True)


def members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(name, content) of an archive's files."""
    with tarfile.open(path) as tar:
        for info in tar:
            file = tar.extractfile(info)
            if file is not None:
                yield info.name, file.read()
