"""Two answers to one request, by kind."""

import io

import msgspec
import numpy as np
import pytest
from PIL import Image

from fairlead.control.compare.classes import MAX_CLASSES, OTHER, Calibration, Classes, probabilities
from fairlead.control.compare.numbers import Numbers
from fairlead.control.compare.pictures import Pictures, pixels, similarity
from fairlead.control.compare.spread import ks, psi, psi_of, spread
from fairlead.control.compare.texts import Texts, choices, refuses, suffix
from fairlead.control.compare.vectors import Vectors, unit_vectors
from fairlead.control.compare.verdict import Verdict, worse
from fairlead.core.generation import Delta, Generate, Picture, Sampling, TokenLogprob
from fairlead.core.request import Response
from fairlead.core.rollout import ShadowRules

RULES = ShadowRules(rtol=0.01, atol=0.001, min_cosine=0.99, min_similarity=0.9, max_logprob_drop=0.1)
RANDOM = np.random.default_rng(7)


def again(value):
    """As it comes back from JSON."""
    return msgspec.json.decode(msgspec.json.encode(value), type=type(value))


# Spreads


def test_two_samples_of_one_distribution_are_spread_alike():
    one, other = spread(RANDOM.normal(size=20_000)), spread(RANDOM.normal(size=20_000))
    assert ks(one, other) < 0.02 and psi(one, other) < 0.01


def test_a_shift_shows():
    one, other = spread(RANDOM.normal(size=20_000)), spread(RANDOM.normal(0.5, 1.0, size=20_000))
    # of two normal distributions half a standard deviation apart: 2 Phi(0.25) - 1 = 0.197
    assert ks(one, other) == pytest.approx(0.197, abs=0.02)
    assert 0.2 < psi(one, other) < 0.32


def test_ks_is_scipys_but_for_the_width_of_a_bucket():
    from scipy.stats import ks_2samp

    one, other = RANDOM.gamma(2.0, size=3000), RANDOM.gamma(2.4, size=3000)
    assert ks(spread(one), spread(other)) == pytest.approx(ks_2samp(one, other).statistic, abs=0.02)


def test_the_index_of_classes():
    # (0.5 - 0.8) ln(0.5 / 0.8) + (0.5 - 0.2) ln(0.5 / 0.2)
    assert psi_of({"a": 80, "b": 20}, {"a": 50, "b": 50}) == pytest.approx(0.41589, abs=1e-4)
    assert psi_of({"a": 80}, {}) is None and psi({}, {1: 1}) is None and ks({}, {}) is None
    assert psi_of({"a": 1000}, {"b": 1000}) < 20  # not infinite


def test_what_is_no_number_is_spread_nowhere():
    assert spread(np.array([np.nan, np.inf, 0.0, -1.0, 1.0])) == {0: 1, 1047: 1, -1047: 1}


# Numbers


def test_numbers_agree_within_the_tolerance():
    numbers = Numbers()
    champion = np.array([[100.0], [0.0], [-5.0]])
    assert numbers.add(champion, champion * 1.009, RULES).agree
    found = numbers.add(champion, champion * 1.02, RULES)
    assert not found.agree and found.note.startswith("102 instead of 100")
    assert (numbers.num, numbers.num_close, numbers.most) == (6, 4, pytest.approx(2.0))
    assert numbers.describe()["mean_difference"] == pytest.approx((0.9 - 0.045 + 2.0 - 0.1) / 6)


def test_numbers_that_are_none_agree_only_with_themselves():
    nan, infinite, one = np.array([np.nan]), np.array([np.inf]), np.array([1.0])
    assert Numbers().add(nan, nan, RULES).agree and Numbers().add(infinite, infinite, RULES).agree
    for champion, candidate in ((one, nan), (nan, one), (one, infinite), (infinite, -infinite)):
        found = Numbers().add(champion, candidate, RULES)
        assert not found.agree and np.isfinite(found.distance)


def test_another_shape_is_another_answer():
    assert "shape" in Numbers().add(np.zeros((1, 2)), np.zeros((1, 3)), RULES).note


