"""`/v1/artifacts`: files that jobs made, for whoever has a signed link to one. No key is asked for: the link is the proof."""

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from fairlead.api.admin_bodies import Problem
from fairlead.api.line import AccessLine
from fairlead.api.openapi import Operation
from fairlead.api.status import CLIENT_LEFT, http_status
from fairlead.api.web import Ended, while_connected
from fairlead.core.errors import FairleadError, NotFound
from fairlead.core.jobs import Artifact
from fairlead.jobs.artifacts import KEY, SUFFIXES, Artifacts
from fairlead.jobs.links import Links
from fairlead.observe.finished import Finished
from fairlead.store.job_rows import JobRow

Find = Callable[[str, str | None], JobRow | None]
"""(job, tenant) → the job; blocks. Raises Unavailable."""
TYPES = (*SUFFIXES, "application/octet-stream")
HARMLESS = {
    # A file is shown as what it is said to be, and runs nothing, even where it was opened as a page.
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
    # The link is all the proof that there is, so a page that has it may read the file.
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "Accept-Ranges, Content-Range, ETag",
    "Cross-Origin-Resource-Policy": "cross-origin",
}
_RANGE = re.compile(r"bytes=\s*([0-9]{0,18})-([0-9]{0,18})\s*", re.IGNORECASE)


class ArtifactRoutes:
    """Its operations."""

    def __init__(self, find: Find, artifacts: Artifacts, links: Links, finished: Finished) -> None:
        self.find = find
        self.artifacts = artifacts
        self.links = links
        self.finished = finished
        self.operations = tuple(
            Operation(
                name=name,
                method=method,
                path="/v1/artifacts/{job}/{name}",
                tag="jobs",
                summary=summary,
                serve=self.serve,
                media=TYPES,
                query=("tenant", "expires", "signature"),
                scope=None,
                errors=(403, 404, 416, 500, 503),
                error=Problem,
            )
            # HEAD comes with GET wherever there is a GET; it is in the table for the document.
            for method, name, summary in (
                ("GET", "artifact", "A file that a job made, or a range of it, by its signed link"),
                ("HEAD", "artifactHead", "The same without the file"),
            )
        )

    async def serve(self, http: HttpRequest) -> Any:
        line = AccessLine(self.finished, http)
        with ended(line):
            query = http.query_params
            key = f"{http.path_params['job']}/{http.path_params['name']}"
            tenant = query.get("tenant", "")
            seconds = await self.links.check(key, tenant=tenant, expires=query.get("expires", ""), signed=query.get("signature", ""))
            artifact = await self._artifact(key, tenant)
            size = artifact.num_bytes
            tag = f'"{artifact.sha256}"'
            headers = {
                **line.headers,
                **HARMLESS,
                "Accept-Ranges": "bytes",
                "Cache-Control": f"private, max-age={int(seconds)}, immutable",
                "ETag": tag,
            }
            if _matches(http.headers.get("if-none-match", ""), tag):
                return _plain(line, 304, headers)
            span: Span | None = None
            if http.method == "GET" and http.headers.get("if-range", tag) == tag:
                try:
                    span = span_of(http.headers.get("range", ""), size)
                except ValueError:
                    raise HTTPException(416, f"the file has {size} bytes", {**headers, "Content-Range": f"bytes */{size}"}) from None
            start, stop = span or (0, size)
            headers |= {
                "Content-Type": artifact.content_type,
                "Content-Length": str(stop - start),
                "Content-Disposition": f'inline; filename="{key.replace("/", "-")}"',
            }
            if span is not None:
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            if http.method == "HEAD":
                return _plain(line, 200, headers)
            chunks = self.artifacts.read(artifact.key, start, stop)
            # With the first one here, what is wrong with the file can still be said.
            return FileStream(await anext(chunks, b""), chunks, 206 if span else 200, headers, line.end)

    async def _artifact(self, key: str, tenant: str) -> Artifact:
        """Raises NotFound: for a job that is gone, for a file that it does not name, for another tenant's."""
        match = KEY.fullmatch(key)
        row = None if match is None else await asyncio.to_thread(self.find, match[1], tenant)
        for artifact in row.result.artifacts if row is not None and row.result is not None else ():
            if artifact.key == key:
                return artifact
        raise NotFound("there is no such file: it may have been removed with its job")


@contextmanager
def ended(line: AccessLine) -> Iterator[None]:
    """Its line in the access log, where it fails."""
    try:
        yield
    except FairleadError as error:
        line.end(http_status(error), error.message)
        error.headers = {**line.headers, **error.headers}
        raise
    except HTTPException as error:
        line.end(error.status_code, error.detail)
        raise
    except asyncio.CancelledError:
        line.end(503, "the server stopped")
        raise
    except Exception:
        line.end(500, "internal error")
        raise


Span = tuple[int, int]
"""From the first byte to the one after the last."""


def span_of(header: str, size: int) -> Span | None:
    """Of a Range header (RFC 9110, 14.2); None: the whole, also for several ranges and for units that are not bytes.

    Raises ValueError where there is no byte of it.
    """
    match = _RANGE.fullmatch(header)
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        start, stop = max(0, size - int(match[2])), size
    else:
        start, stop = int(match[1]), min(int(match[2]) + 1, size) if match[2] else size
        if match[2] and int(match[2]) < start:
            return None
    if start >= size:
        raise ValueError(header)
    return start, stop


def _matches(header: str, tag: str) -> bool:
    """Of an If-None-Match header."""
    tags = [each.strip().removeprefix("W/") for each in header.split(",")]
    return tag in tags or tags == ["*"]


def _plain(line: AccessLine, status: int, headers: dict[str, str]) -> Response:
    line.end(status, "")
    return Response(status_code=status, headers=headers)


class FileStream:
    """A file in chunks, read as fast as the client takes them, and no further when it leaves.

    An error cuts the connection: the length was promised.
    """

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], status: int, headers: dict[str, str], ended: Ended) -> None:
        self.first = first
        self.rest = rest
        self.status = status
        self.headers = headers
        self.ended = ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, error = 503, "the server stopped"
        try:
            status, error = await while_connected(scope, receive, self._send(send)) or (CLIENT_LEFT, "the client left")
        finally:
            self.ended(status, error)

    async def _send(self, send: Send) -> tuple[int, str]:
        head = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in self.headers.items()]
        try:
            async with aclosing(self.rest) as rest:
                await send({"type": "http.response.start", "status": self.status, "headers": head})
                await send({"type": "http.response.body", "body": self.first, "more_body": True})
                async for chunk in rest:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except FairleadError as error:
            return self.status, error.message
        except OSError:
            return CLIENT_LEFT, "the client left"
        await send({"type": "http.response.body", "body": b""})
        return self.status, ""
