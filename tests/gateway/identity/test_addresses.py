"""Callers behind proxies."""

import pytest

from fairlead.core.errors import ConfigError
from fairlead.gateway.identity.addresses import MAX_HOPS, client_address, networks_of

TRUSTED = ("10.0.0.0/8", "2001:db8::/32", "127.0.0.1")


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "client"),
    [
        ("192.0.2.1", "", "192.0.2.1"),
        ("192.0.2.1", "198.51.100.7", "192.0.2.1"),  # no proxy of ours says so
        ("10.0.0.1", "", "10.0.0.1"),
        ("10.0.0.1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "203.0.113.9, 198.51.100.7", "198.51.100.7"),  # what stands left of it, the caller made up
        ("10.0.0.1", "10.1.1.1, 198.51.100.7 ,10.0.0.2", "198.51.100.7"),
        ("10.0.0.1", "10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", "198.51.100.7:4711", "198.51.100.7"),
        ("10.0.0.1", "[2001:db9::1]:4711", "2001:db9::1"),
        ("10.0.0.1", "2001:DB9:0::1", "2001:db9::1"),
        ("::ffff:10.0.0.1", "::ffff:198.51.100.7", "198.51.100.7"),
        ("2001:db8::1", "198.51.100.7", "198.51.100.7"),
        ("10.0.0.1", "198.51.100.7, unknown", "10.0.0.1"),  # of an unknown hop nothing left of it can be believed
        ("10.0.0.1", "198.51.100.7, , 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", "<script>", "10.0.0.1"),
        ("", "198.51.100.7", ""),
        ("10.0.0.1", "203.0.113.9, " + "10.0.0.2, " * MAX_HOPS + "10.0.0.3", "10.0.0.2"),
    ],
)
def test_the_address_is_the_last_one_that_no_trusted_proxy_has(peer: str, forwarded_for: str, client: str) -> None:
    assert client_address(peer, forwarded_for, TRUSTED) == client


def test_without_trusted_proxies_the_header_is_not_read() -> None:
    assert client_address("10.0.0.1", "198.51.100.7", ()) == "10.0.0.1"


@pytest.mark.parametrize("text", ["10.0.0.1/8", "proxy.example", "10.0.0.0/40", ""])
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="10.0.0.0/8, or one address"):
        networks_of((text,))
