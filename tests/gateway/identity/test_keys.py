"""How keys look, and what is kept of them."""

import hashlib
import hmac
import string

from hypothesis import given
from hypothesis import strategies as st

from fairlead.gateway.identity.keys import ALPHABET, digest_of, new_key, parse_key, signing_key_of

KEY = new_key()


def test_a_new_key_names_itself_and_nothing_that_is_kept_gives_the_secret_away() -> None:
    key = new_key()
    assert parse_key(key.secret) == key.id and key.secret.startswith(key.prefix + "_") and len(key.secret) == 54
    assert key.digest == hashlib.sha256(key.secret.encode()).hexdigest() == digest_of(key.secret)
    assert key.signing_key == hmac.new(key.secret.encode(), b"fairlead request signing v1", "sha256").hexdigest()
    assert key.signing_key == signing_key_of(key.secret)
    secret_part = key.secret.removeprefix(key.prefix + "_")
    assert all(secret_part not in kept for kept in (key.id, key.prefix, key.digest, key.signing_key))


def test_no_two_keys_are_the_same() -> None:
    keys = [new_key() for _ in range(500)]
    assert len({key.id for key in keys}) == len({key.secret for key in keys}) == 500


@given(st.integers(3, len(KEY.secret) - 1), st.sampled_from(string.ascii_letters + string.digits + "_- "))
def test_a_key_with_one_wrong_character_is_told_from_a_key_without_asking_anyone(position: int, wrong: str) -> None:
    text = KEY.secret[:position] + wrong + KEY.secret[position + 1 :]
    assert parse_key(text) == (KEY.id if text == KEY.secret else None)


@given(st.integers(3, len(KEY.secret) - 2))
def test_a_key_with_two_neighbours_swapped_or_cut_short_is_no_key(position: int) -> None:
    swapped = KEY.secret[:position] + KEY.secret[position + 1] + KEY.secret[position] + KEY.secret[position + 2 :]
    assert parse_key(swapped) == (KEY.id if swapped == KEY.secret else None)
    assert parse_key(KEY.secret[:position]) is None


@given(st.text() | st.text(ALPHABET + "_", min_size=40).map(lambda text: "fl_" + text))
def test_any_text_is_read_without_an_error(text: str) -> None:
    assert parse_key(text) is None
    assert len(digest_of(text)) == 64


def test_text_around_a_key_makes_it_no_key() -> None:
    for text in (KEY.secret + "\n", " " + KEY.secret, KEY.secret + "x", KEY.secret.upper(), "", "fl_", "fl_\u0662" + KEY.secret[4:]):
        assert parse_key(text) is None
