"""The registry: artefacts in a folder (or any fsspec URL), what is known of them in the store.

`<url>/<model>/<number>/...` holds a version's own files and nothing else. A version is listed once its row is written, which is the
last that happens: what a crash leaves behind is in no list.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Meta, Struct, structs

from fairlead.backends import detect
from fairlead.control.artefacts import CHECKS_FOLDER, Artefacts, Progress, discreet, find, open_plain, without_credentials
from fairlead.control.digest import CHUNK_BYTES, Files, digest_of, said, sha256_of, spec_text
from fairlead.control.signing import fingerprint, public_key, signer, trusted
from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError, FairleadError, InvalidRequest, LoadError, Unreachable
from fairlead.core.rollout import RegistrySettings
from fairlead.core.specs import ModelSpec
from fairlead.core.versions import Stage, check_model_name, parse_ref
from fairlead.runtime.repository import Hosted
from fairlead.runtime.source import SPEC_FILE, Source, default_cache
from fairlead.runtime.triton_config import CONFIG_FILE
from fairlead.store.database import default_folder
from fairlead.store.registry_rows import GateRow, VersionRow
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store

Label = Annotated[str, Meta(max_length=1000)]
Tags = dict[Annotated[str, Meta(min_length=1, max_length=128)], Label]
NOT_OF_THE_VERSION = (SPEC_FILE, CONFIG_FILE, CHECKS_FOLDER)
UNFINISHED = ".adding-"
"""How the folders of what is being added begin."""
UNFINISHED_SECONDS = 86_400.0
"""After which such a folder is a crash's."""

log = structlog.get_logger("fairlead.registry")


