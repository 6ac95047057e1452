"""Whether what a configuration leans on is there: files of TLS, the store, Redis, issuers of tokens. Each is asked within a deadline."""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from threading import Thread

from msgspec import Struct

from fairlead.cli.finding import Finding, Findings, State
from fairlead.core.errors import ConfigError, FairleadError
from fairlead.core.policy import OidcSettings, TlsSettings
from fairlead.core.settings import Settings, asks_for_keys

AREA = "connections"
DEADLINE = 12.0
"""Seconds for each: those of an issuer's two documents, and some."""


class Seen(Struct, frozen=True):
    detail: str
    state: State = State.OK
    advice: str = ""


def connections(settings: Settings, config: Path) -> Findings:
    tls, required = settings.tls, asks_for_keys(settings)
    if tls.certificate or tls.private_key or tls.client_ca:
        yield _asked("tls", partial(_tls, tls), "tls.certificate, tls.private_key and tls.client_ca name files in PEM")
    if settings.store.url or required:
        yield _asked("store", partial(_store, settings, config, required=required), "see `store.url`")
    if settings.gateway.redis_url:
        yield _asked("redis", partial(_redis, settings.gateway.redis_url), "see `gateway.redis_url`")
    for issuer in settings.auth.oidc:
        yield _asked(f"issuer {issuer.issuer}", partial(_issuer, issuer), "see `auth.oidc`")


def _asked(name: str, look: Callable[[], Seen], advice: str) -> Finding:
    """`advice`: where it fails."""
    try:
        seen = _in_time(look)
    except TimeoutError:
        return Finding(AREA, name, State.PROBLEM, f"does not answer within {DEADLINE:g} s", advice)
    except FairleadError as error:
        return Finding(AREA, name, State.PROBLEM, error.message, advice)
    return Finding(AREA, name, seen.state, seen.detail, seen.advice)


def _in_time(look: Callable[[], Seen]) -> Seen:
    """In a thread that is left behind where it hangs. Raises TimeoutError."""
    answer: Future[Seen] = Future()

    def run() -> None:
        try:
            answer.set_result(look())
        except BaseException as error:
            answer.set_exception(error)

    Thread(target=run, daemon=True).start()
    return answer.result(DEADLINE)


def _tls(settings: TlsSettings) -> Seen:
    from fairlead.api.tls import server_context

    server_context(settings)
    return Seen("certificate and key are readable and belong together")


def _store(settings: Settings, config: Path, *, required: bool) -> Seen:
    from fairlead.store.database import HEAD, default_url, look_at

    version, num_keys = look_at(settings.store.url or default_url())
    if version > HEAD:
        raise ConfigError(f"its tables are of version {version}, which a newer Fairlead made: this one knows {HEAD}")
    if required and not (num_keys or settings.auth.oidc or settings.auth.mtls):
        advice = f"fairlead keys create --config {config}"
        return Seen("callers must show a key, and there is none: the server will not start", State.PROBLEM, advice)
    if not version:
        return Seen("has no tables yet", State.NOTE, "the first start makes them")
    if version != HEAD:
        return Seen(f"its tables are of version {version}, not {HEAD}", State.NOTE, "the next start brings them up to date")
    return Seen(f"tables of version {version}, {num_keys} key{'s' * (num_keys != 1)}")


def _redis(url: str) -> Seen:
    try:
        from redis import Redis
        from redis.exceptions import RedisError
    except ImportError:
        raise ConfigError("needs a package that is not installed: pip install 'fairlead[redis]'") from None
    try:
        redis = Redis.from_url(url, protocol=2)
    except ValueError:  # whose text may have the password in it
        raise ConfigError("`gateway.redis_url` is no URL of a Redis, such as redis://127.0.0.1:6379/0") from None
    try:
        redis.ping()
    except (RedisError, OSError) as error:
        raise ConfigError(f"does not answer: {error}") from None
    finally:
        redis.close()
    return Seen("answers")


def _issuer(settings: OidcSettings) -> Seen:
    from fairlead.gateway.identity.jwks import NotRead, read_keys
    from fairlead.gateway.identity.oidc import Issuer
    from fairlead.observe.counts import Counts

    issuer = Issuer(settings, Counts())
    try:
        issuer.keys = read_keys(settings.issuer)
    except NotRead as error:
        raise ConfigError(str(error)) from None
    num_keys = sum(map(len, issuer.keys.values()))
    fitting = [name for name in settings.algorithms if issuer.fitting(name, None)]
    if not fitting:
        raise ConfigError(f"none of its {num_keys} keys is for {', '.join(settings.algorithms)} (`algorithms`)")
    return Seen(f"{num_keys} key{'s' * (num_keys != 1)}, for {', '.join(fitting)}")