# Classes


def test_classes_by_their_labels():
    classes = Classes()
    labels = np.array([[b"cat"], [b"dog"], [b"cat"]], object)
    assert classes.add_labels(labels, labels).agree
    found = classes.add_labels(labels, np.array([[b"cat"], [b"cat"], [b"cat"]], object))
    assert not found.agree and found.note == "class cat instead of dog"
    assert (classes.num, classes.num_same) == (6, 5)
    assert classes.champion == {"cat": 4, "dog": 2} and classes.candidate == {"cat": 5, "dog": 1}


def test_probabilities_agree_where_the_first_choice_is_the_same():
    classes = Classes()
    sure, unsure = np.array([[0.9, 0.1]], np.float32), np.array([[0.6, 0.4]], np.float32)
    assert classes.add_probabilities(sure, unsure).agree
    assert not classes.add_probabilities(unsure, 1 - unsure).agree
    found = classes.describe()
    assert found["same"] == 0.5 and found["confidence_shift"] == pytest.approx(-0.15, abs=1e-6)


def test_classes_are_bounded():
    classes = Classes()
    labels = np.arange(MAX_CLASSES + 50).reshape(-1, 1)
    classes.add_labels(labels, labels)
    assert len(classes.champion) == MAX_CLASSES + 1 and classes.champion[OTHER] == 50


def test_what_probabilities_are():
    assert probabilities(np.array([[0.2, 0.8], [1.0, 0.0]]))
    for array in ([[0.2, 0.9]], [[1.2, -0.2]], [[1.0]], [0.5, 0.5], [[np.nan, 1.0]]):
        assert not probabilities(np.array(array))


def test_calibration_of_a_model_that_is_too_sure():
    sure, honest = Calibration(), Calibration()
    for n in range(100):
        truth = float(n % 10 < 6)
        sure.add_row(np.array([0.05, 0.95]), truth)
        honest.add_row(np.array([0.4, 0.6]), truth)
    assert sure.describe()["accuracy"] == honest.describe()["accuracy"] == pytest.approx(0.6)
    assert sure.describe()["calibration_error"] == pytest.approx(0.35)
    assert honest.describe()["calibration_error"] == pytest.approx(0.0, abs=1e-9)
    assert sure.describe()["mean_square"] > honest.describe()["mean_square"]


def test_calibration_of_one_probability_and_of_a_number():
    score, number = Calibration(), Calibration()
    score.add_row(np.array([0.2]), 0.0)
    number.add_row(np.array([12.0]), 10.0)
    assert score.describe() == {
        "labels": 1,
        "mean_square": pytest.approx(0.04),
        "accuracy": 1.0,
        "calibration_error": pytest.approx(0.2),
    }
    assert number.describe() == {"labels": 1, "mean_square": 4.0, "mean_distance": 2.0}


# Embeddings


def test_embeddings_point_the_same_way():
    vectors = Vectors()
    one = RANDOM.normal(size=(3, 32))
    assert vectors.add(one, one * 5.0, RULES).agree
    found = vectors.add(one, np.concatenate([one[:2], -one[2:]]), RULES)
    assert not found.agree and found.distance == pytest.approx(2.0)
    assert vectors.describe()["mean_cosine"] == pytest.approx(4 / 6) and vectors.least == pytest.approx(-1.0)


def test_embeddings_of_nothing():
    nothing, something = np.zeros((1, 32)), np.ones((1, 32))
    assert Vectors().add(nothing, nothing, RULES).agree and not Vectors().add(nothing, something, RULES).agree
    assert not Vectors().add(something, something * np.nan, RULES).agree


def test_what_embeddings_are():
    rows = RANDOM.normal(size=(4, 32))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert unit_vectors(unit.astype(np.float32)) and not unit_vectors(rows) and not unit_vectors(unit[:, :8])


# Texts


