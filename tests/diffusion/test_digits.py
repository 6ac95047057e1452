"""The image model that ships: whether its pictures show what was asked for, as a classifier of real digits sees them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fairlead.cli.demo_models.digits import FOLDER, GUIDANCE, MODEL, NUM_STEPS, moderation
from fairlead.cli.demo_models.digits.judge import Judge, colours, train_judge
from fairlead.cli.demo_models.digits.paint import paint
from fairlead.cli.demo_models.digits.pictures import COLOURS, PIXELS, SIZES, as_pixels, draw, from_pixels, ink_of, originals

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FORMS = (
    "{digit}",
    "a {word}",
    "the digit {digit}",
    "a handwritten {word}",
    "A {colour} {word}",
    "please draw the number {digit} in {colour}",
)


@pytest.fixture(scope="module")
def judge() -> Judge:
    return train_judge()


@pytest.fixture(scope="module")
def asked() -> list[tuple[int, str, str]]:
    """Digit, colour or "" where none is named, prompt: each digit in each form."""
    found = []
    for digit, word in enumerate(WORDS):
        for number, form in enumerate(FORMS):
            colour = list(COLOURS)[(digit + number) % len(COLOURS)]
            found.append((digit, colour if "{colour}" in form else "", form.format(digit=digit, word=word, colour=colour)))
    return found


@pytest.fixture(scope="module")
def painted(asked: list[tuple[int, str, str]]) -> np.ndarray:
    return paint([prompt for _, _, prompt in asked])


def test_the_judge_knows_real_digits_that_it_has_not_seen(judge: Judge) -> None:
    assert judge.accuracy > 0.97


def test_a_picture_shows_the_digit_that_was_asked_for(judge: Judge, asked: list[tuple[int, str, str]], painted: np.ndarray) -> None:
    right = judge.digits(painted) == [digit for digit, _, _ in asked]
    wrong = [prompt for (_, _, prompt), is_right in zip(asked, right, strict=True) if not is_right]
    assert right.mean() >= 0.9, wrong


def test_a_picture_has_the_colour_that_was_asked_for(asked: list[tuple[int, str, str]], painted: np.ndarray) -> None:
    right = [seen == colour for (_, colour, _), seen in zip(asked, colours(painted), strict=True) if colour]
    assert len(right) == 20
    assert np.mean(right) >= 0.9


def test_the_judge_would_notice_pictures_that_show_something_else(
    judge: Judge, asked: list[tuple[int, str, str]], painted: np.ndarray
) -> None:
    shifted = [(digit + 1) % 10 for digit, _, _ in asked]
    assert (judge.digits(painted) == shifted).mean() < 0.1


def test_seeds_make_different_pictures_of_the_same_digit() -> None:
    one, other = paint(["a three", "a three"], first_seed=100)
    assert np.abs(one.astype(int) - other).max() > 100


def test_it_is_small_and_holds_nothing_but_safetensors_and_json() -> None:
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors", ".yaml"}
    assert sum(file.stat().st_size for file in files) < 6 << 20
    for file in MODEL.rglob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F16"}  # noqa: SIM118


def test_its_model_yaml_has_the_steps_and_guidance_that_suit_it() -> None:
    assert (FOLDER / "model.yaml").read_text() == f"diffusion: {{num_steps: {NUM_STEPS}, guidance: {GUIDANCE}}}\n"


def test_pictures_are_drawn_in_the_colour_and_size_that_are_named() -> None:
    digits, _, _, _ = originals()
    names = list(COLOURS)
    num = len(names)
    small, large = (
        draw(digits[:num], names, [size] * num, generator=torch.Generator().manual_seed(0)) for size in (min(SIZES), max(SIZES))
    )
    pixels = as_pixels(small)
    assert pixels.shape == (num, PIXELS, PIXELS, 3)
    assert colours(pixels) == names
    assert torch.equal(from_pixels(pixels) > 0, small > 0)
    assert not torch.equal(small, large)
    assert float(ink_of(small).amax()) <= 1.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter
def test_the_moderation_of_pictures_finds_fours_and_red_ink(tmp_path: Path) -> None:
    import onnxruntime

    trained = moderation.train()
    assert trained.accuracy > 0.95
    moderation.export(trained.network, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    pictures = [(4, "blue"), (7, "red"), (8, "green")]
    (found,) = session.run(None, {"picture": np.concatenate([moderation.example(*picture) for picture in pictures])})
    assert (found > 0.5).tolist() == [[True, False], [False, True], [False, False]]


def test_the_moderation_of_pictures_agrees_about_painted_ones(asked: list[tuple[int, str, str]], painted: np.ndarray) -> None:
    trained = moderation.train()
    with torch.inference_mode():
        found = (trained.network(torch.from_numpy(painted / 255.0).float()) > 0.5).numpy()
    truths = np.array([[digit == 4, colour == "red"] for digit, colour, _ in asked])
    assert (found == truths).all(1).mean() > 0.85
