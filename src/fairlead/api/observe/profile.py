"""What a model does for some seconds."""

from typing import Annotated, Any

from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from fairlead.api.admin_bodies import decoded
from fairlead.api.admin_route import actor_of, body_of, operation
from fairlead.api.web import json_response
from fairlead.core.versions import check_model_name
from fairlead.observe.profile.result import KINDS, Kind, Profile
from fairlead.runtime.profiler import Profiler, Wanted


class NewProfile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    model: Annotated[str, Meta(min_length=1, max_length=300)]
    """`fraud`, or `fraud@7`: then only requests that this version answered are counted."""
    seconds: Annotated[float, Meta(ge=1, le=60)] = 10.0
    kinds: Annotated[tuple[Kind, ...], Meta(min_length=1, max_length=3)] = KINDS
    rate: Annotated[int, Meta(ge=1, le=500)] = 100
    """Samples of stacks in a second."""
    native: bool = False
    """Functions of C and C++, too: slows the processes down much more."""
    shapes: bool = False
    """Those of the operators' inputs."""


class ProfileOperations:
    def __init__(self, profiler: Profiler) -> None:
        self.profiler = profiler
        self.operations = (
            operation("POST", "/admin/profile", "adminProfile", "Look at a model for some seconds: stacks, kernels, memory, and where its requests' time goes", self.look, Profile, NewProfile, 404, 409),
        )  # fmt: skip

    async def look(self, http: Request) -> Response:
        body = decoded(await body_of(http), NewProfile)
        name, _, version = body.model.partition("@")
        more: dict[str, Any] = {name: getattr(body, name) for name in ("seconds", "kinds", "rate", "native", "shapes")}
        wanted = Wanted(model=check_model_name(name), version=version, actor=actor_of(http), **more)
        return json_response(await self.profiler.look(wanted))
