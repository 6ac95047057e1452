"""The part of the administration under `/admin/models`: models, their versions, and what is known of them."""

import asyncio
import re
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from typing import Any

from msgspec import UNSET, structs
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import BadField, Deleted, Entries, NoQuery, decoded, query_of, when
from fairlead.api.admin_route import actor_of, body_of, operation
from fairlead.api.doorkeeper import caller_of
from fairlead.api.registry_bodies import (
    Added,
    AliasTarget,
    DiffQuery,
    EventsQuery,
    LoadedVersion,
    Model,
    ModelChange,
    Models,
    ModelVersion,
    ModelVersions,
    NewModel,
    NewVersion,
    Retirement,
    UploadQuery,
    VersionChange,
    VersionSignature,
    VersionsQuery,
    WholeVersion,
    draft_of,
    model_of,
    version_of,
    whole_version,
)
from fairlead.api.web import json_response, read_body
from fairlead.control.checks import Checks, checks_of
from fairlead.control.registry import Actor, Diff, Draft, Registry
from fairlead.control.tar import tar_size, unpack
from fairlead.core.errors import FairleadError, InvalidRequest, Unavailable, Unsupported
from fairlead.core.versions import Ref, parse_ref
from fairlead.runtime.repository import IndexEntry
from fairlead.store.registry_rows import ModelRow, VersionRow
from fairlead.store.rows import AuditQuery

TAR = "application/x-tar"
MAX_ADDING = 4
"""Versions being added at a time."""
MAX_CHECKS_BYTES = 16 << 20
"""Of a model's checks, data set and all: they are a row of the store."""
_VERSIONS, _CHECKS = re.compile(rb"/admin/models/[^/]+/versions"), re.compile(rb"/admin/models/[^/]+/checks")


