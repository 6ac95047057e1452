"""What `keys`, `tenants`, `usage`, `audit` and `models` share: one way to ask the administration, of a running server or of the store itself.

Both are asked the same HTTP: a server over the network, or the same operations called in this process.
"""

import asyncio
import getpass
import http.client
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property, wraps
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import click
import msgspec
from click.decorators import FC
from msgspec import Struct
from rich.console import Console
from rich.table import Table

from fairlead.core.errors import ConfigError, FairleadError, InvalidRequest, Unavailable
from fairlead.core.settings import Settings, read_settings
from fairlead.gateway.identity.keys import ID_CHARS, PREFIX

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from fairlead.api.openapi import Operation

T = TypeVar("T")

TIMEOUT = 60.0
CONTROL = ("/admin/models", "/admin/rollouts", "/admin/deployments", "/admin/feedback")
"""Where the operations of the registry and of rollouts begin."""
_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


class Answer(Struct, frozen=True):
    status: int
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes


class Asks(Protocol):
    """Where the administration is."""

    @property
    def place(self) -> str:
        """For people to read."""

    def ask(self, method: str, target: str, body: bytes, *, timeout: float = TIMEOUT) -> Answer:
        """`timeout`: how long a server may take."""


class Remote:
    """A running server."""

    def __init__(self, url: str, key: str) -> None:
        self.place = url
        self._parsed = parsed_url(url, "http://127.0.0.1:8002")
        self._headers = {"Content-Type": "application/json", **bearer(key, "FAIRLEAD_ADMIN_KEY or --key")}

    def ask(self, method: str, target: str, body: bytes, *, timeout: float = TIMEOUT) -> Answer:
        return self._ask(method, target, body, self._headers, timeout)

    def upload(self, target: str, content_type: str, chunks: Iterator[bytes], *, timeout: float) -> Answer:
        """POST what comes in chunks, nobody knows how many."""
        return self._ask("POST", target, chunks, {**self._headers, "Content-Type": content_type}, timeout)

    def _ask(self, method: str, target: str, body: bytes | Iterator[bytes], headers: dict[str, str], timeout: float) -> Answer:
        parsed = self._parsed
        connect = http.client.HTTPSConnection if parsed.scheme == "https" else http.client.HTTPConnection
        connection = connect(str(parsed.hostname), parsed.port, timeout=timeout)
        try:
            try:
                connection.request(method, parsed.path.rstrip("/") + target, body, headers, encode_chunked=not isinstance(body, bytes))
            except (BrokenPipeError, ConnectionResetError):
                if isinstance(body, bytes):
                    raise  # else it was refused while it was sent, and the answer says why
            response = connection.getresponse()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response.read())
        except (OSError, http.client.HTTPException) as error:
            why = getattr(error, "strerror", None) or error
            raise Unavailable(f"no answer from {self.place}: {why}. Is `fairlead serve` running there?") from None
        finally:
            connection.close()


def parsed_url(url: str, example: str) -> urllib.parse.SplitResult:
    """Raises FairleadError."""
    parsed = urllib.parse.urlsplit(url)
    with suppress(ValueError):  # of what is no port
        if parsed.scheme in ("http", "https") and parsed.hostname and parsed.port != 0:
            return parsed
    raise FairleadError(f"--url must look like {example}, not {url!r}")


def bearer(key: str, where: str) -> dict[str, str]:
    """The header that shows a key. Raises FairleadError, which does not say what was in its place."""
    if not (key.isascii() and key.isprintable()):
        raise FairleadError(f"{where} holds no key: there is a line break in it, or a character that no key has")
    return {"Authorization": f"Bearer {key}"} if key else {}


