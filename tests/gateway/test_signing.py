"""Signed requests, held against http_message_signatures, the RFC's own examples and every change of a byte."""

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import threading
from base64 import b64decode, b64encode
from hashlib import sha512
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import http_message_signatures as library
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec.structs import replace

from fairlead.core.caller import Envelope
from fairlead.core.errors import LimitExceeded, Unauthenticated, Unreachable
from fairlead.gateway.signing import ED25519, HMAC, Nonces, SharedNonces, SigningKey, key_id, proves, sign, signature_base, verify

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "signing_client.py"
NOW = 1_700_000_000.0
WINDOW = 300.0
BODY = b'{"inputs": []}'
URL = "http://models.example:8000/v2/models/fraud/infer?a=1"
SECRET = bytes(range(32))
PRIVATE = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
PRIVATE_PEM = PRIVATE.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
PUBLIC_PEM = PRIVATE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
KEYS = {key.id: key for key in (SigningKey("both", SECRET, PUBLIC_PEM), SigningKey("hmac", SECRET), SigningKey("ed", ed25519=PUBLIC_PEM))}
SECRETS: dict[str, bytes | str] = {HMAC: SECRET, ED25519: PRIVATE_PEM}


def envelope_of(method: str, url: str, body: bytes, headers: dict[str, str]) -> Envelope:
    """What a server receives."""
    parts = urlsplit(url)
    return Envelope(
        method=method,
        target=url.split(parts.netloc, 1)[1] or "/",
        scheme=parts.scheme,
        authority=parts.netloc.lower(),
        headers={name.lower().encode(): value.encode("latin-1") for name, value in headers.items()},
        body=body,
    )


def signed(method="POST", url=URL, body=BODY, *, algorithm=HMAC, keyid="both", now=NOW, **options) -> Envelope:
    headers = {"Host": "models.example:8000", "Content-Type": "application/json", **(options.get("headers") or {})}
    return envelope_of(
        method, url, body, {**headers, **sign(method, url, body, keyid=keyid, secret=SECRETS[algorithm], now=now, **options)}
    )


def with_headers(envelope: Envelope, **headers: str | None) -> Envelope:
    changed = {name.replace("_", "-").encode(): value for name, value in headers.items()}
    kept = {name: value for name, value in envelope.headers.items() if name not in changed}
    return replace(envelope, headers=kept | {name: value.encode("latin-1") for name, value in changed.items() if value is not None})


def with_input(envelope: Envelope, old: str, new: str) -> Envelope:
    before = envelope.header("signature-input")
    assert old in before
    return with_headers(envelope, signature_input=before.replace(old, new))


def check(envelope: Envelope, now: float = NOW):
    return verify(envelope, KEYS.get, window=WINDOW, now=now)


def refusal(envelope: Envelope, now: float = NOW) -> str:
    with pytest.raises(Unauthenticated) as refused:
        check(envelope, now)
    assert "Accept-Signature" in refused.value.headers and "WWW-Authenticate" in refused.value.headers
    return refused.value.message


# Between us and others


@pytest.mark.parametrize("algorithm", [HMAC, ED25519])
@pytest.mark.parametrize("url", [URL, "https://models.example/v2", "http://models.example:80", "http://models.example/a%20b?q=%C3%A4&&"])
@pytest.mark.parametrize("target", [("@path", "@query"), ("@target-uri",), ("@request-target",)])
def test_what_we_sign_we_verify_and_so_does_the_library(algorithm, url, target):
    headers = sign("POST", url, BODY, keyid="both", secret=SECRETS[algorithm], now=NOW, nonce="n-1", target=target)
    verified = check(envelope_of("POST", url, BODY, headers))
    assert (verified.key, verified.nonce, verified.until) == ("both", "n-1", NOW + WINDOW)
    assert {"@method", "@authority", "content-digest", *target} == verified.covered
    chosen, public = (library.algorithms.HMAC_SHA256, SECRET) if algorithm == HMAC else (library.algorithms.ED25519, PUBLIC_PEM.encode())
    verifier = library.HTTPMessageVerifier(
        signature_algorithm=chosen, key_resolver=library.MappingKeyResolver(public_keys={"both": public}, private_keys={})
    )
    results = verifier.verify(SimpleNamespace(method="POST", url=url, headers=headers), max_age=None, body=BODY)
    assert [result.parameters["keyid"] for result in results] == ["both"]


