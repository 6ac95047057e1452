"""The dashboard's files: read once, at the start, and served from memory. What is not among them is not there."""

import base64
import gzip
import hashlib
from pathlib import Path

import msgspec
from msgspec import Struct

FOLDER = Path(__file__).parents[2] / "ui"
HTML = "text/html; charset=utf-8"
TYPES = {".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".woff2": "font/woff2"}
IMPORTS = {
    "preact": "vendor/preact.js",
    "preact/hooks": "vendor/preact-hooks.js",
    "@preact/signals": "vendor/signals.js",
    "@preact/signals-core": "vendor/signals-core.js",
    "htm": "vendor/htm.js",
    "uplot": "vendor/uplot.js",
}
LATER = ("pages/", "playground/", "vendor/uplot.js", "vendor/types/", "lib/theme.js")
"""What the first page does not wait for."""
DEMO = "playground/demo.js"
"""The page of one model, for those who are invited to try it."""
ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 24 24' fill='none' stroke='%230e8198' stroke-linecap='round'%3E"
    "%3Ccircle cx='13' cy='12' r='6.6' stroke-width='2.6'/%3E%3Cpath d='M1.5 18.5C6 18.5 8.500 15 11.5 12.600S18 8 22.5 6.5' stroke-width='2'/%3E%3C/svg%3E"
)


class File(Struct, frozen=True):
    content_type: str
    body: bytes
    zipped: bytes
    """The same with gzip; b"" where that saves nothing."""
    etag: str


class Files:
    def __init__(self, folder: Path = FOLDER) -> None:
        """Reads them."""
        found = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.suffix in TYPES and path.is_file()}
        self.by_name = {name: _file(path.read_bytes(), TYPES[path.suffix]) for name, path in found.items()}
        """By the path within the folder."""
        self.build = hashlib.sha256("".join(name + file.etag for name, file in self.by_name.items()).encode()).hexdigest()[:12]
        """Of all of them: an address with it never means other content."""
        base = f"/ui/static/{self.build}"
        imports = msgspec.json.encode({"imports": {name: f"{base}/{path}" for name, path in IMPORTS.items()}}).decode()
        digest = base64.b64encode(hashlib.sha256(imports.encode()).digest()).decode()
        self.policy = (
            f"default-src 'none'; script-src 'self' 'sha256-{digest}'; style-src 'self'; font-src 'self'; img-src 'self' data: blob:; "
            "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
        )
        """Content-Security-Policy."""
        scripts = [name for name in self.by_name if name.endswith(".js") and not name.startswith(LATER)]
        pieces = [name for name in self.by_name if name.startswith("playground/") and name.endswith(".js")]
        self.shell = _file(self._shell(base, imports, "app.js", [*scripts, "pages/index.js"]).encode(), HTML)
        self.demo = _file(self._shell(base, imports, DEMO, [name for name in [*scripts, *pieces] if name != "app.js"]).encode(), HTML)

    def find(self, build: str, name: str) -> File | None:
        """None for what is not there, and for another build's: a tab of before an update is told so instead of getting half of each."""
        return self.by_name.get(name) if build == self.build else None

    def _shell(self, base: str, imports: str, entry: str, preloaded: list[str]) -> str:
        styles = [name for name in self.by_name if name.endswith(".css")]
        # uPlot's first, so that ours may change what it says
        links = "".join(
            f'<link rel="stylesheet" href="{base}/{name}">' for name in sorted(styles, key=lambda name: ("vendor" not in name, name))
        )
        preloads = "".join(f'<link rel="modulepreload" href="{base}/{name}">' for name in preloaded)
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Fairlead</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
            f'<link rel="icon" href="{ICON}"><script src="{base}/lib/theme.js"></script>'
            f'<link rel="preload" href="{base}/vendor/inter.woff2" as="font" type="font/woff2" crossorigin>{links}'
            f'<script type="importmap">{imports}</script>{preloads}'
            f'<script type="module" src="{base}/{entry}"></script></head>'
            '<body><div id="app"></div><noscript>This page needs JavaScript.</noscript></body></html>'
        )


def _file(body: bytes, content_type: str) -> File:
    zipped = gzip.compress(body, 9, mtime=0)
    return File(content_type, body, zipped if len(zipped) < len(body) else b"", f'"{hashlib.sha256(body).hexdigest()[:20]}"')