class Draft(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is said of a version when it is added."""

    spec: str = ""
    """A model.yaml, in place of the source's own."""
    trusted: bool = False
    """Whoever adds it vouches for artefacts whose loading runs code."""
    flavour: str = ""
    """Of an MLflow model: in place of the best one."""
    in_place: bool = False
    """Its files stay where they are."""
    source: Label = ""
    """Where it comes from, where that is not where it is read."""
    git_commit: Label = ""
    parent: Label = ""
    """The version that it was made of."""
    licence: Label = ""
    framework: Label = ""
    notes: Label = ""
    metrics: dict[str, float] = {}
    tags: Tags = {}
    public_key: str = ""
    """Of `signature`, in PEM."""
    signature: str = ""
    """Over the statement of this model and this content."""


class Actor(Struct, frozen=True):
    """Who does something, for the audit log."""

    name: str
    address: str = ""


class FileChange(Struct, frozen=True, kw_only=True):
    path: str
    change: str
    """added, removed, changed."""
    bytes: tuple[int | None, int | None]


class Diff(Struct, frozen=True, kw_only=True):
    """What differs between two versions: pairs of what the one says and the other; null: it says nothing."""

    versions: tuple[str, str]
    same_content: bool
    files: tuple[FileChange, ...]
    spec: dict[str, tuple[Any, Any]]
    schema: dict[str, tuple[Any, Any]]
    metrics: dict[str, tuple[Any, Any]]
    provenance: dict[str, tuple[Any, Any]]
    gates: dict[str, tuple[Any, Any]]
    """Of the latest run of each."""


def registry_folder(store: Store) -> Path:
    """Beside the store's file."""
    file = store.file
    return (default_folder() if file is None else file.parent) / "registry"


class Registry:
    """Its methods block: call them from a thread."""

    def __init__(
        self, store: Store, settings: RegistrySettings, *, cache_folder: Path | None = None, now: Callable[[], float] = time.time
    ) -> None:
        """Raises ConfigError where there is no such kind of file system, or a trusted key is none."""
        self.store = store
        self.rows = store.registry
        self.settings = settings
        self.keys = trusted(settings.trusted_keys)
        if settings.signed_only and not self.keys:
            raise ConfigError("`control.registry.signed_only` needs `trusted_keys`: nothing could serve")
        self.cache_folder = cache_folder or default_cache()
        self.now = now
        self.url = settings.url or str(registry_folder(store))
        self.place = Source(self.url, self.cache_folder)
        self.local = self.place.local
        self.root = self.place.root.rstrip("/")

    # Adding

    def find(self, url: str, model: str, draft: Draft) -> Artefacts:
        """What would be added. Raises FairleadError."""
        check_model_name(model)
        return find(
            url,
            model,
            cache_folder=self.cache_folder,
            max_bytes=self.settings.max_bytes,
            spec=draft.spec,
            trusted=draft.trusted,
            flavour=draft.flavour,
        )

    @discreet()
    def add(
        self, url: str, model: str, draft: Draft, by: Actor, *, progress: Progress = lambda _: None, move: bool = False
    ) -> tuple[VersionRow, bool]:
        """The version, and whether it is new: the same content again is the same version, of which nothing is changed.

        `move`: the files at `url` are this registry's to take, and lie in a folder of `intake`. Raises FairleadError.
        """
        if draft.parent:
            draft = structs.replace(draft, parent=self.rows.resolve(parse_ref(draft.parent)).ref)
        if draft.in_place and without_credentials(url) != url:
            raise InvalidRequest(
                f"{url} cannot stay where it is: its URL names a user or has a query, and it would be kept; give credentials by the environment"
            )
        if bool(draft.signature) != bool(draft.public_key):
            raise InvalidRequest("`signature` and `public_key` go together")
        if draft.signature:
            self._key_of(draft.public_key)
        artefacts = self.find(url, model, draft)
        if draft.in_place and not artefacts.folder:
            raise InvalidRequest(f"{url} cannot stay where it is: name a folder that holds the version's own files, under their own names")
        kind = self._kind(artefacts)
        if draft.in_place:
            files, location = artefacts.hashed(progress), artefacts.folder
            return self._listed(self._row(model, draft, artefacts, files, location, kind, by), by)
        with self._kept(model, artefacts, kind, progress, move=move) as (files, kind, publish):
            row = self._row(model, draft, artefacts, files, "", kind, by)
            earlier = self.rows.same_content(model, row.digest)
            if earlier is not None:
                return self._again(earlier, row, by), False
            number = self.rows.reserve(model, now=self.now())
            publish(number)
            row = structs.replace(row, number=number, location=f"{model}/{number}")
            try:
                return self._listed(row, by)
            finally:
                self._remove_unlisted(row)

    def _row(self, model: str, draft: Draft, artefacts: Artefacts, files: Files, location: str, kind: str, by: Actor) -> VersionRow:
        digest = digest_of(files, artefacts.spec)
        signed_by = ""
        if draft.signature:
            signed_by = self._signed_by(draft.signature, draft.public_key, model, digest)
        told = {name: getattr(draft, name) for name in ("git_commit", "parent", "licence", "framework", "notes", "metrics")}
        provenance = {
            "who": by.name,
            "source": without_credentials(draft.source or artefacts.source.url),
            **{name: without_credentials(value) for name, value in artefacts.provenance.items()},
            **{name: value for name, value in told.items() if value},
        }
        return VersionRow(
            model=model,
            digest=digest,
            spec=spec_text(artefacts.spec),
            files=dict(files),
            location=location,
            bytes=artefacts.num_bytes,
            backend=kind,
            provenance=provenance,
            tags=draft.tags,
            signed_by=signed_by,
            signature_text=draft.signature,
            created=self.now(),
        )

    def _listed(self, row: VersionRow, by: Actor) -> tuple[VersionRow, bool]:
        details = {"digest": row.digest, "bytes": row.bytes, "source": row.provenance["source"]}
        if row.signed_by:
            details["signed_by"] = row.signed_by
        listed, new = self.rows.add_version(row, self.did(by, "version.add", row.model, **details))
        return (listed, True) if new else (self._again(listed, row, by), False)

    def _again(self, listed: VersionRow, row: VersionRow, by: Actor) -> VersionRow:
        """The same content once more: a signature is taken where there was none."""
        if row.signature_text and not listed.signature_text:
            return self._put_signature(listed, row.signed_by, row.signature_text, by)
        return listed

    def _kind(self, artefacts: Artefacts) -> str:
        """Looked at before anything is copied, where that can be, else what the spec says. Raises ConfigError where it is no kind of model."""
        spec, parts = artefacts.spec, list(artefacts.parts.values())
        if not artefacts.source.local:
            return "" if self.local else spec.backend
        if artefacts.folder:
            return _detected(Path(artefacts.folder), spec, "")
        if len(parts) == 1 and parts[0].path and not spec.file:
            return _detected(Path(parts[0].path), spec, "")
        return "" if self.local else spec.backend

    @contextmanager
    def _kept(
        self, model: str, artefacts: Artefacts, kind: str, progress: Progress, *, move: bool
    ) -> Iterator[tuple[Files, str, Callable[[int], None]]]:
        """The files' digests, their kind, and what puts them in their place."""
        if self.local:
            with self._unfinished(model) as staged:
                files = self._stage(artefacts, staged, progress, move=move)
                kind = kind or _detected(staged, artefacts.spec, artefacts.source.url)
                yield files, kind, partial(self._rename, staged)
        else:
            files = artefacts.hashed(progress)
            yield files, kind, partial(self._upload, model, artefacts, files)

    @contextmanager
    def _unfinished(self, model: str) -> Iterator[Path]:
        """A new folder in the registry's own. Raises Unreachable."""
        folder = Path(self.root) / check_model_name(model)
        with self._writing(folder):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for left in folder.glob(f"{UNFINISHED}*"):
                with suppress(FileNotFoundError):  # who adds at the same time takes its own away
                    if left.stat().st_mtime < time.time() - UNFINISHED_SECONDS:
                        shutil.rmtree(left, ignore_errors=True)
            staged = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    @contextmanager
    def intake(self, model: str) -> Iterator[Path]:
        """An empty folder for what is uploaded, gone afterwards. Raises Unreachable."""
        if self.local:
            with self._unfinished(model) as folder:
                yield folder
            return
        with self._writing(self.cache_folder):
            self.cache_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=self.cache_folder))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _stage(self, artefacts: Artefacts, staged: Path, progress: Progress, *, move: bool) -> Files:
        files = {}
        for path, part in artefacts.parts.items():
            target = staged / path
            with self._writing(staged):
                target.parent.mkdir(parents=True, exist_ok=True)
                if move and part.path:
                    os.rename(part.path, target)
                    with open_plain(target) as file:
                        files[path] = (part.num_bytes, sha256_of(file))
                    progress(part.num_bytes)
                    continue
                digest = hashlib.sha256()
                with target.open("xb") as file:
                    for chunk in artefacts.read(path):
                        digest.update(chunk)
                        file.write(chunk)
                        progress(len(chunk))
                    file.flush()
                    os.fsync(file.fileno())
                files[path] = (part.num_bytes, digest.hexdigest())
        for folder in {(staged / path).parent for path in files}:
            _sync(folder)
        return files

    def _rename(self, staged: Path, number: int) -> None:
        target = staged.parent / str(number)
        with self._writing(target):
            try:
                os.rename(staged, target)
            except OSError:
                if target.exists():
                    raise InvalidRequest(f"there is something at {target} of which the store knows nothing: move it away") from None
                raise
            _sync(target.parent)

    def _upload(self, model: str, artefacts: Artefacts, files: Files, number: int) -> None:
        folder = f"{self.root}/{model}/{number}"
        try:
            with self._writing(f"{self.url}/{model}/{number}"):
                for path, (size, sha256) in files.items():
                    self._upload_file(artefacts, path, f"{folder}/{path}", size, sha256)
        except BaseException:
            self._remove_folder(folder)
            raise

    def _upload_file(self, artefacts: Artefacts, path: str, target: str, size: int, sha256: str) -> None:
        fs, digest = self.place.fs, hashlib.sha256()
        with fs.open(target, "wb") as file:
            for chunk in artefacts.read(path):
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != sha256:
            raise InvalidRequest(f"{path} changed while it was read from {artefacts.source.url}")
        if fs.size(target) != size:
            raise OSError(f"{path} was cut short")

    @contextmanager
    def _writing(self, where: object) -> Iterator[None]:
        """Raises Unreachable."""
        try:
            yield
        except FairleadError:
            raise
        except Exception as error:  # file systems of all kinds have errors of all kinds
            place = without_credentials(str(where))
            log.error("registry", where=place, error=without_credentials(f"{type(error).__name__}: {error}"))
            why = getattr(error, "strerror", None) or error or type(error).__name__
            raise Unreachable(without_credentials(f"the registry does not take {place}: {why}"), reason="artifact-store") from None

    def _remove_unlisted(self, row: VersionRow) -> None:
        """The files of a version that is not listed after all: others added the same meanwhile, or the store failed."""
        try:
            listed = self.rows.same_content(row.model, row.digest)
        except FairleadError:
            return  # whether it is listed nobody knows: what lies there does no harm
        if listed is None or listed.location != row.location:
            self._remove(row)

    def _remove(self, row: VersionRow) -> None:
        if not _in_place(row):
            self._remove_folder(f"{self.root}/{row.location}")

    def _remove_folder(self, folder: str) -> None:
        try:
            self.place.fs.invalidate_cache()
            with suppress(FileNotFoundError):
                self.place.fs.rm(folder, recursive=True)
        except Exception as error:  # nobody can do anything about it here, and the version is listed no more
            log.warning("artefacts_left", folder=without_credentials(folder), error=without_credentials(str(error)))

    # Serving

    def hosted(self, row: VersionRow) -> Hosted:
        """What a server loads. Raises ConfigError where this release cannot read its spec."""
        spec = read_yaml(row.spec, ModelSpec, f"{row.ref}: {SPEC_FILE}")
        return Hosted(spec=spec.replace(name=row.model), fetch=partial(self.fetch, row), edition=row.digest[:16])

    @discreet()
    def fetch(self, row: VersionRow) -> Path:
        """Its folder on this machine, every file of which is what was added. Raises LoadError."""
        self.check_signature(row)
        if digest_of(row.files, read_yaml(row.spec, ModelSpec, f"{row.ref}: {SPEC_FILE}")) != row.digest:
            raise LoadError(f"{row.ref} is not what was added: its row in the store was changed")
        try:
            source = Source(self._place(row), self.cache_folder)
            if source.local:
                return _verified(Path(source.root), row)
            return self._copied(source, row)
        except FairleadError as error:
            raise LoadError(error.message) from None
        except Exception as error:  # file systems of all kinds have errors of all kinds
            why = getattr(error, "strerror", None) or error or type(error).__name__
            raise LoadError(f"{row.ref} cannot be read from {self.location(row)}: {why}") from None

    def location(self, row: VersionRow) -> str:
        """Path or URL of its files, as it may be shown."""
        return without_credentials(self._place(row))

    def _place(self, row: VersionRow) -> str:
        return row.location if _in_place(row) else f"{self.url.rstrip('/')}/{row.location}"

    def check_signature(self, row: VersionRow) -> None:
        """Raises LoadError where only signed versions serve, and this is none."""
        if self.settings.signed_only and self.signed_by(row) is None:
            why = f"is signed by {row.signed_by}, which is none of" if row.signature_text else "is not signed, and only what one of"
            end = "" if row.signature_text else " signed may serve"
            raise LoadError(f"{row.ref} {why} `control.registry.trusted_keys`{end} (fairlead models sign {row.ref} --private-key KEY.pem)")

    def signed_by(self, row: VersionRow) -> str | None:
        """Which of the trusted keys vouches for it."""
        return signer(self.keys, row.signature_text, row.model, row.digest) if row.signature_text else None

    def _copied(self, source: Source, row: VersionRow) -> Path:
        """A copy on this machine that is whole or absent, of the files that the row names."""
        target = self.cache_folder / f"{row.model}-{row.number}-{row.digest[:32]}"
        if target.is_dir():
            try:
                return _verified(target, row)
            except LoadError:
                shutil.rmtree(target)
        self.cache_folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        partial_copy = Path(tempfile.mkdtemp(prefix=".partial-", dir=self.cache_folder))
        try:
            for path, (_, sha256) in row.files.items():
                local = partial_copy / path
                local.parent.mkdir(parents=True, exist_ok=True)
                digest = hashlib.sha256()
                with source.fs.open(f"{source.root.rstrip('/')}/{path}", "rb") as remote, local.open("xb") as file:
                    while chunk := remote.read(CHUNK_BYTES):
                        digest.update(chunk)
                        file.write(chunk)
                _check_same(row, path, sha256, digest.hexdigest())
            try:
                os.rename(partial_copy, target)
            except OSError:
                if not target.is_dir():  # else another process was faster
                    raise
                return _verified(target, row)
        finally:
            shutil.rmtree(partial_copy, ignore_errors=True)
        return target

    # Signatures

    def sign(self, row: VersionRow, signature: str, pem: str, by: Actor) -> VersionRow:
        """Raises InvalidRequest where it is no signature of this version, or of a key that is not trusted where some are."""
        return self._put_signature(row, self._signed_by(signature, pem, row.model, row.digest), signature, by)

    def _put_signature(self, row: VersionRow, name: str, signature: str, by: Actor) -> VersionRow:
        did = self.did(by, "version.sign", row.ref, signed_by=name, digest=row.digest)
        return self.rows.change_version(row.model, row.number, did, signed=(name, signature))

    def _signed_by(self, signature: str, pem: str, model: str, digest: str) -> str:
        name, key = self._key_of(pem)
        if signer({name: key}, signature, model, digest) is None:
            raise InvalidRequest(f"the signature is not of this content of `{model}`, whose digest is {digest}, or not of this key")
        return name

    def _key_of(self, pem: str) -> tuple[str, Ed25519PublicKey]:
        """(its name, or how it is shown, the key). Raises InvalidRequest."""
        try:
            key = public_key(pem, "`public_key`")
        except ConfigError as error:
            raise InvalidRequest(error.message) from None
        name = next((name for name, each in self.keys.items() if each == key), None)
        if name is None and self.keys:
            raise InvalidRequest(f"the key {fingerprint(key)} is none of `control.registry.trusted_keys` ({', '.join(self.keys)})")
        return name or fingerprint(key), key

    # Changes

    def retire(self, row: VersionRow, reason: str, by: Actor) -> VersionRow:
        """Raises Conflict while it is wanted."""
        did = self.did(by, "version.stage", row.ref, stage=Stage.RETIRED, before=row.stage, reason=reason)
        return self.rows.move(row.model, row.number, Stage.RETIRED, reason, did)

    def delete(self, row: VersionRow, by: Actor) -> None:
        """With its files, unless they stayed where they were. Raises Conflict while it is wanted, or not retired."""
        self._remove(self.rows.delete_version(row.model, row.number, self.did(by, "version.delete", row.ref, digest=row.digest)))

    def diff(self, old: VersionRow, new: VersionRow) -> Diff:
        """Raises FairleadError."""
        before, after = old.provenance, new.provenance
        return Diff(
            versions=(old.ref, new.ref),
            same_content=old.digest == new.digest,
            files=tuple(_file_changes(old.files, new.files)),
            spec=changes(_spec(old), _spec(new)),
            schema=changes(old.signature, new.signature),
            metrics=changes(before.get("metrics", {}), after.get("metrics", {})),
            provenance=changes(_without_metrics(before), _without_metrics(after)),
            gates=changes(self._outcomes(old), self._outcomes(new)),
        )

    def latest_gates(self, row: VersionRow) -> tuple[GateRow, ...]:
        rows = self.rows.gates(row.model, row.number)
        return tuple(each for each in rows if each.run == rows[0].run)

    def _outcomes(self, row: VersionRow) -> dict[str, str]:
        return {each.gate: str(each.outcome) for each in self.latest_gates(row)}

    def did(self, by: Actor, action: str, subject: str, **details: Any) -> AuditRow:
        return AuditRow(time=self.now(), actor=by.name, action=action, subject=subject, details=details, address=by.address)