@pytest.mark.parametrize("algorithm", [HMAC, ED25519])
@pytest.mark.parametrize("body", [b"", BODY])
@pytest.mark.parametrize("url", [URL, "https://models.example/a%20b?", "http://models.example"])
@pytest.mark.parametrize(
    "components", [("@method", "@authority", "@target-uri"), ("@method", "@authority", "@path", "@query", "@scheme", "content-type")]
)
def test_what_the_library_signs_we_verify(algorithm, body, url, components):
    from datetime import UTC, datetime

    chosen, private = (library.algorithms.HMAC_SHA256, SECRET) if algorithm == HMAC else (library.algorithms.ED25519, PRIVATE_PEM.encode())
    signer = library.HTTPMessageSigner(
        signature_algorithm=chosen, key_resolver=library.MappingKeyResolver(public_keys={}, private_keys={"both": private})
    )
    message = SimpleNamespace(method="POST", url=url, headers={"Content-Type": "application/json"})
    created, expires = (datetime.fromtimestamp(NOW + later, UTC) for later in (0, 60))
    signer.sign(
        message, key_id="both", created=created, expires=expires, nonce="ab/c+d==", covered_component_ids=components, body=body or None
    )
    verified = check(envelope_of("POST", url, body, message.headers))
    assert (verified.key, verified.nonce, verified.until) == ("both", "ab/c+d==", NOW + 60)


def test_the_rfcs_examples_b_2_5_and_b_2_6_hold():
    headers = {"date": "Tue, 20 Apr 2021 02:07:55 GMT", "content-type": "application/json", "content-length": "18"}
    message = envelope_of("POST", "https://example.com/foo?param=Value&Pet=dog", b'{"hello": "world"}', headers)
    text = '("date" "@authority" "content-type");created=1618884473;keyid="test-shared-secret"'
    secret = b64decode("uzvJfB4u3N0Jy4T7NZ75MDVcr8zSTInedJtkgcu46YW4XByzNJjxBdtjUkdJPBtbmHhIDi6pcl8jsasjlTMtDQ==")
    base = signature_base(message, ("date", "@authority", "content-type"), text)
    assert proves(SigningKey("", secret), HMAC, base, b64decode("pxcQw6G3AjtMBQjwo8XzkZf/bws5LelbaMk5rGIGtE8="))

    text = '("date" "@method" "@path" "@authority" "content-type" "content-length");created=1618884473;keyid="test-key-ed25519"'
    pem = "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAJrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs=\n-----END PUBLIC KEY-----\n"
    signature = b64decode("wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw==")
    base = signature_base(message, ("date", "@method", "@path", "@authority", "content-type", "content-length"), text)
    assert proves(SigningKey("", ed25519=pem), ED25519, base, signature)
    assert not proves(SigningKey("", ed25519=pem), ED25519, base + b" ", signature)


