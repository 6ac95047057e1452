"""Where models come from: a folder, one bare artefact, or any fsspec URL with digest-checked local copies."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Collection
from functools import partial
from pathlib import Path, PurePosixPath

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem
from msgspec import Struct

from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError, LoadError
from fairlead.core.specs import ModelSpec, VersionPolicy
from fairlead.runtime.triton_config import CONFIG_FILE, spec_from_pbtxt

SPEC_FILE = "model.yaml"
VERSION = re.compile(r"[1-9][0-9]*")
_ARTEFACT_SUFFIXES = frozenset((".onnx", ".ubj", ".json", ".txt", ".cbm", ".skops", ".joblib", ".pkl", ".pickle", ".pt", ".pth", ".pt2"))


def default_cache() -> Path:
    """Where versions are copied to from elsewhere."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fairlead" / "models"


class Listing(Struct, frozen=True):
    """One model as its source shows it, without having read a file: relative paths and what tells a change."""

    name: str
    files: dict[str, str]
    root: str
    """The model's own folder (or the one bare file) in the source's file system."""

    def versions(self) -> dict[int, dict[str, str]]:
        """Version number → its files. A folder without version folders is version 1, even where it holds nothing but what says what it is."""
        found: dict[int, dict[str, str]] = {}
        for path, stamp in self.files.items():
            first, _, rest = path.partition("/")
            if rest and VERSION.fullmatch(first):
                found.setdefault(int(first), {})[path] = stamp
        if found:
            return found
        own = {path: stamp for path, stamp in self.files.items() if path not in (SPEC_FILE, CONFIG_FILE)}
        own = own or {path: stamp for path, stamp in self.files.items() if path == SPEC_FILE}
        return {1: own} if own else {}

    def folder_of(self, number: int) -> str:
        """The version's folder relative to the model's, "" where the model has no version folders."""
        prefix = f"{number}/"
        return str(number) if any(path.startswith(prefix) for path in self.files) else ""


def choose_versions(numbers: list[int], policy: VersionPolicy) -> list[int]:
    """The versions that a policy wants served, ascending."""
    numbers = sorted(numbers)
    if policy.all:
        return numbers
    if policy.specific:
        return [number for number in numbers if number in policy.specific]
    return numbers[-(policy.latest or 1) :]


