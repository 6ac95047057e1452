"""What people call a picture of a digit: "7", "a large red seven", "the digit 7 in green ink"."""

from random import Random
from typing import NamedTuple

from fairlead.cli.demo_models.digits.pictures import COLOURS, SIZES

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPENINGS = (
    "",
    "",
    "a",
    "a",
    "the",
    "a picture of a",
    "a drawing of the",
    "an image of",
    "please draw a",
    "draw me a",
    "show the",
    "paint a",
)
KINDS = ("", "", "", "digit", "number", "numeral", "figure")
HANDS = ("", "", "", "handwritten", "nice")
AFTER = (" in {}", " in {} ink", ", {}", " {}")


class Caption(NamedTuple):
    text: str
    colour: str
    size: str


def caption(digit: int, rng: Random) -> Caption:
    """A caption of `digit`, and the colour and size that it asks for: black and medium where it names none."""
    colour = rng.choice(tuple(COLOURS)) if rng.random() < 0.6 else ""
    size = rng.choice(tuple(SIZES)) if rng.random() < 0.35 else ""
    before, after = (colour, "") if rng.random() < 0.6 else ("", colour and rng.choice(AFTER).format(colour))
    words = (size, rng.choice(HANDS), before, rng.choice(KINDS), rng.choice((WORDS[digit], str(digit))))
    phrase = " ".join(filter(None, words))
    opening = rng.choice(OPENINGS)
    if opening.endswith("a") and phrase[0] in "aeiou8" and not phrase.startswith("one"):
        opening += "n"
    return Caption(f"{opening} {phrase}{after}".strip(), colour or "black", size or "medium")


def every_word() -> list[str]:
    """What a vocabulary must hold."""
    texts = (*OPENINGS, *KINDS, *HANDS, *AFTER, *COLOURS, *SIZES, *WORDS, "an")
    return sorted({word for text in texts for word in text.replace("{}", "").replace(",", "").split()})
