"""What the gateway is told to do: who gets how much, in which order, to which place. Everything here comes from
`fairlead.yaml` or, for tenants and keys, from the store."""

import re
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(ge=0)]
Money = Annotated[float, Meta(ge=0)]
Weight = Annotated[float, Meta(gt=0)]
Amount = Annotated[float, Meta(ge=0)]


class Unit(StrEnum):
    """What can be limited, billed and counted."""

    REQUESTS = "requests"
    TOKENS = "tokens"
    """Of the prompt and the answer together."""
    INPUT_TOKENS = "input_tokens"
    OUTPUT_TOKENS = "output_tokens"
    ROWS = "rows"
    MEGAPIXELS = "megapixels"
    COMPUTE_SECONDS = "compute_seconds"
    MONEY = "money"


Amounts = dict[Unit, float]
"""How much of each unit; a unit that is not there is 0."""

WINDOWS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0, "month": 0.0}
"""Seconds of each; a month is the calendar's."""
CALENDAR = ("day", "month")
"""Budgets: whole days and months in UTC. The others are token buckets that refill all the time."""

_LIMIT = re.compile(rf"({'|'.join(Unit)})_per_({'|'.join(WINDOWS)})")

Limits = dict[str, Amount]
"""`UNIT_per_WINDOW` → amount, e.g. `tokens_per_minute: 90000`; and `concurrent`: requests under way at once."""


class Rule(Struct, frozen=True):
    """One entry of Limits, read."""

    name: str
    """As it was written."""
    unit: Unit | None
    """None: `concurrent`."""
    window: str
    """A key of WINDOWS; "" for `concurrent`."""
    amount: float


def rules_of(limits: Limits) -> tuple[Rule, ...]:
    """Raises ValueError for a name that is none."""
    rules = []
    for name, amount in limits.items():
        if name == "concurrent":
            rules.append(Rule(name, None, "", amount))
        elif match := _LIMIT.fullmatch(name):
            rules.append(Rule(name, Unit(match[1]), match[2], amount))
        else:
            units, windows = ", ".join(Unit), ", ".join(WINDOWS)
            raise ValueError(
                f"`{name}` is no limit: write `concurrent`, or UNIT_per_WINDOW with a unit of {units} and a window of {windows}"
            )
    return tuple(rules)


# Who


class Scope(StrEnum):
    """What a key may be used for."""

    INFER = "infer"
    """Ask models, and read what they are."""
    REPOSITORY = "repository"
    """Load and unload models."""
    ADMIN = "admin"
    """Everything under /admin: tenants, keys, usage, configuration."""


ROLES = {
    "user": (Scope.INFER,),
    "operator": (Scope.INFER, Scope.REPOSITORY),
    "admin": (Scope.INFER, Scope.REPOSITORY, Scope.ADMIN),
}


class TenantPolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one tenant may: a row of the store, over `gateway.tenants` of fairlead.yaml for those that have none."""

    qos_class: str = field(default="standard", name="class")
    """Its class of service, unless the key or the request names another."""
    classes: tuple[str, ...] = ()
    """Further classes that its requests may ask for."""
    weight: Weight = 1.0
    """Its share of a model's turns against other tenants of the same class."""
    limits: Limits = {}
    models: tuple[str, ...] = ("*",)
    """Patterns of the models that it may use and see."""
    require_signature: bool = False
    """Requests must be signed (RFC 9421)."""
    filters: "FilterPolicy | None" = None
    """In place of the model's."""

    def __post_init__(self) -> None:
        rules_of(self.limits)


class OidcSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One issuer of JSON web tokens that is trusted."""

    issuer: str
    """Its URL, exactly as its tokens say; /.well-known/openid-configuration is read below it."""
    audience: str
    """Tokens must be meant for this."""
    algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA", "PS256")
    leeway: Seconds = 30.0
    """Seconds by which clocks may differ."""
    jwks_seconds: Annotated[float, Meta(ge=1)] = 300.0
    """How long the issuer's keys are used before they are read again."""
    tenant_claim: str = "tenant"
    """Dots reach into objects: `org.id`."""
    project_claim: str = "project"
    class_claim: str = "class"
    roles_claim: str = "roles"
    roles: dict[str, tuple[Scope, ...]] = field(default_factory=lambda: ROLES)
    """What each role may. A token without any role may `infer`."""


class AuthSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    required: bool | None = None
    """Whether callers must say who they are; null: unless both hosts are loopback."""
    oidc: tuple[OidcSettings, ...] = ()
    mtls: bool = False
    """A client certificate that `tls.client_ca` signed says who calls: its organisation is the tenant, its common name the key."""
    revocation_seconds: Annotated[float, Meta(gt=0, le=60)] = 0.5
    """How often the store is asked whether keys or tenants have changed."""
    signature_seconds: Annotated[float, Meta(gt=0)] = 300.0
    """How far the `created` of a signed request may be from now."""
    trusted_proxies: tuple[str, ...] = ()
    """Networks whose X-Forwarded-For says the caller's address."""


class TlsSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of the HTTP and gRPC ports; files in PEM."""

    certificate: str = ""
    private_key: str = ""
    client_ca: str = ""
    """Callers may (with `auth.mtls`: must, unless they show a key) present a certificate signed by it."""


# How much


class Price(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Money for what a request used; what is not said costs nothing."""

    per_request: Money = 0.0
    per_million_input_tokens: Money = 0.0
    per_million_cached_input_tokens: Money | None = None
    """None: as other input tokens."""
    per_million_output_tokens: Money = 0.0
    per_thousand_rows: Money = 0.0
    per_megapixel: Money = 0.0
    per_compute_second: Money = 0.0


# In which order


