"""TLS of the HTTP and gRPC ports."""

import ssl
from pathlib import Path

from fairlead.core.errors import ConfigError
from fairlead.core.policy import TlsSettings


def server_context(settings: TlsSettings) -> ssl.SSLContext | None:
    """One for each port, because each door sets its own ALPN; None where no certificate is configured. Raises ConfigError.

    With `client_ca`, callers may present a certificate: one that it did not sign ends the handshake.
    """
    if not settings.certificate:
        if settings.private_key or settings.client_ca:
            raise ConfigError("`tls.certificate` is missing: without the server's own certificate there is no TLS")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    _load_own(context, settings)
    if settings.client_ca:
        _load_client_ca(context, settings.client_ca)
    return context


def _load_own(context: ssl.SSLContext, settings: TlsSettings) -> None:
    certificate, private_key = settings.certificate, settings.private_key or settings.certificate
    _check_readable("certificate", certificate)
    _check_readable("private_key", private_key)
    try:
        context.load_cert_chain(certificate, private_key, password=_no_password)
    except ssl.SSLError as error:
        reason = (error.reason or "").replace("_", " ").lower()
        if "mismatch" in reason:
            raise ConfigError(f"`tls.private_key` {private_key} is not the key of `tls.certificate` {certificate}") from None
        raise ConfigError(
            f"`tls.certificate` {certificate} with `tls.private_key` {private_key} cannot be used: {reason or 'not PEM'};"
            " both must be PEM, the server's own certificate first, then those between it and the root"
        ) from None


def _load_client_ca(context: ssl.SSLContext, path: str) -> None:
    _check_readable("client_ca", path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        reason = (error.reason or "").replace("_", " ").lower()
        raise ConfigError(f"`tls.client_ca` {path} cannot be used: {reason or 'not PEM'}; it must be PEM") from None
    if not context.cert_store_stats()["x509_ca"]:
        raise ConfigError(f"`tls.client_ca` {path} holds no certificate of an authority (basicConstraints CA:TRUE)")
    context.verify_mode = ssl.CERT_OPTIONAL


def _check_readable(name: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"`tls.{name}`: cannot read {path}: {error.strerror}") from None


def _no_password() -> str:
    # Without this, OpenSSL would ask the terminal.
    raise ConfigError("`tls.private_key` is encrypted: give a key without a password, readable by this user only")
