"""The upstreams of every model: made from the settings, kept while those name them, looked after."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from fairlead.core.policy import GatewaySettings, Upstream
from fairlead.runtime.upstream.place import UpstreamPlace

CHECK_SECONDS = 5.0
LINGER_SECONDS = 0.5


Places = dict[tuple[str, Upstream], UpstreamPlace]


class Upstreams:
    def __init__(self, settings: GatewaySettings) -> None:
        """Raises ConfigError."""
        self._places: Places = {}
        self._of: dict[str, tuple[UpstreamPlace, ...]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self.configure(settings, self.prepare(settings))

    def prepare(self, settings: GatewaySettings) -> Places:
        """What `configure` takes: a place that is still named stays. Raises ConfigError."""
        return {
            (name, upstream): self._places.get((name, upstream)) or UpstreamPlace(name, upstream)
            for name, policy in settings.models.items()
            for upstream in policy.upstreams
        }

    def configure(self, settings: GatewaySettings, places: Places) -> None:
        """Places that are not named any more are closed once what is under way there is over."""
        wanted = {name: policy.upstreams for name, policy in settings.models.items() if policy.upstreams}
        gone = [place for key, place in self._places.items() if key not in places]
        self._places = places
        self._of = {name: tuple(places[name, upstream] for upstream in upstreams) for name, upstreams in wanted.items()}
        for place in gone:
            task = asyncio.get_running_loop().create_task(_let_go(place))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def __call__(self, model: str) -> Sequence[UpstreamPlace]:
        return self._of.get(model, ())

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self._of)

    def models(self) -> list[str]:
        return list(self._of)

    async def check(self) -> None:
        """For ever: which of them answer."""
        while True:
            await asyncio.gather(*(place.check() for place in self._places.values()))
            await asyncio.sleep(CHECK_SECONDS)

    async def close(self) -> None:
        for task in self._closing:
            task.cancel()
        await asyncio.gather(*(place.close() for place in self._places.values()), *self._closing, return_exceptions=True)


async def _let_go(place: UpstreamPlace) -> None:
    """Close it once what is under way there is answered, or has had its time."""
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(place.upstream.timeout):
                while place.in_flight:  # noqa: ASYNC110  nobody waits for this, and places tell nobody that they are idle
                    await asyncio.sleep(LINGER_SECONDS)
    finally:
        await place.close()
