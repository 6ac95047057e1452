"""A server for one model and nothing else, with a page to try it on: what `fairlead ui PATH` runs."""

import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from msgspec import Struct
from starlette.requests import Request

from fairlead.api.data import data_operations
from fairlead.api.http_server import HttpServer
from fairlead.api.ops import OPS_SHAPES
from fairlead.api.ui.demo import Demo
from fairlead.api.ui.files import Files
from fairlead.api.ui.guests import Guests
from fairlead.api.ui.playground import Playground, data_url
from fairlead.app import Server
from fairlead.core.errors import ConfigError
from fairlead.core.logs import Logs
from fairlead.core.policy import StoreSettings, WebhookSettings
from fairlead.core.rollout import ControlSettings
from fairlead.core.settings import LOOPBACK, Limits, Listen, Models, Settings
from fairlead.core.ui import UiSettings
from fairlead.observe.finished import Finished

DRAIN_SECONDS = 3.0
NOWHERE = ("192.0.2.1", 9)
"""An address of nobody (RFC 5737): nothing is sent to find out which of ours would be used."""


class Links(Struct, frozen=True, kw_only=True):
    model: str
    url: str
    """For a browser of this machine; it opens once."""
    share: str
    """For browsers of the local network; "": it is not shared."""
    api: str
    """The data port, for programs of this machine."""


def demo_settings(path: str, folder: Path) -> Settings:
    """One model; every port but the page's on loopback; what it keeps is kept in `folder`, and no server outside is called."""
    return Settings(
        listen=Listen(port=0, grpc_port=0, ops_port=0),
        models=Models(repositories=(path,)),
        limits=Limits(drain_timeout=DRAIN_SECONDS),
        logs=Logs(level="warning", requests=False),
        store=StoreSettings(url=f"sqlite:///{folder}/fairlead.db", usage=False),
        webhooks=WebhookSettings(enabled=False),
        control=ControlSettings(enabled=False),
        ui=UiSettings(enabled=False),
    )


async def open_demo(server: Server, port: int, *, guests: int) -> Links:
    """The page of the one model that the server has, until the server stops. `guests`: browsers of the local network that may come; 0: it is not shared.

    Raises ConfigError.
    """
    model = only_model(server)
    house = Guests(model)
    limit = server.settings.limits.max_request_bytes
    jobs = () if server.jobs is None else server.jobs.operations
    finished = server.telemetry.finished
    app = Demo(house, Files()).app(
        Playground(server.repository, server.gateway, lambda http: _programs(server, http), keys=False),
        [*data_operations(server.repository, server.gateway, finished, server.gateway, limit), *jobs],
    )
    door = HttpServer(None, app, Finished(), shapes=OPS_SHAPES, max_body_bytes=limit)
    await server.open(door, "--port", "0.0.0.0" if guests else "127.0.0.1", port)
    return Links(
        model=model,
        url=f"http://127.0.0.1:{door.port}/#{house.invite()}",
        share=f"http://{lan_address()}:{door.port}/#{house.invite(guests)}" if guests else "",
        api=f"http://127.0.0.1:{server.http.port}",
    )


def only_model(server: Server) -> str:
    """Raises ConfigError."""
    repository = server.repository
    for name, reason in repository.failures().items():
        raise ConfigError(f"{name} could not be loaded: {reason}")
    names = sorted({entry.name for entry in repository.index(ready=True)})
    if len(names) != 1:
        found = f"{len(names)} models ({', '.join(names[:3])}, ...): name the folder of one of them" if names else "no model"
        raise ConfigError(f"there is {found} in {', '.join(server.settings.models.repositories)}")
    return names[0]


def _programs(server: Server, http: Request) -> str:
    """Where programs reach the model: only those of this machine do."""
    address = http.client.host if http.client else ""
    with suppress(ValueError):
        if address in LOOPBACK or ip_address(address).is_loopback:
            return data_url(server.settings, server.http.port, "")
    return ""


def lan_address() -> str:
    """Of this machine in its network. Raises ConfigError where it is in none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(NOWHERE)
        except OSError:
            raise ConfigError("there is no network to share it on") from None
        return str(probe.getsockname()[0])
