"""Folders, bare artefacts and remote stores, all seen as the same listing."""

import shutil
from pathlib import Path

import fsspec
import pytest

from fairlead.core.errors import ConfigError, LoadError
from fairlead.core.specs import VersionPolicy
from fairlead.runtime.source import Source, choose_versions


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def scan(root: object, tmp_path: Path) -> dict:
    return Source(str(root), tmp_path / "cache").scan()


def test_a_repository_is_a_folder_of_models_with_version_folders(tmp_path):
    root = write(tmp_path / "models", {"a/1/model.onnx": "", "a/10/model.onnx": "", "b/model.yaml": "", "b/2/model.py": ""})
    found = scan(root, tmp_path)
    assert {name: sorted(listing.versions()) for name, listing in found.items()} == {"a": [1, 10], "b": [2]}


def test_a_model_without_version_folders_is_version_1(tmp_path):
    root = write(tmp_path / "models", {"a/model.onnx": "x", "a/model.yaml": "{}"})
    listing = scan(root, tmp_path)["a"]
    assert listing.versions().keys() == {1}
    assert Source(str(root), tmp_path).fetch(listing, 1) == root / "a"


def test_what_is_not_a_version_number_is_not_a_version(tmp_path):
    root = write(
        tmp_path / "models", {"a/1/model.onnx": "", "a/0/model.onnx": "", "a/03/model.onnx": "", "a/labels/x.txt": "", "a/.git/1": ""}
    )
    assert list(scan(root, tmp_path)["a"].versions()) == [1]


@pytest.mark.parametrize("files", [{"model.py": ""}, {"3/model.onnx": ""}, {"model.yaml": ""}, {"weights.ubj": ""}])
def test_one_models_own_folder_may_be_served_by_itself(tmp_path, files):
    root = write(tmp_path / "churn", files)
    assert list(scan(root, tmp_path)) == ["churn"]


def test_a_bare_artefact_is_a_model_named_after_it(tmp_path):
    root = write(tmp_path, {"fraud.onnx": "x"})
    source = Source(str(root / "fraud.onnx"), tmp_path / "cache")
    (listing,) = source.scan().values()
    assert listing.name == "fraud"
    assert source.fetch(listing, 1) == root / "fraud.onnx"


def test_a_checkpoints_folder_is_one_model(tmp_path):
    folder = tmp_path / "tiny-llama"
    (folder / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "1_Pooling/config.json"):
        (folder / name).write_text("{}")
    source = Source(str(folder), tmp_path / "cache")
    (listing,) = source.scan().values()
    assert (listing.name, list(listing.versions())) == ("tiny-llama", [1])
    assert source.fetch(listing, 1) == folder


def test_an_absent_repository_is_said_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there is no model repository at .*nowhere"):
        scan(tmp_path / "nowhere", tmp_path)


