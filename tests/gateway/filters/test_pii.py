"""Personal data and secrets: what is found, what is not, and how much of each."""

import time
from collections import Counter
from zlib import crc32

import pytest

from fairlead.core.policy import FilterPolicy
from fairlead.gateway.filters.filters import Filters
from fairlead.gateway.filters.finding import Finding
from fairlead.gateway.filters.pii import MAX_ASKED, is_card
from tests.gateway.filters.cases import cases, iban, luhn, own_key
from tests.gateway.filters.cases import random as chance

REDACT = Filters.of(FilterPolicy(pii="redact"))
KINDS = ("email", "phone", "card", "iban", "secret")


def found(text: str) -> list[Finding]:
    return [finding for scan in REDACT.scans for finding in scan(text, 0, True)[0]]


def redacted(text: str) -> str:
    return REDACT._checked(text, "", {})


def test_recall_and_precision_on_the_labelled_texts_are_as_the_docs_say() -> None:
    right: Counter[str] = Counter()
    missed, wrong = [], []
    for case in cases():
        kinds = {finding.rule.removeprefix("pii.") for finding in found(case.text)}
        if case.kind in kinds:
            right[case.kind] += 1
        elif case.kind:
            missed.append(case.text)
        wrong += [(kind, case.text) for kind in kinds - {case.kind}]
    assert sum(case.kind == "" for case in cases()) == 320 and sum(right.values()) + len(missed) == 428
    assert set(right) == set(KINDS)
    assert len(missed) == 0, missed
    assert len(wrong) <= 1, wrong  # a group of digits within a bank account that is a telephone number, too


@pytest.mark.parametrize(
    "case", [case for case in cases() if case.kind], ids=lambda case: f"{case.kind}-{crc32(case.value.encode()) % 1000:03}"
)
def test_nothing_of_the_value_is_left(case) -> None:
    left = redacted(case.text)
    secret = case.value.rpartition(" ")[2] if case.value.startswith("Authorization") else case.value
    assert secret not in left
    assert f"[{case.kind.upper()}]" in left


def test_what_stands_around_it_is_left_as_it_was() -> None:
    text = "Write to jane.roe+x@mail.example.co.uk, or call +44 20 7946 0018; card 4111 1111 1111 1111, IBAN DE89 3704 0044 0532 0130 00."
    assert redacted(text) == "Write to [EMAIL], or call [PHONE]; card [CARD], IBAN [IBAN]."
    assert redacted("password = hunter2hunter, user = bob") == "password = [SECRET], user = bob"
    assert redacted('{"api_key": "aB3dE5gH7jK9mN1pQ3sT", "n": 1}') == '{"api_key": "[SECRET]", "n": 1}'


@pytest.mark.parametrize(
    "text",
    [
        "git commit -m 'fix' 1a2b3c4d5e6f",
        "see icon@2x.png and lodash@4.17.21",
        "4111 1111 1111 1112",  # the check digit is wrong
        "DE89 3704 0044 0532 0130 01",
        "4242-4242-4242",
        "0.4111111111111111",
        "id 84111111111111111",
        "on 2024-05-01 at 12:30:45.123456",
        "192.168.100.200:8080",
        "1234 5678 9012",
        "tokens: 4096, key: value",
        "password: required. secret: forgotten",
        "token=${API_TOKEN}",
        "the password is not written here",
        "sk-learn-is-a-library-for-learning",
        "fl_7Jx0aQm2VbKc_00000000000000000000000000000000000000",  # no key of ours: the checksum
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text: str) -> None:
    assert redacted(text) == text


def test_a_card_beside_other_numbers_is_found() -> None:
    assert redacted("4111 1111 1111 1111 12/27 123") == "[CARD] 12/27 123"
    assert redacted("4111 1111 1111 1111 2027") == "[CARD] 2027"
    assert redacted("no. 3782 822463 10005!") == "no. [CARD]!"
    assert is_card(luhn("411111111111111")) and not is_card("9" + "0" * 15)


def test_an_account_number_in_small_letters_and_one_followed_by_a_word_are_found() -> None:
    number = iban("ES", "21000418450200051332")
    assert redacted(f"{number.lower()} call me") == "[IBAN] call me"
    spaced = " ".join(number[at : at + 4] for at in range(0, 24, 4))
    assert redacted(f"{spaced} call me") == "[IBAN] call me"
    assert redacted(f"{spaced}9") == f"{spaced}9"


def test_our_own_keys_are_known_by_their_checksum() -> None:
    key = own_key(chance.Random(1))
    assert redacted(f"it is {key}.") == "it is [SECRET]."
    other = key[:-1] + ("0" if key[-1] != "0" else "1")
    assert redacted(f"my key is {other}") == f"my key is {other}"


def test_thousands_of_numbers_cost_a_bounded_number_of_questions() -> None:
    text = "0999 000 0000, " * 1000
    assert found(text)[0].start == MAX_ASKED * 15  # those that were asked about are none; what was not asked about counts as one
    assert redacted("(212) 736-5000 " * 3000).count("[PHONE]") == 3000


HOSTILE = {
    "email": ("@", "a@", "a@a.", "a.", "x@y.co "),
    "phone": ("+1", "(0", "020 0000 0000 ", "1 "),
    "card": ("4", "4111 ", "4111 1111 1111 1112 "),
    "iban": ("DE44 ", "DE89 3704 0044 0532 0130 01 ", "AA11"),
    "secret": ("eyJ", "eyJaaaaaaaa.", "-----BEGIN PRIVATE KEY-----", "password: ", "key=", "sk-", "bearer a1", "password=a1aaaaaaaa"),
}


@pytest.mark.parametrize(("kind", "unit"), [(kind, unit) for kind, units in HOSTILE.items() for unit in units])
def test_hostile_texts_cost_time_in_proportion_to_their_length(kind: str, unit: str) -> None:
    (scan,) = Filters.of(FilterPolicy(pii="flag", pii_kinds=(kind,))).scans  # type: ignore[arg-type]

    def seconds(size: int) -> float:
        text = (unit * (size // len(unit) + 1))[:size]
        best = 1e9
        for _ in range(2):
            start = time.thread_time()
            scan(text, 0, True)
            best = min(best, time.thread_time() - start)
        return best

    # eight times the length: 8 if linear, 64 if quadratic; with a floor, below which the clock tells nothing
    assert seconds(64_000) / max(seconds(8_000), 1e-4) < 32
