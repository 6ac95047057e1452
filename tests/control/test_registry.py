"""The registry: artefacts that are kept whole, numbered, and proved before they are loaded."""

import os
import shutil
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fairlead.control.artefacts import MAX_FILES, find, reading
from fairlead.control.digest import digest_of, spec_text
from fairlead.control.registry import Actor, Draft, Registry, changes, registry_folder
from fairlead.control.signing import pem_of, sign
from fairlead.core.config import read_yaml
from fairlead.core.errors import ConfigError, FairleadError, InvalidRequest, LoadError, NotFound, TooLarge, Unavailable, Unreachable
from fairlead.core.rollout import RegistrySettings
from fairlead.core.specs import BatchingSpec, ModelSpec, VersionPolicy
from fairlead.core.versions import Stage, parse_ref
from fairlead.store.registry_rows import GateOutcome, GateRow, VersionRow
from fairlead.store.rows import AuditQuery
from fairlead.store.store import Store
from fairlead.store.transactions import Conflict
from tests.stores import new_store

NOW = 1_790_000_000.0
ME = Actor("me", "10.0.0.9")
PYTHON = "class Model:\n    def infer(self, inputs):\n        return inputs\n"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    (tmp_path / "data").mkdir()
    opened = new_store(tmp_path / "data")
    yield opened
    opened.close()


def registry_of(store: Store, tmp_path: Path, **settings: Any) -> Registry:
    return Registry(store, RegistrySettings(**settings), cache_folder=tmp_path / "cache", now=lambda: NOW)


@pytest.fixture
def registry(store: Store, tmp_path: Path) -> Registry:
    return registry_of(store, tmp_path)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def add(registry: Registry, source: object, model: str = "fraud", **draft: Any) -> VersionRow:
    return registry.add(str(source), model, Draft(**draft), ME)[0]


def actions(store: Store, model: str = "fraud") -> list[tuple[str, str]]:
    return [(row.action, row.subject) for row in reversed(store.audit(AuditQuery(model=model), 100))]


def folders(registry: Registry, model: str = "fraud") -> list[str]:
    """What lies there, hidden or not."""
    return sorted(each.name for each in (Path(registry.url) / model).iterdir())


# Adding


def test_a_version_is_kept_with_its_digest_spec_and_provenance(registry: Registry, store: Store, tmp_path: Path) -> None:
    source = write(tmp_path / "fraud", {"model.ubj": "trees", "model.yaml": "instances: {count: 2}\n", "labels/en.txt": "good\nbad"})
    row, new = registry.add(str(source), "fraud", Draft(git_commit="abc", metrics={"auc": 0.9}, licence="MIT", tags={"team": "risk"}), ME)
    assert new and row.ref == "fraud@1" and row.stage is Stage.STAGED and row.created == NOW
    assert (row.backend, row.bytes, row.location) == ("xgboost", 13, "fraud/1")
    assert row.provenance == {"who": "me", "source": str(source), "git_commit": "abc", "licence": "MIT", "metrics": {"auc": 0.9}}
    assert row.tags == {"team": "risk"}
    assert sorted(row.files) == ["labels/en.txt", "model.ubj"]
    assert read_yaml(row.spec, ModelSpec, "").instances.count == 2
    kept = registry_folder(store) / "fraud" / "1"
    assert (kept / "model.ubj").read_text() == "trees" and not (kept / "model.yaml").exists()
    assert kept.stat().st_mode & 0o077 == 0
    hosted = registry.hosted(row)
    assert (hosted.spec.name, hosted.spec.instances.count, hosted.edition) == ("fraud", 2, row.digest[:16])
    assert hosted.fetch() == kept
    assert actions(store) == [("version.add", "fraud@1")]
    (entry,) = store.audit(AuditQuery(model="fraud"), 10)
    assert (entry.actor, entry.address, entry.details["digest"]) == ("me", "10.0.0.9", row.digest)


