"""What a version is made of, wherever it lies: a folder, one file, any fsspec URL, an MLflow model folder."""

import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader, BytesIO
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from msgspec import Struct, structs

from fairlead.control.digest import CHUNK_BYTES, Files, own
from fairlead.control.mlflow import MLMODEL, convert
from fairlead.core.config import read_yaml
from fairlead.core.errors import FairleadError, InvalidRequest, TooLarge
from fairlead.core.specs import ModelSpec
from fairlead.runtime.source import SPEC_FILE, VERSION, Listing, Source, is_one_model
from fairlead.runtime.triton_config import CONFIG_FILE

Progress = Callable[[int], None]
"""Told of bytes as they are read."""
MAX_FILES = 10_000
"""Of one version: their names and digests are a row of the store."""


CHECKS_FOLDER = "checks"
"""In a model's folder: what its versions are held against is no part of them."""


class Part(Struct, frozen=True):
    """One file, in its file system; or made here."""

    num_bytes: int
    path: str = ""
    content: bytes | None = None


class Artefacts(Struct, frozen=True, kw_only=True, eq=False):
    """One version, not yet kept."""

    spec: ModelSpec
    parts: dict[str, Part]
    """Path within the version's folder → the file."""
    source: Source
    folder: str = ""
    """Path or URL of the folder that holds this under these names, and nothing else but a spec; "": none does."""
    provenance: dict[str, str] = {}
    """What the artefacts tell of where they come from."""

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts.values())

    @contextmanager
    def opened(self, path: str) -> Iterator[BinaryIO]:
        """Raises OSError."""
        part = self.parts[path]
        if part.content is not None:
            yield BytesIO(part.content)
            return
        file = open_plain(part.path) if self.source.local else cast(BinaryIO, self.source.fs.open(part.path, "rb"))
        with file:
            yield file

    def read(self, path: str) -> Iterator[bytes]:
        """In chunks, exactly as much as it was found to have. Raises InvalidRequest."""
        left = self.parts[path].num_bytes
        with reading(self.source.url), self.opened(path) as file:
            while chunk := file.read(min(CHUNK_BYTES, left + 1)):
                left -= len(chunk)
                if left < 0:
                    break
                yield chunk
        if left:
            raise InvalidRequest(f"{path} changed while it was read from {self.source.url}")

    def hashed(self, progress: Progress) -> Files:
        """Reads all of it. Raises InvalidRequest."""
        found = {}
        for path, part in self.parts.items():
            digest = hashlib.sha256()
            for chunk in self.read(path):
                digest.update(chunk)
                progress(len(chunk))
            found[path] = (part.num_bytes, digest.hexdigest())
        return found


def without_credentials(text: str) -> str:
    """Every URL of it without what may let somebody in: user and password, and the query, where signatures are. For all that is kept or said."""
    text = _USER.sub("", text)
    return _QUERY.sub(r"\1", text)