# Files


def _in_place(row: VersionRow) -> bool:
    """Else its location is relative to the registry's own, which may be moved."""
    return row.location.startswith("/") or "://" in row.location


def _detected(path: Path, spec: ModelSpec, shown: str) -> str:
    """Raises LoadError."""
    try:
        return detect(path, spec)[0].name
    except ConfigError as error:
        raise error.saying(error.message.replace(str(path), shown) if shown else error.message) from None


def _verified(folder: Path, row: VersionRow) -> Path:
    """Raises LoadError where a file is missing, or another, or one more; OSError."""
    if not folder.is_dir():
        raise LoadError(f"{row.ref} is gone: there is no folder {folder}")
    for path, (_, sha256) in row.files.items():
        try:
            with open_plain((folder / path).resolve()) as file:
                found = sha256_of(file)
        except FileNotFoundError:
            raise LoadError(f"{row.ref} is not what was added: {path} is missing from {folder}") from None
        _check_same(row, path, sha256, found)
    for each in folder.rglob("*"):
        inside = each.relative_to(folder)
        # what is hidden, and what Python compiled, is read by nobody here; a spec is the row's
        if any(part.startswith(".") or part == "__pycache__" for part in inside.parts) or inside.parts[0] in NOT_OF_THE_VERSION:
            continue
        if (each.is_symlink() or not each.is_dir()) and inside.as_posix() not in row.files:
            raise LoadError(f"{row.ref} is not what was added: {inside} in {folder} was not there")
    return folder