class Local:
    """The store, by the same operations in this process."""

    def __init__(self, settings: Settings, *, classes_known: bool) -> None:
        # Imported here: with --url none of it is needed.
        from fairlead.api.admin import Admin
        from fairlead.api.doorkeeper import CALLER
        from fairlead.api.problems import Problems
        from fairlead.api.web import json_app
        from fairlead.core.caller import Caller
        from fairlead.store.database import default_url
        from fairlead.store.store import Store

        self._settings = settings
        self._store = Store.open(settings.store.url or default_url())
        classes = settings.gateway.classes if classes_known else None
        caller = Caller(key=f"cli:{user()}")
        admin = Admin(self._store, classes=None if classes is None else lambda: classes)

        async def admit(request: Any, _: Any) -> None:
            request.scope[CALLER] = (caller, "")

        def app(operations: "Iterable[Operation]") -> "ASGIApp":
            return json_app([(each.method, each.path, each.serve, each.scope) for each in operations], {"/admin": Problems()}, admit)

        self._make = app
        self._admin = app(admin.operations)

    @property
    def place(self) -> str:
        return self._store.url

    @cached_property
    def _control(self) -> "ASGIApp":
        """Imported and made here: most commands need no registry, whose artefacts may lie on a file system of their own."""
        from fairlead.api.registry import RegistryRoutes
        from fairlead.api.rollouts import RolloutOperations
        from fairlead.control.registry import Registry
        from fairlead.control.rollouts import Rollouts

        control = self._settings.control
        registry = Registry(self._store, control.registry)
        rollouts = RolloutOperations(Rollouts(self._store, registry, control))
        return self._make((*RegistryRoutes(registry).operations, *rollouts.operations))

    def ask(self, method: str, target: str, body: bytes, *, timeout: float = TIMEOUT) -> Answer:
        """Here it takes as long as it takes."""
        return asyncio.run(self._ask(method, target, body))

    async def _ask(self, method: str, target: str, body: bytes) -> Answer:
        path, _, query = target.partition("?")
        app = self._control if path.startswith(CONTROL) else self._admin
        scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": urllib.parse.unquote(path),
            "raw_path": path.encode("ascii"),
            "query_string": query.encode("ascii"),
            "root_path": "",
            "headers": [],
            "client": None,
            "server": None,
        }
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in sent[0]["headers"]}
        return Answer(sent[0]["status"], headers, b"".join(message.get("body", b"") for message in sent[1:]))

    def close(self) -> None:
        self._store.close()


