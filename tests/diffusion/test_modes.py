"""Modes: what is faster than exact loses little, alone and in a batch. In place of CUDA's kernels stand what dynamo traces, run
operation by operation, and the processor's own bfloat16."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from msgspec import structs

from fairlead.core.errors import Unsupported
from fairlead.core.specs import DiffusionSpec
from fairlead.diffusion.load import load_family
from fairlead.diffusion.modes import Modes, compile_blocks
from tests.diffusion.conftest import Folders
from tests.diffusion.test_families import BATCH_TOLERANCE, PAINTED, SIDE, begun, finished

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::UserWarning:torch", "ignore::FutureWarning:torch")

Loaded = Callable[..., Any]


@pytest.fixture
def loaded(folders: Folders) -> Iterator[Loaded]:
    """Families as on CUDA: with blocks that are compiled, or with a reduced precision."""
    logs = logging.getLogger("torch._dynamo")
    level = logs.level
    logs.setLevel(logging.CRITICAL)  # it tells of each limit that it meets

    traced: list[int] = []

    def kernels(graph: Any, examples: Any) -> Any:
        traced.append(1)
        return graph

    def family(name: str, *, compiled: bool = False, reduced: torch.dtype | None = None, **changes: Any) -> Any:
        spec = DiffusionSpec(width=SIDE, height=SIDE, compile=compiled, **changes)
        model: Any = load_family(folders(name), spec)
        blocks = compile_blocks(model.parts.model, backend=kernels) if compiled else []
        model.parts.modes = Modes(spec, reduced=reduced, compiled=blocks, caches=model.parts.first_block.works, device="cpu")
        model.info = structs.replace(model.info, modes=model.parts.modes.offered)
        model.traced = traced
        return model

    torch.compiler.reset()
    limit = torch._dynamo.config.recompile_limit
    yield family
    torch._dynamo.config.recompile_limit = limit
    torch.compiler.reset()
    logs.setLevel(level)


def test_a_processor_has_nothing_to_offer_but_the_cache_and_says_so(folders: Folders) -> None:
    spec = DiffusionSpec(compile=True)
    unet, transformer = load_family(folders("sd"), spec), load_family(folders("flux"), spec)
    assert (unet.info.modes, transformer.info.modes) == (("exact",), ("exact", "turbo"))
    assert unet.explain[-1] == (
        "modes: exact only; nothing that is faster differs for this model on cpu; `compile` has no effect on this model on cpu"
    )
    assert transformer.explain[-1] == (
        "modes: exact, turbo; turbo with a first-block cache at 0.08; `compile` has no effect on this model on cpu"
    )
    with pytest.raises(Unsupported, match="`mode` 'balanced'"):
        begun(transformer, mode="balanced")


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_compiled_blocks_are_called_for_balanced_only_and_with_few_numbers_of_rows(loaded: Loaded, name: str) -> None:
    model = loaded(name, compiled=True)
    assert "faster by compiled blocks" in model.parts.modes.explain and model.parts.modes.compiled
    asked: list[dict[str, Any]] = [{"seed": seed, "num_steps": 2 + seed % 2, "guidance": 3.0} for seed in range(3)]
    exact = [finished(model, [begun(model, **one)])[0] for one in asked]
    assert not model.traced

    rows: list[int] = []
    blocks = model.parts.modes.compiled
    forget = blocks[0][0].register_forward_pre_hook(
        lambda module, given, told: rows.append(len(told.get("hidden_states", given[0] if given else None))), with_kwargs=True
    )
    try:
        together = finished(model, [begun(model, mode="balanced", **one) for one in asked])
    finally:
        forget.remove()
    each = 1 if name == "flux" else 2
    assert rows == [4 * each, 4 * each, each], "three are filled up to four"
    assert model.traced
    for state, own in zip(together, exact, strict=True):
        assert (state.latents - own.latents).abs().max() < BATCH_TOLERANCE


def test_where_there_are_too_many_shapes_blocks_run_as_they_are_written(loaded: Loaded) -> None:
    """No request fails for it."""
    model = loaded("flux", compiled=True)
    torch._dynamo.config.recompile_limit = 2
    for width, height, count in ((SIDE, SIDE, 1), (2 * SIDE, SIDE, 2), (48, 48, 1)):
        asked: list[dict[str, Any]] = [{"seed": seed, "num_steps": 2, "width": width, "height": height} for seed in range(count)]
        for state, one in zip(finished(model, [begun(model, mode="balanced", **one) for one in asked]), asked, strict=True):
            (exact,) = finished(model, [begun(model, **one)])
            assert (state.latents - exact.latents).abs().max() < BATCH_TOLERANCE
    assert len(model.traced) <= 4, "two for each kind of block"


def test_the_cache_skips_the_same_with_compiled_blocks(loaded: Loaded) -> None:
    """Where rows are filled up, and where the rows that are computed are packed."""
    asked: list[dict[str, Any]] = [{"seed": seed, "num_steps": 4 + 10 * seed, "guidance": 3.0} for seed in range(3)]
    plain, compiled = loaded("sd3"), loaded("sd3", compiled=True)
    expected, found = (finished(model, [begun(model, mode="turbo", **one) for one in asked]) for model in (plain, compiled))
    assert 0 < plain.num_cached == compiled.num_cached
    for state, own in zip(found, expected, strict=True):
        assert (state.latents - own.latents).abs().max() < BATCH_TOLERANCE


@pytest.mark.parametrize("name", ["sd", "sd3", "flux"])
def test_a_reduced_precision_is_near_and_leaves_latents_as_they_were(loaded: Loaded, name: str) -> None:
    model = loaded(name, reduced=torch.bfloat16)
    assert "multiplication in bfloat16" in model.parts.modes.explain
    for inputs in (None, PAINTED):
        (exact,) = finished(model, [begun(model, inputs, guidance=3.0)])
        near = [finished(model, [begun(model, inputs, guidance=3.0, mode=mode)])[0] for mode in model.info.modes[1:]]
        for state in near:
            assert state.latents.dtype == torch.float32
            error = (state.latents - exact.latents).pow(2).mean() / exact.latents.pow(2).mean()
            assert 0 < error < 0.01
        (again,) = finished(model, [begun(model, inputs, guidance=3.0)])
        assert torch.equal(again.latents, exact.latents), "exact stays exact"
    first, second = (finished(model, [begun(model, mode="balanced", seed=seed) for seed in (11, 12)])[0] for _ in range(2))
    assert torch.equal(first.latents, second.latents)
