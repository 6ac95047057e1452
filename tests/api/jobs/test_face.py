"""What the faces share, on its own: base64, `Prefer`, names of fields."""

import msgspec
import pytest
from starlette.requests import Request as HttpRequest

from fairlead.api.jobs.details import Details
from fairlead.api.jobs.face import base64_bytes, cursor, decode_named, named, paint_of, parted, wait_seconds
from fairlead.core.errors import InvalidRequest, LimitExceeded, NotFound, TooLarge
from tests.api.jobs.served import in_base64, picture


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    size: int
    names: list[str] = []


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: Inner


@pytest.mark.parametrize(
    ("body", "within", "said"),
    [
        ('{"inner": {"size": "x"}}', "", "`inner.size`: Expected `int`, got `str`"),
        ('{"inner": {"size": "x"}}', "input", "`input.inner.size`: Expected `int`, got `str`"),
        ('{"inner": {"size": 1, "more": 2}}', "", "`inner.more`: Object contains unknown field `more`"),
        ('{"inner": {}}', "", "`inner.size`: Object missing required field `size`"),
        ("{}", "", "`inner`: Object missing required field `inner`"),
        ('{"inner": {"size": 1, "names": ["a", 2]}}', "", "`inner.names[1]`: Expected `str`, got `int`"),
        ("[]", "", "Expected `object`, got `array`"),
        ("[]", "input", "`input`: Expected `object`, got `array`"),
        ("{", "", "the body is not JSON: Input data was truncated"),
    ],
)
def test_what_is_wrong_is_said_after_its_name(body: str, within: str, said: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        decode_named(body.encode(), Outer, within)
    assert refused.value.message == said


def test_a_paint_says_which_of_its_fields_is_wrong() -> None:
    with pytest.raises(InvalidRequest, match=r"^`num_steps`: Expected `int` >= 1$"):
        paint_of({"text": "x", "num_steps": 0})
    with pytest.raises(InvalidRequest, match=r"^`mask` needs an `image`"):
        paint_of({"text": "x", "mask": b"x"})
    assert named("`a` is wrong") == "`a` is wrong"


@pytest.mark.parametrize("head", ["", "data:image/png;base64,", "data:image/jpeg;base64,", "DATA:image/WebP;BASE64,"])
def test_base64_and_data_urls_of_pictures(head: str) -> None:
    text = in_base64(picture())
    assert base64_bytes(head + text, "image") == picture()
    assert base64_bytes(head + "\n".join(text[at : at + 76] for at in range(0, len(text), 76)), "image") == picture()
    assert base64_bytes("", "image") == b""


@pytest.mark.parametrize(
    "text",
    [
        "no!",
        "abc",
        "é",
        "data:image/png,abcd",
        "data:image/png;base64",
        "data:;base64,abcd",
        "data:image/png;base64,",
        "  ",
        "data:text/html;base64,abcd",
        "data:image/svg+xml;base64,abcd",
        "data:image/png;charset=x;base64,abcd",
        "http://example.com/a.png",
        "HTTPS://example.com/a.png",
        "file:///etc/passwd",
    ],
)
def test_what_is_no_picture_in_base64(text: str) -> None:
    with pytest.raises(InvalidRequest, match="^`image` is "):
        base64_bytes(text, "image")


def asked(*prefer: str) -> HttpRequest:
    return HttpRequest({"type": "http", "headers": [(b"prefer", each.encode()) for each in prefer]})


def test_prefer() -> None:
    assert wait_seconds(asked(), 60.0) is None
    assert wait_seconds(asked("respond-async"), 60.0) is None
    assert wait_seconds(asked("waiting=3"), 60.0) is None
    assert wait_seconds(asked("wait"), 60.0) == 60.0
    assert wait_seconds(asked("wait=5"), 60.0) == 5.0
    assert wait_seconds(asked("wait=500"), 60.0) == 60.0
    assert wait_seconds(asked("wait=0"), 60.0) == 0.0
    assert wait_seconds(asked("handling=lenient", "respond-async; x=1, WAIT = 7"), 60.0) == 7.0


def test_names_and_cursors() -> None:
    assert parted("name") == ("name", "") and parted("name@3") == ("name", "3")
    assert cursor(None, "before") is None
    assert cursor("job_" + "0af" * 10 + "00", "before")
    with pytest.raises(InvalidRequest, match="^`cursor` "):
        cursor("job_xyz", "cursor")


def test_the_shape_that_fastapis_users_know() -> None:
    said = Details()
    assert said.content(InvalidRequest("`input.width` must be smaller"))[::2] == (
        422,
        b'{"detail":[{"loc":["body","input","width"],"msg":"`input.width` must be smaller","type":"value_error"}]}',
    )
    assert said.content(InvalidRequest("no name"))[2] == b'{"detail":[{"loc":["body"],"msg":"no name","type":"value_error"}]}'
    assert said.content(NotFound("nothing"))[::2] == (404, b'{"detail":"nothing"}')
    assert said.content(TooLarge("much"))[::2] == (413, b'{"detail":"much"}')
    assert said.content(LimitExceeded("poor", reason="budget", retry_after=9.0))[0] == 402
    assert said.content(LimitExceeded("fast", reason="queued-jobs", retry_after=9.0))[0] == 429
