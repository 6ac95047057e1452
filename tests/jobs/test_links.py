"""Signed links: what they are good for, and until when. The clock is the test's."""

from base64 import urlsafe_b64decode
from urllib.parse import parse_qs, urlsplit

import pytest

from fairlead.core.errors import Forbidden
from fairlead.core.jobs import Artifact
from fairlead.core.policy import ArtifactSettings
from fairlead.jobs.links import Links, check, link, signature
from fairlead.jobs.secrets import FRESH_SECONDS, Secrets
from tests.stores import new_store

KEY = "job_1/" + "ab" * 16 + ".png"
ARTIFACT = Artifact(key=KEY, content_type="image/png", num_bytes=3, sha256="00")
GOOD = {"tenant": "acme & sons", "expires": "1600", "secrets": ("old", "new")}


def parts(url):
    query = {name: values[0] for name, values in parse_qs(urlsplit(url).query, strict_parsing=True).items()}
    return {"tenant": query["tenant"], "expires": query["expires"], "signed": query["signature"]}


def test_a_link_is_good_until_it_expires():
    url = link(KEY, tenant="acme & sons", expires=1600, secret="new")
    assert urlsplit(url).path == f"/v1/artifacts/{KEY}"
    assert len(urlsafe_b64decode(parts(url)["signed"] + "=")) == 32
    assert check(KEY, **parts(url), secrets=("new", "old"), now=1599.9) == 1600
    with pytest.raises(Forbidden, match="has expired"):
        check(KEY, **parts(url), secrets=("new", "old"), now=1600.0)


@pytest.mark.parametrize(
    "change",
    [
        {"tenant": "rival"},
        {"tenant": ""},
        {"expires": "1601"},
        {"expires": "1600 "},
        {"expires": "-1"},
        {"expires": ""},
        {"expires": "9" * 400},
        {"expires": "١٦٠٠"},
        {"signed": ""},
        {"signed": "é"},
        {"signed": "A" * 43},
        {"secrets": ()},
        {"secrets": ("other",)},
    ],
)
def test_a_link_that_was_changed_is_good_for_nothing(change):
    good = {**GOOD, "signed": signature(KEY, tenant=GOOD["tenant"], expires=1600, secret="new")}
    assert check(KEY, **good, now=1.0) == 1600
    with pytest.raises(Forbidden, match="not signed"):
        check(KEY, **(good | change), now=1.0)


def test_a_link_is_good_for_one_file():
    signed = parts(link(KEY, tenant="acme", expires=1600, secret="new"))
    with pytest.raises(Forbidden):
        check(KEY.replace("ab", "ba"), **signed, secrets=("new",), now=1.0)


@pytest.fixture
def jobs(tmp_path):
    store = new_store(tmp_path)
    yield store.jobs
    store.close()


class Server:
    """One of several with the same store; each asks for its secrets at most so often."""

    def __init__(self, jobs, clock):
        self.links = Links(
            Secrets(jobs, "links", iter(map(str, range(1000))).__next__, lambda: clock[0]), ArtifactSettings(), lambda: clock[0]
        )
        self.clock = clock

    async def link(self):
        return self.links.to(ARTIFACT, "acme", self.clock[0])[0]

    async def check(self, url):
        return await self.links.check(KEY, **parts(url))


async def test_links_of_one_server_are_good_at_the_others(jobs):
    clock = [1000.0]
    one, other = Server(jobs, clock), Server(jobs, clock)
    await one.links.start()
    await other.links.start()
    url, until = one.links.to(ARTIFACT, "acme", clock[0])
    assert until == 1600
    assert await other.check(url) == 600
    assert await one.check(await other.link()) == 600


async def test_a_secret_that_was_replaced_is_good_as_long_as_its_links(jobs):
    clock = [1000.0]
    one, other = Server(jobs, clock), Server(jobs, clock)
    await one.links.start()
    await other.links.start()
    before = await one.link()
    await one.links.rotate()

    clock[0] += 1  # the other one knows nothing of it yet: what either gives is good at both
    for giver in (one, other):
        for taker in (one, other):
            assert await taker.check(await giver.link())

    clock[0] += FRESH_SECONDS
    await other.links.secrets.read("")
    after = await one.link()
    assert parts(after)["signed"] != signature(KEY, tenant="acme", expires=int(clock[0] + 600), secret="0")
    assert await other.check(after) and await other.check(before)

    clock[0] = 1599.0
    assert await other.check(before)
    clock[0] = 1000 + 600 + 2 * FRESH_SECONDS
    with pytest.raises(Forbidden, match="not signed"):  # its secret is forgotten
        await other.check(before)
