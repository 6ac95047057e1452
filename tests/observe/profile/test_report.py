"""The page needs nothing from anywhere, and no name in it can become code."""

import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from typing import Any

from fairlead.observe.profile.kernels import Kernel
from fairlead.observe.profile.layers import Answer, Layer
from fairlead.observe.profile.memory import MemoryPoint
from fairlead.observe.profile.report import report
from fairlead.observe.profile.result import ProcessProfile, Profile
from fairlead.observe.profile.stacks import Hot

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u2028"


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)


def page() -> str:
    process = ProcessProfile(
        7,
        "server",
        sampler="py-spy",
        num_samples=3,
        top=[Hot(EVIL, 1.0, 1.0)],
        stacks=f"{EVIL} main;{EVIL} f 3\n",
        memory=[MemoryPoint(0.0, 10, 5), MemoryPoint(1.0, 20, 5)],
        kernels=[Kernel(EVIL, "operator", 1, 0.1, 1.0)],
        trace=b"large",
    )
    answer = Answer(1, 0, 0.1, [Layer("compute", EVIL, 0.1, 1.0)], EVIL, EVIL)
    return report(Profile(EVIL, "1", 0.0, 1.0, ["cpu"], answer, [process], [EVIL]))


def test_names_are_data_and_nothing_else() -> None:
    text = page()
    elements = Elements()
    elements.feed(text)
    assert elements.tags == ["html", "meta", "meta", "meta", "meta", "title", "style", "main", "script", "script"]
    (data,) = re.findall(r'<script type="application/json" id="found">(.*?)</script>', text, re.DOTALL)
    found = json.loads(data)
    assert found["model"] == EVIL and found["processes"][0]["top"][0][0] == EVIL
    assert "trace" in found["processes"][0] and found["processes"][0]["trace"] == ""  # it lies beside the page


def test_the_page_may_run_its_own_script_alone_and_ask_nobody_for_anything() -> None:
    text = page()
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)[-1]
    digest = b64encode(sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)"', text)
    assert policy.replace("&#x27;", "'") == f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    assert not re.search(r"innerHTML|insertAdjacent|document\.write|eval\(|src=|@import|url\(", script)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", script)
