"""A client that signs its requests (RFC 9421, RFC 9530), in one file to copy from.

    export FAIRLEAD_KEY=fl_...
    python signing_client.py http://127.0.0.1:8000/v2/models/fraud/infer request.json
    python signing_client.py http://127.0.0.1:8000/v1/chat/completions chat.json --ed25519 private.pem --keyid 7Jx0aQm2VbKc

With the key alone it signs by hmac-sha256, which needs nothing but the standard library, and the key never leaves this machine.
With an Ed25519 private key, whose public half the server was given, it signs by that (`pip install cryptography`).
"""

import argparse
import base64
import hashlib
import hmac
import os
import secrets
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit


def signing_key(api_key: str) -> tuple[str, bytes]:
    """The id of an API key `fl_ID_...`, and the secret that signs for it."""
    return api_key.split("_")[1], hmac.digest(api_key.encode(), b"fairlead request signing v1", "sha256")


def signed_headers(method: str, url: str, body: bytes, keyid: str, secret: bytes = b"", private_pem: bytes = b"") -> dict[str, str]:
    """The headers that sign one request. Every call signs anew: a signature is good for one request only."""
    parts = urlsplit(url)
    port = {"http": ":80", "https": ":443"}[parts.scheme]
    covered = {
        "@method": method,
        "@authority": parts.netloc.lower().removesuffix(port),
        "@path": parts.path or "/",
        "@query": "?" + parts.query,
        "content-digest": f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:",
    }
    names = " ".join(f'"{name}"' for name in covered)
    algorithm = "ed25519" if private_pem else "hmac-sha256"
    parameters = (
        f'({names});created={int(time.time())};nonce="{secrets.token_urlsafe(18)}";keyid="{keyid}";alg="{algorithm}";tag="fairlead"'
    )
    base = "\n".join(f'"{name}": {value}' for name, value in {**covered, "@signature-params": parameters}.items()).encode("ascii")
    if private_pem:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        private = load_pem_private_key(private_pem, password=None)
        if not isinstance(private, Ed25519PrivateKey):
            sys.exit("this is not an Ed25519 private key")
        signature = private.sign(base)
    else:
        signature = hmac.digest(secret, base, "sha256")
    return {
        "Content-Digest": covered["content-digest"],
        "Signature-Input": f"sig={parameters}",
        "Signature": f"sig=:{base64.b64encode(signature).decode()}:",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Send one signed POST request.")
    parser.add_argument("url")
    parser.add_argument("body", help="a file of JSON")
    parser.add_argument("--ed25519", metavar="PEM", help="a private key; else FAIRLEAD_KEY signs")
    parser.add_argument("--keyid", help="the id of the key that the Ed25519 key belongs to")
    options = parser.parse_args()
    with open(options.body, "rb") as file:
        body = file.read()
    if options.ed25519:
        with open(options.ed25519, "rb") as file:
            headers = signed_headers("POST", options.url, body, options.keyid, private_pem=file.read())
    else:
        headers = signed_headers("POST", options.url, body, *signing_key(os.environ["FAIRLEAD_KEY"]))
    request = urllib.request.Request(options.url, body, {"Content-Type": "application/json", **headers}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            sys.stdout.buffer.write(answer.read())
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {error.read().decode()}")


if __name__ == "__main__":
    main()
