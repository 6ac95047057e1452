"""Checkpoints on disk: what is whole is loaded exactly, what is not is refused in one sentence that names the file."""

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fairlead.core.errors import LoadError
from fairlead.core.specs import LlmSpec
from fairlead.llm.checkpoint import INDEX, WEIGHTS, choose_dtype, load_generator, open_checkpoint
from fairlead.llm.load import load_decoder
from tests.llm.tiny import EOS_ID, VOCAB, edit_json, tiny_checkpoint

FIRST = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("whole") / "tiny")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("sharded") / "tiny", max_shard_size="100KB")


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(whole, tmp_path / "tiny")


def load(folder: Path) -> Any:
    checkpoint = open_checkpoint(folder)
    return load_generator(checkpoint, checkpoint.dtype, "eager")


def why(folder: Path) -> str:
    with pytest.raises(LoadError) as caught:
        load(folder)
    assert "\n" not in caught.value.message
    return caught.value.message


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*-of-*.safetensors"))


# What is whole


@pytest.mark.parametrize("kind", ["whole", "sharded"])
def test_the_weights_are_those_of_the_files(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    stored = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}

    model = load(folder)

    assert (len(shards(folder)) > 2) == (kind == "sharded")
    loaded = model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in stored.items())
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_nothing_is_asked_of_the_network(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a checkpoint is a folder")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load_decoder(whole, LlmSpec(kernels="torch"))


def test_a_moe_checkpoint_in_its_old_spelling_is_the_same_model(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "moe", "mixtral")  # saved with one tensor for each expert, computed with one for all
    assert any("experts.3" in name for name in open_checkpoint(folder).tensors)
    ids = torch.arange(5, 15)[None]
    with torch.inference_mode():
        wanted = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")(ids).logits
        # not bit for bit: where a tensor happens to lie in memory decides in which order some CPUs add
        torch.testing.assert_close(load(folder)(ids).logits, wanted, rtol=1e-5, atol=1e-5)


def test_tied_embeddings_need_no_head_in_the_file(tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path / "tied", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_generation_defaults_and_ends(folder: Path) -> None:
    assert open_checkpoint(folder).eos_ids == (EOS_ID,)
    path = folder / "generation_config.json"
    edit_json(path, temperature=0.6, top_k=20, top_p=None, do_sample=True, eos_token_id=[2, 4], max_length=99)
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.defaults, checkpoint.eos_ids) == ({"temperature": 0.6, "top_k": 20}, (2, 4))
    edit_json(path, do_sample=False)
    assert open_checkpoint(folder).defaults["temperature"] == 0.0
    path.unlink()
    edit_json(folder / "config.json", eos_token_id=[5, 6])
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.defaults, checkpoint.eos_ids) == ({}, (5, 6))


@pytest.mark.parametrize(
    ("stored", "wanted", "device", "computed"),
    [
        (torch.float32, "auto", "cpu", torch.float32),
        (torch.bfloat16, "auto", "cpu", torch.bfloat16),
        (torch.float16, "auto", "cpu", torch.bfloat16),
        (torch.float16, "auto", "cuda", torch.float16),
        (torch.float64, "auto", "cpu", torch.float32),
        (torch.bfloat16, "float32", "cpu", torch.float32),
        (torch.float32, "bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_the_dtype_is_the_checkpoints_own_as_far_as_the_device_has_it(
    stored: torch.dtype, wanted: Any, device: str, computed: torch.dtype
) -> None:
    assert choose_dtype(stored, LlmSpec(dtype=wanted), device) == computed


def test_the_files_tell_the_dtype_and_not_the_config(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "half", dtype=torch.float16)
    edit_json(folder / "config.json", dtype="float32")
    loaded = load_decoder(folder, LlmSpec(kernels="torch"))
    assert loaded.decoder.dtype == torch.bfloat16
    assert "of float16, computed in bfloat16" in loaded.explain[0]


# What is not


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert why(tmp_path / "empty") == "empty has no config.json"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{not json", "tiny/config.json is not JSON: "),
        ("[]", "tiny/config.json must hold a JSON object, not list"),
        ("\xff", "is not JSON"),
    ],
)
def test_a_config_that_is_no_json_object(folder: Path, text: str, reason: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert reason in why(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": ...}, "tiny/config.json has no `model_type`"),
        ({"architectures": ...}, "tiny/config.json has no `architectures`"),
        ({"architectures": []}, "tiny/config.json has no `architectures`"),
        ({"model_type": "lama"}, "tiny/config.json: `model_type` 'lama' is not known to transformers"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}, "tiny/config.json has an `auto_map`"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "tiny/config.json says that the weights are quantised (gptq)"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification' does not predict a next token"),
        ({"architectures": ["BertModel"], "model_type": "bert"}, "'BertModel' does not predict a next token"),
        ({"hidden_size": "wide"}, "tiny/config.json is not a valid 'llama' configuration"),
    ],
)
def test_a_config_that_names_no_model_of_ours(folder: Path, changes: dict[str, Any], reason: str) -> None:
    edit_json(folder / "config.json", **changes)
    assert reason in why(folder)


@pytest.mark.parametrize("changes", [{"temperature": "hot"}, {"top_p": 7}, {"eos_token_id": "</s>"}])
def test_a_generation_config_that_makes_no_sense(folder: Path, changes: dict[str, Any]) -> None:
    edit_json(folder / "generation_config.json", **changes)
    assert "tiny/generation_config.json: Expected" in why(folder)


def test_weights_that_are_missing_or_only_pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert why(folder) == f"tiny has no weights: neither {WEIGHTS} nor {INDEX}"
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert "only in pytorch_model.bin, which is not loaded: convert it to safetensors" in why(folder)


@pytest.mark.parametrize("left", [0, 5, 40, 2000, -1])
def test_a_truncated_file(folder: Path, left: int) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:left])
    assert f"tiny/{WEIGHTS} is truncated" in why(folder)


