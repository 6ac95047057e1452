"""Adapters on disk: found, refused with a reason, kept within a budget, and never taken from who uses them."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fairlead.core.errors import LoadError, ModelError, NotFound, Unavailable
from fairlead.core.specs import LlmSpec
from fairlead.llm.adapters import CONFIG, WEIGHTS, Adapters
from fairlead.llm.attention import choose
from fairlead.llm.build import open_adapters
from fairlead.llm.decoder import LeanDecoder
from tests.llm.adapters import tiny_adapter
from tests.llm.tiny import edit_json, tiny_model

SIZE = 2 * 4 * 2 * (64 + 64) * 4
"""Bytes of an adapter of rank 4 for q_proj and o_proj of both layers: 64 inputs and outputs each, in float32."""
SMALL: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "o_proj"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("one", "two", "three")):
        tiny_adapter(folder, name, seed=seed, **SMALL)
    return folder


@pytest.fixture(scope="module")
def decoder() -> LeanDecoder:
    found = LeanDecoder.from_graph(tiny_model("llama"), choose("torch", "cpu"))
    assert isinstance(found, LeanDecoder)
    return found


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "loras", tmp_path / "model" / "loras")
    return tmp_path / "model"


@pytest.fixture
def opened(folder: Path, decoder: LeanDecoder) -> Callable[..., Adapters]:
    def open_(num: float = 8, **spec: Any) -> Adapters:
        adapters, _ = open_adapters(folder, decoder, LlmSpec(lora_bytes=int(num * SIZE), **spec))
        assert adapters is not None
        return adapters

    return open_


def test_adapters_are_listed_loaded_once_and_found_while_serving(folder, opened):
    adapters = opened()
    assert adapters.names() == ("one", "three", "two") and adapters.num_loaded == 0
    first, again = adapters.take("one"), adapters.take("one")
    assert first.weights is again.weights and (adapters.num_loads, adapters.nbytes) == (1, SIZE)
    with pytest.raises(NotFound, match="no adapter 'four'"):
        adapters.take("four")
    shutil.copytree(folder / "loras" / "one", folder / "loras" / "four")
    assert adapters.take("four").identity != first.identity
    assert "four" in adapters.names()


def test_it_is_loaded_once_also_for_two_threads_at_a_time(opened, monkeypatch: pytest.MonkeyPatch):
    # Given two readers, that meet where an adapter is read, if anything lets them
    adapters = opened()
    both = threading.Barrier(2)
    keep = adapters.layout.keep

    def meeting(adapter: Any) -> Any:
        with suppress(threading.BrokenBarrierError):
            both.wait(0.2)
        return keep(adapter)

    monkeypatch.setattr(adapters.layout, "keep", meeting)
    # When both take the same one
    with ThreadPoolExecutor(2) as readers:
        first, second = readers.map(adapters.take, ["one", "one"])
    # Then it lies in memory once
    assert first.weights is second.weights
    assert (adapters.num_loads, adapters.nbytes) == (1, SIZE)


def test_the_least_recently_used_makes_room_unless_it_is_in_use(opened):
    # Given room for two
    adapters = opened(2)
    one = adapters.take("one")
    adapters.take("two")  # nobody keeps it
    # When a third comes, the one that nobody uses goes, though it was used later
    three = adapters.take("three")
    assert (adapters.num_loaded, adapters.num_evictions) == (2, 1)
    # And while both are in use the next one is told so, and nobody loses anything
    with pytest.raises(Unavailable, match="requests use 2 others"):
        adapters.take("two")
    assert adapters.take("one").weights is one.weights and adapters.num_loads == 3
    # Until a request ends
    del three
    adapters.take("two")
    assert (adapters.num_loads, adapters.num_evictions, adapters.nbytes) == (4, 2, 2 * SIZE)


def test_an_adapter_that_was_replaced_is_another_one(folder, opened):
    adapters = opened(2)
    old = adapters.take("one")
    tiny_adapter(folder, "one", seed=9, **SMALL)
    new = adapters.take("one")
    assert new.identity != old.identity and new.weights is not old.weights
    assert adapters.nbytes == 2 * SIZE  # the old one stays for its request
    with pytest.raises(Unavailable):
        adapters.take("two")
    del old
    adapters.take("two")
    assert adapters.nbytes == 2 * SIZE


def test_a_refused_adapter_is_read_again_when_it_is_mended(folder, opened):
    adapters = opened()
    edit_json(folder / "loras" / "one" / CONFIG, use_dora=True)
    for _ in range(2):
        with pytest.raises(ModelError, match="the adapter 'one' cannot be used: .* DoRA"):
            adapters.take("one")
    edit_json(folder / "loras" / "one" / CONFIG, use_dora=False)
    adapters.take("one")


def test_no_budget_means_no_adapters(folder, decoder):
    assert open_adapters(folder, decoder, LlmSpec(lora_bytes=0)) == (None, [])


@pytest.mark.parametrize("loras", ["..", "../elsewhere", "/etc", ".", ""])
def test_the_folder_of_adapters_lies_in_the_models(folder, decoder, loras):
    with pytest.raises(LoadError, match="must be a folder in the model's"):
        open_adapters(folder, decoder, LlmSpec(loras=loras))


@pytest.mark.parametrize("name", ["../one", "..", ".", "one/../two", "/etc/passwd", "one\0", "o" * 65, "", "öne"])
def test_a_name_that_leads_elsewhere_is_no_adapter(opened, name):
    with pytest.raises(NotFound):
        opened().take(name)


# What is refused


def of_config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / CONFIG, **changes)


def of_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return apply


def renamed(old: str, new: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return of_weights(change)


def first_A(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return next(tensor for key, tensor in sorted(tensors.items()) if "lora_A" in key)


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])


def lying(folder: Path) -> None:
    """The header tells of the same bytes twice."""
    data = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    one, other = [key for key in header if "q_proj.lora_A" in key]
    header[one]["data_offsets"] = header[other]["data_offsets"]
    raw = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + size :])


def linked(folder: Path) -> None:
    outside = folder.parent.parent.parent / "outside.safetensors"
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def piped(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "DoRA": (of_config(use_dora=True), "DoRA"),
    "whole modules": (of_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "biases": (of_config(bias="all"), "bias: all"),
    "another method": (of_config(peft_type="LOHA"), "only LORA"),
    "what is not known": (of_config(use_sorcery=True), "`use_sorcery` is not known"),
    "a base that training changed": (of_config(init_lora_weights="pissa"), "changes the base model's own weights"),
    "a rank that is too high": (of_config(r=65), "`llm.max_lora_rank` is 64"),
    "a rank that its weights do not have": (of_config(r=5), r"has the shape \[4, 64\]"),
    "a rank that is no number": (of_config(r="4"), "`r` must be a number"),
    "an alpha that is no number": (of_config(lora_alpha=None), "`lora_alpha` must be a number"),
    "modules without weights": (of_config(target_modules=["q_proj", "o_proj", "v_proj"]), "lacks the weights of .*v_proj"),
    "weights that are not named": (of_config(target_modules=["q_proj"]), "o_proj.*, which adapter_config.json does not name"),
    "layers that are not named": (of_config(layers_to_transform=[0]), "layers.1.*does not name"),
    "a broken pattern": (of_config(target_modules="(q_proj"), "no regular expression"),
    "a pattern that takes for ever": (of_config(target_modules="(.|.|.)*#"), "takes too long|does not name"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{") and None, "is not JSON"),
    "embeddings": (renamed("layers.0.self_attn.q_proj.lora_A.weight", "embed_tokens.lora_embedding_A"), "embeddings"),
    "other tensors": (renamed("layers.0.self_attn.q_proj.lora_A.weight", "layers.0.input_layernorm.weight"), "only linear layers"),
    "one half": (of_weights(lambda tensors: tensors.pop(next(key for key in tensors if "lora_B" in key))), "only one of lora_A and lora_B"),
    "a deeper base": (renamed("layers.1.", "layers.7."), "no place.*made for 'somebody/model'"),
    "a wider base": (
        of_weights(lambda tensors: tensors.update({key: torch.zeros(4, 80) for key in tensors if "lora_A" in key})),
        r"\[4, 80\].*made for",
    ),
    "integers": (of_weights(lambda tensors: tensors.update({key: tensor.to(torch.int8) for key, tensor in tensors.items()})), "is I8"),
    "NaN": (of_weights(lambda tensors: first_A(tensors).fill_(float("nan"))), "infinity or NaN"),
    "a pickle": (pickled, "only in adapter_model.bin"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS}"),
    "a file that was cut": (cut, "truncated"),
    "a header that lies": (lying, "cannot be read|damaged"),
    "a link out of the folder": (linked, "leaves the model's folder"),
    "a pipe": (piped, "no plain file"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_lora_of_this_model_is_refused_with_a_reason(folder, opened, what):
    spoil, reason = REFUSED[what]
    edit_json(folder / "loras" / "one" / CONFIG, base_model_name_or_path="somebody/model")
    spoil(folder / "loras" / "one")
    adapters = opened()
    with pytest.raises(ModelError, match=reason):
        adapters.take("one")
    assert adapters.num_loaded == 0
    adapters.take("two")


def test_one_that_is_larger_than_the_budget_is_refused(opened):
    with pytest.raises(ModelError, match="more than all of `llm.lora_bytes`"):
        opened(0.5).take("one")