def test_a_store_whose_library_is_missing_names_it(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        Source("nosuchprotocol://bucket", tmp_path)


def test_an_empty_model_folder_is_seen_so_that_it_can_be_reported(tmp_path):
    (tmp_path / "models/hollow").mkdir(parents=True)
    assert scan(tmp_path / "models", tmp_path)["hollow"].versions() == {}


def test_the_name_in_model_yaml_must_be_the_folders(tmp_path):
    root = write(tmp_path / "models", {"a/1/model.py": "", "a/model.yaml": "name: b"})
    source = Source(str(root), tmp_path)
    with pytest.raises(ConfigError, match="'b' but its folder 'a'"):
        source.spec(source.scan()["a"])


def test_a_wrong_key_in_model_yaml_is_named_with_its_line(tmp_path):
    root = write(tmp_path / "models", {"a/1/model.py": "", "a/model.yaml": "batching:\n  max_batch: 3\n"})
    source = Source(str(root), tmp_path)
    with pytest.raises(ConfigError, match=r"model\.yaml:2: unknown key `max_batch`"):
        source.spec(source.scan()["a"])


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


def test_a_remote_version_is_copied_once_and_checked_by_digest(tmp_path, memory):
    memory.pipe({"/models/a/1/model.py": b"one", "/models/a/1/sub/data.bin": b"two", "/models/a/model.yaml": b"{}"})
    source = Source("memory://models", tmp_path / "cache")
    listing = source.scan()["a"]
    folder = source.fetch(listing, 1)
    assert (folder / "model.py").read_bytes() == b"one"
    assert (folder / "sub/data.bin").read_bytes() == b"two"

    memory.rm("/models/a/1/model.py")  # the copy is enough now
    assert source.fetch(listing, 1) == folder


def test_a_damaged_local_copy_is_made_again(tmp_path, memory):
    memory.pipe({"/models/a/1/model.py": b"one"})
    source = Source("memory://models", tmp_path / "cache")
    listing = source.scan()["a"]
    folder = source.fetch(listing, 1)
    (folder / "model.py").write_bytes(b"0ne")
    assert (source.fetch(listing, 1) / "model.py").read_bytes() == b"one"


def test_a_copy_that_breaks_off_leaves_nothing_behind(tmp_path, memory):
    memory.pipe({"/models/a/1/model.py": b"one", "/models/a/1/weights": b"two"})
    source = Source("memory://models", tmp_path / "cache")
    listing = source.scan()["a"]
    memory.rm("/models/a/1/weights")
    with pytest.raises(LoadError, match="cannot copy"):
        source.fetch(listing, 1)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_changed_remote_file_gets_a_copy_of_its_own(tmp_path, memory):
    memory.pipe({"/models/a/1/model.py": b"one"})
    source = Source("memory://models", tmp_path / "cache")
    before = source.fetch(source.scan()["a"], 1)
    memory.pipe({"/models/a/1/model.py": b"three"})
    after = source.fetch(source.scan()["a"], 1)
    assert before != after
    assert (after / "model.py").read_bytes() == b"three"


@pytest.fixture
def bucket(monkeypatch):
    """A real S3 server on loopback."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    fs = fsspec.filesystem("s3", skip_instance_cache=True)
    fs.mkdir("shelf")
    yield fs
    server.stop()


def test_models_are_served_from_s3(tmp_path, bucket):
    bucket.pipe("shelf/models/a/2/model.py", b"one")
    bucket.pipe("shelf/models/a/model.yaml", b"batching: {max_batch_size: 3}")
    source = Source("s3://shelf/models", tmp_path / "cache")
    listing = source.scan()["a"]
    assert source.spec(listing).batching.max_batch_size == 3
    assert (source.fetch(listing, 2) / "model.py").read_bytes() == b"one"
    before = listing.files
    bucket.pipe("shelf/models/a/2/model.py", b"two!")
    changed = source.scan()["a"]
    assert changed.files != before
    assert (source.fetch(changed, 2) / "model.py").read_bytes() == b"two!"
    with pytest.raises(ConfigError, match="there is no model repository at s3://shelf/elsewhere"):
        Source("s3://shelf/elsewhere", tmp_path / "cache").scan()


@pytest.mark.parametrize(
    ("policy", "chosen"),
    [
        (VersionPolicy(), [5]),
        (VersionPolicy(latest=2), [3, 5]),
        (VersionPolicy(all=True), [1, 3, 5]),
        (VersionPolicy(specific=(1, 4)), [1]),
    ],
)
def test_the_version_policy_chooses(policy, chosen):
    assert choose_versions([5, 1, 3], policy) == chosen


def test_a_folder_that_is_removed_disappears_from_the_listing(tmp_path):
    root = write(tmp_path / "models", {"a/1/model.py": "", "b/1/model.py": ""})
    source = Source(str(root), tmp_path)
    shutil.rmtree(root / "b")
    assert list(source.scan()) == ["a"]