def user() -> str:
    """Who acts here, for the audit log."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return "unknown"


# Options


def place_options(command: FC) -> FC:
    """--config, --url, --key of every command, and one argument `asks` in their place."""

    @click.option("--config", type=click.Path(path_type=Path), help="The server's fairlead.yaml, which says where its store is.")
    @click.option("--url", envvar="FAIRLEAD_ADMIN_URL", help="Ask a running server instead, e.g. http://127.0.0.1:8002.")
    @click.option(
        "--key", "admin_key", envvar="FAIRLEAD_ADMIN_KEY", help="With --url: a key with the scope admin. Better in FAIRLEAD_ADMIN_KEY."
    )
    @click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
    @wraps(command)
    def inner(config: Path | None, url: str | None, admin_key: str | None, **arguments: Any) -> Any:
        if url and config:
            raise ConfigError("--url and --config exclude each other: a server knows its own store")
        if url:
            return command(asks=Remote(url, admin_key or ""), **arguments)
        local = Local(Settings() if config is None else read_settings(config), classes_known=config is not None)
        try:
            return command(asks=local, **arguments)
        finally:
            local.close()

    return inner  # type: ignore[return-value]


def server_options(command: FC) -> FC:
    """--url, --key, --json of commands that only a running server can answer, and one argument `asks` in place of the first two."""

    @click.option("--url", envvar="FAIRLEAD_ADMIN_URL", default="http://127.0.0.1:8002", show_default=True, help="Its operations port.")
    @click.option("--key", "admin_key", envvar="FAIRLEAD_ADMIN_KEY", help="A key with the scope admin. Better in FAIRLEAD_ADMIN_KEY.")
    @click.option("--json", "as_json", is_flag=True, help="JSON, for scripts.")
    @wraps(command)
    def inner(url: str, admin_key: str | None, **arguments: Any) -> Any:
        return command(asks=Remote(url, admin_key or ""), **arguments)

    return inner  # type: ignore[return-value]


force_option = click.option("--force", is_flag=True, help="Although it is the last key with the scope admin, or has keys that work.")
limit_option = click.option(
    "--limit", "limits", multiple=True, metavar="NAME=AMOUNT", help="E.g. tokens_per_minute=90000, concurrent=8. Repeatable."
)


def key_id(_: click.Context, __: click.Parameter, text: str | None) -> str | None:
    """A callback that raises BadParameter for a secret, which must not get into addresses and messages."""
    if text is not None and text.startswith(PREFIX):
        id = text.removeprefix(PREFIX)[:ID_CHARS].partition("_")[0]
        raise click.BadParameter(f"that is a key itself, which nobody needs to see: give its id, {id}")
    return text


def limits_of(texts: tuple[str, ...], *, removable: bool = False) -> dict[str, float | None]:
    """`removable`: `NAME=` takes one away. Raises click.BadParameter; whether there is such a limit is checked by the operation."""
    limits: dict[str, float | None] = {}
    for text in texts:
        name, equals, amount = text.partition("=")
        try:
            if not equals:
                raise ValueError
            limits[name] = None if removable and not amount else float(amount)
        except ValueError:
            raise click.BadParameter(f"{text!r} is not NAME=AMOUNT, e.g. tokens_per_minute=90000") from None
    return limits


def time_of(text: str, *, ahead: bool = False, now: Callable[[], float] = time.time) -> str:
    """RFC 3339 of a span such as 30d (ago, or ahead), a date or a time."""
    span = _SPAN.fullmatch(text)
    if span is None:
        try:
            parsed = datetime.fromisoformat(text)
        except ValueError:
            raise click.BadParameter(f"{text!r} is neither a span (30d, 12h, 90m), a date (2026-10-01) nor a time") from None
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).isoformat()
    seconds = float(span[1]) * _SECONDS[span[2]]
    return datetime.fromtimestamp(now() + (seconds if ahead else -seconds), UTC).isoformat()


def seconds_of(text: str) -> float:
    span = _SPAN.fullmatch(text)
    if span is None:
        raise click.BadParameter(f"{text!r} is no span: write 90s, 30m, 12h, 30d")
    return float(span[1]) * _SECONDS[span[2]]


# Asking and showing


def target(path: str, *parts: str, **query: Any) -> str:
    """`path` with {} for each part, and what of the query is not None."""
    pairs = {name.rstrip("_"): value for name, value in query.items() if value is not None}
    with _utf8():
        quoted = [urllib.parse.quote(part, safe="") for part in parts]
        return path.format(*quoted) + (f"?{urllib.parse.urlencode(pairs)}" if pairs else "")


@contextmanager
def _utf8() -> Iterator[None]:
    try:
        yield
    except UnicodeEncodeError as error:
        raise click.UsageError(f"{error.object!a} is not UTF-8") from None


def ask(asks: Asks, method: str, target: str, body: Any = None, *, timeout: float = TIMEOUT) -> Any:
    """The JSON of a good answer. Raises FairleadError with what went wrong."""
    with _utf8():
        sent = b"" if body is None else msgspec.json.encode(body)
    answer = checked(asks.ask(method, target, sent, timeout=timeout), asks)
    return msgspec.json.decode(answer.body)


def checked(answer: Answer, asks: Asks) -> Answer:
    """Raises FairleadError with what the server says is wrong."""
    if answer.status < 400:
        if not answer.headers.get("content-type", "").startswith(("application/json", "text/csv")):
            raise FairleadError(f"{asks.place} is not Fairlead's operations port: {answer.status} without JSON")
        return answer
    try:
        problem = msgspec.json.decode(answer.body)
        detail = problem.get("detail") or problem["error"]
    except (msgspec.DecodeError, AttributeError, KeyError):
        detail = ""
    if not detail or (answer.status == 404 and not answer.headers.get("content-type", "").startswith("application/problem+json")):
        detail = f"{asks.place} answers {answer.status}. Is it the operations port of `fairlead serve`?"
    if answer.status == 401:
        detail = f"{detail} (give a key with the scope admin: FAIRLEAD_ADMIN_KEY or --key)"
    raise InvalidRequest(str(detail))


def show_json(value: Any) -> None:
    click.echo(msgspec.json.encode(value).decode())


def show_done(words: str, value: Any, as_json: bool) -> None:
    """What came of a change."""
    if as_json:
        show_json(value)
    else:
        click.echo(words)


def fields(*names: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Columns that show what a row has under that name."""
    return {name: itemgetter(name) for name in names}


def show_table(columns: dict[str, Callable[[dict[str, Any]], Any]], rows: list[dict[str, Any]], empty: str) -> None:
    if not rows:
        click.echo(empty, err=True)
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_cell(value(row)) for value in columns.values()))
    # As wide as it needs to be where nobody looks at a terminal: a script must not find words cut in two.
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def show_fields(value: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for name, each in value.items():
        table.add_row(name, _cell(each))
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    match value:
        case None:
            return ""
        case list():
            return escape(", ".join(map(str, value)))
        case dict():
            return escape(", ".join(f"{name}={_cell(each)}" for name, each in value.items()))
        case float():
            return f"{value:.6g}" if value != int(value) else str(int(value))
    return escape(str(value))


def short_time(text: str | None) -> str:
    """`2026-10-01 12:00` of RFC 3339."""
    return "" if text is None else text[:16].replace("T", " ")
