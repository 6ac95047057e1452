"""The public keys of an OIDC issuer, read over HTTPS."""

import json
import ssl
import time
from collections import defaultdict
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, ProxyHandler, Request, build_opener

from joserfc.errors import JoseError
from joserfc.jwk import ECKey, JWKRegistry, Key, OKPKey, RSAKey

DISCOVERY = "/.well-known/openid-configuration"
READ_SECONDS = 5.0
MAX_DOCUMENT_BYTES = 512 << 10
MAX_KEYS = 100
MIN_RSA_BITS = 2048
LOOPBACK = ("127.0.0.1", "::1", "localhost")

Keys = dict[str, tuple[Key, ...]]
"""By key id; an issuer may give one id to keys of two kinds."""


class NotRead(Exception):
    """The message is for the operator's log."""


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, req: Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str) -> None:
        return None


def is_secure(url: str) -> bool:
    """Keys that came over plain HTTP prove nothing, unless they never left this machine."""
    parts = urlsplit(url)
    return bool(parts.hostname) and (parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in LOOPBACK))


def read_keys(issuer: str) -> Keys:
    """Blocks. Raises NotRead."""
    discovery = _read_json(issuer.rstrip("/") + DISCOVERY)
    if discovery.get("issuer") != issuer:
        raise NotRead(f"{issuer}{DISCOVERY} says that its issuer is {discovery.get('issuer')!r}")
    url = discovery.get("jwks_uri")
    if not isinstance(url, str) or not is_secure(url):
        raise NotRead(f"the jwks_uri of {issuer} is no https URL: {url!r}")
    keys = keys_of(_read_json(url))
    if not keys:
        raise NotRead(f"{url} holds no public key for signatures that is understood here")
    return keys


def keys_of(document: dict[str, Any]) -> Keys:
    """Those for asymmetric signatures; others are passed over, as RFC 7517 wants."""
    found: defaultdict[str, list[Key]] = defaultdict(list)
    entries = document.get("keys")
    for entry in entries[:MAX_KEYS] if isinstance(entries, list) else ():
        if isinstance(entry, dict) and (key := _key_of(entry)) is not None:
            found[str(entry.get("kid", ""))].append(key)
    return {kid: tuple(keys) for kid, keys in found.items()}


def _key_of(entry: dict[str, Any]) -> Key | None:
    if entry.get("use", "sig") != "sig" or entry.get("kty") not in {"RSA", "EC", "OKP"}:
        return None
    if entry["kty"] == "RSA" and len(str(entry.get("n", ""))) * 6 < MIN_RSA_BITS:
        return None  # before joserfc warns of it
    try:
        key = JWKRegistry.import_key(entry)
    except (JoseError, ValueError, TypeError, KeyError):
        return None
    return key if isinstance(key, RSAKey | ECKey | OKPKey) else None


def _read_json(url: str) -> dict[str, Any]:
    handlers = [_NoRedirects(), HTTPSHandler(context=ssl.create_default_context())]
    if urlsplit(url).hostname in LOOPBACK:
        handlers.append(ProxyHandler({}))
    request = Request(url, headers={"Accept": "application/json", "User-Agent": "fairlead"})
    deadline = time.monotonic() + READ_SECONDS
    data = b""
    try:
        with build_opener(*handlers).open(request, timeout=READ_SECONDS) as response:
            while piece := response.read1(64 << 10):
                data += piece
                if len(data) > MAX_DOCUMENT_BYTES:
                    raise NotRead(f"{url} is longer than {MAX_DOCUMENT_BYTES} bytes")
                if time.monotonic() > deadline:
                    raise NotRead(f"{url} took longer than {READ_SECONDS:g} s")
        document = json.loads(data)
    except HTTPError as error:
        error.close()
        raise NotRead(f"{url} answers with status {error.code}") from None
    except (OSError, HTTPException, ValueError, RecursionError) as error:
        raise NotRead(f"{url} cannot be read: {error}") from None
    if not isinstance(document, dict):
        raise NotRead(f"{url} is no JSON object")
    return document
