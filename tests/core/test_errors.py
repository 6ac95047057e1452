"""What an error says can always be sent, and logged."""

import pytest

from fairlead.core.errors import FairleadError, ModelError


@pytest.mark.parametrize(
    ("said", "told"),
    [("plain", "plain"), ("größer als 😀", "größer als 😀"), ("no such file: caf\udce9", "no such file: caf?"), ("\ud83d", "?")],
)
def test_half_characters_are_replaced(said: str, told: str) -> None:
    for error in (ModelError(said), FairleadError("other").saying(said)):
        assert error.message == str(error) == told
