"""The keys, tenants and projects of the store, held in memory for every request to look up."""

import asyncio
from collections.abc import Mapping, Sequence
from math import inf
from threading import Lock
from typing import Protocol

import structlog
from msgspec import Struct, structs

from fairlead.core.caller import Caller
from fairlead.core.policy import GatewaySettings, Limits, Scope, TenantPolicy
from fairlead.gateway.identity.subject import INVALID, Refused, Subject
from fairlead.observe.counts import Counts
from fairlead.store.rows import KeyRow, ProjectRow, TenantRow

log = structlog.get_logger("fairlead.identity")

READ_SECONDS = 5.0
"""A store that takes longer to answer counts as failing."""


class Rows(Protocol):
    """What of the store is read here. All of it blocks."""

    def revision(self) -> int: ...
    def tenants(self) -> Sequence[TenantRow]: ...
    def projects(self) -> Sequence[ProjectRow]: ...
    def keys(self) -> Sequence[KeyRow]: ...


class Entry(Struct, frozen=True):
    """One key."""

    caller: Caller
    hmac: bytes
    """What its signatures of requests are made with; and in `ed25519` the public key of its owner's, in PEM."""
    ed25519: str
    refused: str
    """Why, whatever the time; "" where it is good."""

    def check(self, now: float, message: str = INVALID) -> None:
        """Raises Refused."""
        if self.refused:
            raise Refused(self.refused, message)
        if now >= self.caller.expires:
            raise Refused("expired", message)


class Snapshot(Struct, frozen=True):
    """The store at one revision, under one configuration; replaced whole. What a key may is worked out when it is first shown:
    for all keys at once that would hold up the event loop at each change of the configuration."""

    gateway: GatewaySettings
    revision: int = -1
    policies: Mapping[str, TenantPolicy] = {}
    """Of those tenants that have one in the store."""
    disabled: frozenset[str] = frozenset()
    project_limits: Mapping[tuple[str, str], Limits] = {}
    by_digest: Mapping[str, KeyRow] = {}
    by_id: Mapping[str, KeyRow] = {}
    entries: dict[str, Entry] = {}
    """By id, of those keys that were shown."""

    def of_digest(self, digest: str) -> Entry | None:
        row = self.by_digest.get(digest)
        return None if row is None else self._entry(row)

    def of_id(self, id: str) -> Entry | None:
        row = self.by_id.get(id)
        return None if row is None else self._entry(row)

    def _entry(self, row: KeyRow) -> Entry:
        entry = self.entries.get(row.id)
        if entry is None:
            entry = self.entries[row.id] = entry_of(row, self)
        return entry

    def policy(self, tenant: str) -> TenantPolicy:
        return self.policies.get(tenant) or self.gateway.tenant(tenant)

    def classes(self, policy: TenantPolicy) -> tuple[str, ...]:
        """Those that requests may ask for by name."""
        return tuple(self.gateway.classes) if "*" in policy.classes else policy.classes

    def caller(self, subject: Subject) -> Caller:
        """Raises Refused where its tenant is disabled."""
        if subject.tenant in self.disabled:
            raise Refused("tenant")
        policy = self.policy(subject.tenant)
        return Caller(
            tenant=subject.tenant,
            project=subject.project,
            key=subject.key,
            qos_class=subject.qos_class or policy.qos_class,
            classes=self.classes(policy),
            scopes=subject.scopes,
            models=(policy.models,),
            policy=policy,
            project_limits=self.project_limits.get((subject.tenant, subject.project), {}),
            must_sign=policy.require_signature,
        )


class Keyring:
    """Reads the store when it changes, so that no request ever does."""

    def __init__(self, store: Rows | None, gateway: GatewaySettings, counts: Counts) -> None:
        self.snapshot = Snapshot(gateway)
        self._store = store
        self._counts = counts
        self._failing = False
        self._replacing = Lock()
        """Two threads replace the snapshot: that of `follow`, and the event loop's where the configuration changes."""

    def refresh(self) -> None:
        """Blocks while it reads everything. Raises what the store raises, and keeps the last snapshot then."""
        if self._store is not None:
            found = read(self._store, self.snapshot.gateway)
            with self._replacing:
                self.snapshot = structs.replace(found, gateway=self.snapshot.gateway)

    def configure(self, gateway: GatewaySettings) -> None:
        """Other policies for those tenants that the store has none for; does not ask the store."""
        with self._replacing:
            self.snapshot = structs.replace(self.snapshot, gateway=gateway, entries={})

    def refresh_if_changed(self) -> None:
        """Blocks for one small query, mostly."""
        if self._store is not None and self._store.revision() != self.snapshot.revision:
            self.refresh()

    async def follow(self, seconds: float) -> None:
        """For ever: look for changes so often. A store that fails is told of once; the last snapshot goes on meanwhile."""
        if self._store is None:
            return
        reading: asyncio.Task[None] | None = None
        try:
            while True:
                await asyncio.sleep(seconds)
                # One thread at most: a store that hangs must not take all of them.
                reading = reading or asyncio.create_task(asyncio.to_thread(self.refresh_if_changed))
                await asyncio.wait({reading}, timeout=READ_SECONDS)
                self._note(reading.exception() if reading.done() else TimeoutError(f"no answer in {READ_SECONDS:g} s"))
                if reading.done():
                    reading = None
        finally:
            if reading is not None:
                reading.cancel()

    def _note(self, error: BaseException | None) -> None:
        if error is not None:
            self._counts.add("fairlead_auth_refresh_failures_total", "store")
            if not self._failing:
                log.error("keys_not_read", error=str(error), note="keys and tenants stay as they were until the store answers")
        elif self._failing:
            log.info("keys_read_again")
        self._failing = error is not None


def read(store: Rows, gateway: GatewaySettings) -> Snapshot:
    revision = store.revision()  # first: what changes while the rest is read is read again
    tenants, projects, keys = store.tenants(), store.projects(), store.keys()
    return Snapshot(
        gateway,
        revision,
        {row.name: row.policy for row in tenants if row.policy is not None},
        frozenset(row.name for row in tenants if row.disabled),
        {(row.tenant, row.name): row.limits for row in projects},
        {row.digest: row for row in keys},
        {row.id: row for row in keys},
    )


def entry_of(row: KeyRow, snapshot: Snapshot) -> Entry:
    policy = snapshot.policy(row.tenant)
    caller = Caller(
        tenant=row.tenant,
        project=row.project,
        key=row.id,
        qos_class=row.qos_class or policy.qos_class,
        classes=snapshot.classes(policy),
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        models=(policy.models,) if row.models is None else (policy.models, row.models),
        policy=policy,
        project_limits=snapshot.project_limits.get((row.tenant, row.project), {}),
        key_limits=row.limits,
        must_sign=policy.require_signature,
        expires=inf if row.expires is None else row.expires,
    )
    refused = "revoked" if row.revoked is not None else "tenant" if row.tenant in snapshot.disabled else ""
    return Entry(caller, bytes.fromhex(row.signing_key), row.public_key or "", refused)
