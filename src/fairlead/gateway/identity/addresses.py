"""Where a request came from, when proxies stand before the server."""

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from fairlead.core.errors import ConfigError

Network = IPv4Network | IPv6Network

MAX_HOPS = 32


@lru_cache(maxsize=8)
def networks_of(trusted: tuple[str, ...]) -> tuple[Network, ...]:
    """Raises ConfigError for what is no network."""
    networks = []
    for text in trusted:
        try:
            networks.append(ip_network(text))
        except ValueError as error:
            raise ConfigError(f"`auth.trusted_proxies`: {error}; write a network such as 10.0.0.0/8, or one address") from None
    return tuple(networks)


def client_address(peer: str, forwarded_for: str, trusted: tuple[str, ...]) -> str:
    """The last address that no trusted proxy has: what stands left of it in X-Forwarded-For, its owner may have made up."""
    if not trusted or not forwarded_for:
        return peer
    networks = networks_of(trusted)
    client = peer
    for hop in [*forwarded_for.rsplit(",", MAX_HOPS)[-MAX_HOPS:], peer][::-1]:
        address = _address(hop)
        if address is None:
            break
        client = str(address)
        if not any(address in network for network in networks):
            break
    return client


def _address(hop: str) -> IPv4Address | IPv6Address | None:
    text = hop.strip()
    if text.startswith("["):  # [::1]:8080
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:  # 10.0.0.1:8080
        text = text.partition(":")[0]
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
