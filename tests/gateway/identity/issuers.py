"""OIDC issuers for tests: an independent one in a process of its own, and one whose keys and failures a test decides."""

import base64
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import parse_qs, urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, build_opener

from joserfc.jwk import Key, RSAKey
from joserfc.jws import JWSRegistry

AUDIENCE = "fairlead"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Stay(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


DIRECT = build_opener(ProxyHandler({}), _Stay())


@contextmanager
def provider(port: int, users: list[dict[str, Any]]) -> Iterator[str]:
    """A running oidc-provider-mock: another implementation of OpenID Connect, which makes itself a new key at each start."""
    options = [option for user in users for option in ("--user-claims", json.dumps(user))]
    command = [sys.executable, "-m", "oidc_provider_mock", "--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                DIRECT.open(url + "/jwks", timeout=5).close()
                break
            except URLError:
                assert process.poll() is None and time.monotonic() < deadline, "the provider did not start"
                time.sleep(0.05)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def log_in(issuer: str, user: str) -> str:
    """An ID token by the authorization code flow, as a browser and an application get one."""
    back = "http://127.0.0.1:1/callback"
    asked = urlencode({"client_id": AUDIENCE, "redirect_uri": back, "response_type": "code", "scope": "openid profile", "state": "s"})
    try:
        DIRECT.open(f"{issuer}/oauth2/authorize?{asked}", data=urlencode({"sub": user}).encode(), timeout=10)
        raise AssertionError("the provider did not send us back")
    except HTTPError as redirect:
        location = redirect.headers["location"]
        redirect.close()
    code = parse_qs(urlsplit(location).query)["code"][0]
    form = {"grant_type": "authorization_code", "code": code, "redirect_uri": back, "client_id": AUDIENCE, "client_secret": "any"}
    with DIRECT.open(f"{issuer}/oauth2/token", data=urlencode(form).encode(), timeout=10) as response:
        return str(json.load(response)["id_token"])


class LocalIssuer:
    """Answers discovery and JWKS over HTTP, and signs whatever it is told to."""

    def __init__(self) -> None:
        self.keys: dict[str, Key] = {"first": RSAKey.generate_key(2048)}
        self.num_reads = 0
        self.broken = False
        self.discovery: dict[str, Any] = {}
        """In place of what would be told."""
        self.extra_keys: list[dict[str, Any]] = []
        issuer = self

        class Answers(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = issuer.documents().get(self.path)
                body = json.dumps(found).encode()
                self.send_response(503 if issuer.broken else 404 if found is None else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def documents(self) -> dict[str, Any]:
        self.num_reads += 1
        jwks = [{**key.as_dict(private=False), "kid": kid, "use": "sig"} for kid, key in self.keys.items()]
        return {
            "/.well-known/openid-configuration": {"issuer": self.url, "jwks_uri": self.url + "/jwks", **self.discovery},
            "/jwks": {"keys": jwks + self.extra_keys},
        }

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def claims(self, now: float, **changes: Any) -> dict[str, Any]:
        """Of a good token; a change to None leaves one out."""
        base = {"iss": self.url, "aud": AUDIENCE, "sub": "ada", "tenant": "acme", "exp": now + 600, "iat": now, "nbf": now}
        return {name: value for name, value in {**base, **changes}.items() if value is not None}

    def token(self, now: float, *, kid: str = "first", header: Mapping[str, Any] = {}, **changes: Any) -> str:
        key = self.keys[kid]
        algorithm = {"RSA": "RS256", "EC": "ES256", "OKP": "Ed25519"}[key.key_type]
        return sign({"alg": algorithm, "kid": kid, **header}, json.dumps(self.claims(now, **changes)), key)


def sign(header: Mapping[str, Any], payload: str, key: Any) -> str:
    """Whatever the payload is, and whatever the header says."""
    signed = encoded(json.dumps(header)) + "." + encoded(payload)
    signature = JWSRegistry.algorithms[str(header["alg"])].sign(signed.encode(), key)
    return signed + "." + encoded(signature)


def encoded(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
