"""How one alert stands, as a pure function of how it stood.

| stands | and | then |
|---|---|---|
| inactive | active | pending; firing at once where nothing is to be waited for |
| pending | active for `pending` seconds | firing |
| pending | not active | inactive |
| firing | neither active nor held for `calm` seconds | inactive: it is resolved |
"""

from typing import Literal

from msgspec import Struct, structs

State = Literal["inactive", "pending", "firing"]


class Standing(Struct, frozen=True):
    state: State = "inactive"
    since: float = 0.0
    """When this state began."""
    seen: float = 0.0
    """When it was active or held last."""


def step(standing: Standing, *, active: bool, holds: bool, pending: float, calm: float, now: float) -> Standing:
    """`now` before what was seen already changes nothing."""
    now = max(now, standing.since, standing.seen)
    match standing.state:
        case "inactive":
            if not active:
                return standing
            return Standing("pending" if pending else "firing", now, now)
        case "pending":
            if not active:
                return Standing("inactive", now, now)
            return Standing("firing", now, now) if now - standing.since >= pending else structs.replace(standing, seen=now)
    if active or holds:
        return structs.replace(standing, seen=now)
    return Standing("inactive", now, now) if now - standing.seen >= calm else standing
