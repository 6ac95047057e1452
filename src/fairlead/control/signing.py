"""Signatures of versions: Ed25519 over an in-toto statement, in the envelope that Sigstore's tools sign (DSSE).

The statement names the model and the version's digest, so that a signature for one model is none for another. The number is
not in it: a version is signed before it has one.
"""

import base64
import binascii
import hashlib
from collections.abc import Callable, Mapping

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key, load_pem_public_key

from fairlead.core.errors import ConfigError, InvalidRequest

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://fairlead.dev/version/v1"

Keys = Mapping[str, Ed25519PublicKey]
"""By name."""


def statement(model: str, digest: str) -> bytes:
    """What a signature says: this is a version of that model."""
    said = {
        "_type": STATEMENT_TYPE,
        "predicate": {},
        "predicateType": PREDICATE_TYPE,
        "subject": [{"digest": {"sha256": digest}, "name": model}],
    }
    return msgspec.json.encode(said, order="sorted")


def signed_bytes(model: str, digest: str) -> bytes:
    """The statement as DSSE has it signed."""
    payload = statement(model, digest)
    return b"DSSEv1 %d %b %d %b" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def sign(key: Ed25519PrivateKey, model: str, digest: str) -> str:
    """In base64."""
    return base64.b64encode(key.sign(signed_bytes(model, digest))).decode()


def signer(keys: Keys, signature: str, model: str, digest: str) -> str | None:
    """The name of the key that made it; None: none of them did."""
    try:
        raw = base64.b64decode(signature, validate=True)
    except (binascii.Error, ValueError):
        return None
    for name, key in keys.items():
        try:
            key.verify(raw, signed_bytes(model, digest))
        except InvalidSignature:
            continue
        return name
    return None


def public_key(pem: str, what: str) -> Ed25519PublicKey:
    """Raises ConfigError, which says nothing of what was in its place."""
    if "PRIVATE KEY" in pem:
        raise ConfigError(f"{what} is a private key: keep it to yourself, and give its public one (openssl pkey -in KEY.pem -pubout)")
    try:
        key = load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{what} is no Ed25519 public key in PEM")
    return key


def private_key(pem: bytes, what: str, passphrase: Callable[[], str]) -> Ed25519PrivateKey:
    """`passphrase` is asked for where the key is encrypted. Raises InvalidRequest, which says nothing of what was in its place."""
    try:
        try:
            key = load_pem_private_key(pem, None)
        except TypeError:  # it is encrypted
            key = load_pem_private_key(pem, passphrase().encode())
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise InvalidRequest(
            f"{what} is no Ed25519 private key in PEM, or its passphrase is another one (openssl genpkey -algorithm ed25519 -out KEY.pem makes one)"
        )
    return key


def pem_of(key: Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def fingerprint(key: Ed25519PublicKey) -> str:
    """How a key without a name is shown."""
    return f"ed25519:{hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:16]}"


def trusted(keys: Mapping[str, str]) -> Keys:
    """Those of the settings. Raises ConfigError."""
    return {name: public_key(pem, f"`control.registry.trusted_keys.{name}`") for name, pem in keys.items()}
