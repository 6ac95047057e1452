"""What policies say of models that answer instead of others: `routing.fallback` and the `model` of a step of `queue.degrade`."""

from collections.abc import Callable, Iterator, Sequence

from fairlead.core.errors import ConfigError
from fairlead.core.policy import GatewaySettings


def check_fallbacks(settings: GatewaySettings) -> None:
    """Raises ConfigError for one that leads back. A fallback's own fallbacks are not asked, so there is no longer way round."""
    for model, option, names in _named(settings):
        if model in names:
            raise ConfigError(f"`{option}` names the model itself: leave it out")
        if len(set(names)) < len(names):
            raise ConfigError(f"`{option}` names a model twice: leave one out")


def unknown_fallbacks(settings: GatewaySettings, served: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    """(option, name) of those that nobody computes: neither `served` here nor by upstreams. A model may come later, so that this is no
    error of the configuration."""
    for _, option, names in _named(settings):
        yield from ((option, name) for name in names if not served(name) and not settings.model(name).upstreams)


def _named(settings: GatewaySettings) -> Iterator[tuple[str, str, Sequence[str]]]:
    """(model, option, the names there)."""
    for model, policy in settings.models.items():
        yield model, f"gateway.models.{model}.routing.fallback", policy.routing.fallback
        for number, step in enumerate(policy.queue.degrade):
            if step.model is not None:
                yield model, f"gateway.models.{model}.queue.degrade[{number}].model", (step.model,)