class Source:
    """One place that models come from. Its methods block: call them from a thread."""

    def __init__(self, url: str, cache_folder: Path) -> None:
        """Raises ConfigError where there is nothing at `url`, or its file system is not installed."""
        self.url = url
        self.cache_folder = cache_folder
        try:
            self.fs, self.root = fsspec.url_to_fs(url)
        except ImportError as error:
            extra = " (pip install 'fairlead[s3]')" if url.startswith("s3:") else ""
            raise ConfigError(f"cannot read {url}: {error}{extra}") from None
        except ValueError as error:
            raise ConfigError(f"cannot read {url}: {error}") from None
        self.local = isinstance(self.fs, LocalFileSystem)

    def scan(self) -> dict[str, Listing]:
        """Every model here, by name. Raises ConfigError where the place is absent or cannot be read."""
        try:
            self.fs.invalidate_cache()
            if self.fs.isfile(self.root):
                name = PurePosixPath(self.root).stem
                return {
                    name: Listing(name=name, files={PurePosixPath(self.root).name: self._stamp(self.fs.info(self.root))}, root=self.root)
                }
            if not self.fs.isdir(self.root):
                raise ConfigError(f"there is no model repository at {self.url}")
            found = self.fs.find(self.root, detail=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read {self.url}: {error}") from None
        files: dict[str, str] = {}
        for path, info in found.items():
            relative = path[len(self.root) :].lstrip("/")
            if not any(part.startswith(".") or part == "__pycache__" for part in relative.split("/")):
                files[relative] = self._stamp(info)
        if is_one_model(files):
            name = PurePosixPath(self.root.rstrip("/")).name
            return {name: Listing(name=name, files=files, root=self.root)}
        grouped: dict[str, dict[str, str]] = {}
        for path, stamp in files.items():
            name, _, rest = path.partition("/")
            if rest:
                grouped.setdefault(name, {})[rest] = stamp
        if self.local:  # an empty folder is a model that lacks everything: better reported than missed
            for folder in os.scandir(self.root):
                if folder.is_dir() and not folder.name.startswith((".", "_")):
                    grouped.setdefault(folder.name, {})
        return {
            name: Listing(name=name, files=own, root=f"{self.root.rstrip('/')}/{name}")
            for name, own in grouped.items()
            if not name.startswith("_")
        }

    def spec(self, listing: Listing) -> ModelSpec:
        """As `own_spec`, with the model's name. Raises ConfigError where it names itself otherwise."""
        spec = self.own_spec(listing)
        if spec.name and spec.name != listing.name:
            where = f"{listing.root}/{SPEC_FILE if SPEC_FILE in listing.files else CONFIG_FILE}"
            raise ConfigError(
                f"{where}: the model is named '{spec.name}' but its folder '{listing.name}'; they must agree (or leave `name` out)"
            )
        return spec.replace(name=listing.name)

    def own_spec(self, listing: Listing) -> ModelSpec:
        """The model's own `model.yaml` or Triton's `config.pbtxt`, empty where it has none. Raises ConfigError, naming the line."""
        found = [name for name in (SPEC_FILE, CONFIG_FILE) if name in listing.files]
        if not found:
            return ModelSpec()
        if len(found) > 1:
            raise ConfigError(
                f"{listing.root} holds both {SPEC_FILE} and {CONFIG_FILE}; keep {SPEC_FILE}, or remove it to serve by Triton's configuration"
            )
        path = f"{listing.root}/{found[0]}"
        text = self.text(listing, found[0])
        return read_yaml(text, ModelSpec, path) if found[0] == SPEC_FILE else spec_from_pbtxt(text, path, partial(self.text, listing))

    def text(self, listing: Listing, name: str) -> str:
        """One of the model's own files. Raises ConfigError."""
        path = f"{listing.root}/{name}"
        if name not in listing.files:
            raise ConfigError(f"{path} is not there")
        try:
            return self.fs.cat_file(path).decode()  # type: ignore[no-any-return]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from None

    def fetch(self, listing: Listing, number: int) -> Path:
        """The version's folder (or bare file) on this machine. Raises LoadError."""
        relative = listing.folder_of(number)
        files = listing.versions()[number]
        if self.local:
            return Path(listing.root) / relative if relative else Path(listing.root)
        return self._copy(listing, number, relative, files)

    def _copy(self, listing: Listing, number: int, relative: str, files: dict[str, str]) -> Path:
        """A local copy that is complete or absent, each file checked against the digest taken when it was copied."""
        identity = hashlib.sha256(msgspec.json.encode([self.url, listing.name, number, sorted(files.items())])).hexdigest()[:32]
        target = self.cache_folder / f"{listing.name}-{number}-{identity}"
        bare = self.fs.isfile(listing.root)
        name = next(iter(files)) if bare else ""
        if target.is_dir():
            if _intact(target):
                return target / name
            shutil.rmtree(target)
        self.cache_folder.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.cache_folder))
        try:
            digests = {}
            for path in files:
                inside = path[len(relative) :].lstrip("/") if relative else path
                local = partial / inside
                if not local.resolve().is_relative_to(partial.resolve()):
                    raise LoadError(f"{listing.root} holds a path that leaves its folder: {path!r}")
                local.parent.mkdir(parents=True, exist_ok=True)
                digests[inside] = self._download(listing.root if bare else f"{listing.root}/{path}", local)
            (partial / _DIGESTS).write_bytes(msgspec.json.encode(digests))
            os.replace(partial, target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise LoadError(f"cannot copy {listing.root} version {number} from {self.url}: {error}") from None
        return target / name

    def _download(self, remote: str, local: Path) -> str:
        digest = hashlib.sha256()
        with self.fs.open(remote, "rb") as source, local.open("wb") as target:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                target.write(chunk)
            target.flush()
            os.fsync(target.fileno())
        want = self.fs.size(remote)
        if want is not None and local.stat().st_size != want:
            raise OSError(f"{remote} was cut short: {local.stat().st_size} of {want} bytes")
        return digest.hexdigest()

    @staticmethod
    def _stamp(info: dict[str, object]) -> str:
        """What changes when a file changes: its size, and the time or tag that the file system gives."""
        when = next(
            (info[key] for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created") if info.get(key)), ""
        )
        return f"{info.get('size')} {when} {info.get('ino', '')}"


_DIGESTS = ".fairlead-digests.json"


def _intact(folder: Path) -> bool:
    try:
        digests: dict[str, str] = msgspec.json.decode((folder / _DIGESTS).read_bytes())
        for name, want in digests.items():
            with (folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != want:
                    return False
    except (OSError, msgspec.DecodeError):
        return False
    return True


def is_one_model(files: Collection[str]) -> bool:
    """Whether a folder is a model rather than a repository of models."""
    for path in files:
        first, _, rest = path.partition("/")
        if rest:
            if VERSION.fullmatch(first):
                return True
        elif first in (SPEC_FILE, CONFIG_FILE, "model.py") or PurePosixPath(first).suffix in _ARTEFACT_SUFFIXES:
            return True
    return False
