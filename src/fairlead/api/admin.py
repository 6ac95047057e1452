"""The administration under `/admin`: tenants, projects, keys, usage, audit, configuration.

Whoever comes this far has the scope `admin`: the door has seen to that. Every change is in the audit log.
"""

import asyncio
import time
from collections.abc import Callable, Collection
from typing import Any

import msgspec
from msgspec import UNSET, structs
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import (
    ActionInForce,
    Actions,
    BadField,
    Before,
    Deleted,
    Entries,
    EntriesQuery,
    Forced,
    Key,
    Keys,
    KeysQuery,
    Name,
    NewKeyBody,
    NewProject,
    NewTenant,
    NoQuery,
    OfWhom,
    Project,
    Projects,
    Records,
    RecordsQuery,
    Revocation,
    Rotation,
    SecretKey,
    Sums,
    SumsQuery,
    Tenant,
    TenantChange,
    Tenants,
    bad_field,
    check_limits,
    check_public_key,
    decoded,
    dimensions,
    key_of,
    merged,
    moment,
    policy_of,
    project_of,
    query_of,
    span,
    tenant_of,
    when,
)
from fairlead.api.admin_config import AdminConfig, Configured
from fairlead.api.admin_csv import csv_response, wants_csv
from fairlead.api.admin_route import actor_of, body_of, operation
from fairlead.api.doorkeeper import caller_of
from fairlead.api.web import json_response
from fairlead.core.errors import ConfigError, NotFound, Unsupported
from fairlead.core.policy import DEFAULT_TENANT, TenantPolicy
from fairlead.gateway.abuse import Abuse
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.identity.keys import NewKey, new_key
from fairlead.store.rows import AuditQuery, AuditRow, KeyRow, ProjectRow, TenantRow, UsageQuery, UsageRow, UsageSum
from fairlead.store.store import Store, said

MAX_GROUPS = 100_000
"""Of sums in one answer."""
SECRET = {"Cache-Control": "no-store"}


