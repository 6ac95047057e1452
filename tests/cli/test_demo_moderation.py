"""The demonstration classifier: what it learnt, and that it does what a filter wants when it is served."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from fairlead.backends.python import PythonBackend
from fairlead.cli.demo import RECIPES
from fairlead.cli.demo_models import moderation_sentences
from fairlead.cli.demo_models.moderation import LABELS, features
from fairlead.cli.demo_models.moderation_sentences import Trained, sentences, train
from fairlead.core.errors import Filtered
from fairlead.core.generation import Generate
from fairlead.core.policy import FilterPolicy
from fairlead.core.request import Request
from fairlead.core.specs import ModelSpec
from fairlead.core.tensors import object_array
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.filters.moderation import by_label


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train()


def test_what_is_held_out_was_not_learnt_from() -> None:
    seen, unseen = ({text.lower().strip(".!?") for text, _ in sentences(held_out=held_out)} for held_out in (False, True))
    assert seen.isdisjoint(unseen)
    assert {label for _, labels in sentences(held_out=True) for label in labels} == set(LABELS)


def test_how_good_it_is_is_as_the_docs_say(trained: Trained) -> None:
    assert list(trained.scores) == list(LABELS)
    assert all(area > 0.9 for area, _, _ in trained.scores.values())
    assert trained.exact > 0.7
    assert trained.false_alarms < 0.15
    assert trained.weights.nbytes < 500_000


def test_a_hostile_text_costs_a_bounded_number_of_features() -> None:
    assert len(features("x" * 1_000_000)) < 200
    assert len(features("word " * 1_000_000)) < 50
    assert len(features(" ".join(f"w{n}" for n in range(100_000)))) < 32_768
    assert len(features("")) == 0


async def test_served_it_answers_what_the_filter_asks(tmp_path: Path, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moderation_sentences, "train", lambda: trained)
    folder = tmp_path / "moderation" / "1"
    folder.mkdir(parents=True)
    built = RECIPES["moderation"](folder)
    assert (folder.parent / "model.yaml").read_text().count("labels: [harassment, hate, violence, self-harm, sexual, illicit, spam]") == 1
    executable = PythonBackend().load(folder / "model.py", ModelSpec(name="moderation"), 1)

    async def classify(model: str, texts: list[str]) -> Sequence[Mapping[str, float]]:
        rows = object_array([text.encode() for text in texts], (len(texts),))
        outputs = executable.infer({"text": rows}, None)
        assert isinstance(outputs, dict) and outputs["probability"].dtype == np.float32
        return by_label(built.labels, outputs["probability"])

    filters = Filters.of(FilterPolicy(moderation="block"))
    assert await filters.moderate(Request(model="m", prompt=Generate(text="What is the capital of France?")), classify) == ()
    with pytest.raises(Filtered) as refused:
        await filters.moderate(Request(model="m", prompt=Generate(text=built.values[0])), classify)
    assert refused.value.rule == "moderation.illicit"
    executable.close()
