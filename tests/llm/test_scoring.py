"""Scores of pairs: sentence-transformers' CrossEncoder's, whoever else is in the batch."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification

from fairlead.core.errors import ContextExceeded, InvalidRequest, LoadError
from fairlead.core.specs import LlmSpec
from fairlead.llm.build import build_scorer, task_of
from fairlead.llm.embedder import Pair
from fairlead.llm.scoring import ScoringModel, load_scoring
from fairlead.llm.tokenizer import Tokenizer, cut_lengths
from tests.llm.tiny import BASE, BOS, EOS, edit_json, tiny_tokenizer

WORDS = ["a fairlead", "guides", "the line", "so that", "it runs", "free", "Ünïcode", "☃", "42 metres,", "(deep) sea!"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def texts(count: int, longest: int = 40, seed: int = 0) -> list[str]:
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, longest))) for _ in range(count)]


def cross_encoder(folder: Path, model_type: str = "bert", **overrides: Any) -> Path:
    """A small one whose weights are random, and far enough from zero for scores that differ."""
    config = AutoConfig.for_model(model_type, **{**BASE, "num_key_value_heads": 4, "num_labels": 1, "pad_token_id": 0, **overrides})
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15)
        *_, last = (module for module in model.modules() if isinstance(module, torch.nn.Linear))
        last.weight.mul_(20)
    model.save_pretrained(folder)
    tokenizer = Backend.from_str(tiny_tokenizer().to_str())
    tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A {EOS}",
        pair=f"{BOS} $A {EOS} $B:1 {EOS}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(
        folder / "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        pad_token="<pad>",
        model_max_length=256,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cross_encoder(tmp_path_factory.mktemp("cross") / "tiny")


@pytest.fixture(scope="module")
def model(folder: Path) -> ScoringModel:
    return load_scoring(folder, LlmSpec())


def scores(model: ScoringModel, folder: Path, pairs: list[tuple[str, str]], *, raw: bool = False, limit: int | None = None) -> np.ndarray:
    tokenizer = Tokenizer.load(folder)
    return model.embed([Pair(*tokenizer.encode_pair(*pair, limit), raw=raw) for pair in pairs])[:, 0]


def expected(folder: Path, pairs: list[tuple[str, str]], **how: Any) -> np.ndarray:
    from sentence_transformers import CrossEncoder

    given: np.ndarray = CrossEncoder(str(folder), device="cpu", local_files_only=True).predict(pairs, show_progress_bar=False, **how)
    return given


PAIRS = list(zip(texts(12, longest=12), texts(12, longest=12, seed=1), strict=True))


def test_scores_are_those_of_sentence_transformers(model: ScoringModel, folder: Path) -> None:
    ours = scores(model, folder, PAIRS)
    assert scores(model, folder, PAIRS, raw=True).std() > 0.01
    assert np.abs(ours - expected(folder, PAIRS)).max() < 1e-5
    assert np.abs(scores(model, folder, PAIRS, raw=True) - expected(folder, PAIRS, activation_fn=torch.nn.Identity())).max() < 1e-5


@pytest.mark.parametrize("model_type", ["xlm-roberta", "distilbert", "modernbert"])
def test_other_families_of_encoders(tmp_path: Path, model_type: str) -> None:
    names = {"dim": 64, "n_heads": 4, "hidden_dim": 128, "n_layers": 2} if model_type == "distilbert" else {}
    folder = cross_encoder(tmp_path / "tiny", model_type, **names)
    edit_json(folder / "tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])
    model = load_scoring(folder, LlmSpec())
    assert np.abs(scores(model, folder, PAIRS) - expected(folder, PAIRS)).max() < 1e-5


def test_a_pair_scores_the_same_alone_and_in_any_batch(model: ScoringModel, folder: Path) -> None:
    together = scores(model, folder, PAIRS)
    alone = np.concatenate([scores(model, folder, [pair]) for pair in PAIRS])
    assert np.abs(together - alone).max() < 1e-6


@pytest.mark.parametrize("limit", [8, 9, 20, 64])
def test_what_is_too_long_is_cut_as_transformers_cuts_it(model: ScoringModel, folder: Path, limit: int) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), Tokenizer.load(folder)
    pairs = [*PAIRS, (PAIRS[0][0] * 9, PAIRS[0][1]), (PAIRS[0][0], PAIRS[0][1] * 9)]
    for pair in pairs:
        given = theirs(*pair, truncation=True, max_length=limit)
        assert ours.encode_pair(*pair, limit) == (given["input_ids"], given["token_type_ids"])
    how = {"processing_kwargs": {"text": {"max_length": limit, "truncation": True}}}
    assert np.abs(scores(model, folder, pairs, limit=limit) - expected(folder, pairs, **how)).max() < 1e-5


def test_where_two_texts_are_cut() -> None:
    assert cut_lengths(10, 2, 8) == (6, 2)
    assert cut_lengths(2, 10, 8) == (2, 6)
    assert cut_lengths(10, 10, 9) == (4, 5)
    assert cut_lengths(11, 10, 9) == (5, 4)


def test_what_is_too_long_is_refused_unless_it_may_be_cut(model: ScoringModel, folder: Path) -> None:
    long = "line " * 300
    with pytest.raises(ContextExceeded, match="the two texts have .* together: shorten one, or set `truncate_prompt_tokens`"):
        scores(model, folder, [(long, "x")])
    assert np.isfinite(scores(model, folder, [(long, "x")], limit=256)).all()
    with pytest.raises(InvalidRequest, match="`truncate_prompt_tokens` is 3: it must leave room"):
        scores(model, folder, [(long, "x")], limit=3)


# Folders


@pytest.mark.parametrize(
    ("file", "keys", "kind"),
    [
        ("config.json", {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "Identity"),
        ("config.json", {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "Identity"),
        ("config_sentence_transformers.json", {"model_type": "CrossEncoder", "activation_fn": "torch.nn.modules.activation.Tanh"}, "Tanh"),
        ("config.json", {}, "Sigmoid"),
    ],
)
def test_the_activation_is_the_one_that_the_files_name(tmp_path: Path, file: str, keys: dict[str, Any], kind: str) -> None:
    folder = cross_encoder(tmp_path / "tiny")
    edit_json(folder / file, **keys)
    model = load_scoring(folder, LlmSpec())
    assert model.activation == kind
    if file == "config.json":
        assert np.abs(scores(model, folder, PAIRS) - expected(folder, PAIRS)).max() < 1e-5


def test_a_folder_that_sentence_transformers_saved(folder: Path, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    CrossEncoder(str(folder), device="cpu", local_files_only=True, max_length=40).save_pretrained(str(tmp_path / "saved"))
    assert task_of(tmp_path / "saved", LlmSpec()) == task_of(folder, LlmSpec()) == "score"
    assert task_of(folder, LlmSpec(task="embed")) == "embed"
    engine, tokenizer, info = build_scorer(tmp_path / "saved", LlmSpec())
    assert (info.tasks, info.max_model_len, info.architecture) == (("score", "tokenize"), 40, "BertForSequenceClassification")
    assert any("Sigmoid" in line for line in info.explain)
    for id, pair in enumerate(PAIRS):
        engine.add(id, Pair(*tokenizer.encode_pair(*pair, 40), raw=False), None)
    answers: dict[int, Any] = {}
    while engine.has_work:
        answers.update(engine.step())
    ours = np.array([np.frombuffer(answers[id].vector, "<f4")[0] for id in range(len(PAIRS))])
    assert np.abs(ours - expected(tmp_path / "saved", PAIRS)).max() < 1e-5
    assert answers[0].usage.prompt_tokens == len(tokenizer.encode_pair(*PAIRS[0], 40)[0])


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"config.json": {"num_labels": 3, "id2label": {"0": "a", "1": "b", "2": "c"}}}, "has 3 labels: a score needs a model with one"),
        ({"config.json": {"architectures": ["BertModel"]}}, "scores of pairs come from a model of ...ForSequenceClassification"),
        ({"config.json": {"sentence_transformers": {"activation_fn": "my.module.Odd"}}}, "activation 'my.module.Odd' is not supported"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "query"}}, "`default_prompt_name` is not supported"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, change: dict[str, dict[str, Any]], why: str) -> None:
    folder = cross_encoder(tmp_path / "tiny")
    for file, keys in change.items():
        edit_json(folder / file, **keys)
    with pytest.raises(LoadError, match=why):
        load_scoring(folder, LlmSpec())
