"""What one comparison says."""

from msgspec import Struct


class Verdict(Struct, frozen=True):
    agree: bool | None
    """None: it cannot be told, of texts that were sampled and not scored."""
    distance: float = 0.0
    """How far apart they are, to find the worst; in a unit of its kind."""
    note: str = ""
    """What differs."""


SAME = Verdict(True)
FAR = 1e9
"""The distance of what cannot be compared at all."""


def worse(one: Verdict, other: Verdict) -> Verdict:
    """Of the parts of one answer: all must agree."""
    if one.agree is not other.agree:
        order = {False: 0, None: 1, True: 2}
        return min(one, other, key=lambda each: order[each.agree])
    return max(one, other, key=lambda each: each.distance)
