"""One HTML page with all that was found: nothing in it is fetched from anywhere."""

from base64 import b64encode
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import Any

import msgspec

from fairlead.observe.profile.result import Profile

MAX_STACKS_CHARS = 4 << 20


def report(found: Profile) -> str:
    """Names of models, functions and kernels are data in it: they are set as text, and can be nothing else."""
    shown: dict[str, Any] = msgspec.to_builtins(found)
    for process in shown["processes"]:
        process["trace"] = ""
        process["stacks"] = process["stacks"][:MAX_STACKS_CHARS]
    here = files("fairlead.observe.profile")
    script, style = (here / "report.js").read_text("utf-8"), (here / "report.css").read_text("utf-8")
    # Within <script> nothing is decoded: what could end the element must not stand there
    data = msgspec.json.encode(shown).decode().replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    digest = b64encode(sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(found.model)} under the profiler</title><style>{style}</style>"
        f'<main id="page"></main><script type="application/json" id="found">{data}</script><script>{script}</script></html>\n'
    )
