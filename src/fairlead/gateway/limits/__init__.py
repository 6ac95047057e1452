"""How much: hold before, settle after."""

from fairlead.core.policy import GatewaySettings
from fairlead.gateway.limits.ledger import AnyLimiter, Limiter
from fairlead.observe.counts import Counts


def limiter_of(settings: GatewaySettings, counts: Counts) -> AnyLimiter:
    """As the settings want it; to be started."""
    if not settings.limits.redis:
        return Limiter()
    from fairlead.gateway.limits.redis import SharedLimiter

    return SharedLimiter(settings.redis_url, counts=counts, gone=settings.limits.redis_gone)
