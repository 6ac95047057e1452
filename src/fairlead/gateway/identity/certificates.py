"""Client certificates: the organisation is the tenant, the common name the key."""

import ssl
from collections.abc import Mapping
from typing import Any

from fairlead.gateway.identity.subject import Refused, Subject, is_name


def subject_of(certificate: Mapping[str, Any]) -> Subject:
    """Of a certificate that the handshake has verified. Raises Refused where it does not name exactly one of both."""
    fields: dict[str, list[str]] = {}
    for name, value in (pair for relative in certificate.get("subject", ()) for pair in relative):
        fields.setdefault(name, []).append(value)
    match fields.get("organizationName"), fields.get("commonName"):
        case [tenant], [key] if is_name(tenant) and is_name(key):
            return Subject(tenant=tenant, key=key, expires=float(ssl.cert_time_to_seconds(certificate["notAfter"])))
    raise Refused("certificate")
