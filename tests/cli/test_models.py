"""`fairlead models`: the registry, on the store itself and on a server over the network."""

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from fairlead.api.doorkeeper import CALLER
from fairlead.api.http_server import HttpServer
from fairlead.api.ops import OPS_SHAPES
from fairlead.api.problems import Problems
from fairlead.api.registry import RegistryRoutes
from fairlead.api.web import json_app
from fairlead.cli import cli
from fairlead.control.registry import Registry
from fairlead.control.signing import pem_of
from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError, Unauthenticated
from fairlead.core.policy import Scope
from fairlead.core.rollout import RegistrySettings
from fairlead.observe.finished import Finished
from fairlead.runtime.repository import IndexEntry
from fairlead.store.store import Store


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's data folder."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    for name in ("FAIRLEAD_ADMIN_KEY", "FAIRLEAD_ADMIN_URL", "FAIRLEAD_GIT_COMMIT", "GITHUB_SHA", "CI_COMMIT_SHA"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def run(*arguments: object, input: str | None = None) -> Result:
    result = CliRunner().invoke(cli, [*map(str, arguments)], input=input)
    if isinstance(result.exception, FairleadError):
        raise result.exception
    return result


def asked(*arguments: object) -> Any:
    result = run("models", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def model(tmp_path: Path, content: str = "x", spec: str = "") -> Path:
    folder = tmp_path / "source"
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_text(content)
    (folder / "model.yaml").write_text(spec)
    return folder


def key_file(tmp_path: Path, passphrase: bytes = b"") -> tuple[Path, str]:
    """(private key's file, public key in PEM)."""
    key = Ed25519PrivateKey.generate()
    encryption = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    path = tmp_path / "key.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    return path, pem_of(key.public_key())


# On the store itself


def test_a_version_is_added_listed_shown_and_retired(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no models yet: `fairlead models add PATH" in run("models", "list").stderr
    monkeypatch.setenv("GITHUB_SHA", "abcdef0123456789")
    added = run(
        "models", "add", model(data, spec="batching: {max_batch_size: 4}"), "--name", "fraud", "--metric", "auc=0.93", "--tag", "team=risk",
        "--licence", "MIT",
    )  # fmt: skip
    assert added.stdout == "fraud@1\n" and "is new: onnx, 1 bytes" in added.stderr
    again = run("models", "add", model(data, spec="batching: {max_batch_size: 4}"), "--name", "fraud")
    assert again.stdout == "fraud@1\n" and "is the same content: nothing was added or changed; it is staged" in again.stderr
    (version,) = asked("show", "fraud")["versions"]
    assert version["provenance"]["git_commit"] == "abcdef0123456789" and version["provenance"]["metrics"] == {"auc": 0.93}
    assert version["provenance"]["who"].startswith("cli:")
    table = run("models", "show", "fraud").stdout
    assert "abcdef012345" in table and "auc=0.93" in table and "team=risk" in table and "staged" in table
    whole = run("models", "show", "fraud@1").stdout
    assert "model.onnx" in whole and "max_batch_size: 4" in whole and version["digest"] in whole
    (row,) = asked("list")
    assert (row["name"], row["versions"], row["newest"], row["loaded"]) == ("fraud", 1, 1, None)
    assert "fraud" in run("models", "list").stdout
    assert run("models", "retire", "fraud@1", "--reason", "old").stdout == "retired fraud@1\n"
    assert [(each["action"], each["details"].get("reason")) for each in asked("events", "fraud")] == [
        ("version.stage", "old"),
        ("version.add", None),
    ]
    assert "version.stage" in run("models", "events", "fraud").stdout
    assert run("models", "delete", "fraud@1").stdout == "deleted fraud@1\n"
    assert "no versions yet" in run("models", "show", "fraud").stderr


@pytest.mark.usefixtures("data")
def test_two_versions_are_compared(tmp_path: Path) -> None:
    for content, auc in (("one", 0.9), ("three", 0.8)):
        run("models", "add", model(tmp_path, content), "--name", "fraud", "--metric", f"auc={auc}")
    found = run("models", "diff", "fraud@1", "fraud@2").stdout
    assert all(word in found for word in ("model.onnx", "auc", "0.9", "0.8", "fraud@1", "fraud@2"))
    assert asked("diff", "fraud@1", "fraud@2")["metrics"] == {"auc": [0.9, 0.8]}
    assert "nothing differs between fraud@1 and fraud@1" in run("models", "diff", "fraud@1", "fraud@1").stderr
    assert run("models", "diff", "fraud@1", "spam@2").exit_code == 2


@pytest.mark.usefixtures("data")
def test_tags_and_aliases_are_set_and_taken_away(tmp_path: Path) -> None:
    run("models", "add", model(tmp_path), "--name", "fraud", "--tag", "a=b")
    run("models", "tag", "fraud@1", "a=", "c=d=e")
    run("models", "tag", "fraud", "team=risk")
    assert run("models", "alias", "fraud@1", "blue").stdout == "fraud@blue is fraud@1\n"
    assert asked("show", "fraud@blue")["tags"] == {"c": "d=e"}
    shown = asked("show", "fraud")
    assert (shown["tags"], shown["aliases"]) == ({"team": "risk"}, {"blue": 1})
    run("models", "alias", "fraud@blue", "green")
    run("models", "alias", "fraud", "blue", "--drop")
    assert asked("show", "fraud")["aliases"] == {"green": 1}
    with pytest.raises(FairleadError, match="the alias `champion` is moved by rollouts"):
        run("models", "alias", "fraud@1", "champion")


@pytest.mark.usefixtures("data")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("add", "x"), "Missing option '--name'"),
        (("add", "x", "--name", "a", "--metric", "auc"), "'auc' is not NAME=VALUE"),
        (("add", "x", "--name", "a", "--metric", "auc=good"), "metrics are numbers"),
        (("show", "fraud@"), "'fraud@' names no version"),
        (("retire", "fraud"), "say which version: fraud@7"),
        (("alias", "fraud", "blue"), "say which version: fraud@7"),
        (("alias", "fraud@1", "blue", "--drop"), "name the model alone: fraud"),
        (("diff", "fraud@1", "a b@2"), "'a b' is no model's name"),
        (("tag", "fraud@1"), "Missing argument"),
    ],
)
def test_what_was_written_wrong_is_told_before_anything_is_done(arguments: tuple[str, ...], words: str) -> None:
    told = run("models", *arguments)
    assert told.exit_code == 2 and words in told.output


@pytest.mark.usefixtures("data")
def test_what_cannot_be_added_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(FairleadError, match="there is nothing at .*nowhere"):
        run("models", "add", tmp_path / "nowhere", "--name", "fraud")
    with pytest.raises(FairleadError, match=r"spec:1: unknown key `nope`"):
        (tmp_path / "spec.yaml").write_text("nope: 1")
        run("models", "add", model(tmp_path), "--name", "fraud", "--spec", tmp_path / "spec.yaml")


@pytest.mark.usefixtures("data")
def test_a_version_is_signed_with_a_key_that_stays_here(tmp_path: Path) -> None:
    path, _ = key_file(tmp_path)
    assert "signed by ed25519:" in run("models", "add", model(tmp_path), "--name", "fraud", "--sign", path).stderr
    run("models", "add", model(tmp_path, "y"), "--name", "fraud")
    assert run("models", "sign", "fraud@2", "--private-key", path).stdout.startswith("signed fraud@2 as ed25519:")
    first, second = (asked("show", f"fraud@{number}")["signed_by"] for number in (1, 2))
    assert first == second
    encrypted, _ = key_file(tmp_path, b"sesame")
    assert run("models", "sign", "fraud@2", "--private-key", encrypted, input="sesame\n").exit_code == 0
    (tmp_path / "none.pem").write_text("nothing")
    with pytest.raises(FairleadError, match=r"none.pem is no Ed25519 private key"):
        run("models", "sign", "fraud@2", "--private-key", tmp_path / "none.pem")


def test_the_configuration_says_where_artefacts_lie_and_which_keys_are_trusted(data: Path) -> None:
    path, public = key_file(data)
    lines = "\n".join(f"        {line}" for line in public.splitlines())
    (data / "fairlead.yaml").write_text(
        f"store: {{url: 'sqlite:///{data}/own.db'}}\ncontrol:\n  registry:\n    url: {data}/artefacts\n    trusted_keys:\n      release: |\n{lines}\n"
    )
    place = ("--config", data / "fairlead.yaml")
    assert "signed by release" in run("models", "add", model(data), "--name", "fraud", "--sign", path, *place).stderr
    assert (data / "artefacts" / "fraud" / "1" / "model.onnx").exists()
    assert asked("show", "fraud@1", *place)["trusted"] is True
    stranger, _ = key_file(data)
    with pytest.raises(FairleadError, match="is none of `control.registry.trusted_keys`"):
        run("models", "sign", "fraud@1", "--private-key", stranger, *place)


@pytest.mark.usefixtures("data")
def test_the_checks_of_a_model_are_a_folder(tmp_path: Path) -> None:
    run("models", "add", model(tmp_path), "--name", "fraud")
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "safety.jsonl").write_text('{"prompt": "how to", "must_refuse": true}\n')
    assert run("models", "checks", "fraud", tmp_path / "checks").stdout == "checks of fraud replaced\n"
    assert asked("checks", "fraud")["safety"][0]["prompt"] == "how to"
    assert "safety" in run("models", "checks", "fraud").stdout


@pytest.mark.usefixtures("data")
def test_other_commands_need_no_registry(tmp_path: Path) -> None:
    (tmp_path / "fairlead.yaml").write_text(
        f"store: {{url: 'sqlite:///{tmp_path}/own.db'}}\ncontrol: {{registry: {{url: 's4://nowhere'}}}}\n"
    )
    assert run("keys", "list", "--config", tmp_path / "fairlead.yaml").exit_code == 0
    with pytest.raises(FairleadError, match="cannot read s4://nowhere"):
        run("models", "list", "--config", tmp_path / "fairlead.yaml")


def test_commands_in_files_of_their_own_are_listed_with_the_others() -> None:
    listed = run("models", "--help").stdout
    assert all(name in listed for name in ("add", "validate", "record", "loaded", "unload"))
    assert "golden requests" in run("models", "record", "--help").stdout


# On a server


@pytest.fixture
def server(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The operations port of a server whose store and registry lie elsewhere, and which has `fraud@1` loaded."""
    (tmp_path / "server").mkdir()
    store = Store.open(f"sqlite:///{tmp_path}/server/fairlead.db")
    registry = Registry(store, RegistrySettings(max_bytes=1 << 20), cache_folder=tmp_path / "cache")
    routes = RegistryRoutes(registry, lambda: [IndexEntry("fraud", "1", "READY"), IndexEntry("plain", "1", "READY")])
    where: list[Any] = []
    ready, end = threading.Event(), asyncio.Event()

    async def admit(request: Any, scope: Scope | None) -> None:
        if scope is Scope.ADMIN and request.headers.get("authorization") != "Bearer good":
            raise Unauthenticated("no such key")
        request.scope[CALLER] = (Caller(key="k1"), "")

    app = json_app([(each.method, each.path, each.serve, each.scope) for each in routes.operations], {"/admin": Problems()}, admit)

    async def serve() -> None:
        port = HttpServer(None, app, Finished(), shapes=OPS_SHAPES, max_body_bytes=1 << 16, larger=routes.body_bound)
        await port.listen(port=0)
        where.extend((port.port, asyncio.get_running_loop()))
        ready.set()
        await end.wait()
        await port.drain(1.0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    monkeypatch.setenv("FAIRLEAD_ADMIN_KEY", "good")
    monkeypatch.setenv("FAIRLEAD_ADMIN_URL", f"http://127.0.0.1:{where[0]}")
    yield f"http://127.0.0.1:{where[0]}"
    where[1].call_soon_threadsafe(end.set)
    thread.join(30)
    routes.close()
    store.close()


@pytest.mark.usefixtures("server")
def test_a_folder_of_this_machine_is_uploaded_with_its_spec_and_signature(tmp_path: Path) -> None:
    path, _ = key_file(tmp_path)
    content = "x" * 300_000  # more than other bodies may have
    source = model(tmp_path, content, "batching: {max_batch_size: 4}")
    (source / "sub").mkdir()
    (source / "sub" / "a name of more than a hundred characters, which a tar keeps in a header of its own, and é too.txt").write_text("y")
    added = run("models", "add", source, "--name", "fraud", "--metric", "auc=0.9", "--sign", path, "--git-commit", "abc")
    assert added.stdout == "fraud@1\n" and "is new: onnx, 0.3 MB" in added.stderr and "signed by ed25519:" in added.stderr
    version = asked("show", "fraud@1")
    assert version["provenance"] == {"who": "k1", "source": str(source), "git_commit": "abc", "metrics": {"auc": 0.9}}
    assert version["spec"] == "batching:\n  max_batch_size: 4\n" and len(version["files"]) == 2
    assert (tmp_path / "server" / "registry" / "fraud" / "1" / "model.onnx").read_text() == content
    # the same content from a folder that the server reads has the same digest
    digest = asked("add", f"file://{source}", "--name", "copy")["version"]["digest"]
    assert digest == version["digest"]
    assert "is the same content" in run("models", "add", source, "--name", "fraud").stderr


@pytest.mark.usefixtures("server")
def test_a_url_is_read_by_the_server_and_signed_by_its_digest(tmp_path: Path) -> None:
    path, _ = key_file(tmp_path)
    added = asked("add", f"file://{model(tmp_path)}", "--name", "fraud", "--sign", path, "--in-place")
    assert added["version"]["location"] == str(tmp_path / "source") and added["version"]["signed_by"].startswith("ed25519:")


@pytest.mark.usefixtures("server")
def test_the_list_has_what_the_server_loaded(tmp_path: Path) -> None:
    run("models", "add", model(tmp_path), "--name", "fraud")
    listed = run("models", "list").stdout
    assert "1 READY" in listed and "in a repository" in listed and "plain" in listed


@pytest.mark.usefixtures("server")
def test_who_may_not_upload_is_told_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAIRLEAD_ADMIN_KEY", "bad")
    with pytest.raises(FairleadError, match=r"no such key \(give a key with the scope admin"):
        run("models", "add", model(tmp_path), "--name", "fraud")
    monkeypatch.setenv("FAIRLEAD_ADMIN_KEY", "good")
    with pytest.raises(FairleadError, match="holds no artefact"):
        run("models", "add", tmp_path / "server", "--name", "fraud")
    with pytest.raises(FairleadError, match="'fr aud' is no model's name"):
        run("models", "add", model(tmp_path), "--name", "fr aud")


@pytest.mark.usefixtures("server")
def test_what_is_refused_while_it_is_sent_is_told_with_the_reason(tmp_path: Path) -> None:
    source = model(tmp_path, "x" * (8 << 20))
    with pytest.raises(FairleadError, match="more than a version may have"):
        run("models", "add", source, "--name", "fraud")
    assert [(each["name"], each["registered"]) for each in asked("list")] == [("fraud", False), ("plain", False)]
