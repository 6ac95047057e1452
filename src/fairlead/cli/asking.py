"""How the commands for users ask a running server's data port: with the key in FAIRLEAD_API_KEY, errors in one line."""

import http.client
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgspec

from fairlead.cli.admin import parsed_url
from fairlead.cli.models import shown_key
from fairlead.core.errors import FairleadError, Unavailable

TIMEOUT_SECONDS = 300.0


@contextmanager
def answer(
    url: str,
    method: str,
    target: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    timeout: float = TIMEOUT_SECONDS,
) -> Iterator[http.client.HTTPResponse]:
    """An answer below 400, to be read. Raises FairleadError with what the server says, Unavailable where none answers."""
    parsed = parsed_url(url, "http://127.0.0.1:8000")
    connect = http.client.HTTPSConnection if parsed.scheme == "https" else http.client.HTTPConnection
    path = parsed.path.rstrip("/").removesuffix("/v1")
    data = None if body is None else msgspec.json.encode(body)
    sent = {**({"content-type": "application/json"} if data is not None else {}), **shown_key(), **(headers or {})}
    with closing(connect(str(parsed.hostname), parsed.port, timeout=timeout)) as connection:
        try:
            connection.request(method, path + target, data, sent)
            with connection.getresponse() as response:
                if response.status >= 400:
                    raise FairleadError(said(response.read(), f"{response.status} {response.reason}"))
                yield response
        except TimeoutError:
            raise Unavailable(f"no answer from {url} within {timeout:g} s") from None
        except OSError as error:
            raise Unavailable(f"no answer from {url}: {error.strerror or error}. Is `fairlead serve` running there?") from None
        except http.client.HTTPException as error:
            raise Unavailable(f"{url} broke off its answer ({type(error).__name__})") from None


def asked(
    url: str, method: str, target: str, body: Any = None, headers: dict[str, str] | None = None, timeout: float = TIMEOUT_SECONDS
) -> Any:
    """The answer's JSON. Raises FairleadError."""
    with answer(url, method, target, body, headers, timeout) as response:
        return msgspec.json.decode(response.read())


def events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The data of server-sent events, as JSON."""
    for line in response:
        if line.startswith(b"data: "):
            yield msgspec.json.decode(line.removeprefix(b"data: "))


def said(body: bytes, otherwise: str) -> str:
    """What an error's body says, whichever protocol's it is."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return otherwise
    if isinstance(found, dict):
        error = found.get("error")
        message = error.get("message") if isinstance(error, dict) else error or found.get("detail")
        if isinstance(message, str):
            return message
    return otherwise
