"""Signatures of versions: what they say, and what is taken for a key."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat, PublicFormat

from fairlead.control.signing import fingerprint, pem_of, private_key, public_key, sign, signed_bytes, signer, statement, trusted
from fairlead.core.errors import ConfigError, InvalidRequest

DIGEST = "ab" * 32


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def never() -> str:
    raise AssertionError("asked for a passphrase")


def test_a_statement_is_in_totos_and_names_the_model_and_the_digest() -> None:
    assert json.loads(statement("fraud", DIGEST)) == {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": "fraud", "digest": {"sha256": DIGEST}}],
        "predicateType": "https://fairlead.dev/version/v1",
        "predicate": {},
    }
    payload = statement("fraud", DIGEST)
    assert signed_bytes("fraud", DIGEST) == b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload)


def test_a_signature_is_good_for_one_model_one_content_and_one_key(key: Ed25519PrivateKey) -> None:
    other = Ed25519PrivateKey.generate()
    keys = {"other": other.public_key(), "release": key.public_key()}
    signature = sign(key, "fraud", DIGEST)
    assert signer(keys, signature, "fraud", DIGEST) == "release"
    assert signer(keys, signature, "spam", DIGEST) is None
    assert signer(keys, signature, "fraud", "cd" * 32) is None
    assert signer({"other": other.public_key()}, signature, "fraud", DIGEST) is None


@pytest.mark.parametrize("text", ["", "no base64!", "QUJD", "é"])
def test_what_is_no_signature_is_nobodys(key: Ed25519PrivateKey, text: str) -> None:
    assert signer({"release": key.public_key()}, text, "fraud", DIGEST) is None


def test_keys_are_read_from_pem_and_told_by_a_fingerprint(key: Ed25519PrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    read = private_key(pem, "KEY.pem", never)
    assert pem_of(read.public_key()) == pem_of(key.public_key())
    assert (
        fingerprint(public_key(pem_of(key.public_key()), "it"))
        == fingerprint(key.public_key())
        != fingerprint(Ed25519PrivateKey.generate().public_key())
    )


def test_an_encrypted_key_asks_for_its_passphrase(key: Ed25519PrivateKey) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"open sesame"))
    assert pem_of(private_key(pem, "KEY.pem", lambda: "open sesame").public_key()) == pem_of(key.public_key())
    with pytest.raises(InvalidRequest, match="its passphrase is another one"):
        private_key(pem, "KEY.pem", lambda: "wrong")


def test_what_is_no_key_of_ours_is_refused_and_not_repeated(key: Ed25519PrivateKey) -> None:
    rsa = generate_private_key(65537, 2048)
    pem = rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for content in (pem, b"-----BEGIN SECRET", b""):
        with pytest.raises(InvalidRequest, match=r"KEY\.pem is no Ed25519 private key") as told:
            private_key(content, "KEY.pem", never)
        assert "SECRET" not in told.value.message
    for text in (rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode(), "nothing"):
        with pytest.raises(ConfigError, match=r"`control\.registry\.trusted_keys\.ci` is no Ed25519 public key"):
            trusted({"ci": text})
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    with pytest.raises(ConfigError, match="is a private key: keep it to yourself"):
        trusted({"ci": secret})
