"""Client certificates over real TLS, and the files of the server's own."""

import asyncio
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from fairlead.api.tls import server_context
from fairlead.core.caller import Caller, Credentials
from fairlead.core.errors import ConfigError, Unauthenticated
from fairlead.core.policy import AuthSettings, GatewaySettings, Scope, TenantPolicy, TlsSettings
from fairlead.gateway.identity.identity import Identity
from fairlead.gateway.identity.keyring import Keyring
from fairlead.gateway.identity.keys import NewKey, new_key
from fairlead.observe.counts import Counts
from fairlead.store.rows import AuditRow, KeyRow, TenantRow
from fairlead.store.store import Store
from tests.gateway.identity.authority import Authority
from tests.stores import new_store

GATEWAY = GatewaySettings(tenants={"acme": TenantPolicy(models=("chat",))})
AUDIT = AuditRow(time=1.0, actor="test", action="test", subject="test")

Pair = tuple[str, str]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "strangers")


@pytest.fixture(scope="module")
def tls(authority: Authority) -> TlsSettings:
    certificate, private_key = authority.server()
    return TlsSettings(certificate=certificate, private_key=private_key, client_ca=str(authority.path))


async def shown_to(
    tls: TlsSettings, authority: Authority, client: Pair | None, *, version: ssl.TLSVersion | None = None
) -> dict[str, Any] | None:
    """What a real server with this context sees of the client's certificate. Raises what ends the handshake."""
    seen: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.set_result(writer.get_extra_info("peercert"))
        writer.write(b"ok")
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    trusting = ssl.create_default_context(cafile=str(authority.path))
    if client is not None:
        trusting.load_cert_chain(*client)
    if version is not None:
        trusting.minimum_version = trusting.maximum_version = version
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context(tls))
    port = server.sockets[0].getsockname()[1]
    async with server, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        try:
            if await reader.read(2) != b"ok":  # with TLS 1.3, a refusal comes after the client thinks that it is done
                raise ConnectionResetError("the server ended the handshake")
            return await seen
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


def gate(keyring: Keyring | None = None, *, mtls: bool = True, required: bool = True) -> Identity:
    counts = Counts()
    return Identity(AuthSettings(mtls=mtls), GATEWAY, keyring or Keyring(None, GATEWAY, counts), counts, required=required)


def caller(identity: Identity, certificate: dict[str, Any] | None, now: float | None = None, **shown: str) -> Caller:
    known = identity.known(Credentials(certificate=certificate, address="192.0.2.1", **shown), now or time.time())
    assert known is not None
    return known


# Who the certificate says


async def test_a_certificate_of_our_authority_says_tenant_and_key(tls: TlsSettings, authority: Authority) -> None:
    certificate = await shown_to(tls, authority, authority.client(["acme"], ["worker-7"]))
    identity = gate()
    for _ in range(2):
        found = caller(identity, certificate)
        assert (found.tenant, found.key, found.scopes, found.address) == ("acme", "worker-7", {Scope.INFER}, "192.0.2.1")
        assert found.policy == GATEWAY.tenants["acme"]


async def test_who_shows_no_certificate_is_heard_but_must_show_a_key(tls: TlsSettings, authority: Authority) -> None:
    certificate = await shown_to(tls, authority, None)
    assert not certificate
    with pytest.raises(Unauthenticated, match="client certificate"):
        caller(gate(), certificate)
    assert caller(gate(required=False), certificate).key == ""


async def test_a_certificate_of_another_authority_ends_the_handshake(tls: TlsSettings, authority: Authority, stranger: Authority) -> None:
    with pytest.raises(OSError):  # ssl.SSLError is one
        await shown_to(tls, authority, stranger.client(["acme"], ["worker-7"]))


async def test_an_expired_certificate_ends_the_handshake_and_one_that_expires_later_is_refused_from_then_on(
    tls: TlsSettings, authority: Authority
) -> None:
    with pytest.raises(OSError):  # ssl.SSLError is one
        await shown_to(tls, authority, authority.client(["acme"], ["old"], days=-1.0))
    certificate = await shown_to(tls, authority, authority.client(["acme"], ["worker-7"]))
    identity = gate()
    assert caller(identity, certificate).key == "worker-7"
    with pytest.raises(Unauthenticated):
        caller(identity, certificate, time.time() + 86_401)  # on a connection that has been open since


async def test_a_servers_certificate_is_none_of_a_client(tls: TlsSettings, authority: Authority) -> None:
    with pytest.raises(OSError):  # ssl.SSLError is one
        await shown_to(tls, authority, authority.server("other"))


@pytest.mark.parametrize(
    ("organizations", "commons"),
    [([], ["worker"]), (["acme"], []), (["acme", "other"], ["worker"]), (["acme"], ["one", "two"]), (["acme\n"], ["worker"])],
)
async def test_a_certificate_that_does_not_name_one_tenant_and_one_key_is_refused(
    tls: TlsSettings, authority: Authority, organizations: list[str], commons: list[str]
) -> None:
    certificate = await shown_to(tls, authority, authority.client(organizations, commons))
    with pytest.raises(Unauthenticated, match="not valid"):
        caller(gate(), certificate)