def answer(*pieces, finish="stop"):
    deltas = [Delta(text=piece, token_ids=[n]) for n, piece in enumerate(pieces)]
    deltas[-1].finish_reason = finish
    return [Response(model="m", version="1", delta=delta) for delta in deltas]


def greedy(**fields):
    return Generate(text="hi", sampling=Sampling(temperature=0.0, **fields))


SAMPLED = Generate(text="hi", sampling=Sampling(temperature=0.7))


def test_at_temperature_0_texts_must_be_the_same_but_for_white_space():
    texts = Texts()
    assert texts.add(greedy(), answer("Good", " day"), answer("Good  day\n"), None, RULES).agree
    found = texts.add(greedy(), answer("Good day"), answer("Good night"), None, RULES)
    assert not found.agree and found.note == "another text from character 5 on" and found.distance == pytest.approx(0.5)
    assert texts.describe()["same_at_temperature_0"] == 0.5 and texts.describe()["mean_tokens"] == [1.5, 1.0]


def test_of_sampled_texts_nothing_can_be_told_without_scores():
    assert Texts().add(SAMPLED, answer("a"), answer("b"), None, RULES).agree is None
    unknown = Generate(text="hi")  # the model's own default may be any
    assert Texts().add(unknown, answer("a"), answer("b"), None, RULES).agree is None


def scored(*logprobs):
    tokens = [None, *(TokenLogprob(1, text, text.encode(), logprob, 1) for text, logprob in logprobs)]
    return Response(model="m", version="1", delta=Delta(prompt_logprobs=tokens))


def test_scores_tell_of_sampled_texts():
    texts = Texts()
    champion = scored(("hi", -9.0), (" Good", -1.0), (" day", -2.0))
    near, far = scored(("hi", -1.0), (" Good day", -3.1)), scored(("hi", -1.0), (" Good", -3.0), (" day", -2.0))
    assert texts.add(SAMPLED, answer("Good day"), answer("x"), (champion, near), RULES).agree
    found = texts.add(SAMPLED, answer("Good day"), answer("x"), (champion, far), RULES)
    assert not found.agree and found.distance == pytest.approx(1.0)
    assert texts.describe()["logprob_delta"] == pytest.approx((-0.1 - 2.0) / 4)


def test_the_answers_tokens_are_the_last_that_spell_it():
    tokens = scored(("Good", -9.0), (" day? Go", -1.0), ("od", -2.0), ("<end>", -5.0)).delta.prompt_logprobs
    assert suffix(tokens, Delta(text="Good")) == (-3.0, 2)
    assert suffix(tokens, Delta(text="night")) is None and suffix(tokens, Delta(text=" ")) is None


def test_refusals_and_answers_that_were_cut_off_are_counted():
    texts = Texts()
    texts.add(greedy(), answer("Sure: 42"), answer("I'm sorry, but I cannot help with that.", finish="length"), None, RULES)
    assert texts.describe()["refused"] == [0.0, 1.0] and texts.describe()["cut_off"] == [0.0, 1.0]


@pytest.mark.parametrize("text", ["I can't do that", "I cannot help", "As an AI language model, I", "I am unable to say", "I’m sorry"])
def test_refusals(text):
    assert refuses(text)


@pytest.mark.parametrize("text", ["Sure!", "The can't of 1789", "He is sorry", "x" * 300 + "I cannot help"])
def test_what_is_no_refusal(text):
    assert not refuses(text)


def test_choices_are_put_together():
    pieces = [Delta(index=1, text="b"), Delta(index=0, text="a", token_ids=[1]), Delta(index=0, text="c", token_ids=[2])]
    whole = choices([Response(model="m", version="1", delta=each) for each in pieces])
    assert [(each.text, each.token_ids) for each in whole] == [("ac", [1, 2]), ("b", [])]
    assert pieces[1].text == "a"


# Pictures


def png(array):
    data = io.BytesIO()
    Image.fromarray(array.astype(np.uint8)).save(data, "PNG")
    height, width = array.shape[:2]
    return Picture(
        data=data.getvalue(), content_type="image/png", width=width, height=height, seed=1, num_steps=1, guidance=0.0, scheduler=""
    )


