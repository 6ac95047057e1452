"""Low-rank adapters (LoRA, Hu et al., 2021) beside a decoder's weights: y += (x A^T) B^T, for each row of a step with its own A and B.

Rows of one adapter are computed together, whatever sequences they are of, as Punica does it (Chen et al., 2023). Two ways to
compute it:
    Packed  one call of our own kernel (kernels/gemm.cpp) for each linear layer, whatever the number of adapters
    Plain   torch's operators, for each adapter of the step
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fairlead.llm.linear import LANES, Add

MAX_PARTS = 3
PART = 6
"""Numbers that tell where a part's B lies: see LowRank in kernels/gemm.cpp."""
PLACE = 2 + MAX_PARTS * PART


@dataclass(frozen=True, slots=True)
class Part:
    """A projection that adapters may change, by its module's name in transformers' graph."""

    name: str
    num_inputs: int
    num_outputs: int
    column: int = 0
    """Where its outputs begin in those of its site."""
    step: int = LANES
    """Columns from one panel of LANES outputs to the next."""


Site = tuple[Part, ...]
"""A linear layer, which may hold siblings that read the same input."""


class LowRank(NamedTuple):
    """What an adapter has for one part."""

    a_RK: Tensor
    b_NR: Tensor
    """Times the adapter's scale."""


@dataclass(slots=True, eq=False)
class Weights:
    """An adapter's, as its Layout keeps them."""

    nbytes: int
    active: frozenset[int] = frozenset()
    """Sites that it changes."""
    arena: Tensor | None = None
    """Packed: all in one piece."""
    places: Tensor | None = None
    """Packed: [sites, PLACE], where in it."""
    plain: dict[int, list[tuple[Part, LowRank]]] = field(default_factory=dict)
    """Plain: by site."""


Operands = tuple[list[Tensor], list[Tensor], Tensor, Tensor, Tensor, Tensor]
"""Arenas, places of each site (empty where nothing is added), then tiles and rows: of all, and of those whose logits are wanted."""


class Laid(Protocol):
    """Adapters as the rows of one step have them."""

    def adds(self, first: int, num: int, *, wanted: bool = False) -> list[Add | None]:
        """For `num` sites from `first` on; None where no adapter of the step changes one. `wanted`: of the rows whose logits are wanted
        alone."""

    @property
    def operands(self) -> Operands | None:
        """For kernels/decoder.cpp; None where torch's operators compute it."""