def test_a_damaged_header(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[8:12] = b"oops"
    (folder / WEIGHTS).write_bytes(data)
    assert f"tiny/{WEIGHTS} is no safetensors file: its header is damaged" in why(folder)
    (folder / WEIGHTS).write_bytes(b"\xff" * 64)
    assert f"tiny/{WEIGHTS} is truncated, or no safetensors file" in why(folder)


def test_a_padding_token_that_has_no_embedding(folder: Path) -> None:
    edit_json(folder / "config.json", pad_token_id=VOCAB)
    assert why(folder) == f"tiny/{WEIGHTS} cannot be loaded as LlamaForCausalLM: Padding_idx must be within num_embeddings"


def test_a_missing_tensor(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors.pop(FIRST))
    assert why(folder) == f"tiny/{WEIGHTS} lacks {FIRST} of LlamaForCausalLM"


def test_a_tensor_too_many(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.lora_A": torch.zeros(2)}))
    message = why(folder)
    assert f"tiny/{WEIGHTS} holds model.layers.0.self_attn.q_proj.lora_A, for which LlamaForCausalLM" in message


def test_more_layers_than_the_config_knows(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)
    assert "holds model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight" in why(folder)
    edit_json(folder / "config.json", num_hidden_layers=3)
    assert f"tiny/{WEIGHTS} lacks model.layers.2." in why(folder)


def test_a_wrong_shape(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({FIRST: torch.zeros(64, 63)}))
    assert why(folder) == (
        f"tiny/{WEIGHTS}: tensor '{FIRST}' has the shape [64, 63], but LlamaForCausalLM with this config.json needs [64, 64]"
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_integers_where_weights_should_be(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({FIRST: torch.zeros(64, 64, dtype=dtype)}))
    assert f"tiny/{WEIGHTS}: tensor '{FIRST}' is {str(dtype)[6:7].upper()}" in why(folder)


def test_eight_bit_floats(folder: Path) -> None:
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({FIRST: torch.zeros(64, 64).to(torch.float8_e4m3fn)}))
    assert f"tiny/{WEIGHTS}: tensor '{FIRST}' is F8_E4M3, a quantised format that is not supported" in why(folder)


# Shards


@pytest.fixture
def parts(sharded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sharded, tmp_path / "tiny")


def test_a_missing_shard(parts: Path) -> None:
    missing = shards(parts)[1]
    missing.unlink()
    assert f"tiny lacks {missing.name} of the {len(shards(parts)) + 1} shards that {INDEX} names" == why(parts)


def test_a_shard_that_the_index_does_not_name(parts: Path) -> None:
    stranger = parts / "model-00009-of-00003.safetensors"
    shutil.copy(shards(parts)[0], stranger)
    assert f"tiny holds {stranger.name}, which {INDEX} does not name" in why(parts)


def test_a_tensor_that_is_not_where_the_index_says(parts: Path) -> None:
    shard = shards(parts)[0]
    name = next(iter(load_file(shard)))
    rewrite(shard, lambda tensors: tensors.pop(name))
    assert why(parts) == f"tiny/{shard.name} lacks the tensor {name!r} that {INDEX} says it has"


def test_a_tensor_that_the_index_does_not_name(parts: Path) -> None:
    shard = shards(parts)[0]
    rewrite(shard, lambda tensors: tensors.update(stray=torch.zeros(2)))
    assert why(parts) == f"tiny/{shard.name} holds stray, which {INDEX} does not name"


def test_a_truncated_shard(parts: Path) -> None:
    shard = shards(parts)[-1]
    shard.write_bytes(shard.read_bytes()[:-4])
    assert f"tiny/{shard.name} is truncated" in why(parts)


@pytest.mark.parametrize("weight_map", [..., [], {"x": 1}, {"x": "../model.safetensors"}])
def test_an_index_without_a_map(parts: Path, weight_map: Any) -> None:
    edit_json(parts / INDEX, weight_map=weight_map)
    assert why(parts) == f"tiny/{INDEX} has no `weight_map` from tensors to files of the folder"
