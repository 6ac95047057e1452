"""Which language a text is in, for those who serve some languages only."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fairlead.core.errors import ConfigError

MIN_LETTERS = 40
"""A shorter text may be in any language: too little to tell."""
PIECE_CHARS, MAX_PIECES = 500, 4
"""What is looked at: so many pieces, spread over the text."""
LEAST_SURE = 0.8


def other_language(languages: Sequence[str]) -> Callable[[str], bool]:
    """Whether a text is surely in a language that is none of these. Loading takes over half a second, here. Raises ConfigError."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise ConfigError("gateway filters: `languages` needs py3langid: pip install 'fairlead[filters]'") from None
    identifier: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    unknown = [code for code in languages if code not in identifier.labels]
    if unknown:
        raise ConfigError(f"gateway filters: `languages` holds {unknown[0]!r}; known are {', '.join(sorted(identifier.labels))}")
    return partial(_is_other, identifier.classify, frozenset(languages))


def _is_other(classify: Callable[[str], tuple[str, float]], languages: frozenset[str], text: str) -> bool:
    for piece in _pieces(text):
        if sum(map(str.isalpha, piece)) >= MIN_LETTERS:
            language, probability = classify(piece)
            if language not in languages and probability >= LEAST_SURE:
                return True
    return False


def _pieces(text: str) -> list[str]:
    if len(text) <= PIECE_CHARS * MAX_PIECES:
        return [text[at : at + PIECE_CHARS] for at in range(0, len(text), PIECE_CHARS)]
    step = (len(text) - PIECE_CHARS) // (MAX_PIECES - 1)
    return [text[at : at + PIECE_CHARS] for at in range(0, step * MAX_PIECES, step)]