_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(://[^\s?#]*)[?#]\S*")


@contextmanager
def discreet() -> Iterator[None]:
    """What is raised tells no credentials."""
    try:
        yield
    except FairleadError as error:
        raise error.saying(without_credentials(error.message)) from None


@discreet()
def find(
    url: str,
    model: str,
    *,
    cache_folder: Path,
    max_bytes: int,
    spec: str = "",
    trusted: bool = False,
    flavour: str = "",
) -> Artefacts:
    """`spec`: a model.yaml in place of the source's own; `trusted`: the spec's; `flavour`: of an MLflow model.

    Reads names, sizes and specs, no artefact. Raises FairleadError.
    """
    with reading(url):
        source = Source(url, cache_folder)
        source.fs.invalidate_cache()
        found = _local(Path(source.root), url) if source.local else _remote(source)
        if found.folder and MLMODEL in found.parts and SPEC_FILE not in found.parts:
            artefacts = _mlflow(source, found, flavour=flavour, trusted=trusted)
        elif flavour:
            raise InvalidRequest(f"{url} is no model folder of MLflow's: it has no flavours")
        else:
            artefacts = _version(source, found, told=bool(spec))
    wanted = read_yaml(spec, ModelSpec, "spec") if spec else artefacts.spec
    if wanted.name not in ("", model):
        raise InvalidRequest(f"the spec is of a model named {wanted.name!r}, not {model!r}: they must agree (or leave `name` out)")
    _check(artefacts, max_bytes)
    spec_of = own(wanted.replace(trusted=wanted.trusted or trusted))
    return structs.replace(artefacts, spec=spec_of, parts=dict(sorted(artefacts.parts.items())))


def _check(artefacts: Artefacts, max_bytes: int) -> None:
    """Raises InvalidRequest, TooLarge."""
    url = artefacts.source.url
    if not artefacts.parts:
        raise InvalidRequest(f"{url} holds no artefact")
    if len(artefacts.parts) > MAX_FILES:
        raise TooLarge(f"{url} holds {len(artefacts.parts)} files; a version has {MAX_FILES} at most")
    if artefacts.num_bytes > max_bytes:
        raise TooLarge(f"{url} holds {artefacts.num_bytes} bytes, more than a version may have ({max_bytes}: `control.registry.max_bytes`)")


class _Found(Struct, frozen=True):
    root: str
    """The folder, in its file system."""
    folder: bool
    """Else it is the one bare file in it."""
    parts: dict[str, Part]


def _local(path: Path, url: str) -> _Found:
    """Raises InvalidRequest for what is no plain file, and for links that leave the folder."""
    root = path.resolve()
    if not root.exists():
        raise InvalidRequest(f"there is nothing at {url}")
    if not root.is_dir():
        return _Found(str(root.parent), False, {path.name: _plain(root, path.name)})
    parts = {}
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(name for name in folders if _kept(name))
        for name in folders:
            if (Path(folder) / name).is_symlink():
                raise InvalidRequest(
                    f"{(Path(folder) / name).relative_to(root)} in {root} is a link to a folder: put the folder there (cp -rL)"
                )
        for name in filter(_kept, names):
            file = Path(folder) / name
            inside = file.relative_to(root).as_posix()
            try:
                target = file.resolve(strict=True)
            except (OSError, RuntimeError):
                raise InvalidRequest(f"{inside} in {root} is a link that leads nowhere") from None
            if not target.is_relative_to(root):
                raise InvalidRequest(f"{inside} in {root} is a link that leaves the folder: put the file there (cp -rL)")
            parts[_sane(inside, url)] = _plain(target, inside)
    return _Found(str(root), True, parts)


def _raise(error: OSError) -> None:
    """A folder that cannot be read would be passed over."""
    raise error


def _plain(path: Path, name: str) -> Part:
    """Raises InvalidRequest."""
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise InvalidRequest(f"{name} is no plain file")
    return Part(info.st_size, str(path))


def _remote(source: Source) -> _Found:
    fs, root = source.fs, source.root.rstrip("/")
    if fs.isfile(root):
        name = PurePosixPath(root).name
        return _Found(root.removesuffix(f"/{name}"), False, {name: Part(int(fs.size(root) or 0), root)})
    if not fs.isdir(root):
        raise InvalidRequest(f"there is nothing at {source.url}")
    parts = {}
    for path, info in fs.find(root, detail=True).items():
        inside = path[len(root) :].lstrip("/")
        if all(map(_kept, inside.split("/"))):
            parts[_sane(inside, source.url)] = Part(int(info.get("size") or 0), path)
    return _Found(root, True, parts)


def _kept(name: str) -> bool:
    """As everywhere in a model's folder: what is hidden is none of the model."""
    return not name.startswith(".") and name != "__pycache__"


def _sane(path: str, where: str) -> str:
    """Raises InvalidRequest for a path that leaves its folder, or cannot be written down."""
    if not path.isprintable() or "\\" in path or any(part in ("", ".", "..") for part in path.split("/")):
        raise InvalidRequest(f"{where} holds a file whose path is not taken: {path!a}")
    return path


def _version(source: Source, found: _Found, *, told: bool) -> Artefacts:
    """Of a version's folder, of a model's folder that holds one, or of a file. `told`: a spec says which file is the artefact."""
    url = source.url
    if not found.folder:
        return Artefacts(spec=ModelSpec(), parts=found.parts, source=source)
    parents = _parents_spec(source, found)
    own_files = [path for path in found.parts if path not in (SPEC_FILE, CONFIG_FILE) and not path.startswith(f"{CHECKS_FOLDER}/")]
    if not (told or parents or is_one_model(found.parts)):
        models = sorted({path.partition("/")[0] for path in own_files if "/" in path})
        raise InvalidRequest(
            f"{url} holds no model but folders: add one of them ({', '.join(models[:10])})" if models else f"{url} holds no artefact"
        )
    listing = Listing(name="", files=dict.fromkeys(found.parts, ""), root=found.root)
    numbers = sorted(listing.versions())
    if len(numbers) > 1:
        raise InvalidRequest(f"{url} holds versions {', '.join(map(str, numbers))}: add one of them ({url.rstrip('/')}/{numbers[-1]})")
    folder = listing.folder_of(numbers[0]) if numbers else ""
    spec = source.own_spec(listing) if parents is None else parents
    if folder:
        kept = {path.removeprefix(f"{folder}/"): part for path, part in found.parts.items() if path.startswith(f"{folder}/")}
        return Artefacts(spec=spec, parts=kept, source=source, folder=f"{_place(source)}/{folder}")
    return Artefacts(spec=spec, parts={path: found.parts[path] for path in own_files}, source=source, folder=_place(source))


def _place(source: Source) -> str:
    """Of a folder: for good, wherever somebody stands who asks for it."""
    return str(Path(source.root).resolve()) if source.local else source.url.rstrip("/")


def _parents_spec(source: Source, found: _Found) -> ModelSpec | None:
    """A version's folder without a spec has its model's beside it. None: this is none."""
    folder = PurePosixPath(found.root)
    if not VERSION.fullmatch(folder.name) or found.parts.keys() & {SPEC_FILE, CONFIG_FILE}:
        return None
    parent = str(folder.parent)
    if not any(source.fs.isfile(f"{parent}/{name}") for name in (SPEC_FILE, CONFIG_FILE)):
        return None
    names = [path[len(parent) :].lstrip("/") for path in source.fs.find(parent, maxdepth=1)]
    return source.own_spec(Listing(name="", files=dict.fromkeys(names, ""), root=parent))


def _mlflow(source: Source, found: _Found, *, flavour: str, trusted: bool) -> Artefacts:
    listing = Listing(name="", files=dict.fromkeys(found.parts, ""), root=found.root)
    where = f"{source.url.rstrip('/')}/{MLMODEL}"
    converted = convert(source.text(listing, MLMODEL), where, found.parts, flavour=flavour, trusted=trusted)
    parts = {name: found.parts[path] for name, path in converted.files.items()}
    made = {name: Part(len(content), content=content) for name, content in converted.made.items()}
    same = not made and parts.keys() == found.parts.keys() and all(name == path for name, path in converted.files.items())
    folder = _place(source) if same else ""
    return Artefacts(spec=converted.spec, parts={**parts, **made}, source=source, folder=folder, provenance=converted.provenance)


@contextmanager
def reading(url: str) -> Iterator[None]:
    """Raises InvalidRequest for whatever a file system says."""
    try:
        yield
    except FairleadError:
        raise
    except Exception as error:  # file systems of all kinds have errors of all kinds
        why = getattr(error, "strerror", None) or error or type(error).__name__
        raise InvalidRequest(without_credentials(f"cannot read {url}: {why}")) from None


def open_plain(path: str | Path) -> BufferedReader:
    """A file that is no link, and nothing that would make a reader wait. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no plain file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