def scene(noise=0.0):
    y, x = np.mgrid[:64, :64]
    picture = np.stack([127 + 100 * np.sin(x / 5), 127 + 100 * np.cos(y / 7), (x + y) * 2.0], axis=-1)
    return np.clip(picture + RANDOM.normal(0, noise, picture.shape) if noise else picture, 0, 255)


def test_pictures_agree_by_their_structure():
    pictures = Pictures()
    assert pictures.add(png(scene()), png(scene()), RULES).agree
    assert pictures.add(png(scene()), png(scene(noise=3.0)), RULES).agree
    found = pictures.add(png(scene()), png(scene(noise=80.0)), RULES)
    assert not found.agree and "structural similarity" in found.note
    assert not pictures.add(png(scene()), png(255 - scene()), RULES).agree
    assert not pictures.add(png(scene()), png(scene()[:32]), RULES).agree
    assert pictures.num == 5 and pictures.describe()["least_similarity"] < 0.5


def test_structural_similarity_of_a_few_cases():
    flat = np.full((32, 32, 3), 100.0)
    assert similarity(flat, flat) == pytest.approx(1.0)
    # of flat pictures only the means count: (2ab + C1) / (a^2 + b^2 + C1)
    assert similarity(flat, flat + 20) == pytest.approx((2 * 100 * 120 + 6.5025) / (100**2 + 120**2 + 6.5025))
    assert similarity(pixels(png(scene()).data), pixels(png(255 - scene()).data)) < 0


def test_what_is_no_picture():
    broken = msgspec.structs.replace(png(scene()), data=b"no picture")
    with pytest.raises(OSError, match="cannot identify"):
        Pictures().add(png(scene()), broken, RULES)


# Adding up


def halves(make, add):
    """All in one, and two halves that went through JSON and were added."""
    whole, first, second = make(), make(), make()
    for n in range(40):
        add(whole, n)
        add(first if n < 25 else second, n)
    first, second = again(first), again(second)
    first.merge(second)
    return whole, first


def rows_of(n):
    random = np.random.default_rng(n)
    return random.normal(size=(2, 20)), random.normal(size=(2, 20))


def shares_of(n):
    return tuple(np.exp(each) / np.exp(each).sum(axis=1, keepdims=True) for each in rows_of(n))


@pytest.mark.parametrize(
    ("make", "add"),
    [
        (Numbers, lambda each, n: each.add(*rows_of(n), RULES)),
        (Classes, lambda each, n: each.add_probabilities(*shares_of(n))),
        (Classes, lambda each, n: each.add_labels(np.array([n % 7, 3]), np.array([n % 5, 3]))),
        (Calibration, lambda each, n: each.add_row(shares_of(n)[0][0], n % 20)),
        (Vectors, lambda each, n: each.add(*rows_of(n), RULES)),
        (Texts, lambda each, n: each.add(greedy(), answer("a" * n + "."), answer("a" * 5 + "."), None, RULES)),
        (Pictures, lambda each, n: each.add(png(scene()), png(scene() * (1 - n / 100)), RULES)),
    ],
    ids=["numbers", "probabilities", "labels", "calibration", "vectors", "texts", "pictures"],
)
def test_parts_add_up_to_the_whole(make, add):
    whole, added = halves(make, add)
    assert flat(added.describe()) == pytest.approx(flat(whole.describe()))


def flat(value, name=""):
    if isinstance(value, dict):
        return {key: each for part, inner in value.items() for key, each in flat(inner, f"{name}.{part}").items()}
    if isinstance(value, (list, tuple)):
        return flat(dict(enumerate(value)), name)
    return {name: value}


def test_the_worst_part_of_an_answer_counts():
    same, far, near, unknown = Verdict(True), Verdict(False, 9.0), Verdict(False, 2.0), Verdict(None)
    assert worse(same, near) is near and worse(near, far) is far and worse(unknown, same) is unknown and worse(unknown, near) is near