async def test_a_certificate_says_nothing_where_it_is_not_asked_and_less_than_a_key(tls: TlsSettings, authority: Authority) -> None:
    certificate = await shown_to(tls, authority, authority.client(["acme"], ["worker-7"]))
    with pytest.raises(Unauthenticated, match="send a key"):
        caller(gate(mtls=False), certificate)
    with pytest.raises(Unauthenticated, match="not valid"):
        caller(gate(), certificate, authorization=f"Bearer {new_key().secret}")


# Certificates of keys in the store


@pytest.fixture
def stored(tmp_path: Path) -> Iterator[tuple[Keyring, Store, NewKey]]:
    store = new_store(tmp_path)
    key = new_key()
    row = KeyRow(id=key.id, tenant="acme", digest=key.digest, signing_key=key.signing_key, prefix=key.prefix, created=1.0, models=("chat",))
    store.add_tenant(TenantRow(name="acme", created=1.0), AUDIT)
    store.add_key(row, AUDIT)
    keyring = Keyring(store, GATEWAY, Counts())
    keyring.refresh()
    yield keyring, store, key
    store.close()


async def test_a_certificate_that_names_a_key_of_the_store_may_what_that_key_may_until_it_is_revoked(
    tls: TlsSettings, authority: Authority, stored: tuple[Keyring, Store, NewKey]
) -> None:
    keyring, store, key = stored
    certificate = await shown_to(tls, authority, authority.client(["acme"], [key.id]))
    identity = gate(keyring)
    assert caller(identity, certificate).models == (("chat",), ("chat",))
    store.revoke_key(key.id, AUDIT)
    keyring.refresh_if_changed()
    with pytest.raises(Unauthenticated, match="not valid"):
        caller(identity, certificate)


async def test_a_certificate_cannot_borrow_another_tenants_key(
    tls: TlsSettings, authority: Authority, stored: tuple[Keyring, Store, NewKey]
) -> None:
    keyring, _, key = stored
    certificate = await shown_to(tls, authority, authority.client(["other"], [key.id]))
    with pytest.raises(Unauthenticated, match="not valid"):
        caller(gate(keyring), certificate)


async def test_certificates_of_a_disabled_tenant_are_refused(
    tls: TlsSettings, authority: Authority, stored: tuple[Keyring, Store, NewKey]
) -> None:
    keyring, store, _ = stored
    certificate = await shown_to(tls, authority, authority.client(["acme"], ["worker-7"]))
    identity = gate(keyring)
    assert caller(identity, certificate).tenant == "acme"
    store.change_tenant("acme", lambda row: structs.replace(row, disabled=True), AUDIT)
    keyring.refresh_if_changed()
    with pytest.raises(Unauthenticated, match="not valid"):
        caller(identity, certificate)


# The server's own files


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_tls_1_2_and_1_3_are_spoken(tls: TlsSettings, authority: Authority, version: ssl.TLSVersion) -> None:
    certificate = await shown_to(tls, authority, authority.client(["acme"], ["worker-7"]), version=version)
    assert certificate is not None and certificate["subject"]


def test_nothing_older_than_tls_1_2_is_spoken(tls: TlsSettings) -> None:
    context = server_context(tls)
    assert context is not None and context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_without_a_certificate_there_is_no_tls(authority: Authority) -> None:
    assert server_context(TlsSettings()) is None
    for settings in (TlsSettings(client_ca=str(authority.path)), TlsSettings(private_key="server.key")):
        with pytest.raises(ConfigError, match=r"`tls.certificate` is missing"):
            server_context(settings)


def test_without_a_client_ca_nobody_is_asked_for_a_certificate(tls: TlsSettings) -> None:
    context = server_context(structs.replace(tls, client_ca=""))
    assert context is not None and context.verify_mode == ssl.CERT_NONE


def test_files_that_cannot_be_used_are_told_by_name_with_what_to_do(tls: TlsSettings, authority: Authority, tmp_path: Path) -> None:
    junk, missing = tmp_path / "junk.pem", str(tmp_path / "missing.pem")
    junk.write_text("no certificate")
    other = authority.server("second")
    locked = authority.server("locked", password=b"secret")
    wrong: list[tuple[dict[str, str], str]] = [
        ({"certificate": missing}, r"`tls.certificate`: cannot read .*missing.pem: No such file"),
        ({"private_key": missing}, r"`tls.private_key`: cannot read"),
        ({"client_ca": missing}, r"`tls.client_ca`: cannot read"),
        ({"private_key": other[1]}, "is not the key of"),
        ({"certificate": str(junk)}, "must be PEM"),
        ({"private_key": str(junk)}, "must be PEM"),
        ({"private_key": str(tmp_path)}, "Is a directory"),
        ({"certificate": locked[0], "private_key": locked[1]}, "is encrypted"),
        ({"client_ca": str(junk)}, "must be PEM"),
        ({"client_ca": other[0]}, "holds no certificate of an authority"),
    ]
    for changes, message in wrong:
        with pytest.raises(ConfigError, match=message):
            server_context(structs.replace(tls, **changes))


def test_one_file_may_hold_the_certificate_and_its_key(tls: TlsSettings, tmp_path: Path) -> None:
    both = tmp_path / "both.pem"
    both.write_text(Path(tls.certificate).read_text() + Path(tls.private_key).read_text())
    assert server_context(TlsSettings(certificate=str(both))) is not None
