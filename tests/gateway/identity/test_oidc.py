"""Tokens: of an independent provider, and of an issuer that a test holds in its hand."""

import asyncio
import json
import time
from collections.abc import Iterator

import pytest
from joserfc.jwk import ECKey, OctKey, OKPKey, RSAKey
from joserfc.util import urlsafe_b64decode

from fairlead.core.caller import Caller, Credentials
from fairlead.core.errors import ConfigError, Unauthenticated, Unavailable
from fairlead.core.policy import AuthSettings, GatewaySettings, OidcSettings, Scope, TenantPolicy
from fairlead.gateway.identity.identity import Identity
from fairlead.gateway.identity.keyring import Keyring
from fairlead.gateway.identity.oidc import MAX_REMEMBERED, MAX_TOKEN_CHARS, MIN_REFRESH_SECONDS, claim
from fairlead.gateway.identity.subject import INVALID
from fairlead.observe.counts import Counts
from tests.gateway.identity.issuers import AUDIENCE, LocalIssuer, encoded, free_port, log_in, provider, sign

NOW = 1_800_000_000.0
GATEWAY = GatewaySettings(tenants={"acme": TenantPolicy(qos_class="batch", models=("chat-*",))})


@pytest.fixture(scope="module")
def running() -> Iterator[LocalIssuer]:
    issuer = LocalIssuer()
    yield issuer
    issuer.close()


@pytest.fixture
def issuer(running: LocalIssuer) -> LocalIssuer:
    """As new, but for its first key, which takes long to make."""
    running.keys = {"first": running.keys["first"]}
    running.num_reads, running.broken, running.discovery, running.extra_keys = 0, False, {}, []
    return running


class Gate:
    """An Identity, and what it counts."""

    def __init__(self, *settings: OidcSettings, required: bool = True) -> None:
        self.counts = Counts()
        self.identity = Identity(AuthSettings(oidc=settings), GATEWAY, Keyring(None, GATEWAY, self.counts), self.counts, required=required)

    async def caller(self, token: str, now: float = NOW) -> Caller:
        shown = Credentials(authorization=f"Bearer {token}", address="192.0.2.1")
        return self.identity.known(shown, now) or await self.identity.learn(shown, now)

    async def refusal(self, token: str, now: float = NOW) -> str:
        """The kind that it is counted as. What the caller is told is always the same."""
        before = dict(self.counts._counts)
        with pytest.raises(Unauthenticated) as refused:
            await self.caller(token, now)
        assert refused.value.message == INVALID
        (changed,) = {labels for labels, number in self.counts._counts.items() if number != before.get(labels, 0)}
        assert changed[0] == "fairlead_auth_failures_total"
        return changed[1]


def trusting(issuer: LocalIssuer, **changes: object) -> Gate:
    return Gate(OidcSettings(issuer=issuer.url, audience=AUDIENCE, **changes))  # type: ignore[arg-type]


# An independent provider


async def test_a_token_of_an_independent_provider_names_tenant_class_and_roles_and_a_restart_with_a_new_key_is_followed() -> None:
    users = [
        {"sub": "ada", "org": {"id": "acme", "team": "search"}, "class": "interactive", "roles": ["admin", "chess club"]},
        {"sub": "bob", "tenant": "none of org"},
    ]
    port = free_port()
    with provider(port, users) as url:
        gate = Gate(OidcSettings(issuer=url, audience=AUDIENCE, tenant_claim="org.id", project_claim="org.team"))
        now = time.time()
        first = log_in(url, "ada")
        caller = await gate.caller(first, now)
        assert (caller.tenant, caller.project, caller.key, caller.qos_class) == ("acme", "search", "ada", "interactive")
        assert caller.scopes == frozenset(Scope) and caller.policy.models == ("chat-*",)
        assert await gate.refusal(log_in(url, "bob"), now) == "token-claims"
        assert await gate.refusal(first, now + 3600 + 31) == "token-expired"
    assert (await gate.caller(first, now)).key == "ada"  # the issuer is gone, its keys are known
    with provider(port, users) as url:
        later = now + MIN_REFRESH_SECONDS
        second = log_in(url, "ada")
        assert (await gate.caller(second, later)).key == "ada"
        assert await gate.refusal(first, later) == "token-signature"