def test_the_example_client_signs_what_the_server_verifies(tmp_path):
    # Given a server that checks signatures, and an API key of the kind that `fairlead keys create` shows
    from fairlead.gateway.identity.keys import new_key

    key = new_key()
    keys = {key.id: SigningKey(key.id, bytes.fromhex(key.signing_key), PUBLIC_PEM)}
    answers: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            url = f"http://{self.headers['host']}{self.path}"
            verified = verify(envelope_of("POST", url, body, dict(self.headers)), keys.get, window=WINDOW, now=client.time.time())
            answers.append(verified.key)
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"ok")

        def log_message(self, *_):
            pass

    spec = importlib.util.spec_from_file_location("signing_client", EXAMPLE)
    assert spec is not None and spec.loader is not None
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    assert client.signing_key(key.secret) == (key.id, bytes.fromhex(key.signing_key))
    (tmp_path / "body.json").write_bytes(BODY)
    (tmp_path / "private.pem").write_text(PRIVATE_PEM)
    with HTTPServer(("127.0.0.1", 0), Server) as server:
        serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        serving.start()
        try:
            # When the example is run as its docstring says, by both algorithms
            for options in ([], ["--ed25519", "private.pem", "--keyid", key.id]):
                url = f"http://127.0.0.1:{server.server_port}/v2/models/fraud/infer?a=1"
                command = [sys.executable, str(EXAMPLE), url, "body.json", *options]
                run = subprocess.run(
                    command, cwd=tmp_path, capture_output=True, timeout=60, env={**os.environ, "FAIRLEAD_KEY": key.secret}, check=False
                )
                assert (run.stdout, run.stderr) == (b"ok", b"")
        finally:
            server.shutdown()
            serving.join()
    # Then the server knows who it was
    assert answers == [key.id, key.id]


# What a signature must be


def test_an_honest_client_is_told_what_is_wrong_with_its_signature():
    assert "must be signed" in refusal(with_headers(signed(), signature=None))
    assert "must be signed" in refusal(with_headers(signed(), signature_input=None))
    assert "check the clock" in refusal(signed(), now=NOW + 301)
    assert "check the clock" in refusal(signed(), now=NOW - 301)
    assert "has expired" in refusal(signed(expires=int(NOW) + 10), now=NOW + 10)
    assert "needs `created`" in refusal(with_input(signed(), f";created={int(NOW)}", ""))
    assert "`nonce`" in refusal(with_input(signed(nonce="abc"), ';nonce="abc"', ""))
    assert "`nonce`" in refusal(signed(nonce="n" * 129))
    assert "`keyid`" in refusal(with_input(signed(), ';keyid="both"', ""))
    assert "`alg`" in refusal(with_input(signed(), HMAC, "rsa-pss-sha512"))
    assert "`alg`" in refusal(with_input(signed(), f';alg="{HMAC}"', ""))
    assert "does not fit the body" in refusal(replace(signed(), body=b"{}"))
    assert "does not fit the body" in refusal(replace(signed(), body=b""))
    assert "does not have" in refusal(with_headers(signed(), content_digest=None))


@pytest.mark.parametrize(
    ("without", "named"),
    [('"@method" ', "@method"), ('"@authority" ', "@authority"), ('"@path" ', "@target-uri"), ('"@query" ', "@target-uri"), (' "content-digest"', "content-digest")],
)  # fmt: skip
def test_what_is_asked_must_be_covered(without, named):
    assert refusal(with_input(signed(), without, "")) == f"the signature must cover {named}"


def test_a_request_without_a_body_needs_no_digest_but_none_can_be_added():
    bare = signed("GET", body=b"")
    assert check(bare).covered == {"@method", "@authority", "@path", "@query"}
    assert refusal(replace(bare, body=BODY)) == "the signature must cover content-digest"


def test_headers_that_change_what_is_asked_must_be_covered():
    for name, value in {"content-encoding": "gzip", "inference-header-content-length": "3", "x-fairlead-class": "interactive"}.items():
        assert refusal(with_headers(signed(), **{name: value})) == f"the signature must cover {name}"
        covered = signed(headers={name: value})
        assert name in check(covered).covered
        assert "does not prove" in refusal(with_headers(covered, **{name: value + "1"}))


def test_an_unknown_key_and_a_wrong_signature_are_told_alike():
    unknown = refusal(signed(keyid="nobody"))
    wrong = signed()
    forged = "sig=:" + b64encode(bytes(32)).decode() + ":"
    assert unknown == refusal(with_headers(wrong, signature=forged)) == refusal(with_headers(wrong, signature="sig=::"))