class Layout:
    """Where adapters of one decoder may add, and how their weights are kept."""

    def __init__(self, sites: Sequence[Site], dtype: torch.dtype, device: str, *, native: bool) -> None:
        """`native`: by our own kernel."""
        self.sites = sites
        self.parts = {part.name: part for site in sites for part in site}
        self.dtype = dtype
        self.device = device
        self.native = native and dtype in (torch.float32, torch.bfloat16)
        self._most_rows: int = torch.ops.fairlead.low_rank_rows() if self.native else 0
        self._latest: tuple[list[Weights], list[Tensor]] | None = None
        self._last: tuple[tuple[list[Weights | None], bytes, bytes], Laid] | None = None
        """Decodes lay the same in step after step."""

    def nbytes(self, ranks: Mapping[str, int]) -> int:
        """Of an adapter with these ranks, by part."""
        total = 0
        for site in self.sites:
            present = [(part, ranks[part.name]) for part in site if part.name in ranks]
            if not self.native:
                total += sum(rank * (part.num_inputs + part.num_outputs) for part, rank in present)
            elif present:
                total += _up(sum(_up(rank, 2) for _, rank in present), LANES) * self._depth(site)
                total += sum(_up(part.num_outputs, LANES) * _up(rank, 2) for part, rank in present)
        return total * int(self.dtype.itemsize)

    def _depth(self, site: Site) -> int:
        """Inputs as the kernel counts them: in pairs of bfloat16."""
        return _up(site[0].num_inputs, 2) if self.dtype == torch.bfloat16 else site[0].num_inputs

    def keep(self, adapter: Mapping[str, LowRank]) -> Weights:
        """`adapter`: by part, every name one of `parts`, every shape that part's."""
        found = {
            index: [(part, adapter[part.name]) for part in site if part.name in adapter]
            for index, site in enumerate(self.sites)
            if any(part.name in adapter for part in site)
        }
        return self._packed(found) if self.native else self._plain(found)

    def _plain(self, found: dict[int, list[tuple[Part, LowRank]]]) -> Weights:
        plain = {
            index: [
                (part, LowRank(*(tensor.to(self.dtype).contiguous().to(self.device) for tensor in low_rank))) for part, low_rank in parts
            ]
            for index, parts in found.items()
        }
        tensors = [tensor for parts in plain.values() for _, low_rank in parts for tensor in low_rank]
        return Weights(sum(tensor.nbytes for tensor in tensors), frozenset(plain), plain=plain)

    def _packed(self, found: dict[int, list[tuple[Part, LowRank]]]) -> Weights:
        places = np.zeros((len(self.sites), PLACE), np.int64)
        pieces: list[Tensor] = []
        size = 0

        def put(weight: Tensor) -> int:
            nonlocal size
            pieces.append(torch.ops.fairlead.pack([weight.to(self.dtype).contiguous()], False).flatten())
            size += len(pieces[-1])
            return size - len(pieces[-1])

        for index, parts in found.items():
            ranks = [_up(len(low_rank.a_RK), 2) for _, low_rank in parts]
            rows = [_filled(low_rank.a_RK, rank, 0) for (_, low_rank), rank in zip(parts, ranks, strict=True)]
            places[index, :2] = put(torch.cat(rows)), _up(sum(ranks), LANES) // LANES
            first = 0
            for at, ((part, low_rank), rank) in enumerate(zip(parts, ranks, strict=True)):
                b = put(_filled(low_rank.b_NR, rank, 1))
                places[index, 2 + PART * at : 2 + PART * (at + 1)] = b, rank, first, part.column, part.num_outputs, part.step
                first += rank
        arena = torch.cat(pieces) if pieces else torch.zeros(0, dtype=self.dtype)
        return Weights(arena.nbytes, frozenset(found), arena=arena, places=torch.from_numpy(places))

    def lay(self, adapters: Sequence[Weights | None], num_rows: Sequence[int] | np.ndarray, wanted_rows: np.ndarray) -> Laid | None:
        """`adapters`: of each sequence, whose `num_rows` stand one after another. `wanted_rows`: whose logits are wanted."""
        same = list(adapters), np.asarray(num_rows).tobytes(), wanted_rows.tobytes()
        last = self._last
        if last is not None and last[0] == same:
            return last[1]
        laid = self._lay(adapters, num_rows, wanted_rows)
        self._last = None if laid is None else (same, laid)
        return laid

    def _lay(self, adapters: Sequence[Weights | None], num_rows: Sequence[int] | np.ndarray, wanted_rows: np.ndarray) -> Laid | None:
        distinct = sorted({id(weights): weights for weights in adapters if weights is not None}.values(), key=id)
        if not distinct:
            return None
        place_of = {id(weights): place for place, weights in enumerate(distinct)}
        owners = np.array([-1 if weights is None else place_of[id(weights)] for weights in adapters])
        owners_T = np.repeat(owners, num_rows)
        of_all, of_wanted = _by_owner(owners_T, len(distinct)), _by_owner(owners_T[wanted_rows], len(distinct))
        if not self.native:
            return _Plain(
                distinct,
                [torch.from_numpy(rows).to(self.device) for rows in of_all],
                [torch.from_numpy(rows).to(self.device) for rows in of_wanted],
            )
        latest = self._latest
        if latest is None or latest[0] != distinct:
            stacked = torch.stack([weights.places for weights in distinct if weights.places is not None], 1)
            latest = self._latest = distinct, list(stacked.unbind(0))
        arenas = [weights.arena for weights in distinct if weights.arena is not None]
        active = frozenset[int]().union(*(weights.active for weights in distinct))
        return _Packed(arenas, latest[1], active, self._tiles(of_all), self._tiles(of_wanted))

    def forget(self) -> None:
        """No step needs the adapters of the last one any longer. From any thread."""
        self._latest = self._last = None

    def _tiles(self, rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """(tiles, rows) as the kernel takes them: of one adapter each, of nearly one size."""
        tiles = []
        begin = 0
        for adapter, mine in enumerate(rows):
            num_tiles = -(-len(mine) // self._most_rows)
            for tile in range(num_tiles):
                end = len(mine) * (tile + 1) // num_tiles
                first = len(mine) * tile // num_tiles
                tiles.append((adapter, begin + first, end - first))
            begin += len(mine)
        return torch.tensor(tiles, dtype=torch.int64).view(-1, 3), torch.from_numpy(np.concatenate(rows))


class _Packed:
    def __init__(
        self,
        arenas: list[Tensor],
        places: list[Tensor],
        active: frozenset[int],
        rows: tuple[Tensor, Tensor],
        wanted: tuple[Tensor, Tensor],
    ) -> None:
        self._adds, self._wanted_adds = (
            [_adding(arenas, place, *of_rows) if site in active else None for site, place in enumerate(places)]
            for of_rows in (rows, wanted)
        )
        nothing = torch.empty(0, dtype=torch.int64)
        self.operands = (arenas, [place if site in active else nothing for site, place in enumerate(places)], *rows, *wanted)

    def adds(self, first: int, num: int, *, wanted: bool = False) -> list[Add | None]:
        return (self._wanted_adds if wanted else self._adds)[first : first + num]


def _adding(arenas: list[Tensor], place: Tensor, tiles: Tensor, rows: Tensor) -> Add:
    add_low_rank = torch.ops.fairlead.add_low_rank.default

    def add(y_TN: Tensor, x_TK: Tensor) -> None:
        add_low_rank(y_TN, x_TK, arenas, place, tiles, rows)

    return add


class _Plain:
    operands = None

    def __init__(self, adapters: list[Weights], rows: list[Tensor], wanted: list[Tensor]) -> None:
        self._adapters = adapters
        self._rows = rows
        self._wanted = wanted

    def adds(self, first: int, num: int, *, wanted: bool = False) -> list[Add | None]:
        return [
            partial(self._at, site, wanted) if any(site in adapter.active for adapter in self._adapters) else None
            for site in range(first, first + num)
        ]

    def _at(self, site: int, wanted: bool, y_TN: Tensor, x_TK: Tensor) -> None:
        for adapter, rows in zip(self._adapters, self._wanted if wanted else self._rows, strict=True):
            mine = adapter.plain.get(site)
            if mine is None or not len(rows):
                continue
            x_MK = x_TK.index_select(0, rows)
            for part, (a_RK, b_NR) in mine:
                y_TN[:, part.column : part.column + part.num_outputs].index_add_(0, rows, (x_MK @ a_RK.T) @ b_NR.T)


def _by_owner(owners: np.ndarray, num: int) -> list[np.ndarray]:
    """The rows of each owner, ascending."""
    order = np.argsort(owners, kind="stable")
    bounds = np.searchsorted(owners[order], np.arange(num + 1))
    return [order[bounds[owner] : bounds[owner + 1]] for owner in range(num)]


def _filled(tensor: Tensor, size: int, dim: int) -> Tensor:
    """With zeros up to a size."""
    missing = size - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _up(number: int, to: int) -> int:
    return -(-number // to) * to
