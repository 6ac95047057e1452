"""Where webhooks may go, and how those are found out who want them to go elsewhere."""

import socket
from ipaddress import ip_address

import pytest

from fairlead.core.errors import ConfigError, InvalidRequest
from fairlead.core.policy import WebhookSettings
from fairlead.jobs.addresses import Guard, Lookup, RefusedAddress, check_url

ANYWHERE = WebhookSettings()
AT_HOME = WebhookSettings(allow=("127.0.0.0/8",))


@pytest.mark.parametrize(
    "url",
    [
        "https://hooks.example.com/path?a=b%20c",
        "http://hooks.example.com:8080",
        "HTTPS://Hooks.Example.COM./",
        "https://xn--bcher-kva.example/hook",
        "https://93.184.216.34/hook",
        "https://[2606:2800:220:1:248:1893:25c8:1946]:443/",
        "https://a_b.example.com/",
        "https://localhost.example.com/",
        "https://mylocalhost/",
        "https://3com.example/",
    ],
)
def test_urls_that_may_be_called(url):
    check_url(url, ANYWHERE)


@pytest.mark.parametrize(
    "url",
    [
        # loopback and this host, however it is spelt
        "http://localhost/",
        "http://LOCALHOST.:8080/",
        "http://a.localhost/",
        "http://127.0.0.1/",
        "http://127.1/",
        "http://127.0.0.1./",
        "http://0x7f.1/",
        "http://0x7f000001/",
        "http://2130706433/",
        "http://0177.0.0.1/",
        "http://127.0.0.01/",
        "http://0/",
        "http://0.0.0.0/",
        "http://[::1]/",
        "http://[::]/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://[::127.0.0.1]/",
        "http://[64:ff9b::7f00:1]/",
        "http://[64:ff9b:1::7f00:1]/",
        "http://[2002:7f00:1::]/",
        "http://[2001:0:5ef5:79fb::1]/",
        # what only this host sees
        "http://10.1.2.3/",
        "http://172.31.255.255/",
        "http://192.168.0.1/",
        "http://100.64.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://168.63.129.16/",
        "http://100.100.100.200/",
        "http://[fd00:ec2::254]/",
        "http://[fe80::1]/",
        "http://[fe80::1%25eth0]/",
        "http://[2606:4700::1111%251]/",
        "http://[fec0::1]/",
        # nobody in particular
        "http://224.0.0.1/",
        "http://[ff02::1]/",
        "http://240.0.0.1/",
        "http://255.255.255.255/",
        "http://[5f00::1]/",
        "http://[4000::1]/",
        "http://[v1.127]/",
        # not URLs of a receiver
        "",
        "hooks.example.com",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "unix:///run/docker.sock",
        "javascript:alert(1)",
        "http://",
        "http:///path",
        "http://:80/",
        "http:hooks.example.com",
        "http://user@hooks.example.com/",
        "http://user:word@hooks.example.com/",
        "http://93.184.216.34@127.0.0.1/",
        "http://hooks.example.com#@127.0.0.1/",
        "http://hooks.example.com\\@127.0.0.1/",
        "http://hooks.example.com:0/",
        "http://hooks.example.com:22/",
        "http://hooks.example.com:25/",
        "http://hooks.example.com:65536/",
        "http://hooks.example.com:-1/",
        "http://hooks.example.com:٨٠/",
        "http://hooks.example.com/a b",
        "http://hooks.example.com/\r\nx: y",
        "http://hooks.example.com/\t",
        " http://hooks.example.com/",
        "http://bücher.example/",
        "http://①②⑦.⓪.⓪.①/",
        "http://127%2e0.0.1/",
        "http://a..b/",
        "http://-a.example/",
        "http://[::1/",
        "http://[127.0.0.1]/",
        f"http://{'a' * 64}.example/",
        f"http://hooks.example.com/{'a' * 2048}",
    ],
)
def test_urls_that_may_not(url):
    with pytest.raises(InvalidRequest, match="`webhook`"):
        check_url(url, ANYWHERE)


def test_the_field_is_named_as_the_protocol_has_it():
    with pytest.raises(InvalidRequest, match="^`webhook_url` must not call 10.0.0.1: its address is private$"):
        check_url("http://10.0.0.1/", ANYWHERE, "webhook_url")


def test_a_server_that_calls_nobody_says_so():
    with pytest.raises(InvalidRequest, match="webhooks.enabled"):
        check_url("https://hooks.example.com/", WebhookSettings(enabled=False))


def test_what_the_operator_allows_is_allowed_and_no_more():
    check_url("http://127.8.9.10:9000/", AT_HOME)
    check_url("http://localhost/", AT_HOME)
    for other in ("http://10.0.0.1/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://2130706433/"):
        with pytest.raises(InvalidRequest):
            check_url(other, AT_HOME)
    with pytest.raises(InvalidRequest, match="begins with https://$"):
        check_url("http://hooks.example.com/", WebhookSettings(schemes=("https",)))
    with pytest.raises(ConfigError, match="webhooks.allow"):
        Guard(("10.0.0.1/8",))


@pytest.mark.parametrize("address", ["8.8.8.8", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450::1"])
def test_addresses_of_everybody(address):
    assert Guard(()).why_not(ip_address(address)) == ""


class Names(Lookup):
    """A name server of the test's own."""

    def __init__(self, guard, **names):
        super().__init__(guard)
        self.names = names

    def addresses(self, host, port):
        found = self.names[host.partition(".")[0]]
        return [(each, socket.AF_INET6 if ":" in each else socket.AF_INET) for each in found]


async def test_a_name_is_good_if_all_of_its_addresses_are():
    names = Names(
        Guard(()), good=["8.8.8.8", "2606:4700::1111"], mixed=["8.8.8.8", "10.0.0.1"], mapped=["::ffff:10.0.0.1"], link=["fe80::1%2"]
    )
    found = await names.resolve("good.example", 443)
    assert [each["host"] for each in found] == ["8.8.8.8", "2606:4700::1111"]
    for bad in ("mixed", "mapped", "link"):
        with pytest.raises(RefusedAddress) as refused:
            await names.resolve(f"{bad}.example", 443)
        assert "10.0" not in str(refused.value) and "fe80" not in str(refused.value)
    await names.close()


async def test_names_of_this_host_are_looked_up_for_real():
    lookup = Lookup(Guard(("127.0.0.0/8", "::1/128")))
    assert {each["host"] for each in await lookup.resolve("localhost", 80)} <= {"127.0.0.1", "::1"}
    with pytest.raises(OSError):
        await lookup.resolve("no-such-name.invalid", 80)
    await lookup.close()
    lookup = Lookup(Guard(()))
    with pytest.raises(RefusedAddress, match="loopback"):
        await lookup.resolve("localhost", 80)
    await lookup.close()


def test_no_socket_is_made_for_an_address_that_nobody_may_call():
    with pytest.raises(RefusedAddress):
        Guard(()).socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80)))
    Guard(("127.0.0.0/8",)).socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))).close()