class Admin:
    """The operations upon one store."""

    def __init__(
        self,
        store: Store,
        configured: Configured | None = None,
        classes: Callable[[], Collection[str]] | None = None,
        now: Callable[[], float] = time.time,
        *,
        abuse: Abuse | None = None,
    ) -> None:
        """`configured`, `abuse`: None where no server runs, or watches for it. `classes`: those of service that there are; None where that is not known."""
        self.store = store
        self.classes = classes
        self.now = now
        self.abuse = abuse
        tenant, project, key = "/admin/tenants/{tenant}", "/admin/tenants/{tenant}/projects", "/admin/keys/{key}"
        self.operations = (
            operation("GET", "/admin/tenants", "adminTenants", "All tenants", self.tenants, Tenants),
            operation("POST", "/admin/tenants", "adminCreateTenant", "A new tenant", self.create_tenant, Tenant, NewTenant, 409),
            operation("GET", tenant, "adminTenant", "One tenant", self.tenant, Tenant, None, 404),
            operation("PATCH", tenant, "adminChangeTenant", "Change what it may", self.change_tenant, Tenant, TenantChange, 404, 409),
            operation("DELETE", tenant, "adminDeleteTenant", "Delete it, its projects and keys", self.delete_tenant, Deleted, None, 404, 409),
            operation("GET", project, "adminProjects", "A tenant's projects", self.projects, Projects, None, 404),
            operation("PUT", f"{project}/{{project}}", "adminPutProject", "Make it, or set its limits", self.put_project, Project, NewProject, 404),
            operation("DELETE", f"{project}/{{project}}", "adminDeleteProject", "Delete it", self.delete_project, Deleted, None, 404, 409),
            operation("GET", "/admin/keys", "adminKeys", "All keys, without their secrets", self.keys, Keys),
            operation("POST", "/admin/keys", "adminCreateKey", "A new key: its secret is in this answer only", self.create_key, SecretKey, NewKeyBody, 404),
            operation("GET", key, "adminKey", "One key", self.key, Key, None, 404),
            operation("POST", f"{key}/rotate", "adminRotateKey", "A new key in its place; both work for a while", self.rotate_key, SecretKey, Rotation, 404, 409),
            operation("POST", f"{key}/revoke", "adminRevokeKey", "Never again", self.revoke_key, Key, Revocation, 404, 409),
            operation("GET", "/admin/usage", "adminUsage", "Sums over whole hours, as JSON or CSV", self.usage, Sums),
            operation("GET", "/admin/usage/records", "adminUsageRecords", "One record a request, the newest first", self.records, Records),
            operation("DELETE", "/admin/usage/records", "adminPurgeUsage", "Forget old records; their sums stay", self.purge, Deleted),
            operation("GET", "/admin/audit", "adminAudit", "Who did what to what, the newest first", self.audit, Entries),
            operation("GET", "/admin/abuse", "adminAbuse", "What is done about tenants whose traffic looks abnormal", self.actions, Actions, None, 501),
            operation("DELETE", "/admin/abuse/{tenant}", "adminLiftAbuse", "Let a tenant's requests in again", self.lift, Deleted, None, 404, 501),
            *AdminConfig(store, configured).operations,
        )  # fmt: skip

    # Tenants and projects

    async def tenants(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(Tenants(tenants=[tenant_of(row) for row in await asyncio.to_thread(self.store.tenants)]))

    async def create_tenant(self, http: Request) -> Response:
        body = decoded(await body_of(http), NewTenant)
        if body.policy is not None:
            await asyncio.to_thread(self._check_policy, body.policy)
        row = TenantRow(name=body.name, policy=body.policy, created=self.now(), disabled=body.disabled)
        shown = tenant_of(row)
        await asyncio.to_thread(
            self.store.add_tenant, row, self._did(http, "tenant.create", body.name, policy=shown.policy, disabled=row.disabled)
        )
        return json_response(shown)

    async def tenant(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(tenant_of(await asyncio.to_thread(self.store.tenant, http.path_params["tenant"])))

    async def change_tenant(self, http: Request) -> Response:
        name, force, patch = http.path_params["tenant"], query_of(http, Forced).force, decoded(await body_of(http), TenantChange)

        def change(row: TenantRow) -> TenantRow:
            policy = row.policy
            if patch.policy is None:
                policy = None
            elif patch.policy is not UNSET:
                policy = policy_of(merged({} if policy is None else said(policy, DEFAULT_TENANT), patch.policy))
            return structs.replace(row, policy=policy, disabled=row.disabled if patch.disabled is UNSET else patch.disabled)

        # before the transaction, which must be short
        wanted = change(await asyncio.to_thread(self.store.tenant, name)).policy
        if wanted is not None and patch.policy is not UNSET:
            await asyncio.to_thread(self._check_policy, wanted)
        did = self._did(http, "tenant.change", name, **msgspec.to_builtins(patch))
        return json_response(tenant_of(await asyncio.to_thread(self.store.change_tenant, name, change, did, force=force)))

    async def delete_tenant(self, http: Request) -> Response:
        name, force = http.path_params["tenant"], query_of(http, Forced).force
        await asyncio.to_thread(self.store.delete_tenant, name, self._did(http, "tenant.delete", name), force=force)
        return json_response(Deleted(deleted=1))

    async def projects(self, http: Request) -> Response:
        query_of(http, NoQuery)
        rows = await asyncio.to_thread(self.store.projects, http.path_params["tenant"])
        return json_response(Projects(projects=[project_of(row) for row in rows]))

    async def put_project(self, http: Request) -> Response:
        tenant, name, body = (
            http.path_params["tenant"],
            _name(http.path_params["project"], "project"),
            decoded(await body_of(http), NewProject),
        )
        check_limits(body.limits)
        did = self._did(http, "project.put", f"{tenant}/{name}", limits=body.limits)
        row = ProjectRow(tenant=tenant, name=name, limits=body.limits, created=self.now())
        return json_response(project_of(await asyncio.to_thread(self.store.put_project, row, did)))

    async def delete_project(self, http: Request) -> Response:
        query_of(http, NoQuery)
        tenant, name = http.path_params["tenant"], http.path_params["project"]
        await asyncio.to_thread(self.store.delete_project, tenant, name, self._did(http, "project.delete", f"{tenant}/{name}"))
        return json_response(Deleted(deleted=1))

    # Keys

    async def keys(self, http: Request) -> Response:
        query = query_of(http, KeysQuery)
        if query.state not in (None, "live", "expired", "revoked"):
            raise BadField("is none of live, expired, revoked", "state")
        keys = [key_of(row, self.now()) for row in await asyncio.to_thread(self.store.keys, query.tenant, query.project)]
        return json_response(Keys(keys=[key for key in keys if query.state in (None, key.state)]))

    async def create_key(self, http: Request) -> Response:
        body, now = decoded(await body_of(http), NewKeyBody), self.now()
        check_limits(body.limits)
        if body.qos_class is not None:
            self._check_class(body.qos_class, "class")
        if body.expires is not None and body.expires.timestamp() <= now:
            raise BadField("is in the past", "expires")
        if body.public_key is not None:
            check_public_key(body.public_key)
        new = new_key()
        row = KeyRow(
            tenant=body.tenant,
            project=body.project,
            name=body.name,
            public_key=body.public_key,
            scopes=tuple(dict.fromkeys(body.scopes)),
            models=body.models,
            qos_class=body.qos_class,
            limits=body.limits,
            created=now,
            created_by=actor_of(http),
            expires=None if body.expires is None else body.expires.timestamp(),
            **_kept(new),
        )
        await asyncio.to_thread(self.store.add_key, row, self._did(http, "key.create", row.id, **_described(row, now)))
        return json_response(SecretKey(key=key_of(row, now), secret=new.secret), headers=SECRET)

    async def key(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(key_of(await asyncio.to_thread(self.store.key, http.path_params["key"]), self.now()))

    async def rotate_key(self, http: Request) -> Response:
        id, body, now, new = http.path_params["key"], decoded(await body_of(http), Rotation), self.now(), new_key()
        by = actor_of(http)

        def successor(old: KeyRow) -> KeyRow:
            """What the old one may, for as long as it was given."""
            expires = None if old.expires is None else now + (old.expires - old.created)
            return structs.replace(old, created=now, created_by=by, expires=expires, replaces=old.id, **_kept(new))

        did = self._did(http, "key.rotate", id, replaced_by=new.id, overlap_seconds=body.overlap_seconds)
        _, row = await asyncio.to_thread(self.store.rotate_key, id, successor, body.overlap_seconds, did)
        return json_response(SecretKey(key=key_of(row, now), secret=new.secret), headers=SECRET)

    async def revoke_key(self, http: Request) -> Response:
        id, body = http.path_params["key"], decoded(await body_of(http), Revocation)
        did = self._did(http, "key.revoke", id, **({"forced": True} if body.force else {}))
        row = await asyncio.to_thread(self.store.revoke_key, id, did, force=body.force)
        return json_response(key_of(row, self.now()))

    # Usage and audit

    async def usage(self, http: Request) -> Response:
        query = query_of(http, SumsQuery)
        by, wanted = dimensions(query.by), _wanted(query)

        def answer() -> Response:
            sums = self.store.usage(wanted, by, MAX_GROUPS + 1)
            if len(sums) > MAX_GROUPS:
                raise BadField(f"makes more than {MAX_GROUPS} groups: ask for a shorter time, or by less", "by")
            rows = [{**dict(zip(by, each.group, strict=True)), **_without(each, "group")} for each in sums]
            if wants_csv(http, query.format):
                return csv_response("usage", rows, [*by, *UsageSum.__struct_fields__[1:]])
            return json_response(Sums(groups=rows))

        return await asyncio.to_thread(answer)

    async def records(self, http: Request) -> Response:
        query = query_of(http, RecordsQuery)
        wanted, after = _wanted(query), _record_cursor(query.cursor)

        def answer() -> Response:
            rows = self.store.records(wanted, query.limit, after)
            more = f"{rows[-1].time!r}:{rows[-1].id}" if len(rows) == query.limit else None
            shown = [{**_without(row, "id"), "time": when(row.time)} for row in rows]
            if wants_csv(http, query.format):
                return csv_response("records", shown, list(UsageRow.__struct_fields__[:-1]), more)
            return json_response(Records(records=shown, next=more))

        return await asyncio.to_thread(answer)

    async def purge(self, http: Request) -> Response:
        before = moment(query_of(http, Before).before, "before")
        did = self._did(http, "usage.purge", "usage", before=when(before).isoformat())
        return json_response(Deleted(deleted=await asyncio.to_thread(self.store.purge, before, did)))

    async def audit(self, http: Request) -> Response:
        query = query_of(http, EntriesQuery)
        since, until = span(query)
        if query.cursor and not (query.cursor.isdecimal() and len(query.cursor) < 19):
            raise BadField("is none that was given", "cursor")
        wanted = AuditQuery(since=since, until=until, actor=query.actor, action=query.action, subject=query.subject)
        rows = await asyncio.to_thread(self.store.audit, wanted, query.limit, int(query.cursor) if query.cursor else None)
        entries = [{**_without(row, "id"), "time": when(row.time)} for row in rows]
        return json_response(Entries(entries=entries, next=str(rows[-1].id) if len(rows) == query.limit else None))

    # Abuse

    async def actions(self, http: Request) -> Response:
        query_of(http, NoQuery)
        clock, now = self.now() - time.monotonic(), time.monotonic()
        rows: list[ActionInForce] = [
            {
                "tenant": each.tenant,
                "action": each.action,
                "score": each.score,
                "reasons": each.reasons,
                "since": when(each.since + clock),
                "until": when(each.until + clock),
            }
            for each in self._abuse().actions(now)
        ]
        return json_response(Actions(actions=rows))

    async def lift(self, http: Request) -> Response:
        query_of(http, NoQuery)
        tenant = http.path_params["tenant"]
        if not self._abuse().lift(tenant):
            raise NotFound(f"nothing is done about tenant `{tenant}`")
        await asyncio.to_thread(self.store.record, (), (self._did(http, "abuse.lift", tenant),))
        return json_response(Deleted(deleted=1))

    def _abuse(self) -> Abuse:
        """Raises Unsupported."""
        if self.abuse is None:
            raise Unsupported("no server that watches for abuse runs here (`gateway.abuse.action`)")
        return self.abuse

    # What every change needs

    def _did(self, http: Request, action: str, subject: str, **details: Any) -> AuditRow:
        address = caller_of(http)[0].address or (http.client.host if http.client else "")
        return AuditRow(time=self.now(), actor=actor_of(http), action=action, subject=subject, details=details, address=address)

    def _check_policy(self, policy: TenantPolicy) -> None:
        """Takes milliseconds where it has filters. Raises BadField."""
        if policy.filters is not None:
            try:
                Filters.of(policy.filters)
            except ConfigError as error:
                raise BadField(error.message, "policy.filters") from None
        self._check_class(policy.qos_class, "policy.class")
        for name in policy.classes:
            if name != "*":
                self._check_class(name, "policy.classes")

    def _check_class(self, name: str, field: str) -> None:
        known = None if self.classes is None else self.classes()
        if known is not None and name not in known:
            raise BadField(f"{name!r} is none of the classes {', '.join(known)}", field)


def _name(text: str, field: str) -> str:
    """Raises BadField for what cannot be a name."""
    try:
        return msgspec.convert(text, Name)
    except msgspec.ValidationError as error:
        raise bad_field(error, field) from None


def _kept(new: NewKey) -> dict[str, Any]:
    """What of a new key goes into the store: all but the secret."""
    return {"id": new.id, "prefix": new.prefix, "digest": new.digest, "signing_key": new.signing_key}


def _described(row: KeyRow, now: float) -> dict[str, Any]:
    shown: dict[str, Any] = msgspec.to_builtins(key_of(row, now))
    return {name: shown[name] for name in ("tenant", "project", "name", "scopes", "models", "class", "limits", "expires")}


def _wanted(query: OfWhom) -> UsageQuery:
    """Raises BadField."""
    since, until = span(query)
    return UsageQuery(
        since=since, until=until, tenant=query.tenant, project=query.project, key=query.key, model=query.model, outcome=query.outcome
    )


def _record_cursor(text: str) -> tuple[float, int] | None:
    """Raises BadField."""
    if not text:
        return None
    moment, _, id = text.partition(":")
    try:
        if len(id) < 19:
            return float(moment), int(id)
    except ValueError:
        pass
    raise BadField("is none that was given", "cursor")


def _without(row: msgspec.Struct, name: str) -> dict[str, Any]:
    return {field: getattr(row, field) for field in row.__struct_fields__ if field != name}