def _check_same(row: VersionRow, path: str, wanted: str, found: str) -> None:
    """Raises LoadError."""
    if found != wanted:
        raise LoadError(f"{row.ref} is not what was added: {path} has the digest {found[:12]}... in place of {wanted[:12]}...")


def _sync(folder: Path) -> None:
    """The names are on the disk too: the row that tells of them will be."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# Differences


def _file_changes(old: Mapping[str, tuple[int, str]], new: Mapping[str, tuple[int, str]]) -> Iterator[FileChange]:
    for path in sorted({*old, *new}):
        before, after = old.get(path), new.get(path)
        if before != after:
            change = "added" if before is None else "removed" if after is None else "changed"
            sizes = (before[0] if before else None, after[0] if after else None)
            yield FileChange(path=path, change=change, bytes=sizes)


def _spec(row: VersionRow) -> Any:
    return said(read_yaml(row.spec, ModelSpec, f"{row.ref}: {SPEC_FILE}"))


def _without_metrics(provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in provenance.items() if name != "metrics"}


def changes(old: Any, new: Any) -> dict[str, tuple[Any, Any]]:
    """By place, as `batching.max_batch_size` or `inputs[0].shape`: what differs."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    places = [*before, *(place for place in after if place not in before)]
    return {place: (before.get(place), after.get(place)) for place in places if before.get(place) != after.get(place)}


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, each in value.items():
            yield from _leaves(each, f"{place}.{name}".removeprefix("."))
    elif isinstance(value, (list, tuple)) and any(isinstance(each, dict) for each in value):
        for position, each in enumerate(value):
            name = each.get("name", position) if isinstance(each, dict) else position  # tensors are known by theirs
            yield from _leaves(each, f"{place}[{name}]")
    elif place:
        yield place, list(value) if isinstance(value, tuple) else value