# What a good token says


async def test_a_token_of_a_tenant_without_a_row_has_the_policy_of_the_configuration(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    caller = await gate.caller(issuer.token(NOW))
    assert (caller.tenant, caller.project, caller.key, caller.qos_class) == ("acme", "default", "ada", "batch")
    assert caller.scopes == frozenset({Scope.INFER}) and caller.models == (("chat-*",),) and caller.address == "192.0.2.1"
    assert (await gate.caller(issuer.token(NOW, tenant="other"))).policy == TenantPolicy()


@pytest.mark.parametrize(
    ("roles", "scopes"),
    [
        (None, {Scope.INFER}),
        ("operator", {Scope.INFER, Scope.REPOSITORY}),
        ("user admin", set(Scope)),
        (["operator"], {Scope.INFER, Scope.REPOSITORY}),
        (["somebody else's"], set()),
        ([], set()),
    ],
)
async def test_roles_give_scopes_and_roles_that_are_not_ours_give_none(issuer: LocalIssuer, roles: object, scopes: set[Scope]) -> None:
    assert (await trusting(issuer).caller(issuer.token(NOW, roles=roles))).scopes == scopes


@pytest.mark.parametrize(("key", "algorithm"), [(ECKey, "ES256"), (OKPKey, "EdDSA"), (OKPKey, "Ed25519"), (RSAKey, "PS256")])
async def test_other_kinds_of_keys_sign_too(issuer: LocalIssuer, key: type[ECKey | OKPKey | RSAKey], algorithm: str) -> None:
    issuer.keys["other"] = issuer.keys["first"] if key is RSAKey else key.generate_key()
    token = issuer.token(NOW, kid="other", header={"alg": algorithm})
    assert (await trusting(issuer, algorithms=("ES256", "EdDSA", "Ed25519", "PS256")).caller(token)).key == "ada"


def test_claims_are_found_by_name_or_by_path() -> None:
    claims = {"https://acme.example/tenant": "a", "org": {"id": "b", "list": ["c"]}}
    assert claim(claims, "https://acme.example/tenant") == "a"
    assert claim(claims, "org.id") == "b"
    assert claim(claims, "org.id.more") is None and claim(claims, "org.list.0") is None and claim(claims, "none") is None


async def test_one_issuer_of_several_is_chosen_by_the_token_and_its_keys_prove_nothing_for_another(issuer: LocalIssuer) -> None:
    other = LocalIssuer()
    try:
        gate = Gate(*(OidcSettings(issuer=each.url, audience=AUDIENCE) for each in (issuer, other)))
        assert (await gate.caller(other.token(NOW, sub="bob"))).key == "bob"
        assert (await gate.caller(issuer.token(NOW))).key == "ada"
        assert await gate.refusal(other.token(NOW, iss=issuer.url)) == "token-signature"
    finally:
        other.close()


async def test_a_class_that_is_configured_no_longer_is_refused_of_a_token_that_was_good(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    token = issuer.token(NOW, **{"class": "interactive"})
    assert (await gate.caller(token)).qos_class == "interactive"
    gate.identity.configure(GatewaySettings(classes={"standard": 0}))
    assert await gate.refusal(token) == "token-claims"


# Hostile and broken tokens


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"exp": NOW - 31}, "token-expired"),
        ({"exp": None}, "token-claims"),
        ({"exp": "tomorrow"}, "token-claims"),
        ({"exp": True}, "token-claims"),
        ({"exp": 10**400}, "token-claims"),
        ({"exp": 1e300}, "token-claims"),
        ({"nbf": NOW + 31}, "token-early"),
        ({"iat": NOW + 31}, "token-early"),
        ({"nbf": [NOW]}, "token-claims"),
        ({"aud": "another"}, "token-audience"),
        ({"aud": ["another", "third"]}, "token-audience"),
        ({"aud": None}, "token-audience"),
        ({"aud": {"fairlead": True}}, "token-audience"),
        ({"iss": "https://issuer.example"}, "token-issuer"),
        ({"iss": None}, "token-issuer"),
        ({"iss": ["x"]}, "token-issuer"),
        ({"tenant": None}, "token-claims"),
        ({"tenant": ""}, "token-claims"),
        ({"tenant": "two\nlines"}, "token-claims"),
        ({"tenant": "x" * 300}, "token-claims"),
        ({"tenant": 7}, "token-claims"),
        ({"sub": None}, "token-claims"),
        ({"project": ["x"]}, "token-claims"),
        ({"class": "platinum"}, "token-claims"),
        ({"class": ["batch"]}, "token-claims"),
        ({"roles": {"admin": True}}, "token-claims"),
        ({"roles": [["admin"]]}, "token-claims"),
    ],
)
async def test_a_token_with_wrong_claims_is_refused(issuer: LocalIssuer, changes: dict[str, object], kind: str) -> None:
    assert await trusting(issuer).refusal(issuer.token(NOW, **changes)) == kind  # type: ignore[arg-type]


