"""Where webhooks may not go: a tenant names the URL, and this server could reach what the tenant cannot.

Looked at three times: the URL when the job is submitted, every address that a name resolves to, and the address of each socket
before it connects. The last one holds whatever the others missed: names that resolve differently the second time, parsers that differ.
"""

import asyncio
import re
import socket
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult

from fairlead.core.errors import ConfigError, InvalidRequest
from fairlead.core.policy import WebhookSettings

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

FORBIDDEN = {
    "0.0.0.0/8": "unspecified",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "shared by carriers",
    "127.0.0.0/8": "loopback",
    "168.63.129.16/32": "a cloud's own",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "reserved",
    "192.0.2.0/24": "reserved",
    "192.88.99.0/24": "6to4",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "reserved",
    "198.51.100.0/24": "reserved",
    "203.0.113.0/24": "reserved",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
    "::/128": "unspecified",
    "::1/128": "loopback",
    "::/96": "an IPv4 address in disguise",
    "::ffff:0:0/96": "an IPv4 address in disguise",
    "64:ff9b::/96": "NAT64",
    "64:ff9b:1::/48": "NAT64",
    "2001::/23": "reserved",
    "2001:db8::/32": "reserved",
    "2002::/16": "6to4",
    "3fff::/20": "reserved",
    "fc00::/7": "private",
    "fe80::/10": "link-local",
    "fec0::/10": "private",
    "ff00::/8": "multicast",
}
"""From IANA's registries of special addresses, and what clouds add to them. Of IPv6 nothing outside 2000::/3 is anybody's."""
_FORBIDDEN = [(ip_network(network), why) for network, why in FORBIDDEN.items()]
_GLOBAL = IPv6Network("2000::/3")

MAX_URL_CHARS = 2048
WELL_KNOWN_PORTS = frozenset((80, 443))
"""Those under 1024 that may be called: the others are of services that might take a line of HTTP for one of theirs."""
_NAME = re.compile(r"(?=.{1,253}$)(?:[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9a-fA-F]*")
NUM_THREADS = 8
"""Names that are looked up at a time, in threads of their own: slow name servers hold up webhooks only."""


class RefusedAddress(OSError):
    """Not to be called."""


class Guard:
    """What may be called."""

    def __init__(self, allow: Iterable[str]) -> None:
        """Raises ConfigError for what is no network."""
        try:
            self.allow: list[Network] = [ip_network(network) for network in allow]
        except ValueError as error:
            raise ConfigError(f"`webhooks.allow`: {error}; write a network such as 10.1.0.0/16, or one address") from None

    def why_not(self, address: Address) -> str:
        """Of what kind an address is that may not be called; "" for one that may."""
        if any(address in network for network in self.allow):
            return ""
        for network, why in _FORBIDDEN:
            if address in network:
                return why
        return "reserved" if isinstance(address, IPv6Address) and address not in _GLOBAL else ""

    def check(self, address: str) -> None:
        """Raises RefusedAddress, which does not tell the address: names of the inside are none of the tenants' business."""
        try:
            why = self.why_not(ip_address(address))
        except ValueError:
            why = "unknown"
        if why:
            raise RefusedAddress(f"its address is {why}, which webhooks may not call")

    def socket(self, info: tuple[int, int, int, str, Sequence[int | str]]) -> socket.socket:
        """For a connection to the address that `info`, as getaddrinfo gives it, ends with. Raises RefusedAddress."""
        family, kind, protocol, _, target = info
        self.check(str(target[0]))
        return socket.socket(family, kind, protocol)


def check_url(url: str, settings: WebhookSettings, field: str = "webhook") -> None:
    """What can be said of it before its name is looked up. Raises InvalidRequest, naming `field`."""

    def refuse(why: str) -> InvalidRequest:
        return InvalidRequest(f"`{field}` {why}")

    if not settings.enabled:
        raise refuse("is not offered: this server calls nobody (`webhooks.enabled`)")
    if len(url) > MAX_URL_CHARS:
        raise refuse(f"is longer than {MAX_URL_CHARS} characters")
    if not all("!" <= char <= "~" for char in url) or "\\" in url:
        raise refuse("holds characters that a URL must escape; a name in other letters is written as xn--...")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise refuse(f"is no URL: {error}") from None
    if parts.scheme not in settings.schemes or not parts.netloc:
        raise refuse(f"must be a URL that begins with {' or '.join(f'{scheme}://' for scheme in settings.schemes)}")
    if "@" in parts.netloc:
        raise refuse("must hold no name and no password")
    if "#" in url:
        raise refuse("must have no fragment, which would not be sent")
    if port is not None and port not in WELL_KNOWN_PORTS and port < 1024:
        raise refuse(f"must not call port {port}: 80, 443 and those from 1024 on may be called")
    try:
        address = _literal(host, bracketed="[" in parts.netloc)
    except ValueError:
        raise refuse("names no host, or one whose address is spelt in an odd way") from None
    if address is not None and (why := Guard(settings.allow).why_not(address)):
        raise refuse(f"must not call {host}: its address is {why}")


def _literal(host: str, *, bracketed: bool) -> Address | None:
    """The address that stands in place of a name; None for a name. Raises ValueError for what is neither.

    What ends in a number is an address to the one parser or the other (`0x7f.1`, `2130706433`): only its plain spelling counts.
    """
    name = host.removesuffix(".")
    if bracketed:
        if "%" in host:
            raise ValueError(host)
        return IPv6Address(host)
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        return IPv4Address(host)
    if not _NAME.fullmatch(name):
        raise ValueError(host)
    return IPv4Address("127.0.0.1") if name == "localhost" or name.endswith(".localhost") else None


class Lookup(AbstractResolver):
    """Names to addresses, all of which may be called: one that also has another address would be called there by chance."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="webhook-names")

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Raises OSError."""
        found = await asyncio.get_running_loop().run_in_executor(self._threads, self.addresses, host, port)
        results = []
        for each, kind in found:
            self.guard.check(each)
            results.append(ResolveResult(hostname=host, host=each, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST))
        return results

    def addresses(self, host: str, port: int) -> list[tuple[str, socket.AddressFamily]]:
        """Blocks. Raises OSError."""
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [(str(address[0]), family) for family, _, _, _, address in infos]

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
