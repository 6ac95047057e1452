"""The dashboard's list of models: found, sorted and cut by the server, because there may be ten thousand."""

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta, Struct

from fairlead.runtime.repository import IndexEntry

Order = Literal["name", "requests", "errors", "p99", "state"]
STATES = ("failed", "loading", "ready", "unloaded")
"""Of a model, by what is most worth to know of its versions; sorted by state they stand in this order."""


class ModelsQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: Annotated[str, Meta(max_length=1000)] = ""
    """This model and no other."""
    search: Annotated[str, Meta(max_length=200)] = ""
    """Words that are all in the name."""
    state: Literal["", "failed", "loading", "ready", "unloaded"] = ""
    sort: Order = "name"
    descending: bool = False
    offset: Annotated[int, Meta(ge=0)] = 0
    limit: Annotated[int, Meta(ge=1, le=500)] = 100


class ListedVersion(TypedDict):
    version: str
    state: str
    reason: str


class ListedModel(TypedDict):
    name: str
    state: str
    reason: str
    versions: list[ListedVersion]
    """Those that this server has loaded, or could."""
    registered: list[int]
    """Numbers in the registry."""
    aliases: dict[str, int]
    remote: bool
    """Other servers compute it."""
    now: dict[str, float | None]
    """As of the live feed's models."""


class ListedModels(TypedDict):
    total: int
    """That fit the query."""
    counts: dict[str, int]
    """By state, of those that fit the search."""
    models: list[ListedModel]


class Registered(Struct):
    """What the registry has of a model."""

    numbers: list[int]
    aliases: dict[str, int]


def state_of(entries: Iterable[IndexEntry]) -> tuple[str, str]:
    """(state, reason) of a model."""
    found, reason = "unloaded", ""
    for entry in entries:
        if entry.state == "UNAVAILABLE" and entry.reason and entry.reason != "unloaded":
            return "failed", entry.reason
        if entry.state == "LOADING":
            found = "loading"
        elif entry.state == "READY" and found != "loading":
            found = "ready"
    return found, reason


class ModelList:
    def __init__(
        self,
        index: Callable[[], Iterable[IndexEntry]],
        remote: Callable[[], Iterable[str]],
        now: Callable[[str], Mapping[str, float | None]],
    ) -> None:
        """`now`: a model's numbers of the moment."""
        self._index = index
        self._remote = remote
        self._now = now

    def answer(self, query: ModelsQuery, registered: Mapping[str, Registered]) -> ListedModels:
        entries: dict[str, list[IndexEntry]] = {name: [] for name in registered}
        for entry in self._index():
            entries.setdefault(entry.name, []).append(entry)
        remote = set(self._remote())
        for name in remote:
            entries.setdefault(name, [])
        words = query.search.lower().split()
        found = [name for name in entries if all(word in name.lower() for word in words) and query.name in ("", name)]
        states = {name: ("ready", "") if name in remote and not entries[name] else state_of(entries[name]) for name in found}
        counts = dict.fromkeys(STATES, 0)
        for state, _ in states.values():
            counts[state] += 1
        wanted = [name for name in found if not query.state or states[name][0] == query.state]
        wanted.sort(key=str.lower)
        if query.sort == "state":
            wanted.sort(key=lambda name: STATES.index(states[name][0]), reverse=query.descending)
        elif query.sort != "name":
            wanted.sort(key=lambda name: self._now(name).get(query.sort) or 0.0, reverse=query.descending)
        elif query.descending:
            wanted.reverse()
        page = wanted[query.offset : query.offset + query.limit]
        return ListedModels(
            total=len(wanted),
            counts=counts,
            models=[self._listed(name, states[name], entries[name], registered.get(name), name in remote) for name in page],
        )

    def _listed(
        self, name: str, state: tuple[str, str], entries: list[IndexEntry], registered: Registered | None, remote: bool
    ) -> ListedModel:
        return ListedModel(
            name=name,
            state=state[0],
            reason=state[1],
            versions=[ListedVersion(version=each.version, state=each.state, reason=each.reason) for each in entries if each.version],
            registered=[] if registered is None else registered.numbers,
            aliases={} if registered is None else registered.aliases,
            remote=remote,
            now=dict[str, Any](self._now(name)),
        )