def test_a_key_signs_only_by_the_algorithms_that_it_has():
    assert check(signed(keyid="hmac")).key == "hmac" and check(signed(keyid="ed", algorithm=ED25519)).key == "ed"
    # Given the public key, which is no secret: it must not do as a shared one
    for secret in (PUBLIC_PEM.encode(), b""):
        headers = sign("POST", URL, BODY, keyid="ed", secret=secret, now=NOW)
        assert "does not prove" in refusal(envelope_of("POST", URL, BODY, headers))
    assert "does not prove" in refusal(signed(keyid="hmac", algorithm=ED25519))
    assert "does not prove" in refusal(with_input(signed(), f'alg="{HMAC}"', f'alg="{ED25519}"'))


def test_every_digest_that_we_know_is_checked_and_one_is_enough():
    def digested(field: str) -> Envelope:
        headers = sign("POST", URL, b"", keyid="both", secret=SECRET, now=NOW, headers={"content-digest": field})
        return envelope_of("POST", URL, BODY, {**headers, "content-digest": field})

    right = f"sha-512=:{b64encode(sha512(BODY).digest()).decode()}:"
    wrong = f"sha-256=:{b64encode(bytes(32)).decode()}:"
    assert check(digested(right)) and check(digested(f"md5=:AAAA:, {right}"))
    assert "does not fit" in refusal(digested(f"{right}, {wrong}"))
    assert "does not fit" in refusal(digested("sha-256=:AAAA:"))
    assert "one of sha-256" in refusal(digested("md5=:AAAA:"))
    assert "base64" in refusal(digested("sha-256=:AAA:"))
    assert "cannot be read" in refusal(digested(f"{right}, {right}"))
    assert "cannot be read" in refusal(digested("sha-256=AAAA"))


def test_of_several_signatures_ours_counts():
    ours, proxys = signed(), 'proxy=("signature";key="sig" "@status";req "x-new";bs);created=1;later=?1;p=1.5;t=a/b;b=:AA==:;tag="proxy"'
    both = with_headers(
        ours,
        signature_input=f"{proxys},\t{ours.header('signature-input')}",
        signature=f"proxy=:AAAA:, {ours.header('signature')}",
    )
    assert check(both).key == "both" and key_id(both.header("signature-input")) == "both"
    assert "no label in common" in refusal(with_headers(both, signature="proxy=:AAAA:"))
    assert "no label in common" in refusal(with_input(ours, 'tag="fairlead"', 'tag="other"'))
    # Two without a tag: the one that verifies
    one, two = (with_input(signed(label=label), ';tag="fairlead"', "") for label in ("a", "b"))
    base = two.header("signature-input").removeprefix("b=")
    from hmac import digest

    untagged = b64encode(
        digest(SECRET, signature_base(two, ("@method", "@authority", "@path", "@query", "content-digest"), base), "sha256")
    ).decode()
    both = with_headers(
        two,
        signature_input=f"{one.header('signature-input')}, {two.header('signature-input')}",
        signature=f"{one.header('signature')}, b=:{untagged}:",
    )
    assert check(both).key == "both"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sig",
        "sig=",
        "sig=()",
        "sig=1",
        'sig=("@method" "@authority"',
        'sig=("@method"  "@authority");created=1',
        'sig=("@method""@authority");created=1',
        'sig=( "@method");created=1',
        'sig=("@method"); created=1',
        'sig=("@method");created=1,',
        'sig=("@method");created=1, sig=("@method");created=1',
        'sig=("@method");created=1;created=1',
        'sig=("@method");created="1"',
        'sig=("@method");created=1.5',
        'sig=("@method");created=1234567890123456',
        'sig=("@method");created',
        'sig=("@method");nonce=abc',
        'sig=("@method");nonce=?1',
        'sig=("@method");nonce="a\\b"',
        'sig=("@method");nonce="a\nb"',
        'sig=("@method");nonce="ä"',
        'sig=("@method");other="x"',
        'sig=("@method" "@method");created=1',
        'sig=("@method";req);created=1',
        'sig=("content-digest";sf);created=1',
        'sig=("@query-param";name="a");created=1',
        'sig=("Date");created=1',
        'sig=("@method" "a\\"b");created=1',
        'sig=(method);created=1',
        'Sig=("@method");created=1',
        'a=("@a"), b=("@a"), c=("@a"), d=("@a"), e=("@a")',
        "sig=(" + " ".join(f'"h{n}"' for n in range(40)) + ");created=1",
        'sig=("' + "a" * 5000 + '");created=1',
    ],
)  # fmt: skip
def test_a_signature_input_that_is_not_strictly_right_is_refused(text):
    refusal(with_headers(signed(), signature_input=text))
    assert key_id(text) == ""