class RegistryRoutes:
    """The operations upon one registry."""

    def __init__(self, registry: Registry, loaded: Callable[[], Iterable[IndexEntry]] | None = None) -> None:
        """`loaded`: what this server has loaded, or could; None where no server runs."""
        self.registry = registry
        self.rows = registry.rows
        self.loaded = loaded
        self._slots = threading.Semaphore(MAX_ADDING)
        self._threads = ThreadPoolExecutor(MAX_ADDING, thread_name_prefix="registry")
        model, version = "/admin/models/{model}", "/admin/models/{model}/versions/{ref}"
        upload = operation("POST", f"{model}/versions", "adminAddVersion", "A new version: of a path or URL, or the tar that is the body", self.add_version, Added, NewVersion, 404, 409, 413)  # fmt: skip
        self.operations = (
            operation("GET", "/admin/models", "adminModels", "Models of the registry, and what this server has loaded", self.models, Models),
            operation("POST", "/admin/models", "adminCreateModel", "A new model, without versions", self.create_model, Model, NewModel, 409),
            operation("GET", model, "adminModel", "One model", self.model, Model, None, 404),
            operation("PATCH", model, "adminChangeModel", "Change its description and tags", self.change_model, Model, ModelChange, 404),
            operation("GET", f"{model}/versions", "adminVersions", "Its versions, the newest first", self.versions, ModelVersions, None, 404),
            structs.replace(upload, uploads=(TAR,)),
            operation("GET", version, "adminVersion", "One version: files, spec, schema, gates", self.version, WholeVersion, None, 404),
            operation("PATCH", version, "adminChangeVersion", "Change its tags, add metrics", self.change_version, ModelVersion, VersionChange, 404),
            operation("DELETE", version, "adminDeleteVersion", "Delete it and its files", self.delete_version, Deleted, None, 404, 409),
            operation("POST", f"{version}/retire", "adminRetireVersion", "It will not serve again", self.retire, ModelVersion, Retirement, 404, 409),
            operation("PUT", f"{version}/signature", "adminSignVersion", "Somebody vouches for it", self.sign, ModelVersion, VersionSignature, 404),
            operation("GET", f"{model}/diff", "adminDiffVersions", "What differs between two versions", self.diff, Diff, None, 404),
            operation("PUT", f"{model}/aliases/{{alias}}", "adminPutAlias", "Let an alias name a version", self.put_alias, Model, AliasTarget, 404, 409),
            operation("DELETE", f"{model}/aliases/{{alias}}", "adminDropAlias", "Let an alias name none", self.drop_alias, Deleted, None, 404, 409),
            operation("GET", f"{model}/checks", "adminChecks", "What its gates ask", self.checks, Checks, None, 404),
            operation("PUT", f"{model}/checks", "adminPutChecks", "Replace what its gates ask", self.put_checks, Checks, Checks, 404, 413),
            operation("GET", f"{model}/events", "adminModelEvents", "What happened to it and its versions, the newest first", self.events, Entries, None, 404),
        )  # fmt: skip

    def body_bound(self, method: bytes, path: bytes) -> int:
        """For `HttpServer.larger`."""
        if method == b"POST" and _VERSIONS.fullmatch(path):
            return tar_size(self.registry.settings.max_bytes)
        return MAX_CHECKS_BYTES if method == b"PUT" and _CHECKS.fullmatch(path) else 0

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    # Models

    async def models(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(Models(models=await asyncio.to_thread(self._models)))

    def _models(self) -> list[Model]:
        numbers: dict[str, list[int]] = {}
        for row in self.rows.versions():
            numbers.setdefault(row.model, []).append(row.number)
        aliases: dict[str, dict[str, int]] = {}
        for alias in self.rows.aliases():
            aliases.setdefault(alias.model, {})[alias.alias] = alias.number
        loaded = self._loaded()
        rows = self.rows.models()
        found = [
            model_of(row, numbers.get(row.name, []), aliases.get(row.name, {}), None if loaded is None else loaded.pop(row.name, []))
            for row in rows
        ]
        found += [Model(name=name, registered=False, loaded=versions) for name, versions in (loaded or {}).items()]
        return sorted(found, key=lambda each: each.name)

    def _loaded(self) -> dict[str, list[LoadedVersion]] | None:
        if self.loaded is None:
            return None
        found: dict[str, list[LoadedVersion]] = {}
        for each in self.loaded():
            found.setdefault(each.name, []).append(LoadedVersion(version=each.version, state=each.state, reason=each.reason))
        return found

    async def create_model(self, http: Request) -> Response:
        body = decoded(await body_of(http), NewModel)
        row = ModelRow(name=body.name, created=self.registry.now(), description=body.description, tags=body.tags)
        did = self.registry.did(_by(http), "model.add", body.name, description=body.description, tags=body.tags)
        await asyncio.to_thread(self.rows.add_model, row, did)
        return json_response(await asyncio.to_thread(self._model, body.name))

    async def model(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(await asyncio.to_thread(self._model, http.path_params["model"]))

    def _model(self, name: str) -> Model:
        row = self.rows.model(name)
        aliases = {each.alias: each.number for each in self.rows.aliases(name)}
        loaded = self._loaded()
        return model_of(row, [each.number for each in self.rows.versions(name)], aliases, None if loaded is None else loaded.get(name, []))

    async def change_model(self, http: Request) -> Response:
        name, body = http.path_params["model"], decoded(await body_of(http), ModelChange)
        description = None if body.description is UNSET else body.description
        details = {"tags": body.tags, **({} if description is None else {"description": description})}
        did = self.registry.did(_by(http), "model.change", name, **details)
        await asyncio.to_thread(self.rows.change_model, name, did, description=description, tags=body.tags)
        return json_response(await asyncio.to_thread(self._model, name))

    # Versions

    async def versions(self, http: Request) -> Response:
        name, stage = http.path_params["model"], query_of(http, VersionsQuery).stage

        def answer() -> ModelVersions:
            aliases = self.rows.aliases(name)
            return ModelVersions(versions=[version_of(row, aliases, self.registry) for row in self.rows.versions(name, stage)])

        return json_response(await asyncio.to_thread(answer))

    async def add_version(self, http: Request) -> Response:
        name = http.path_params["model"]
        if http.headers.get("content-type", "").partition(";")[0].strip().lower() == TAR:
            row, new = await self._upload(http, name, decoded(query_of(http, UploadQuery).about.encode(), Draft))
        else:
            query_of(http, NoQuery)
            body = decoded(await body_of(http), NewVersion)
            row, new = await self._add(lambda: self.registry.add(body.uri, name, draft_of(body), _by(http)))
        return json_response(Added(new=new, version=await asyncio.to_thread(self._shown, row)))

    async def _add(self, work: Callable[[], tuple[VersionRow, bool]]) -> tuple[VersionRow, bool]:
        """Raises Unavailable where enough are being added."""
        if not self._slots.acquire(blocking=False):
            raise Unavailable(f"{MAX_ADDING} versions are being added already")

        def slotted() -> tuple[VersionRow, bool]:
            try:
                return work()
            finally:
                self._slots.release()  # here, for the caller may be gone by then

        return await asyncio.get_running_loop().run_in_executor(self._threads, slotted)

    async def _upload(self, http: Request, model: str, draft: Draft) -> tuple[VersionRow, bool]:
        """The tar goes to a thread as it comes, through a socket, which is also what keeps a fast client back."""
        if http.headers.get("content-encoding", "identity") != "identity":
            raise Unsupported("a tar is taken as it is, without Content-Encoding")
        if draft.in_place:
            raise BadField("is for what the server reads itself", "about.in_place")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        whole, by = threading.Event(), _by(http)

        def ended(work: asyncio.Task[tuple[VersionRow, bool]]) -> None:
            theirs.close()
            if not work.cancelled():
                work.exception()  # looked at, for the caller may be gone by then

        work = asyncio.create_task(self._add(lambda: self._received(theirs, whole, model, draft, by)))
        work.add_done_callback(ended)
        try:
            async for chunk in http.stream():
                await asyncio.get_running_loop().sock_sendall(ours, chunk)
            whole.set()
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was given up, and says why
        finally:
            ours.close()
            await asyncio.wait([work])
        try:
            return work.result()
        except FairleadError as error:
            error.headers = {**error.headers, "Connection": "close"}  # what is left of the body is not worth reading
            raise

    def _received(self, theirs: socket.socket, whole: threading.Event, model: str, draft: Draft, by: Actor) -> tuple[VersionRow, bool]:
        """In a thread."""
        with theirs, self.registry.intake(model) as folder:
            try:
                with theirs.makefile("rb", buffering=1 << 20) as stream:
                    assert isinstance(stream, BufferedReader)
                    unpack(stream, folder, self.registry.settings.max_bytes)
                if not whole.is_set():
                    raise InvalidRequest("the upload was broken off")
                theirs.close()
                draft = structs.replace(draft, source=draft.source or "upload")
                return self.registry.add(str(folder), model, draft, by, move=True)
            except FairleadError as error:
                raise error.saying(error.message.replace(str(folder), "the upload")) from None

    async def version(self, http: Request) -> Response:
        query_of(http, NoQuery)

        def answer() -> WholeVersion:
            row = self._row(http)
            return whole_version(row, self.rows.aliases(row.model), self.registry.latest_gates(row), self.registry)

        return json_response(await asyncio.to_thread(answer))

    def _row(self, http: Request) -> VersionRow:
        """Of the path. Raises NotFound, InvalidRequest."""
        return self._resolved(http.path_params["model"], http.path_params["ref"])

    def _resolved(self, model: str, end: str) -> VersionRow:
        return self.rows.resolve(parse_ref(f"{model}@{end}"))

    def _shown(self, row: VersionRow) -> ModelVersion:
        return version_of(row, self.rows.aliases(row.model), self.registry)

    async def change_version(self, http: Request) -> Response:
        body, by = decoded(await body_of(http), VersionChange), _by(http)

        def answer() -> ModelVersion:
            row = self._row(http)
            did = self.registry.did(by, "version.change", row.ref, tags=body.tags, metrics=body.metrics)
            return self._shown(self.rows.change_version(row.model, row.number, did, tags=body.tags, metrics=body.metrics or None))

        return json_response(await asyncio.to_thread(answer))

    async def delete_version(self, http: Request) -> Response:
        query_of(http, NoQuery)
        await asyncio.to_thread(lambda: self.registry.delete(self._row(http), _by(http)))
        return json_response(Deleted(deleted=1))

    async def retire(self, http: Request) -> Response:
        body = decoded(await body_of(http), Retirement)
        return json_response(await asyncio.to_thread(lambda: self._shown(self.registry.retire(self._row(http), body.reason, _by(http)))))

    async def sign(self, http: Request) -> Response:
        body = decoded(await body_of(http), VersionSignature)
        return json_response(
            await asyncio.to_thread(lambda: self._shown(self.registry.sign(self._row(http), body.signature, body.public_key, _by(http))))
        )

    async def diff(self, http: Request) -> Response:
        model, query = http.path_params["model"], query_of(http, DiffQuery)

        def answer() -> Diff:
            return self.registry.diff(self._resolved(model, query.old), self._resolved(model, query.new))

        return json_response(await asyncio.to_thread(answer))

    # Aliases, checks, events

    async def put_alias(self, http: Request) -> Response:
        model, alias, body = http.path_params["model"], http.path_params["alias"], decoded(await body_of(http), AliasTarget)
        did = self.registry.did(_by(http), "alias.put", str(Ref(model, version=body.version)), alias=alias)
        await asyncio.to_thread(self.rows.put_alias, model, alias, body.version, did)
        return json_response(await asyncio.to_thread(self._model, model))

    async def drop_alias(self, http: Request) -> Response:
        query_of(http, NoQuery)
        model, alias = http.path_params["model"], http.path_params["alias"]
        await asyncio.to_thread(self.rows.drop_alias, model, alias, self.registry.did(_by(http), "alias.drop", model, alias=alias))
        return json_response(Deleted(deleted=1))

    async def checks(self, http: Request) -> Response:
        query_of(http, NoQuery)
        # Megabytes, perhaps
        return await asyncio.to_thread(lambda: json_response(checks_of(self.rows.model(http.path_params["model"]).checks)))

    async def put_checks(self, http: Request) -> Response:
        model, body, by = http.path_params["model"], await read_body(http, MAX_CHECKS_BYTES), _by(http)

        def answer() -> Response:
            checks = decoded(body, Checks)
            details = {"golden": len(checks.golden), "rows": checks.dataset.num_rows if checks.dataset else 0, "safety": len(checks.safety)}
            self.rows.change_model(model, self.registry.did(by, "model.checks", model, **details), checks=checks.to_json())
            return json_response(checks)

        return await asyncio.to_thread(answer)

    async def events(self, http: Request) -> Response:
        model, query = http.path_params["model"], query_of(http, EventsQuery)
        if query.cursor and not (query.cursor.isdecimal() and len(query.cursor) < 19):
            raise BadField("is none that was given", "cursor")

        def answer() -> Entries:
            self.rows.model(model)
            after = int(query.cursor) if query.cursor else None
            rows = self.registry.store.audit(AuditQuery(model=model), query.limit, after)
            entries: list[dict[str, Any]] = [
                {**{name: getattr(row, name) for name in row.__struct_fields__ if name != "id"}, "time": when(row.time)} for row in rows
            ]
            return Entries(entries=entries, next=str(rows[-1].id) if len(rows) == query.limit else None)

        return json_response(await asyncio.to_thread(answer))


def _by(http: Request) -> Actor:
    return Actor(actor_of(http), caller_of(http)[0].address or (http.client.host if http.client else ""))
