"""Which share of a model's requests each of its versions gets: what control tells the gateway."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import Literal

from msgspec import Struct

Shares = tuple[tuple[str, float], ...]
"""(version, share), in an order that stays: where it does, few sessions move when shares change."""

Sticky = Literal["session", "tenant", "request"]
"""What keeps to one version while the shares stay: a session (a request that names none is by itself), a tenant, or nothing."""


class Routes(Struct, frozen=True):
    """A snapshot, replaced whole by one assignment and never edited: publishing the previous one is a rollback."""

    shares: Mapping[str, Shares] = {}
    """By model. A model that is not here: its version policy's default."""
    sticky: Mapping[str, Sticky] = {}
    """By model. One that is not here: `session`. The same key is given the same side of all models whose shares are alike."""

    def __post_init__(self) -> None:
        for model, shares in self.shares.items():
            total = sum(share for _, share in shares)
            if any(share < 0 for _, share in shares) or abs(total - 1.0) > 1e-6:
                raise ValueError(f"the shares of model '{model}' must be at least 0 and add up to 1, not {total:g}")

    def pick(self, model: str, key: bytes | None, random: float) -> str:
        """A version, "" where the model has no shares. The same `key` gets the same one, `random` in [0, 1) decides without."""
        shares = self.shares.get(model)
        return pick_version(shares, key, random) if shares else ""


def pick_version(shares: Shares, key: bytes | None, random: float) -> str:
    """As Routes.pick; the shares need not add up to 1."""
    point = (random if key is None else unit(key)) * sum(share for _, share in shares)
    for version, share in shares:
        point -= share
        if point < 0:
            return version
    return next(version for version, share in reversed(shares) if share > 0)  # rounding left a remainder


def unit(key: bytes) -> float:
    """A number in [0, 1) that every process derives from the same key alike."""
    return (int.from_bytes(blake2b(key, digest_size=8).digest()) >> 11) / (1 << 53)