@pytest.mark.parametrize("component", ["@status", "@query-param", "@nothing", "@signature-params"])
def test_unknown_components_are_refused_by_name(component):
    assert f'"{component}" is not supported' in refusal(with_input(signed(), '"@method"', f'"@method" "{component}"'))


def test_bytes_that_are_not_ascii_or_end_a_line_cannot_be_signed():
    for value in ("\xe4", 'a\n"@path": /other', "a\r"):
        envelope = with_headers(signed(headers={"x-name": "a"}), x_name=value)
        assert "ASCII" in refusal(envelope)


@given(st.binary(max_size=300))
def test_no_bytes_in_the_headers_do_more_than_be_refused(data):
    for name in (b"signature-input", b"signature", b"content-digest"):
        envelope = signed()
        refusal(replace(envelope, headers={**envelope.headers, name: data}))


@given(st.text(alphabet='"();=,:?*\\ a1-@', max_size=200))
def test_no_text_of_the_right_letters_is_misread(text):
    envelope = with_headers(signed(), signature_input=text)
    refusal(envelope)


def test_reading_takes_time_in_proportion_to_the_length():
    # A pattern that looked back would not come to an end with these
    for text in ('sig=("' + '\\"' * 2000, "sig=(" + '"a";a;a;a ' * 400, "a=(" + ";a=a" * 1000, 'a=("a")' + ";a=1.1" * 600 + "!"):
        refusal(with_headers(signed(), signature_input=text[:4096]))


# Every byte


def flipped(data: bytes, at: int, to: int) -> bytes:
    at %= len(data)
    assume(data[at] != to)
    return data[:at] + bytes([to]) + data[at + 1 :]


@given(
    algorithm=st.sampled_from([HMAC, ED25519]),
    target=st.sampled_from([("@path", "@query"), ("@target-uri",), ("@request-target",)]),
    part=st.sampled_from(["method", "target", "authority", "body", "digest", "header", "input", "signature"]),
    at=st.integers(0, 500),
    to=st.integers(33, 126),
)
def test_no_covered_byte_can_change(algorithm, target, part, at, to):
    url = "http://models.example:8000/v2/models/fraud/infer?version=3&x=y"
    envelope = signed(url=url, algorithm=algorithm, target=target, headers={"x-fairlead-class": "batch"}, nonce="q83vASNFZ4k")
    assert check(envelope).key == "both"
    before = envelope
    if part in ("method", "target", "authority"):
        old = getattr(envelope, part).encode()
        envelope = replace(envelope, **{part: flipped(old, at, to).decode()})
    elif part == "body":
        envelope = replace(envelope, body=flipped(BODY, at, to))
    else:
        name = {"digest": b"content-digest", "header": b"x-fairlead-class", "input": b"signature-input", "signature": b"signature"}[part]
        old = envelope.headers[name]
        if part == "signature":  # its last character has bits that base64 does not use
            start, end = old.index(b":") + 1, old.rindex(b":") - 3
            new = old[:start] + flipped(old[start:end], at, to) + old[end:]
        else:
            new = flipped(old, at, to)
        envelope = replace(envelope, headers={**envelope.headers, name: new})
    assert envelope != before
    refusal(envelope)