async def test_clocks_may_differ_by_the_leeway_and_one_audience_of_several_will_do(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    assert (await gate.caller(issuer.token(NOW, exp=NOW - 29, nbf=NOW + 29, iat=NOW + 29))).key == "ada"
    assert (await gate.caller(issuer.token(NOW, aud=["another", AUDIENCE]))).key == "ada"


async def test_the_key_is_never_what_the_token_says_it_is(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    payload = json.dumps(issuer.claims(NOW))
    good = issuer.keys["first"]
    mine = RSAKey.generate_key(2048)
    unsigned = encoded('{"alg":"none","kid":"first"}') + "." + encoded(payload) + "."
    assert await gate.refusal(unsigned) == "token-algorithm"
    assert await gate.refusal(unsigned.replace(encoded('{"alg":"none","kid":"first"}'), encoded('{"alg":"None"}'))) == "token-algorithm"
    for public in (good.as_pem(private=False), json.dumps(good.as_dict(private=False)).encode()):  # the confusion of HMAC and RSA
        confused = OctKey(public, {"kty": "oct", "k": encoded(public)})
        assert await gate.refusal(sign({"alg": "HS256", "kid": "first"}, payload, confused)) == "token-algorithm"
    own = {"alg": "RS256", "kid": "first", "jwk": mine.as_dict(private=False), "jku": "http://127.0.0.1:1/jwks"}
    assert await gate.refusal(sign(own, payload, mine)) == "token-signature"
    assert await gate.refusal(sign({"alg": "RS256", "kid": "first"}, payload, mine)) == "token-signature"
    assert await gate.refusal(sign({"alg": "PS256", "kid": "first"}, payload, mine)) == "token-signature"
    elliptic = sign({"alg": "ES256", "kid": "first"}, payload, ECKey.generate_key())
    assert await gate.refusal(elliptic) == "token-key"


async def test_a_key_that_may_only_encrypt_or_is_too_short_or_shared_is_no_key(issuer: LocalIssuer) -> None:
    secret = OctKey.import_key(b"0123456789abcdef0123456789abcdef")
    encrypting = ECKey.generate_key()
    issuer.extra_keys = [
        {**secret.as_dict(private=True), "kid": "secret"},
        {**encrypting.as_dict(private=False), "kid": "encrypting", "use": "enc"},
        {"kty": "RSA", "kid": "short", "n": encoded(b"\xff" * 64), "e": "AQAB"},
        {"kty": "martian", "kid": "odd"},
        {"kty": "RSA", "kid": "broken", "n": 7},
        7,  # type: ignore[list-item]
    ]
    gate = trusting(issuer)
    assert (await gate.caller(issuer.token(NOW))).key == "ada"
    payload = json.dumps(issuer.claims(NOW))
    assert await gate.refusal(sign({"alg": "ES256", "kid": "encrypting"}, payload, encrypting)) == "token-key"
    assert await gate.refusal(sign({"alg": "HS256", "kid": "secret"}, payload, secret)) == "token-algorithm"


async def test_tokens_that_are_no_tokens_are_refused(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    token = issuer.token(NOW)
    assert (await gate.caller(token)).key == "ada"
    header, payload, signature = token.split(".")
    key, good = issuer.keys["first"], json.dumps(issuer.claims(NOW))
    twice = good[:-1] + ', "tenant": "other"}'
    assert json.loads(twice)["tenant"] == "other"
    broken = {
        "token-malformed": [
            f"{header}.{payload}=.{signature}",
            f"{header}.{payload}.{signature}!",
            f".{payload}.{signature}",
            f"{header}..{signature}",
            f"{encoded('[]')}.{payload}.{signature}",
            f"{encoded('{')}.{payload}.{signature}",
            sign({"alg": "RS256", "kid": "first"}, twice, key),
            sign({"alg": "RS256", "kid": "first"}, good.replace('"sub": "ada"', '"sub": NaN'), key),
            sign({"alg": "RS256", "kid": "first"}, '{"a":' * 3000 + "1" + "}" * 3000, key),
            sign({"alg": "RS256", "kid": "first"}, '"text"', key),
            sign({"alg": "RS256", "kid": ["first"]}, good, key),
            sign({"alg": "RS256", "kid": "first", "typ": "logout+jwt"}, good, key),
            sign({"alg": "RS256", "kid": "first", "crit": ["b64"], "b64": False}, good, key),
            issuer.token(NOW, tenant="x" * MAX_TOKEN_CHARS),
            f"{header}.{payload}.\u0416",
        ],
        "token-signature": [
            f"{header}.{payload}.{encoded(urlsafe_b64decode(signature.encode())[:-3])}",
            f"{header}.{payload}.",
            f"{header}.{encoded(good.replace('acme', 'evil'))}.{signature}",
        ],
        "token-issuer": [f"{header}.{encoded('{}')}.{signature}"],
        "unknown": [f"{header}.{payload}", f"{token}.{signature}", "sk-1234"],
    }
    for kind, tokens in broken.items():
        for text in tokens:
            assert await gate.refusal(text) == kind, text[:200]


# The issuer's keys


async def test_a_new_key_is_read_once_and_made_up_key_ids_do_not_hammer_the_issuer(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    await gate.caller(issuer.token(NOW))
    reads = issuer.num_reads
    later = NOW + MIN_REFRESH_SECONDS
    for forged in range(50):
        assert await gate.refusal(issuer.token(later, header={"kid": f"forged {forged}"}), later) == "token-key"
    assert issuer.num_reads == reads + 2  # discovery and keys
    issuer.keys["second"] = ECKey.generate_key()
    token = issuer.token(later, kid="second")
    assert await gate.refusal(token, later + 1) == "token-key"  # not yet: they were read a second ago
    assert (await gate.caller(token, later + MIN_REFRESH_SECONDS)).key == "ada"


async def test_a_key_that_the_issuer_took_back_proves_nothing_any_more(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    old = issuer.token(NOW)
    await gate.caller(old)
    first = issuer.keys.pop("first")
    issuer.keys = {"second": ECKey.generate_key()}
    later = NOW + MIN_REFRESH_SECONDS
    await gate.caller(issuer.token(NOW, kid="second"), later)
    assert await gate.refusal(old, later) == "token-key"
    issuer.keys = {"first": first}


async def test_while_the_issuer_is_down_its_old_keys_go_on_and_without_any_the_answer_is_try_again(issuer: LocalIssuer) -> None:
    gate, fresh = trusting(issuer), trusting(issuer)
    token = issuer.token(NOW, exp=NOW + 1e6)
    await gate.caller(token)
    issuer.broken = True
    much_later = NOW + 90_000
    assert await gate.refusal(issuer.token(NOW, header={"kid": "other"}), NOW + 1) == "token-key"
    await gate.identity._tokens.issuers[issuer.url].refresh(much_later)  # type: ignore[union-attr]
    assert gate.counts.get("fairlead_auth_refresh_failures_total", "issuer") == 1
    assert (await gate.caller(token, much_later)).key == "ada"
    with pytest.raises(Unavailable, match="could not be read"):
        await fresh.caller(token)
    reads = issuer.num_reads
    with pytest.raises(Unavailable, match="could not be read"):
        await fresh.caller(token, NOW + 1)
    assert issuer.num_reads == reads
    issuer.broken = False
    assert (await fresh.caller(token, NOW + MIN_REFRESH_SECONDS)).key == "ada"


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://issuer.example"},
        {"jwks_uri": "http://keys.example/jwks"},
        {"jwks_uri": "file:///etc/passwd"},
        {"jwks_uri": None},
        {"jwks_uri": "http://127.0.0.1:1/jwks"},
    ],
)
async def test_a_discovery_that_says_something_else_gives_no_keys(issuer: LocalIssuer, discovery: dict[str, object]) -> None:
    issuer.discovery = dict(discovery)
    gate = trusting(issuer)
    with pytest.raises(Unavailable):
        await gate.caller(issuer.token(NOW))
    assert gate.counts.get("fairlead_auth_refresh_failures_total", "issuer") == 1


async def test_requests_that_come_together_wait_for_one_reading_and_not_too_many_wait(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    tokens = [issuer.token(NOW, sub=f"user {number}") for number in range(20)]
    callers = await asyncio.gather(*map(gate.caller, tokens))
    assert [caller.key for caller in callers] == [f"user {number}" for number in range(20)]
    assert issuer.num_reads == 2
    waiting = trusting(issuer)
    results = await asyncio.gather(*(waiting.caller(tokens[0]) for _ in range(300)), return_exceptions=True)
    assert sum(isinstance(result, Caller) for result in results) == 256
    assert all("too many" in str(result) for result in results if not isinstance(result, Caller))


async def test_one_that_leaves_while_keys_are_read_does_not_stop_the_reading_for_others(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    token = issuer.token(NOW)
    leaving, staying = asyncio.create_task(gate.caller(token)), asyncio.create_task(gate.caller(token))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).key == "ada"
    assert leaving.cancelled() or leaving.cancelling()


async def test_keys_are_read_ahead_of_the_first_request_and_the_reading_ends_with_the_server(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    following = asyncio.create_task(gate.identity.follow())
    token = issuer.token(NOW)
    async with asyncio.timeout(20):
        while not gate.identity._tokens.issuers[issuer.url].keys:  # type: ignore[union-attr]
            await asyncio.sleep(0.01)
    known = gate.identity.known(Credentials(authorization=f"bearer {token}"), NOW)
    assert known is not None and known.key == "ada"
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await gate.identity.close()


async def test_what_is_remembered_of_tokens_is_bounded_and_forgotten_when_they_expire(issuer: LocalIssuer) -> None:
    gate = trusting(issuer)
    token = issuer.token(NOW)
    await gate.caller(token)
    tokens = gate.identity._tokens
    assert tokens is not None
    ((digest, entry),) = tokens._remembered.items()
    tokens._remembered |= {number.to_bytes(4): entry for number in range(MAX_REMEMBERED)}
    await gate.caller(issuer.token(NOW, sub="bob"))
    assert len(tokens._remembered) == 1 and digest not in tokens._remembered
    assert await gate.refusal(issuer.token(NOW, exp=NOW + 60), NOW + 91) == "token-expired"


# Where nobody has to say who he is


async def test_an_open_server_takes_no_notice_of_tokens_that_are_not_for_it_but_checks_those_that_are(issuer: LocalIssuer) -> None:
    gate = Gate(OidcSettings(issuer=issuer.url, audience=AUDIENCE), required=False)
    for token in ("none", "sk-1234", "a.b.c", issuer.token(NOW, iss="https://elsewhere.example")):
        assert (await gate.caller(token)).key == ""
    assert (await gate.caller(issuer.token(NOW))).key == "ada"
    assert await gate.refusal(issuer.token(NOW, exp=NOW - 60)) == "token-expired"


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([{"issuer": "http://issuer.example"}], "https"),
        ([{"issuer": "issuer.example"}], "https"),
        ([{"issuer": "https://issuer.example", "algorithms": ("RS256", "HS256")}], "HS256"),
        ([{"issuer": "https://issuer.example", "algorithms": ("none",)}], "none"),
        ([{"issuer": "https://issuer.example"}] * 2, "twice"),
    ],
)
def test_settings_that_would_trust_anyone_are_refused(settings: list[dict[str, object]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gate(*(OidcSettings(audience=AUDIENCE, **each) for each in settings))  # type: ignore[arg-type]