def test_numbers_count_up_and_the_same_content_is_the_same_version(registry: Registry, store: Store, tmp_path: Path) -> None:
    first = add(registry, write(tmp_path / "a", {"model.ubj": "one"}))
    again, new = registry.add(str(write(tmp_path / "elsewhere", {"model.ubj": "one"})), "fraud", Draft(notes="again"), ME)
    assert (again, new) == (first, False)
    assert folders(registry) == ["1"]
    second = add(registry, write(tmp_path / "b", {"model.ubj": "two"}))
    assert second.ref == "fraud@2"
    other_spec = add(registry, write(tmp_path / "c", {"model.ubj": "two"}), spec="batching: {max_batch_size: 8}")
    assert other_spec.ref == "fraud@3"
    assert add(registry, tmp_path / "a", model="spam").ref == "spam@1"
    assert actions(store) == [("version.add", f"fraud@{number}") for number in (1, 2, 3)]


def test_an_unfinished_folder_that_vanishes_while_it_is_looked_at_hinders_nobody(registry: Registry, tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.onnx": "x"})
    folder = tmp_path / "data/registry/fraud"
    folder.mkdir(parents=True)
    (folder / ".adding-vanished").symlink_to("nowhere")  # listed, and not there when its age is asked
    assert registry.add(str(source), "fraud", Draft(), ME)[0].number == 1


def test_many_who_add_the_same_at_once_get_the_same_version(registry: Registry, store: Store, tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.onnx": "x" * 100_000, "data/y": "y"})
    with ThreadPoolExecutor(4) as threads:
        found = [*threads.map(lambda _: registry.add(str(source), "fraud", Draft(), ME), range(8))]
    assert [new for _, new in found].count(True) == 1
    (row,) = store.registry.versions("fraud")
    assert {each.ref for each, _ in found} == {row.ref}
    assert folders(registry) == [str(row.number)] and registry.fetch(row).is_dir()


def test_a_number_is_not_given_twice_even_after_its_version_is_deleted(registry: Registry, tmp_path: Path) -> None:
    source = write(tmp_path / "a", {"model.ubj": "one"})
    row = add(registry, source)
    registry.delete(registry.retire(row, "old", ME), ME)
    assert folders(registry) == []
    assert add(registry, source).ref == "fraud@2"


@pytest.mark.parametrize(
    ("files", "path", "kept", "backend"),
    [
        ({"model.onnx": "x"}, "model.onnx", ["model.onnx"], "onnx"),
        ({"m/model.yaml": "backend: onnx", "m/7/model.onnx": "x"}, "m", ["model.onnx"], "onnx"),
        ({"m/model.yaml": "backend: onnx\nfile: a.bin", "m/6/a.bin": "x", "m/7/a.bin": "x"}, "m/7", ["a.bin"], "onnx"),
        ({"m/config.json": '{"model_type": "llama"}', "m/model.safetensors": "x"}, "m", ["config.json", "model.safetensors"], "llm"),
        ({"m/model_index.json": "{}", "m/unet/config.json": "{}"}, "m", ["model_index.json", "unet/config.json"], "diffusion"),
        ({"m/model.py": PYTHON, "m/.git/x": "", "m/__pycache__/x.pyc": "", "m/data/x.csv": ""}, "m", ["data/x.csv", "model.py"], "python"),
        ({"m/config.pbtxt": 'backend: "onnxruntime"\nmax_batch_size: 4', "m/1/model.onnx": "x"}, "m", ["model.onnx"], "onnx"),
    ],
)  # fmt: skip
def test_what_a_version_may_be_added_from(
    registry: Registry, tmp_path: Path, files: dict[str, str], path: str, kept: list[str], backend: str
) -> None:
    row = add(registry, write(tmp_path / "source", files) / path)
    assert (sorted(row.files), row.backend) == (kept, backend)
    assert registry.hosted(row).fetch().is_dir()


def test_the_spec_beside_a_version_folder_counts(registry: Registry, tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.yaml": "backend: onnx\nbatching: {max_batch_size: 3}", "1/model.onnx": "a", "2/model.onnx": "b"})
    assert registry.hosted(add(registry, source / "2")).spec.batching.max_batch_size == 3


def test_a_spec_that_is_given_replaces_the_sources_own(registry: Registry, tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.yaml": "batching: {max_batch_size: 3}", "model.pkl": "x"})
    spec = registry.hosted(add(registry, source, spec="batching: {max_batch_size: 5}", trusted=True)).spec
    assert (spec.batching.max_batch_size, spec.trusted) == (5, True)


@pytest.mark.parametrize(
    ("files", "path", "draft", "words"),
    [
        ({}, "nowhere", {}, "there is nothing at .*nowhere"),
        ({"m/readme.md": ""}, "m", {}, "holds no artefact"),
        ({"m/model.yaml": "{}"}, "m", {}, "holds no artefact"),
        ({"m/a/model.onnx": "", "m/b/model.onnx": ""}, "m", {}, r"holds no model but folders: add one of them \(a, b\)"),
        ({"m/1/model.onnx": "", "m/2/model.onnx": ""}, "m", {}, r"holds versions 1, 2: add one of them \(.*/m/2\)"),
        ({"m/model.onnx": "", "m/model.yaml": "bakend: onnx"}, "m", {}, "model.yaml:1: unknown key `bakend`"),
        ({"m/model.onnx": "", "m/model.yaml": "name: spam"}, "m", {}, "of a model named 'spam', not 'fraud'"),
        ({"m/model.onnx": ""}, "m", {"spec": "nope: 1"}, "spec:1: unknown key `nope`"),
        ({"m/a.onnx": "", "m/b.onnx": ""}, "m", {}, "holds 2 artefacts"),
        ({"m/model.onnx": ""}, "m", {"flavour": "onnx"}, "is no model folder of MLflow's"),
        ({"m/model.onnx": ""}, "m", {"public_key": "x"}, "`signature` and `public_key` go together"),
        ({"m/model.onnx": ""}, "m", {"parent": "fraud@6"}, "there is no model `fraud`"),
        ({"model.onnx": "x"}, "model.onnx", {"in_place": True}, "cannot stay where it is: name a folder"),
        ({"m/mod\nel.onnx": ""}, "m", {}, r"a file whose path is not taken: 'mod\\nel.onnx'"),
    ],
)  # fmt: skip
def test_what_cannot_be_added_is_told_in_words(
    registry: Registry, store: Store, tmp_path: Path, files: dict[str, str], path: str, draft: dict[str, Any], words: str
) -> None:
    source = write(tmp_path / "source", files)
    with pytest.raises(FairleadError, match=words):
        add(registry, source / path, **draft)
    assert store.registry.models() == () and actions(store) == []


@pytest.mark.parametrize("name", ["", "../up", ".hidden", "a/b", "x" * 129, "fr aud"])
def test_a_models_name_is_checked_before_anything_else(registry: Registry, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match="is no model's name"):
        add(registry, tmp_path, model=name)


def test_a_version_that_is_too_large_or_has_too_many_files_is_not_copied(store: Store, tmp_path: Path) -> None:
    registry = registry_of(store, tmp_path, max_bytes=10)
    with pytest.raises(TooLarge, match=r"holds 11 bytes, more than a version may have \(10: `control.registry.max_bytes`\)"):
        add(registry, write(tmp_path / "m", {"model.onnx": "x" * 11}))
    many = tmp_path / "many"
    many.mkdir()
    for number in range(MAX_FILES + 1):
        (many / f"{number}.onnx").touch()
    with pytest.raises(TooLarge, match=f"a version has {MAX_FILES} at most"):
        add(registry, many)


# Links and special files


def test_a_link_inside_the_folder_is_what_it_points_to_and_one_that_leaves_it_is_refused(registry: Registry, tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"real.bin": "x", "model.yaml": "backend: onnx\nfile: model.onnx"})
    (source / "model.onnx").symlink_to("real.bin")
    row = add(registry, source)
    kept = registry.fetch(row) / "model.onnx"
    assert kept.read_text() == "x" and not kept.is_symlink()
    secret = write(tmp_path, {"secret": "s"}) / "secret"
    (source / "more.txt").symlink_to(secret)
    with pytest.raises(InvalidRequest, match=r"more.txt in .* is a link that leaves the folder"):
        add(registry, source)
    (source / "more.txt").unlink()
    (source / "more.txt").symlink_to("gone")
    with pytest.raises(InvalidRequest, match="leads nowhere"):
        add(registry, source)
    (source / "more.txt").unlink()
    (source / "sub").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(InvalidRequest, match="is a link to a folder"):
        add(registry, source)


def test_a_pipe_or_a_socket_is_no_artefact_and_nobody_waits_for_it(registry: Registry, tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.onnx": "x"})
    os.mkfifo(source / "pipe")
    with pytest.raises(InvalidRequest, match="pipe is no plain file"):
        add(registry, source)


def test_a_file_that_changes_while_it_is_read_is_not_kept(registry: Registry, tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.onnx": "before"})
    artefacts = find(str(source), "fraud", cache_folder=tmp_path, max_bytes=100)
    for text in ("longer than before", "less"):
        (source / "model.onnx").write_text(text)
        with pytest.raises(InvalidRequest, match="model.onnx changed while it was read"):
            list(artefacts.read("model.onnx"))


# Crashes and failures


def test_a_store_that_fails_after_the_files_are_there_lists_nothing_and_leaves_nothing(
    registry: Registry, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "m", {"model.onnx": "x"})

    def fail(*_: object) -> None:
        raise Unavailable("the store does not answer: gone")

    with monkeypatch.context() as patch:
        patch.setattr(registry.rows, "add_version", fail)
        with pytest.raises(Unavailable):
            add(registry, source)
    assert folders(registry) == [] and store.registry.versions() == ()
    assert add(registry, source).ref == "fraud@2"


def test_what_a_crash_left_is_in_no_list_and_goes_after_a_day(registry: Registry, store: Store, tmp_path: Path) -> None:
    source = write(tmp_path / "m", {"model.onnx": "x"})
    add(registry, source)
    left = Path(registry.url) / "fraud"
    for name in (".adding-old", ".adding-new"):
        write(left / name, {"model.onnx": "half"})
    os.utime(left / ".adding-old", (1, 1))
    assert len(store.registry.versions("fraud")) == 1
    assert add(registry, write(tmp_path / "n", {"model.onnx": "y"})).ref == "fraud@2"
    assert folders(registry) == [".adding-new", "1", "2"]


def test_files_that_the_store_does_not_know_are_never_overwritten(registry: Registry, tmp_path: Path) -> None:
    write(Path(registry.url) / "fraud" / "1", {"precious": "x"})
    source = write(tmp_path / "m", {"model.onnx": "x"})
    with pytest.raises(InvalidRequest, match="of which the store knows nothing: move it away"):
        add(registry, source)
    assert (Path(registry.url) / "fraud" / "1" / "precious").exists()


def test_a_folder_that_takes_nothing_is_told_as_what_it_is(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    registry = registry_of(store, tmp_path, url=str(tmp_path / "file"))
    with pytest.raises(Unreachable, match="the registry does not take"):
        add(registry, write(tmp_path / "m", {"model.onnx": "x"}))


# Loading


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.py").write_text("other"), "model.py has the digest"),
        (lambda folder: (folder / "data" / "x.csv").unlink(), "data/x.csv is missing"),
        (lambda folder: (folder / "sitecustomize.py").write_text("evil"), "sitecustomize.py in .* was not there"),
        (lambda folder: (folder / "model.py").unlink() or (folder / "model.py").symlink_to("/etc/hostname"), "model.py has the digest"),
        (lambda folder: (folder / "package").symlink_to(folder.parent), "package in .* was not there"),
        (shutil.rmtree, "there is no folder"),
    ],
)  # fmt: skip
def test_what_is_not_what_was_added_is_not_loaded(registry: Registry, tmp_path: Path, change: Any, words: str) -> None:
    row = add(registry, write(tmp_path / "m", {"model.py": PYTHON, "data/x.csv": "1"}))
    folder = registry.fetch(row)
    write(folder, {"__pycache__/model.pyc": "", ".nfs1": ""})
    assert registry.fetch(row) == folder
    change(folder)
    with pytest.raises(LoadError, match=f"fraud@1 is .*{words}"):
        registry.fetch(row)


def test_a_row_that_was_changed_in_the_store_is_not_loaded(registry: Registry, tmp_path: Path) -> None:
    row = add(registry, write(tmp_path / "m", {"model.py": PYTHON}))
    changed = VersionRow(**{**{name: getattr(row, name) for name in row.__struct_fields__}, "spec": "trusted: true"})
    with pytest.raises(LoadError, match="its row in the store was changed"):
        registry.fetch(changed)


def test_a_version_may_stay_where_it_is_and_is_verified_all_the_same(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "m", {"model.onnx": "x", "model.yaml": "batching: {max_batch_size: 2}"})
    monkeypatch.chdir(tmp_path)
    row = add(registry, "m", in_place=True)
    assert (row.location, registry.fetch(row)) == (str(source), source)
    assert not (Path(registry.url) / "fraud").exists()
    (source / "model.onnx").write_text("y")
    with pytest.raises(LoadError, match="model.onnx has the digest"):
        registry.fetch(row)
    registry.delete(registry.retire(row, "", ME), ME)
    assert (source / "model.onnx").exists()


# Elsewhere


@pytest.fixture
def bucket() -> Iterator[str]:
    name = uuid.uuid4().hex
    yield f"memory://{name}"
    fsspec.filesystem("memory").rm(f"/{name}", recursive=True) if fsspec.filesystem("memory").exists(f"/{name}") else None


def test_a_registry_on_another_file_system_gives_verified_copies(store: Store, tmp_path: Path, bucket: str) -> None:
    registry = registry_of(store, tmp_path, url=bucket)
    source = write(tmp_path / "m", {"model.py": PYTHON, "data/x.csv": "1"})
    row = add(registry, source)
    assert (row.location, registry.location(row), row.backend) == ("fraud/1", f"{bucket}/fraud/1", "python")
    folder = registry.fetch(row)
    assert (folder / "data" / "x.csv").read_text() == "1" and folder.is_relative_to(tmp_path / "cache")
    (folder / "model.py").write_text("rotten")
    assert (registry.fetch(row) / "model.py").read_text() == PYTHON
    memory = fsspec.filesystem("memory")
    memory.pipe_file(f"{bucket}/fraud/1/model.py", b"evil")
    assert (registry.fetch(row) / "model.py").read_text() == PYTHON
    shutil.rmtree(folder)
    with pytest.raises(LoadError, match="model.py has the digest"):
        registry.fetch(row)
    assert not folder.exists() and [*(tmp_path / "cache").iterdir()] == []
    registry.delete(registry.retire(row, "", ME), ME)
    assert not memory.exists(f"{bucket}/fraud/1")


def test_a_source_on_another_file_system_is_copied_or_stays(registry: Registry, tmp_path: Path, bucket: str) -> None:
    memory = fsspec.filesystem("memory")
    for name, content in {"model.yaml": b"batching: {max_batch_size: 2}", "5/model.onnx": b"x"}.items():
        memory.pipe_file(f"{bucket}/m/{name}", content)
    copied = add(registry, f"{bucket}/m/5")
    assert (copied.provenance["source"], copied.backend) == (f"{bucket}/m/5", "onnx")
    stays = add(registry, f"{bucket}/m/5", model="stays", in_place=True)
    assert stays.digest == copied.digest and stays.location == f"{bucket}/m/5"
    assert (registry.fetch(stays) / "model.onnx").read_bytes() == b"x"
    with pytest.raises(InvalidRequest, match="there is nothing at memory://"):
        add(registry, f"{bucket}/nowhere")
    with pytest.raises(ConfigError, match="cannot read nosuch://x"):
        add(registry, "nosuch://x")


def test_credentials_in_a_url_are_neither_kept_nor_told(registry: Registry, store: Store) -> None:
    memory, place = fsspec.filesystem("memory"), uuid.uuid4().hex
    url, query = f"memory://ann:pass@{place}/m", f"memory://{place}/q?sig=pass"
    for each in (url, query):
        memory.pipe_file(f"{each}/model.onnx", f"of {each}".encode())
    row, signed = add(registry, url), add(registry, query)
    assert row.provenance["source"] == f"memory://{place}/m" and signed.provenance["source"] == f"memory://{place}/q"
    draft = Draft(source="by hand from https://ann:pass@host/m?sig=pass#pass on Monday")
    told, _ = registry.add(url, "told", draft, ME)
    assert told.provenance["source"] == "by hand from https://host/m on Monday"
    audit = [entry.details for model in ("fraud", "told") for entry in store.audit(AuditQuery(model=model), 100)]
    assert len(audit) == 3 and "pass" not in str(audit)

    for kept in (url, query):
        with pytest.raises(InvalidRequest, match="names a user or has a query") as refused:
            add(registry, kept, model="stays", in_place=True)
        assert "pass" not in refused.value.message
    for nowhere in (f"{url}/nowhere", f"{query}/nowhere", f"nosuch://ann:pass@{place}"):
        with pytest.raises(FairleadError) as failed:
            add(registry, nowhere, model="stays")
        assert "pass" not in failed.value.message and "://" in failed.value.message


def test_a_file_system_that_tells_its_url_tells_no_credentials() -> None:
    with pytest.raises(InvalidRequest) as failed, reading("https://ann:pass@host/m?sig=pass"):
        raise OSError("403, url='https://ann:pass@host/m?sig=pass'")
    assert "pass" not in failed.value.message and "403, url='https://host/m" in failed.value.message


def test_a_registry_whose_url_has_credentials_does_not_tell_them(store: Store, tmp_path: Path) -> None:
    place = uuid.uuid4().hex
    registry = registry_of(store, tmp_path, url=f"memory://ann:pass@{place}")
    row = add(registry, write(tmp_path / "m", {"model.onnx": "x"}))
    assert registry.location(row) == f"memory://{place}/fraud/1"
    assert (registry.fetch(row) / "model.onnx").read_text() == "x"


# Signatures


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def test_only_signed_versions_serve_where_that_is_the_rule(store: Store, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    public = pem_of(key.public_key())
    registry = registry_of(store, tmp_path, signed_only=True, trusted_keys={"release": public})
    row = add(registry, write(tmp_path / "m", {"model.onnx": "x"}))
    with pytest.raises(LoadError, match="fraud@1 is not signed, and only what one of"):
        registry.hosted(row).fetch()
    with pytest.raises(InvalidRequest, match="the signature is not of this content"):
        registry.sign(row, sign(key, "fraud", "00" * 32), public, ME)
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(InvalidRequest, match=r"is none of `control.registry.trusted_keys` \(release\)"):
        registry.sign(row, sign(stranger, "fraud", row.digest), pem_of(stranger.public_key()), ME)
    signed = registry.sign(row, sign(key, "fraud", row.digest), public, ME)
    assert signed.signed_by == "release" and registry.signed_by(signed) == "release"
    assert registry.fetch(signed).is_dir()
    assert actions(store)[-1] == ("version.sign", "fraud@1")


def test_a_signature_of_a_key_that_is_no_longer_trusted_counts_no_more(store: Store, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    row = add(registry_of(store, tmp_path), write(tmp_path / "m", {"model.onnx": "x"}))
    signed = registry_of(store, tmp_path).sign(row, sign(key, "fraud", row.digest), pem_of(key.public_key()), ME)
    assert signed.signed_by.startswith("ed25519:")
    other = pem_of(Ed25519PrivateKey.generate().public_key())
    strict = registry_of(store, tmp_path, signed_only=True, trusted_keys={"new": other})
    with pytest.raises(LoadError, match=r"fraud@1 is signed by ed25519:\w+, which is none of"):
        strict.fetch(signed)


def test_a_version_is_signed_while_it_is_added(registry: Registry, tmp_path: Path, key: Ed25519PrivateKey) -> None:
    source = write(tmp_path / "m", {"model.onnx": "x"})
    artefacts = registry.find(str(source), "fraud", Draft())
    signature = sign(key, "fraud", digest_of(artefacts.hashed(lambda _: None), artefacts.spec))
    public = pem_of(key.public_key())
    with pytest.raises(InvalidRequest, match="not of this content"):
        add(registry, write(tmp_path / "n", {"model.onnx": "y"}), signature=signature, public_key=public)
    unsigned = add(registry, source)
    signed = add(registry, source, signature=signature, public_key=public)
    assert (unsigned.signed_by, signed.ref, signed.signature_text) == ("", "fraud@1", signature)
    assert folders(registry) == ["1"]


def test_a_rule_that_lets_nothing_serve_is_refused(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`control.registry.signed_only` needs `trusted_keys`"):
        registry_of(store, tmp_path, signed_only=True)


# Digests and differences


def test_a_digest_covers_names_contents_and_what_the_spec_says() -> None:
    files = {"a": (1, "aa"), "b": (2, "bb")}
    digest = digest_of(files, ModelSpec())
    assert digest == digest_of(dict(reversed(files.items())), ModelSpec(name="fraud", version_policy=VersionPolicy(all=True)))
    assert digest == digest_of(files, ModelSpec(batching=BatchingSpec()))
    others = [
        digest_of({"a": (1, "aa"), "c": (2, "bb")}, ModelSpec()),
        digest_of({"a": (1, "aa"), "b": (2, "bc")}, ModelSpec()),
        digest_of(files, ModelSpec(trusted=True)),
        digest_of(files, ModelSpec(parameters={"x": 1})),
    ]
    assert len({digest, *others}) == 5


def test_a_spec_survives_its_text() -> None:
    spec = read_yaml(
        "inputs: [{name: é, datatype: FP32, shape: [-1, 4], labels: [a, 'no']}]\n"
        "batching: {priority_levels: 2, priority_queue_policies: {1: {max_queue_size: 3}}}\nparameters: {deep: {list: [1, 2.5, null], 3: x}, day: 2026-01-31}\ninstances: {isolation: process}",
        ModelSpec,
        "",
    )
    assert read_yaml(spec_text(spec), ModelSpec, "") == spec
    assert spec_text(ModelSpec()) == "{}\n"


def test_a_diff_names_what_differs_and_nothing_else(registry: Registry, store: Store, tmp_path: Path) -> None:
    old = add(
        registry,
        write(tmp_path / "a", {"model.onnx": "one", "gone.txt": "x", "same.txt": "s", "model.yaml": "batching: {max_batch_size: 4}"}),
        metrics={"auc": 0.9, "loss": 1},
        git_commit="abc",
    )
    new = add(
        registry,
        write(tmp_path / "b", {"model.onnx": "two!", "new.txt": "", "same.txt": "s", "model.yaml": "trusted: true"}),
        metrics={"auc": 0.95, "loss": 1},
        git_commit="abc",
    )
    row = GateRow(model="fraud", number=2, run="r", gate="load", outcome=GateOutcome.PASSED, seconds=1.0, time=NOW)
    store.registry.add_gates([row])
    store.registry.change_version("fraud", 2, registry.did(ME, "x", "fraud@2"), signature={"inputs": [{"name": "x", "shape": [-1, 4]}]})
    found = registry.diff(old, store.registry.version("fraud", 2))
    assert found.versions == ("fraud@1", "fraud@2") and not found.same_content
    assert [(each.path, each.change, each.bytes) for each in found.files] == [
        ("gone.txt", "removed", (1, None)),
        ("model.onnx", "changed", (3, 4)),
        ("new.txt", "added", (None, 0)),
    ]
    assert found.spec == {"batching.max_batch_size": (4, None), "trusted": (None, True)}
    assert found.metrics == {"auc": (0.9, 0.95)}
    assert list(found.provenance) == ["source"]
    assert found.schema == {"inputs[x].name": (None, "x"), "inputs[x].shape": (None, [-1, 4])}
    assert found.gates == {"load": (None, "passed")}
    assert new.ref == "fraud@2"


def test_tensors_are_compared_by_name_and_other_lists_by_place() -> None:
    assert changes({"inputs": [{"name": "b", "shape": [1]}]}, {"inputs": [{"name": "a", "shape": [1]}, {"name": "b", "shape": [2]}]}) == {
        "inputs[b].shape": ([1], [2]),
        "inputs[a].name": (None, "a"),
        "inputs[a].shape": (None, [1]),
    }


# Life


def test_a_version_is_retired_with_a_reason_and_only_then_deleted(registry: Registry, store: Store, tmp_path: Path) -> None:
    row = add(registry, write(tmp_path / "m", {"model.onnx": "x"}))
    store.registry.move("fraud", 1, Stage.VALIDATED, "gates", registry.did(ME, "version.stage", "fraud@1"))
    with pytest.raises(Conflict, match="fraud@1 is validated: retire it first"):
        registry.delete(row, ME)
    retired = registry.retire(store.registry.resolve(parse_ref("fraud@1")), "too slow", ME)
    assert (retired.stage, retired.reason) == (Stage.RETIRED, "too slow")
    registry.delete(retired, ME)
    with pytest.raises(NotFound):
        store.registry.version("fraud", 1)
    entries = {row.action: row.details for row in reversed(store.audit(AuditQuery(model="fraud"), 10))}
    assert entries["version.stage"] == {"stage": "retired", "before": "validated", "reason": "too slow"}
    assert entries["version.delete"] == {"digest": row.digest}


def test_a_version_that_serves_is_not_retired(registry: Registry, store: Store, tmp_path: Path) -> None:
    row = add(registry, write(tmp_path / "m", {"model.onnx": "x"}))
    for stage in (Stage.VALIDATED, Stage.SERVING):
        store.registry.move("fraud", 1, stage, "", registry.did(ME, "version.stage", "fraud@1"))
    with pytest.raises(Conflict, match="fraud@1 is serving: it cannot become retired"):
        registry.retire(row, "", ME)


def test_what_is_said_of_a_version_can_be_kept_by_every_store(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="`provenance` holds what the store cannot keep"):
        add(registry, write(tmp_path / "m", {"model.onnx": "x"}), metrics={"auc": float("nan")})
    assert folders(registry) == []


def test_the_registrys_folder_is_known_in_words(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read s4://bucket"):
        registry_of(store, tmp_path, url="s4://bucket")


def test_checks_beside_a_model_are_no_part_of_its_versions(registry: Registry, tmp_path: Path) -> None:
    plain = add(registry, write(tmp_path / "plain", {"model.py": PYTHON}))
    source = write(tmp_path / "checked", {"model.py": PYTHON, "checks/checks.yaml": "golden: {rtol: 0.1}\n"})
    assert add(registry, source).ref == plain.ref
    stays = add(registry, source, "other", in_place=True)
    assert set(stays.files) == {"model.py"}
    assert registry.fetch(stays).is_dir()
