"""The part of the administration that moves traffic: rollouts, deployments, validation, recording, feedback."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, Protocol, TypedDict

import msgspec
import structlog
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import BadField, NoQuery, decoded, query_of, when
from fairlead.api.admin_route import actor_of, body_of, operation
from fairlead.api.doorkeeper import caller_of
from fairlead.api.web import json_response
from fairlead.control.acts import deployments_of, rollout_of
from fairlead.control.deployments import Deployments, ServerState
from fairlead.control.leader import LEASE
from fairlead.control.rollout import Command, Kind
from fairlead.control.rollouts import Rollouts, Wish
from fairlead.control.shadow import ShadowReport
from fairlead.core.errors import ConfigError, Unavailable, Unsupported
from fairlead.core.rollout import MetricRule, RolloutPolicy, Share
from fairlead.core.versions import check_model_name, parse_ref
from fairlead.store.control import ControlStore
from fairlead.store.registry_rows import Taken

log = structlog.get_logger("fairlead.control")

MAX_FEEDBACK = 1000
TRUTH = "truth"
"""The feedback that says what was true: the index of a class, or a number. A shadow's report tells which version was nearer to it."""
ALIVE_SECONDS = 30.0
"""A server that said nothing for so long is not shown."""


class NewRollout(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    candidates: Annotated[tuple[str, ...], Meta(min_length=1, max_length=64)]
    """`fraud@7`; several go together."""
    kind: Kind = "canary"
    policy: str | RolloutPolicy = ""
    """A name, or the whole policy; "": what `control.models` says of the model."""
    share: Share | None = None
    """Of a shadow, or an experiment."""
    metrics: tuple[MetricRule, ...] | None = None
    """In place of the policy's."""
    reason: Annotated[str, Meta(max_length=1000)] = ""


class Because(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    reason: Annotated[str, Meta(max_length=1000)] = ""


class RolloutsQuery(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    running: bool | None = None
    limit: Annotated[int, Meta(ge=1, le=1000)] = 50


class ShownRollout(TypedDict):
    """As docs/rollouts.md says."""

    id: str
    kind: str
    phase: str
    members: list[dict[str, Any]]


class ShownRollouts(TypedDict):
    rollouts: list[ShownRollout]


class Report(TypedDict):
    """By model, what its shadow found; {} where there was none."""

    shadow: dict[str, Any]
    rollout: ShownRollout


class ShownDeployment(TypedDict):
    model: str
    wanted: dict[str, Any]
    updated: datetime | None
    """null, with neither actor nor reason, where only the store knows."""
    actor: str
    reason: str
    servers: dict[str, Any]
    """Server → version → how it stands there."""


class ShownDeployments(TypedDict):
    deployments: list[ShownDeployment]
    store_error: str
    """Why this server cannot read what is wanted: its traffic goes on as it was published last. "": it can."""
    leader: str
    """The server that decides; "": none does now."""


class OneFeedback(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    request_id: Annotated[str, Meta(min_length=1, max_length=256)]
    """The answer's `x-request-id`."""
    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$")] = "score"
    score: float | None = None
    label: bool | str | None = None
    """true and "good": 1; false and "bad": 0."""


class Feedback(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    feedback: Annotated[tuple[OneFeedback, ...], Meta(min_length=1, max_length=MAX_FEEDBACK)]


class TakenFeedback(TypedDict):
    taken: list[Literal["taken", "same", "conflict", "unknown"]]
    """For each: counted; posted before, with the same or with another value, which stays; of a request that no rollout waits for."""


class Recording(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    requests: Annotated[int, Meta(ge=1, le=10_000)] = 100
    """So many examples."""
    seconds: Annotated[float, Meta(gt=0, le=86_400)] = 3600.0
    """At most so long."""
    every: Annotated[int, Meta(ge=1)] = 1
    """Each n-th request."""
    redact: bool = True
    """Personal data in texts is replaced."""


class RecordingState(TypedDict):
    model: str
    running: bool
    examples: int
    wanted: int


class Started(TypedDict):
    run: str
    model: str
    version: int


class Acting(Protocol):
    """What only a running server can do."""

    @property
    def store_error(self) -> str: ...

    def standing(self) -> tuple[Deployments, str, ServerState]:
        """What this server does without the store: what is wanted as it was read last, its own id, and how it stands."""

    def write_exposures(self) -> None:
        """Which versions answered the latest requests goes to the store. Blocks. Raises Unavailable."""

    def label(self, request_id: str, truth: float) -> bool:
        """What was true of a request: whether a shadow of this server has a copy of it."""

    def validate(self, model: str, version: int, actor: str) -> str:
        """Begins. Returns the id of the run."""

    async def record(self, model: str, wanted: Recording, actor: str) -> RecordingState: ...

    def recording(self, model: str) -> RecordingState: ...

    async def stop_recording(self, model: str, actor: str) -> RecordingState: ...


class RolloutOperations:
    def __init__(self, rollouts: Rollouts, acting: Acting | None = None, now: Callable[[], float] = time.time) -> None:
        """`acting`: None where no server runs."""
        self.rollouts = rollouts
        self.acting = acting
        self.now = now
        rollout, version = "/admin/rollouts/{rollout}", "/admin/models/{model}/versions/{ref}"
        record = "/admin/models/{model}/recording"
        self.operations = (
            operation("GET", "/admin/rollouts", "adminRollouts", "The newest rollouts", self.list, ShownRollouts),
            operation("POST", "/admin/rollouts", "adminStartRollout", "Try a version: canary, shadow or experiment", self.start, ShownRollout, NewRollout, 404, 409),
            operation("GET", rollout, "adminRollout", "One rollout, by its id, or a model's latest", self.show, ShownRollout, None, 404),
            operation("GET", f"{rollout}/report", "adminRolloutReport", "What it found, with intervals; of a shadow the worst disagreements", self.report, Report, None, 404),
            *(
                operation("POST", f"{rollout}/{kind}", f"admin{kind.capitalize()}Rollout", summary, self._commanded(kind), ShownRollout, Because, 404, 409)
                for kind, summary in COMMANDS.items()
            ),
            operation("GET", "/admin/deployments", "adminDeployments", "What is wanted of each model, and how it stands on each server", self.deployments, ShownDeployments),
            operation("DELETE", "/admin/deployments/{model}", "adminUndeploy", "No version of it serves any more", self.undeploy, ShownDeployments, None, 404, 409),
            operation("POST", f"{version}/validate", "adminValidate", "Run its gates", self.validate, Started, None, 404, 501),
            operation("GET", record, "adminRecording", "How far the recording of golden requests is", self.recording, RecordingState, None, 404, 501),
            operation("POST", record, "adminRecord", "Record golden requests from live traffic", self.record, RecordingState, Recording, 404, 409, 501),
            operation("DELETE", record, "adminStopRecording", "Stop recording, and keep what there is", self.stop_recording, RecordingState, None, 404, 501),
            operation("POST", "/admin/feedback", "adminFeedback", "Labels and scores of answers, by request id", self.feedback, TakenFeedback, Feedback),
        )  # fmt: skip

    async def list(self, http: Request) -> Response:
        query = query_of(http, RolloutsQuery)

        def answer() -> Response:
            shown = []
            for row in self.rollouts.store.control.rollouts(query.model, running=query.running, limit=query.limit):
                try:
                    shown.append(self.rollouts.shown(row))
                except ConfigError as error:  # one of another release does not hide the others
                    log.error("rollout_not_read", rollout=row.id, error=error.message)
            return json_response({"rollouts": shown})

        return await asyncio.to_thread(answer)

    async def start(self, http: Request) -> Response:
        body = decoded(await body_of(http), NewRollout)
        named = isinstance(body.policy, str)
        wish = Wish(
            candidates=body.candidates,
            kind=body.kind,
            policy=body.policy if isinstance(body.policy, str) else "",
            inline=None if named else body.policy,  # type: ignore[arg-type]
            share=body.share,
            metrics=body.metrics,
            reason=body.reason,
        )
        rollout = await self.rollouts.start(wish, actor_of(http), _address(http))
        return await self._shown(rollout.id)

    async def show(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return await self._shown(http.path_params["rollout"])

    async def report(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return await asyncio.to_thread(self._report, http.path_params["rollout"])

    def _report(self, id: str) -> Response:
        row = self.rollouts.find(id)
        text = self.rollouts.store.control.report(row.id)
        reports = msgspec.json.decode(text, type=dict[str, ShadowReport]) if text else {}
        rules = rollout_of(row).policy.shadow
        return json_response(
            {"shadow": {model: found.describe(rules) for model, found in reports.items()}, "rollout": self.rollouts.shown(row)}
        )

    def _commanded(self, kind: str) -> Callable[[Request], Awaitable[Response]]:
        async def command(http: Request) -> Response:
            body = await body_of(http)
            because = decoded(body, Because) if body else Because()
            asked = Command(kind=kind, actor=actor_of(http), reason=because.reason)  # type: ignore[arg-type]
            rollout = await self.rollouts.command(http.path_params["rollout"], asked)
            return await self._shown(rollout.id)

        return command

    async def _shown(self, id: str) -> Response:
        return await asyncio.to_thread(lambda: json_response(self.rollouts.shown(self.rollouts.find(id))))

    async def deployments(self, http: Request) -> Response:
        query_of(http, NoQuery)
        try:
            shown = await asyncio.to_thread(self._deployments)
        except Unavailable as error:
            if self.acting is None:
                raise
            shown = _remembered(*self.acting.standing(), error.message)
        return json_response(shown)

    def _deployments(self) -> ShownDeployments:
        control: ControlStore = self.rollouts.store.control
        now = self.now()
        servers = control.servers(now - ALIVE_SECONDS)
        rows = control.deployments()
        wanted = deployments_of(rows)
        lease = control.lease(LEASE)
        return {
            "deployments": [
                {
                    "model": row.model,
                    "wanted": msgspec.to_builtins(wanted[row.model]),
                    "updated": when(row.updated),
                    "actor": row.actor,
                    "reason": row.reason,
                    "servers": {server.id: server.state.get(row.model, {}) for server in servers},
                }
                for row in rows
                if row.model in wanted and wanted[row.model].wanted
            ],
            "store_error": self.acting.store_error if self.acting is not None else "",
            "leader": lease.holder if lease is not None and lease.until > now else "",
        }

    async def undeploy(self, http: Request) -> Response:
        query_of(http, NoQuery)
        model = check_model_name(http.path_params["model"])
        await self.rollouts.undeploy(model, actor_of(http), "", _address(http))
        return json_response(await asyncio.to_thread(self._deployments))

    async def validate(self, http: Request) -> Response:
        query_of(http, NoQuery)
        ref = parse_ref(f"{http.path_params['model']}@{http.path_params['ref']}")
        row = await asyncio.to_thread(self.rollouts.store.registry.resolve, ref)
        run = self._acting().validate(row.model, row.number, actor_of(http))
        return json_response({"run": run, "model": row.model, "version": row.number})

    async def record(self, http: Request) -> Response:
        body = await body_of(http)
        wanted = decoded(body, Recording) if body else Recording()
        return json_response(await self._acting().record(check_model_name(http.path_params["model"]), wanted, actor_of(http)))

    async def recording(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(self._acting().recording(check_model_name(http.path_params["model"])))

    async def stop_recording(self, http: Request) -> Response:
        query_of(http, NoQuery)
        return json_response(await self._acting().stop_recording(check_model_name(http.path_params["model"]), actor_of(http)))

    async def feedback(self, http: Request) -> Response:
        body = decoded(await body_of(http), Feedback)
        rows = [(each.request_id, each.name, _value(each, n)) for n, each in enumerate(body.feedback)]
        acting = self.acting

        def give() -> list[Taken]:
            if acting is not None:
                acting.write_exposures()
            check_ranges(self.rollouts.store.control, rows)
            return list(self.rollouts.store.control.give_feedback(rows, actor_of(http), self.now()))

        taken = await asyncio.to_thread(give)
        if acting is not None:
            for n, (id, name, value) in enumerate(rows):
                if name == TRUTH and acting.label(id, value) and taken[n] is Taken.UNKNOWN:
                    taken[n] = Taken.TAKEN
        return json_response({"taken": taken})

    def _acting(self) -> Acting:
        """Raises Unsupported."""
        if self.acting is None:
            raise Unsupported("no server runs here: ask one with --url")
        return self.acting


def _remembered(deployments: Deployments, server: str, state: ServerState, store_error: str) -> ShownDeployments:
    told = msgspec.to_builtins(state)
    return {
        "deployments": [
            {
                "model": model,
                "wanted": msgspec.to_builtins(deployment),
                "updated": None,
                "actor": "",
                "reason": "",
                "servers": {server: told.get(model, {})},
            }
            for model, deployment in deployments.items()
            if deployment.wanted
        ],
        "store_error": store_error,
        "leader": "",
    }


COMMANDS = {
    "pause": "Take no further step",
    "resume": "Go on; of a step that holds, with the next one",
    "promote": "Everything to the candidate, now",
    "abort": "Everything to the champion, now",
    "rollback": "The champion before is back, while it is kept",
}

LABELS: dict[object, float] = {True: 1.0, False: 0.0, "good": 1.0, "bad": 0.0}


def _value(feedback: OneFeedback, n: int) -> float:
    """Raises BadField."""
    if (feedback.score is None) == (feedback.label is None):
        raise BadField("needs either a `score` or a `label`", f"feedback.{n}")
    if feedback.score is not None:
        return feedback.score
    if feedback.label not in LABELS:
        raise BadField("is none of true, false, good, bad", f"feedback.{n}.label")
    return LABELS[feedback.label]


def check_ranges(control: ControlStore, rows: Sequence[tuple[str, str, float]]) -> None:
    """Request id, name, value. The test of a mean holds for values from `low` to `high` only. Raises BadField."""
    waited_for = control.waited_for({id for id, _, _ in rows})
    rollouts = {id: rollout_of(control.rollout(id)) for id in {rollout for _, rollout in waited_for.values()}}
    for n, (id, name, value) in enumerate(rows):
        if id not in waited_for:
            continue
        model, rollout = waited_for[id]
        rules = [rule for member in rollouts[rollout].members if member.model == model for rule in member.metrics]
        rule = next((rule for rule in rules if rule.name == f"feedback:{name}"), None)
        if rule is not None and not rule.low <= value <= rule.high:
            raise BadField(
                f"{value:g} is not from {rule.low:g} to {rule.high:g}, which rollout {rollout} says of `{name}`", f"feedback.{n}"
            )


def _address(http: Request) -> str:
    return caller_of(http)[0].address or (http.client.host if http.client else "")