class DegradeStep(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What to do to requests of some classes while a model's predicted wait is long. Each is marked in `x-fairlead-degraded`."""

    wait_above: Seconds
    """Seconds of predicted wait from which on it applies."""
    classes: tuple[str, ...] = ("*",)
    max_tokens: Positive | None = None
    """At most so many tokens of answer."""
    model: str | None = None
    """Another model answers."""
    cached: bool = False
    """A stored answer will do although it has expired (`stale_seconds`)."""


class QueueSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The waiting line before one model."""

    max_in_flight: Count | None = None
    """Requests that the model is given at once; 0: any number, so that nobody waits here (the batcher has a line of its own).
    null: what a language model's engines compute at once; for the others 0."""
    max_requests: Positive = 1024
    """Waiting; more are refused."""
    max_wait: Annotated[float, Meta(gt=0)] = 60.0
    """Seconds after which a waiting request is refused."""
    shed_wait: Annotated[float, Meta(gt=0)] | None = None
    """Refuse at the door where the predicted wait is longer than this; null: `max_wait`."""
    half_life: Annotated[float, Meta(gt=0)] = 60.0
    """Seconds in which half of what a tenant was served is forgotten."""
    degrade: tuple[DegradeStep, ...] = ()

    def __post_init__(self) -> None:
        if self.max_in_flight == 0 and self.degrade:
            raise ValueError("`degrade` is for those who wait, and with `max_in_flight: 0` nobody does")


# Where


class Upstream(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another server that answers for a model, by URL."""

    url: str
    """Without the path of the protocol: `http://10.0.0.7:8000`."""
    protocol: Literal["openai", "kserve"] = "openai"
    model: str = ""
    """What it calls the model; "" for the same name. Another name costs a rewrite of the body."""
    key: str = ""
    """Its API key, sent as a bearer token."""
    weight: Weight = 1.0
    max_in_flight: Positive = 256
    connect_timeout: Annotated[float, Meta(gt=0)] = 5.0
    timeout: Annotated[float, Meta(gt=0)] = 600.0
    """Seconds without a byte of the answer."""


class Breaker(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """When a replica is left out for a while."""

    failures: Positive = 5
    """Failures in a row that open it."""
    error_rate: Share = 0.5
    """Share of failures in the window that opens it, from `min_requests` on."""
    min_requests: Positive = 20
    window: Annotated[float, Meta(gt=0)] = 10.0
    latency_factor: Annotated[float, Meta(gt=1)] = 5.0
    """Its latency against the median of the others that opens it."""
    open_seconds: Annotated[float, Meta(gt=0)] = 5.0
    """How long, at first; doubled each time that the trial fails, up to a minute."""


class RoutingSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    retries: Count = 1
    """Further tries before the first byte of an answer, where the failure says that another place may do better."""
    retry_budget: Share = 0.1
    """Retries against requests, over ten seconds; a few are always allowed."""
    hedge_after: Seconds = 0.0
    """Seconds after which a request of tensors is sent to a second place too and the first answer counts; 0: never."""
    hedge_budget: Share = 0.05
    """Hedged requests against requests."""
    fallback: tuple[str, ...] = ()
    """Models asked in turn where this one is not there or fails before its first byte."""
    sticky: Literal["", "session"] = ""
    """`session`: requests with the same `x-fairlead-session` (or OpenAI's `prompt_cache_key`, `user`) go to the same place."""
    prefix_affinity: bool = True
    """Requests with the same beginning go where it was computed last, unless that place has much more to do."""
    temperature: Annotated[float, Meta(ge=0)] = 0.1
    """Of the choice among places of nearly equal cost; 0: always the best."""
    breaker: Breaker = Breaker()


# Reuse


class CacheSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The response cache of one model."""

    mode: Literal["off", "deterministic", "all"] = "off"
    """`deterministic`: tensors, embeddings and temperature 0 (or a seed); `all`: whatever the request asks with `Cache-Control: max-age`, too."""
    ttl: Annotated[float, Meta(gt=0)] = 300.0
    stale_seconds: Seconds = 0.0
    """How much longer an answer is kept for a degraded request."""
    max_entry_bytes: Positive = 1 << 20
    shared: bool = False
    """Answers of one tenant are given to another. Never those of the semantic cache."""
    single_flight: bool = False
    """Identical requests under way at the same time are computed once."""
    semantic_model: str = ""
    """A served embedder: a stored answer to a nearly equal question will do. "": off."""
    semantic_threshold: Annotated[float, Meta(gt=0, le=1)] = 0.95
    """Least cosine of the two questions."""

    def __post_init__(self) -> None:
        if self.mode == "off" and (self.semantic_model or self.stale_seconds):
            raise ValueError("`semantic_model` and `stale_seconds` are of stored answers, and `mode: off` stores none")


class ReuseSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The memory that all response caches share."""

    max_bytes: Positive = 256 << 20
    redis: bool = False
    """Answers are also kept in Redis, for all gateways."""


# Filtering and abuse


MANY_CHARS = 1_000_000
"""More than that nobody searches for somebody else's sake unless told to."""


class FilterPolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What texts of requests and answers are searched for. Every action: `block`, `redact` (where it can), `flag` (say so in the log and the metrics)."""

    deny: tuple[str, ...] = ()
    """Words and phrases, whole words, in any case: blocked."""
    deny_patterns: tuple[str, ...] = ()
    """Regular expressions (RE2): blocked."""
    pii: Literal["off", "flag", "redact", "block"] = "off"
    pii_kinds: tuple[Literal["email", "phone", "card", "iban", "secret"], ...] = ("email", "phone", "card", "iban", "secret")
    injection: Literal["off", "flag", "block"] = "off"
    """Heuristics against prompts that would overrule the system's."""
    moderation: Literal["off", "flag", "block"] = "off"
    moderation_model: str = "moderation"
    """A served model: one text in, one probability for each of its labels out."""
    moderation_threshold: Share = 0.5
    picture_moderation: Literal["off", "flag", "block"] = "off"
    """Of finished pictures, by `moderation_threshold`, too."""
    picture_moderation_model: str = ""
    """A served model: one picture in, one probability for each of its labels out."""
    max_chars: Count = MANY_CHARS
    """Of a request's texts together; 0: any."""
    languages: tuple[str, ...] = ()
    """ISO 639-1 codes that a text of some length must be in; (): any."""
    output: bool = True
    """Answers are searched too (deny, patterns, PII; not injection, size and language)."""

    def __post_init__(self) -> None:
        if self.pii != "off" and not self.pii_kinds:
            raise ValueError(f"`pii: {self.pii}` looks for none of `pii_kinds`: name some, or turn it off")
        if (self.picture_moderation != "off") != bool(self.picture_moderation_model):
            raise ValueError(
                "`picture_moderation` and `picture_moderation_model` go together: what is done, and by which model's judgement"
            )


class AbuseSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is done about a tenant whose traffic looks wrong."""

    action: Literal["off", "observe", "throttle", "block"] = "observe"
    """The most that is done; every action is written to the audit log."""
    threshold: Annotated[float, Meta(gt=0)] = 8.0
    """The score from which on something is done; see docs/abuse.md."""
    seconds: Annotated[float, Meta(gt=0)] = 300.0
    """How long."""
    throttle_to: Share = 0.1
    """The share of its requests that a throttled tenant still gets."""


# Together


class ModelPolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the gateway treats one model."""

    limits: Limits = {}
    """Of all callers together."""
    price: Price = Price()
    queue: QueueSettings = QueueSettings()
    routing: RoutingSettings = RoutingSettings()
    cache: CacheSettings = CacheSettings()
    filters: FilterPolicy | None = None
    require_signature: bool = False
    traffic: dict[str, Share] = {}
    """Version → share of the requests that name no version; {}: the version policy's default."""
    upstreams: tuple[Upstream, ...] = ()
    """Other servers that answer for it; it need not be in a repository then."""

    def __post_init__(self) -> None:
        rules_of(self.limits)
        if self.traffic and abs(sum(self.traffic.values()) - 1.0) > 1e-6:
            raise ValueError(f"`traffic` must add up to 1, not {sum(self.traffic.values()):g}")
        if self.cache.mode == "off" and any(step.cached for step in self.queue.degrade):
            raise ValueError("`degrade` with `cached` needs stored answers: set `cache.mode`")


class LimitSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where limits are counted."""

    redis: bool = False
    """In Redis, for several gateways that share them; else in this process."""
    redis_gone: Literal["local", "refuse"] = "local"
    """While Redis does not answer: limit in this process as if it were alone, or refuse what has a limit (503)."""
    output_tokens: Positive = 256
    """Held for an answer whose length the request does not bound."""


class GatewaySettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    classes: dict[str, int] = field(default_factory=lambda: {"interactive": 10, "standard": 0, "batch": -1})
    """Class of service → priority: the highest goes first, a negative one is shed first."""
    tenants: dict[str, TenantPolicy] = {}
    """Policies of tenants that the store has none for; the one named `default` for all others."""
    models: dict[str, ModelPolicy] = {}
    """By name, or by a pattern such as `llama-*`; the first that matches counts."""
    limits: LimitSettings = LimitSettings()
    reuse: ReuseSettings = ReuseSettings()
    abuse: AbuseSettings = AbuseSettings()
    redis_url: str = ""

    def __post_init__(self) -> None:
        if not self.redis_url and (self.limits.redis or self.reuse.redis):
            raise ValueError("`redis_url` must say where Redis is, because `limits.redis` or `reuse.redis` wants it")
        for name, policy in self.models.items():
            if policy.upstreams and any(letter in name for letter in "*?["):
                raise ValueError(f"`upstreams` of `{name}` would be those of no model: name the model, not a pattern")
        for name, tenant in self.tenants.items():
            self._check_class(tenant.qos_class, f"tenant `{name}`")
            for each in tenant.classes:
                if each != "*":
                    self._check_class(each, f"tenant `{name}`")
        for name, policy in self.models.items():
            for each in (each for step in policy.queue.degrade for each in step.classes if each != "*"):
                self._check_class(each, f"`degrade` of `{name}`")

    def _check_class(self, name: str, of: str) -> None:
        if name not in self.classes:
            raise ValueError(f"class `{name}` of {of} is not one of `classes`: {', '.join(self.classes)}")

    def model(self, name: str) -> ModelPolicy:
        """The policy of a model; the default one where no entry matches."""
        found = self.models.get(name)
        if found is None:
            found = next((policy for pattern, policy in self.models.items() if fnmatchcase(name, pattern)), DEFAULT_MODEL)
        return found

    def tenant(self, name: str) -> TenantPolicy:
        return self.tenants.get(name) or self.tenants.get("default") or DEFAULT_TENANT


DEFAULT_MODEL = ModelPolicy()
DEFAULT_TENANT = TenantPolicy()


class StoreSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    url: str = ""
    """`sqlite:///path` or `postgresql://...`. "": a file in the user's data folder, used only where callers must say who they are."""
    usage: bool = True
    """One record of every request."""
    flush_seconds: Annotated[float, Meta(gt=0, le=60)] = 1.0
    """How often records are written: a crash loses at most so much."""


# Later


class JobSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Requests that are stored and answered later."""

    enabled: bool = True
    run: bool = True
    """Whether this server answers them, too; else it only takes them, and others that share its store do the work."""
    max_active: Positive = 64
    """Jobs that this server runs at once; the models' own lines order them."""
    tenant_active: Positive = 24
    """Jobs of one tenant that run at once, on all servers together."""
    tenant_queued: Positive = 1000
    """Jobs of one tenant that may wait; more get 429."""
    max_input_bytes: Positive = 32 << 20
    """Of one stored request."""
    tries: Positive = 3
    """How often a job is begun before it fails. Waiting for a limit, or losing a runner that was stopped in order, is no try."""
    lease_seconds: Annotated[float, Meta(ge=1)] = 15.0
    """How long a runner that says nothing keeps its jobs; it says something three times as often."""
    start_seconds: Annotated[float, Meta(gt=0)] = 86_400.0
    """A job that has not started by then has expired, unless it asks for less."""
    total_seconds: Annotated[float, Meta(gt=0)] = 90_000.0
    """A job that has not ended by then fails, unless it asks for less."""
    retention_seconds: Annotated[float, Meta(gt=0)] = 86_400.0
    """How long an ended job, its input, its result and its artifacts are kept, unless it asks for less."""
    idempotency_seconds: Annotated[float, Meta(gt=0)] = 86_400.0
    """How long an `Idempotency-Key` is remembered."""
    max_wait_seconds: Annotated[float, Meta(gt=0)] = 60.0
    """The longest `Prefer: wait=`."""


class ResponseSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the Responses API keeps."""

    store: bool = True
    """Answers are kept where a request does not say `store: false`; else none is, nor answered in the background."""
    retention_days: Annotated[float, Meta(gt=0)] = 30.0
    """How long an answer is kept after its conversation last went on."""
    max_bytes: Positive = 8 << 20
    """Of one answer with the items that it was asked with; larger ones are not kept."""
    max_context_bytes: Positive = 32 << 20
    """Of all answers that one goes on from, together."""
    tenant_bytes: Positive = 1 << 30
    """Of all that a tenant keeps; those that it has not used for longest make room for new ones."""
    max_background: Positive = 256
    """Answers that this server computes in the background at once; more get 429."""
    tenant_background: Positive = 32
    """The same of one tenant."""
    background_seconds: Annotated[float, Meta(gt=0)] = 3600.0
    """Longest time for an answer in the background."""
    lease_seconds: Annotated[float, Meta(ge=1)] = 15.0
    """After so long without a word from the server that computes it, an answer has failed; servers say something three times as often."""
    omit_tools: tuple[str, ...] = ()
    """Types of tools, such as `web_search`, that are left out where clients offer them; others that this server does not have are refused."""


class BatchSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Files of many requests, answered where there is nothing better to do."""

    enabled: bool = True
    run: bool = True
    """Whether this server answers them, too; else it only takes them, and others that share its store do the work."""
    qos_class: str = "batch"
    """The class of their requests, where there is such a class; else their caller's."""
    max_active: Positive = 4
    """Batches that this server runs at once."""
    max_lines_active: Positive = 16
    """Requests of one batch that are under way at once."""
    max_lines: Positive = 50_000
    max_file_bytes: Positive = 64 << 20
    tenant_bytes: Positive = 1 << 30
    """Of all files of a tenant."""
    tenant_batches: Positive = 20
    """Of a tenant, that have not ended; more get 429."""
    tenant_ended: Positive = 1000
    """Of a tenant, that have ended; the oldest go. Their files stay."""
    window_seconds: Annotated[float, Meta(gt=0)] = 86_400.0
    """A batch that has not ended by then has expired, with what was answered by then."""
    retention_days: Annotated[float, Meta(gt=0)] = 30.0
    """How long files and ended batches are kept."""
    lease_seconds: Annotated[float, Meta(ge=1)] = 15.0
    """How long a server that says nothing keeps its batches; it says something three times as often."""


class ArtifactSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where files that jobs make are kept."""

    url: str = ""
    """A folder or any fsspec URL: `s3://bucket/prefix`, `memory://`. "": a folder beside the store's file."""
    options: dict[str, Any] = {}
    """Of the fsspec file system: endpoint, credentials."""
    link_seconds: Annotated[float, Meta(gt=0)] = 600.0
    """How long a signed link is good."""
    public_url: str = ""
    """How callers reach this server, for the links in webhooks: `https://images.example.com`. "": as the request was addressed."""
    timeout: Annotated[float, Meta(gt=0)] = 30.0
    """Seconds for one file to be written or read."""


class WebhookSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Calls to the URL that a job names (Standard Webhooks)."""

    enabled: bool = True
    allow: tuple[str, ...] = ()
    """Networks (CIDR) of private, loopback and link-local addresses that may be called all the same."""
    schemes: tuple[Literal["http", "https"], ...] = ("https", "http")
    timeout: Annotated[float, Meta(gt=0)] = 15.0
    retries: tuple[Annotated[float, Meta(gt=0)], ...] = (5.0, 300.0, 1800.0, 7200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
    """Seconds between the tries; a tenth more or less by chance."""
    max_in_flight: Positive = 32
    rotation_seconds: Annotated[float, Meta(ge=0)] = 86_400.0
    """How long a secret that was replaced signs, too."""
    log_seconds: Annotated[float, Meta(gt=0)] = 604_800.0
    """How long deliveries are remembered."""


Document = dict[str, Any]
"""A policy as JSON, as the store keeps it."""