@given(secret=st.binary(min_size=1, max_size=64))
def test_no_other_secret_signs(secret):
    assume(secret.rstrip(b"\0") != SECRET)  # HMAC fills up short keys with zeros
    refusal(envelope_of("POST", URL, BODY, sign("POST", URL, BODY, keyid="both", secret=secret, now=NOW)))


# Once


def test_a_signature_counts_once():
    nonces = Nonces()
    verified = check(signed(nonce="one"))
    nonces.use(verified, NOW)
    with pytest.raises(Unauthenticated, match="used before"):
        nonces.use(verified, NOW + 1)
    # The same nonce of another key is another's
    nonces.use(check(signed(nonce="one", keyid="hmac")), NOW)
    assert len(nonces) == 2


@given(st.integers(-300, 300), st.integers(0, 700), st.integers(1, 800))
def test_a_nonce_is_remembered_for_as_long_as_its_signature_is_accepted(ahead, later, lifetime):
    # Given a client whose clock is wrong by `ahead`, whose request comes and is sent again `later`
    nonces = Nonces()
    envelope = signed(now=NOW + ahead, expires=int(NOW) + lifetime)
    nonces.use(check(envelope), NOW)
    try:
        again = check(envelope, NOW + later)
    except Unauthenticated:
        return
    with pytest.raises(Unauthenticated, match="used before"):
        nonces.use(again, NOW + later)


def test_nonces_are_forgotten_when_their_signatures_are_too_old():
    nonces = Nonces(max_entries=50)
    for second in range(2000):
        nonces.use(check(signed(now=NOW + second, expires=int(NOW) + second + 20), NOW + second), NOW + second)
    assert len(nonces) <= 41


def test_full_memory_refuses_rather_than_forgets():
    nonces = Nonces(max_entries=6, max_per_key=4)
    used = [check(signed()) for _ in range(4)]
    for each in used:
        nonces.use(each, NOW)
    # One key has its share, and does not lock out others ...
    with pytest.raises(LimitExceeded, match="`both` has 4 signatures"):
        nonces.use(check(signed()), NOW)
    for _ in range(2):
        nonces.use(check(signed(keyid="hmac")), NOW)
    # ... but there is an end, and what was used stays used
    with pytest.raises(Unreachable):
        nonces.use(check(signed(keyid="ed", algorithm=ED25519)), NOW)
    with pytest.raises(Unauthenticated):
        nonces.use(used[0], NOW + WINDOW)
    # Until their time is over
    nonces.use(check(signed(now=NOW + 311), NOW + 311), NOW + 311)
    assert len(nonces) == 1


@pytest.fixture(scope="module")
def redis_port(tmp_path_factory):
    """A Redis of our own."""
    if shutil.which("redis-server") is None:
        subprocess.run(
            ["apt-get", "install", "-y", "-qq", "-o", "DPkg::Lock::Timeout=600", "redis-server"], check=True, capture_output=True
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path_factory.mktemp("redis"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if b"Ready to accept connections" in line:
                break
        yield port
        process.terminate()
        process.stdout.read()


async def test_several_gateways_share_nonces_in_redis_and_refuse_without_it(redis_port):
    from redis.asyncio import Redis

    verified = check(signed())
    async with Redis(port=redis_port) as redis, Redis(port=redis_port) as other:
        await SharedNonces(redis).use(verified, NOW)
        with pytest.raises(Unauthenticated, match="used before"):
            await SharedNonces(other).use(verified, NOW)
        await SharedNonces(other).use(check(signed()), NOW)
        (name, *_) = await redis.keys("fairlead:nonce:*")
        assert WINDOW * 1000 < await redis.pttl(name) <= (WINDOW + SharedNonces.LEEWAY) * 1000
    async with Redis(port=1) as gone:
        with pytest.raises(Unreachable, match="Redis does not answer"):
            await SharedNonces(gone).use(check(signed()), NOW)


def test_the_page_shows_the_example_as_it_is():
    page = (EXAMPLE.parent.parent / "docs" / "signing.md").read_text()
    shown = page.split("```python\n")[1].split("```")[0]
    assert shown.strip() in EXAMPLE.read_text()
