"""Keys, tenants and open servers: who asks, and who is refused."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from msgspec import structs

from fairlead.core.caller import ANYONE, Caller, Credentials
from fairlead.core.errors import ConfigError, Forbidden, Unauthenticated
from fairlead.core.policy import DEFAULT_TENANT, AuthSettings, GatewaySettings, Scope, TenantPolicy
from fairlead.gateway.identity.identity import Identity, may_use, qos_class_of
from fairlead.gateway.identity.keyring import Keyring
from fairlead.gateway.identity.keys import NewKey, new_key
from fairlead.gateway.identity.subject import INVALID
from fairlead.gateway.signing import key_id
from fairlead.observe.counts import Counts
from fairlead.observe.table import TABLE
from fairlead.store.rows import AuditRow, KeyRow, ProjectRow, TenantRow
from fairlead.store.store import Store
from tests.stores import new_file

NOW = 1_800_000_000.0
GATEWAY = GatewaySettings()
AUDIT = AuditRow(time=NOW, actor="test", action="test", subject="test")


class Place:
    """A store, and a gateway that reads it."""

    def __init__(self, url: str, gateway: GatewaySettings) -> None:
        self.store = Store.open(url)
        self.counts = Counts()
        self.keyring = Keyring(self.store, gateway, self.counts)
        self.required = Identity(AuthSettings(), gateway, self.keyring, self.counts, required=True)
        self.open = Identity(AuthSettings(), gateway, self.keyring, self.counts, required=False)

    def tenant(self, name: str, policy: TenantPolicy | None = None) -> None:
        self.store.add_tenant(TenantRow(name=name, policy=policy, created=NOW), AUDIT)
        self.keyring.refresh_if_changed()

    def key(self, tenant: str = "default", **fields: object) -> NewKey:
        key = new_key()
        row = KeyRow(id=key.id, tenant=tenant, digest=key.digest, signing_key=key.signing_key, prefix=key.prefix, created=NOW)
        self.store.add_key(structs.replace(row, **fields), AUDIT)
        self.keyring.refresh_if_changed()
        return key

    def caller(self, secret: str, now: float = NOW) -> Caller:
        caller = self.required.known(Credentials(authorization=f"Bearer {secret}", address="192.0.2.1"), now)
        assert caller is not None
        return caller

    def refusal(self, credentials: Credentials | str, now: float = NOW, *, open: bool = False) -> tuple[str, str]:
        """(the kind that it is counted as, what the caller is told)"""
        shown = Credentials(authorization=f"Bearer {credentials}") if isinstance(credentials, str) else credentials
        before = dict(self.counts._counts)
        with pytest.raises(Unauthenticated) as refused:
            (self.open if open else self.required).known(shown, now)
        assert refused.value.headers["WWW-Authenticate"].startswith("Bearer")
        ((name, kind),) = {labels for labels, number in self.counts._counts.items() if number != before.get(labels, 0)}
        assert name == "fairlead_auth_failures_total" and len(TABLE[name].labels) == 1
        return kind, refused.value.message


Opens = Callable[..., Place]


@pytest.fixture
def opens(tmp_path: Path) -> Iterator[Opens]:
    """Gateways on one store."""
    places: list[Place] = []
    url = new_file(tmp_path)

    def opened(gateway: GatewaySettings = GATEWAY) -> Place:
        places.append(Place(url, gateway))
        return places[-1]

    yield opened
    for place in places:
        place.store.close()


@pytest.fixture
def place(opens: Opens) -> Place:
    return opens()


# Keys


def test_a_key_says_who_asks_and_what_he_may(place: Place) -> None:
    policy = TenantPolicy(qos_class="batch", classes=("standard",), models=("chat-*", "embed"), require_signature=True)
    place.tenant("acme", policy)
    place.store.put_project(ProjectRow(tenant="acme", name="search", limits={"rows_per_minute": 10.0}, created=NOW), AUDIT)
    key = place.key(
        "acme",
        project="search",
        scopes=(Scope.INFER, Scope.REPOSITORY),
        models=("chat-small",),
        qos_class="interactive",
        limits={"concurrent": 2.0},
    )
    caller = place.caller(key.secret)
    assert (caller.tenant, caller.project, caller.key, caller.address) == ("acme", "search", key.id, "192.0.2.1")
    assert caller.scopes == {Scope.INFER, Scope.REPOSITORY} and caller.must_sign
    assert caller.policy == policy and caller.project_limits == {"rows_per_minute": 10.0} and caller.key_limits == {"concurrent": 2.0}
    assert [may_use(caller, name) for name in ("chat-small", "chat-large", "embed", "")] == [True, False, False, False]
    assert (qos_class_of(caller, ""), qos_class_of(caller, "interactive"), qos_class_of(caller, "standard")) == (
        "interactive",
        "interactive",
        "standard",
    )
    with pytest.raises(Forbidden, match="`batch` is not one that this caller may ask for: interactive, standard"):
        qos_class_of(caller, "batch")


def test_every_class_means_every_class_that_is_configured(place: Place) -> None:
    place.tenant("acme", TenantPolicy(classes=("*",)))
    caller = place.caller(place.key("acme").secret)
    assert [qos_class_of(caller, name) for name in ("interactive", "batch")] == ["interactive", "batch"]
    with pytest.raises(Forbidden):
        qos_class_of(caller, "made up")
    assert qos_class_of(ANYONE, "interactive") == "interactive" and may_use(ANYONE, "any")


def test_a_key_is_taken_from_each_header_that_clients_use(place: Place) -> None:
    key = place.key()
    for shown in (
        Credentials(authorization=f"Bearer {key.secret}"),
        Credentials(authorization=f"bEARER  {key.secret} "),
        Credentials(api_key=key.secret),
        Credentials(authorization=f"Bearer {key.secret}", api_key=key.secret),
        Credentials(authorization="Basic eDp5", api_key=key.secret),
    ):
        caller = place.required.known(shown, NOW)
        assert caller is not None and caller.key == key.id


def test_unknown_revoked_expired_mistyped_and_disabled_keys_get_the_same_answer_and_are_counted_apart(place: Place) -> None:
    place.tenant("gone")
    revoked, expired, disabled = place.key(revoked=NOW - 1), place.key(expires=NOW), place.key("gone")
    place.store.change_tenant("gone", lambda row: structs.replace(row, disabled=True), AUDIT)
    place.keyring.refresh_if_changed()
    good = place.key()
    shown = {
        "unknown": new_key().secret,
        "revoked": revoked.secret,
        "expired": expired.secret,
        "tenant": disabled.secret,
        "malformed": good.secret[:-1] + ("a" if good.secret[-1] != "a" else "b"),
    }
    for kind, secret in shown.items():
        assert place.refusal(secret) == (kind, INVALID)
        assert place.refusal(secret, open=True) == (kind, INVALID)
    for text in (good.secret[:-1], good.secret + "x", "fl_", f"{good.secret}, Bearer {good.secret}", "fl_" + "\u0416" * 51, "fl_\udcff"):
        assert place.refusal(text) == ("malformed", INVALID)
    for text in (good.id, good.digest, good.signing_key, "sk-1234", "a.b.c", "x" * 100_000):
        assert place.refusal(text) == ("unknown", INVALID)
    assert place.caller(expired.secret, NOW - 0.001).key == expired.id


def test_two_different_keys_are_ambiguous_whatever_they_are(place: Place) -> None:
    first, second = place.key(), place.key()
    for one, other in ((first.secret, second.secret), (first.secret, "none"), ("none", first.secret), ("fl_\u0416", "\u0416")):
        kind, message = place.refusal(Credentials(authorization=f"Bearer {one}", api_key=other))
        assert kind == "ambiguous" and "send one of them" in message


def test_who_shows_nothing_is_told_how(place: Place) -> None:
    for shown in (Credentials(), Credentials(authorization="Bearer "), Credentials(authorization="Basic eDp5")):
        kind, message = place.refusal(shown)
        assert kind == "missing" and "Authorization: Bearer" in message and "fairlead keys create" in message
    certificates = Identity(AuthSettings(mtls=True), GatewaySettings(), place.keyring, place.counts, required=True)
    with pytest.raises(Unauthenticated, match="a client certificate"):
        certificates.known(Credentials(), NOW)


def test_a_rotated_key_and_its_successor_are_both_good_until_the_overlap_ends(place: Place) -> None:
    old = place.key()
    new = new_key()

    def successor(row: KeyRow) -> KeyRow:
        made = {"id": new.id, "digest": new.digest, "signing_key": new.signing_key, "prefix": new.prefix, "replaces": row.id}
        return structs.replace(row, **made)

    place.store.rotate_key(old.id, successor, 3600.0, AUDIT)
    place.keyring.refresh_if_changed()
    assert place.caller(old.secret, NOW + 3599).key == old.id and place.caller(new.secret, NOW + 3599).key == new.id
    assert place.refusal(old.secret, NOW + 3600) == ("expired", INVALID)
    assert place.caller(new.secret, NOW + 3600).key == new.id


# Signatures that name a key


def test_a_signature_names_its_key_which_then_must_be_proved(place: Place) -> None:
    place.tenant("acme", TenantPolicy(models=("chat",)))
    key, revoked = place.key("acme", public_key="PEM"), place.key("acme", revoked=NOW)
    text = f'sig1=("@method" "@authority");created=1;keyid="{key.id}";nonce="n"'
    assert key_id(text) == key.id
    for identity in (place.required, place.open):
        caller = identity.known(Credentials(signature_input=text, address="192.0.2.1"), NOW)
        assert caller is not None and caller.must_sign and caller.key == key.id and caller.models == (("chat",),)
    signing_key = place.required.signing_key_of(key.id)
    assert signing_key is not None
    assert (signing_key.id, signing_key.hmac.hex(), signing_key.ed25519) == (key.id, key.signing_key, "PEM")
    assert place.required.signing_key_of(revoked.id) is None and place.required.signing_key_of("") is None
    for kind, text in {
        "unknown": 'sig1=("@method");keyid="nobody"',
        "revoked": f'sig1=("@method");keyid="{revoked.id}"',
    }.items():
        told = place.refusal(Credentials(signature_input=text))
        assert told == (kind, "the signature does not prove the key that it names")
    assert place.refusal(Credentials(signature_input="no structured field"))[0] == "unknown"


# Open servers


def test_an_open_server_asks_nobody_but_believes_no_wrong_key(place: Place) -> None:
    for shown in ("", "Bearer none", "Bearer sk-1234", "Bearer EMPTY", "Basic eDp5", "Bearer a.b.c"):
        caller = place.open.known(Credentials(authorization=shown, address="192.0.2.1"), NOW)
        assert caller is not None
        assert (caller.tenant, caller.key, caller.scopes, caller.address) == ("default", "", frozenset(Scope), "192.0.2.1")
        assert may_use(caller, "any") and qos_class_of(caller, "interactive") == "interactive"
    key = place.key()
    caller = place.open.known(Credentials(api_key=key.secret), NOW)
    assert caller is not None and caller.key == key.id
    assert place.refusal(new_key().secret, open=True)[0] == "unknown"


def test_what_the_default_tenant_may_holds_for_callers_that_need_not_say_who_they_are(opens: Opens) -> None:
    policy = TenantPolicy(qos_class="batch", models=("chat",), limits={"requests_per_minute": 10.0})
    configured = opens(GatewaySettings(tenants={"default": policy}))
    assert not configured.open.asks_nobody
    caller = configured.open.known(Credentials(), NOW)
    assert caller is not None and caller.policy == policy and not may_use(caller, "embed") and caller.qos_class == "batch"
    stored = opens()
    stored.keyring.refresh()
    assert stored.open.asks_nobody and not stored.required.asks_nobody
    stored.store.change_tenant("default", lambda row: structs.replace(row, policy=policy), AUDIT)
    stored.keyring.refresh_if_changed()
    caller = stored.open.known(Credentials(), NOW)
    assert not stored.open.asks_nobody and caller is not None and caller.policy == policy
    stored.store.change_tenant("default", lambda row: structs.replace(row, disabled=True), AUDIT)
    stored.keyring.refresh_if_changed()
    assert stored.refusal(Credentials(), open=True)[0] == "tenant"


def test_without_a_store_an_open_server_knows_no_keys() -> None:
    counts = Counts()
    keyring = Keyring(None, GatewaySettings(), counts)
    keyring.refresh()
    keyring.refresh_if_changed()
    identity = Identity(AuthSettings(), GatewaySettings(), keyring, counts, required=False)
    caller = identity.known(Credentials(), NOW)
    assert caller is not None and caller.policy is DEFAULT_TENANT and identity.asks_nobody
    with pytest.raises(Unauthenticated):
        identity.known(Credentials(api_key=new_key().secret), NOW)


def test_a_proxy_that_is_no_network_is_refused_at_the_start() -> None:
    counts = Counts()
    with pytest.raises(ConfigError, match="trusted_proxies"):
        Identity(
            AuthSettings(trusted_proxies=("10.0.0.1/8",)),
            GatewaySettings(),
            Keyring(None, GatewaySettings(), counts),
            counts,
            required=False,
        )


# Several gateways on one store


REVOKE = """
import sys
from fairlead.store.rows import AuditRow
from fairlead.store.store import Store
store = Store.open(sys.argv[1])
store.revoke_key(sys.argv[2], AuditRow(time=1.0, actor="cli", action="key.revoke", subject=sys.argv[2]))
store.close()
"""


async def test_a_key_that_another_process_revokes_is_refused_by_every_gateway_at_its_next_look(opens: Opens) -> None:
    gateways = [opens(), opens()]
    key = gateways[0].key()
    following = asyncio.create_task(gateways[1].keyring.follow(0.01))
    gateways[0].keyring.refresh_if_changed()
    await _until(lambda: key.id in gateways[1].keyring.snapshot.by_id)
    assert all(gateway.caller(key.secret).key == key.id for gateway in gateways)
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", REVOKE, gateways[0].store.url, key.id], check=True)
    await _until(lambda: gateways[1].keyring.snapshot.by_id[key.id].revoked)
    assert gateways[1].refusal(key.secret) == ("revoked", INVALID)
    assert gateways[0].caller(key.secret).key == key.id  # has not looked yet
    gateways[0].keyring.refresh_if_changed()
    assert gateways[0].refusal(key.secret) == ("revoked", INVALID)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def _until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


def test_other_policies_hold_at_once_for_tenants_that_the_store_has_none_for(place: Place) -> None:
    place.tenant("acme")
    place.tenant("other", TenantPolicy(models=("embed",)))
    keys = [place.key(tenant).secret for tenant in ("acme", "other")]
    changed = GatewaySettings(tenants={"acme": TenantPolicy(models=("chat",)), "other": TenantPolicy(models=("chat",))})
    place.keyring.configure(changed)
    place.required.configure(changed)
    assert [place.caller(key).policy.models for key in keys] == [("chat",), ("embed",)]
    place.key()  # and the next look does not bring the old ones back
    assert [place.caller(key).policy.models for key in keys] == [("chat",), ("embed",)]


def test_a_change_of_policies_works_out_no_key_until_it_is_shown(place: Place) -> None:
    shown, idle = place.key(), place.key()
    place.caller(shown.secret)
    before = place.keyring.snapshot
    place.keyring.configure(GatewaySettings(tenants={"default": TenantPolicy(models=("chat",))}))
    after = place.keyring.snapshot
    assert after.by_digest is before.by_digest and after.by_id is before.by_id and not after.entries
    assert place.caller(shown.secret).policy.models == ("chat",)
    assert shown.id in after.entries and idle.id not in after.entries


def test_a_look_reads_everything_only_where_something_changed(place: Place) -> None:
    place.keyring.refresh()
    before = place.keyring.snapshot
    place.keyring.refresh_if_changed()
    assert place.keyring.snapshot is before
    place.key()
    assert place.keyring.snapshot is not before and not before.by_id


class Broken:
    """A store that fails or answers, as it is told."""

    def __init__(self) -> None:
        self.failing = True
        self.looks = 0

    def revision(self) -> int:
        self.looks += 1
        if self.failing:
            raise OSError("the database is gone")
        return self.looks

    def tenants(self) -> Sequence[TenantRow]:
        return [TenantRow(name="acme", created=NOW, disabled=True)]

    def projects(self) -> Sequence[ProjectRow]:
        return []

    def keys(self) -> Sequence[KeyRow]:
        return []


async def test_while_the_store_fails_the_last_snapshot_goes_on_and_it_is_looked_at_again() -> None:
    store, counts = Broken(), Counts()
    keyring = Keyring(store, GatewaySettings(), counts)
    with pytest.raises(OSError, match="gone"):
        keyring.refresh()
    first = keyring.snapshot
    following = asyncio.create_task(keyring.follow(0.001))
    await _until(lambda: counts.get("fairlead_auth_refresh_failures_total", "store") >= 3)
    assert keyring.snapshot is first
    store.failing = False
    await _until(lambda: keyring.snapshot.disabled)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


async def test_a_store_that_hangs_is_told_of_and_holds_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    class Hanging(Broken):
        def revision(self) -> int:
            self.looks += 1
            released.wait(20)
            return 1

    monkeypatch.setattr("fairlead.gateway.identity.keyring.READ_SECONDS", 0.001)
    store, counts = Hanging(), Counts()
    keyring = Keyring(store, GatewaySettings(), counts)
    following = asyncio.create_task(keyring.follow(0.001))
    await _until(lambda: counts.get("fairlead_auth_refresh_failures_total", "store") >= 3)
    assert store.looks == 1
    released.set()
    await _until(lambda: keyring.snapshot.disabled)
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


def test_no_request_asks_the_store() -> None:
    store, counts = Broken(), Counts()
    store.failing = False
    keyring = Keyring(store, GatewaySettings(), counts)
    keyring.refresh()
    identity = Identity(AuthSettings(), GatewaySettings(), keyring, counts, required=False)
    for _ in range(10):
        with pytest.raises(Unauthenticated):
            identity.known(Credentials(api_key=new_key().secret), NOW)
        assert identity.known(Credentials(), NOW) is not None
    assert store.looks == 1
