"""Labelled texts: what holds personal data, and what only looks like it. Made by rule, the same each time; no number is anybody's."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple
from uuid import UUID

from fairlead.gateway.identity.keys import PREFIX, checksum_of

SEED = 4
SENTENCES = (
    "Please write to {} before Friday.",
    "Kunde: {} (siehe Vertrag)",
    "My details are {}, thank you",
    "log line 17: value={} ok",
    '{{"field": "{}", "n": 3}}',
    "{}",
    "the customer said: {}\nand then hung up",
    "送付先は {} です",
    "({})",
    "see <{}> for more",
)


class Case(NamedTuple):
    kind: str
    """Of what is in it; "" for nothing."""
    text: str
    value: str


def cases() -> list[Case]:
    chance = random.Random(SEED)
    found = []
    for kind, make in (*POSITIVES.items(), ("", _negatives)):
        for number, value in enumerate(make(chance)):
            sentence = SENTENCES[number % len(SENTENCES)]
            if kind in ("password", "pem"):
                sentence = "{}"
            found.append(Case("secret" if kind in ("password", "pem") else kind, sentence.format(value), value))
    return found


def digits(chance: random.Random, number: int) -> str:
    return "".join(chance.choice("0123456789") for _ in range(number))


def letters(chance: random.Random, number: int, alphabet: str = "abcdefghijklmnopqrstuvwxyz") -> str:
    return "".join(chance.choice(alphabet) for _ in range(number))


BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
BASE64 = BASE62 + "+/"


def luhn(body: str) -> str:
    """The digits with the check digit that makes them a card number."""
    total = sum(sum(divmod(2 * int(digit), 10)) if place % 2 == 0 else int(digit) for place, digit in enumerate(reversed(body)))
    return body + str(-total % 10)


def iban(country: str, bban: str) -> str:
    check = 98 - int("".join(str(int(each, 36)) for each in bban + country + "00")) % 97
    return f"{country}{check:02d}{bban}"


def own_key(chance: random.Random) -> str:
    body = f"{PREFIX}{letters(chance, 12, BASE62)}_{letters(chance, 32, BASE62)}"
    return body + checksum_of(body)


def grouped(text: str, *sizes: int, by: str = " ") -> str:
    parts, at = [], 0
    for size in sizes:
        parts.append(text[at : at + size])
        at += size
    return by.join(each for each in (*parts, text[at:]) if each)


def _emails(chance: random.Random) -> Iterator[str]:
    for form in (
        "{a}.{b}@{c}.com",
        "{a}+{b}@{c}.co.uk",
        "{a}_{b}@mail.{c}.org",
        "{a}{n}@{c}.de",
        "{a}@{c}-{b}.io",
        "{A}@{C}.EDU",
        "{a}%{b}@{c}.info",
    ):
        for _ in range(10):
            a, b, c = (letters(chance, chance.randint(2, 9)) for _ in range(3))
            yield form.format(a=a, b=b, c=c, n=digits(chance, 3), A=a.upper(), C=c.upper())


def _phones(chance: random.Random) -> Iterator[str]:
    for _ in range(8):
        line = f"{chance.randint(2, 9)}{digits(chance, 2)}", f"{digits(chance, 4)}"
        area = chance.choice(("212", "312", "415", "617", "303", "206"))
        yield f"+1 {area} {line[0]} {line[1]}"
        yield f"({area}) {line[0]}-{line[1]}"
        yield f"{area}-{line[0]}-{line[1]}"
        yield f"+1-{area}-{line[0]}-{line[1]}"
        yield f"+44 20 7{digits(chance, 3)} {digits(chance, 4)}"
        yield f"+4420{chance.choice('78')}{digits(chance, 7)}"
        yield f"020 7{digits(chance, 3)} {digits(chance, 4)}"
        yield f"07700 9{digits(chance, 5)}"
        yield f"+49 30 {chance.randint(2, 9)}{digits(chance, 6)}"
        yield f"0049 89 {chance.randint(2, 9)}{digits(chance, 6)}"
        yield f"+33 6 {chance.randint(10, 99)} {digits(chance, 2)} {digits(chance, 2)} {digits(chance, 2)}"
        yield f"06 {chance.randint(10, 99)} {digits(chance, 2)} {digits(chance, 2)} {digits(chance, 2)}"
        yield f"+81 3-{chance.choice('356')}{digits(chance, 3)}-{digits(chance, 4)}"
        yield f"+91 98{digits(chance, 3)} {digits(chance, 5)}"
        yield f"+34 6{digits(chance, 2)} {digits(chance, 3)} {digits(chance, 3)}"


def _cards(chance: random.Random) -> Iterator[str]:
    for prefix, size in (("4", 16), ("51", 16), ("55", 16), ("2221", 16), ("6011", 16), ("3530", 16), ("62", 16)):
        for by in ("", " ", "-", " ", "."):
            number = luhn(prefix + digits(chance, size - 1 - len(prefix)))
            yield grouped(number, 4, 4, 4, 4, by=by)
    for by in ("", " ", "-", " "):
        for prefix in ("34", "37"):
            yield grouped(luhn(prefix + digits(chance, 12)), 4, 6, 5, by=by)
        yield grouped(luhn("36" + digits(chance, 11)), 4, 6, 4, by=by)
        yield grouped(luhn("4" + digits(chance, 17)), 4, 4, 4, 4, 3, by=by)


def _ibans(chance: random.Random) -> Iterator[str]:
    for country, form in (
        ("DE", "n18"), ("FR", "n20n1n2"), ("GB", "a4n14"), ("ES", "n20"), ("NL", "a4n10"), ("CH", "n17"), ("AT", "n16"), ("PL", "n24"),
        ("BE", "n12"), ("IE", "a4n14"), ("NO", "n11"), ("SE", "n20"), ("IT", "a1n22"), ("PT", "n21"),
    ):  # fmt: skip
        for spaced in (True, False, True, False):
            bban = ""
            for part in form.replace("n", " n").replace("a", " a").split():
                bban += digits(chance, int(part[1:])) if part[0] == "n" else letters(chance, int(part[1:]), "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
            number = iban(country, bban)
            yield " ".join(number[at : at + 4] for at in range(0, len(number), 4)) if spaced else number


def _secrets(chance: random.Random) -> Iterator[str]:
    for _ in range(6):
        yield "AKIA" + letters(chance, 16, "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567")
        yield chance.choice(("ghp_", "gho_", "ghs_")) + letters(chance, 36, BASE62)
        yield "github_pat_" + letters(chance, 82, BASE62)
        yield "glpat-" + letters(chance, 20, BASE62)
        yield f"xoxb-{digits(chance, 12)}-{digits(chance, 12)}-{letters(chance, 24, BASE62)}"
        yield "sk-proj-" + letters(chance, 48, BASE62)
        yield "sk-ant-api03-" + letters(chance, 90, BASE62 + "-_")
        yield "sk_live_" + letters(chance, 24, BASE62)
        yield "AIza" + letters(chance, 35, BASE62 + "-_")
        yield "hf_" + letters(chance, 34, BASE62)
        yield "npm_" + letters(chance, 36, BASE62)
        yield f"eyJ{letters(chance, 33, BASE62)}.eyJ{letters(chance, 120, BASE62)}.{letters(chance, 43, BASE62 + '-_')}"
        yield own_key(chance)
        yield "Authorization: Bearer " + letters(chance, 40, BASE62)


def _passwords(chance: random.Random) -> Iterator[str]:
    for _ in range(6):
        word = letters(chance, 6) + digits(chance, 3) + chance.choice("!#*")
        yield f"password={word}"
        yield f"Password: {word}"
        yield f'"password": "{word}"'
        yield f"export DB_PASSWORD='{word}'"
        yield f"api_key = {letters(chance, 32, BASE62)}"
        yield f'"access_token":"{letters(chance, 40, BASE62)}"'
        yield f"client_secret: {letters(chance, 28, BASE62)}"


def _pems(chance: random.Random) -> Iterator[str]:
    for kind in ("RSA ", "EC ", "", "OPENSSH ", "ENCRYPTED "):
        lines = "\n".join(letters(chance, 64, BASE64) for _ in range(12))
        yield f"-----BEGIN {kind}PRIVATE KEY-----\n{lines}\n{letters(chance, 30, BASE64)}==\n-----END {kind}PRIVATE KEY-----"


POSITIVES: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "email": _emails,
    "phone": _phones,
    "card": _cards,
    "iban": _ibans,
    "secret": _secrets,
    "password": _passwords,
    "pem": _pems,
}


def _negatives(chance: random.Random) -> Iterator[str]:
    for _ in range(8):
        yield f"order {digits(chance, 10)}"
        yield f"ORD-{digits(chance, 4)}-{digits(chance, 6)}"
        yield "invoice no. 10" + digits(chance, 6)
        yield str(UUID(int=chance.getrandbits(128)))
        yield f"20{chance.randint(10, 29)}-{chance.randint(1, 12):02d}-{chance.randint(1, 28):02d}T{chance.randint(0, 23):02d}:14:03Z"
        yield f"{chance.randint(1, 28):02d}.{chance.randint(1, 12):02d}.2025 {chance.randint(0, 23):02d}:15"
        yield f"17{digits(chance, 8)}"  # seconds
        yield f"17{digits(chance, 11)}"  # milliseconds
        yield f"17{digits(chance, 14)}"  # microseconds
        yield f"v{chance.randint(0, 9)}.{chance.randint(0, 30)}.{chance.randint(0, 9)}-rc.{chance.randint(1, 9)}"
        yield f"numpy=={chance.randint(1, 2)}.{chance.randint(0, 30)}.{chance.randint(0, 9)}"
        yield f"10.{chance.randint(0, 255)}.{chance.randint(0, 255)}.{chance.randint(1, 254)}:8080"
        yield f"2001:db8::{chance.getrandbits(16):x}:{chance.getrandbits(16):x}"
        yield f"sha256:{chance.getrandbits(256):064x}"
        yield f"commit {chance.getrandbits(160):040x}"
        yield f"0x{chance.getrandbits(64):016x}"
        yield f"{chance.random():.15f}"
        yield f"{chance.randint(1000, 9999)} rows, {chance.randint(100, 999)} columns, {chance.randint(1, 99)} ms"
        yield f"$ {chance.randint(1, 999)},{digits(chance, 3)}.{digits(chance, 2)}"
        yield f"icon@{chance.randint(2, 3)}x.png"
        yield f"lodash@{chance.randint(1, 4)}.{chance.randint(1, 20)}.{chance.randint(1, 20)}"
        yield f"@{letters(chance, 6)} wrote to @{letters(chance, 7)}"
        yield f"ISBN 978-{digits(chance, 1)}-{digits(chance, 2)}-{digits(chance, 6)}-{digits(chance, 1)}"
        yield f"flight LH{digits(chance, 4)} seat {chance.randint(1, 40)}C gate B{digits(chance, 2)}"
        yield f"DE{digits(chance, 9)}"  # a VAT number
        yield f"{letters(chance, 2, 'ABCDEFGH')}{digits(chance, 2)} {digits(chance, 4)} {digits(chance, 4)} {digits(chance, 4)} {digits(chance, 4)} {digits(chance, 2)}"
        yield f"tracking 1Z{letters(chance, 3, BASE62.upper())}{digits(chance, 13)}"
        yield f"4{digits(chance, 3)} {digits(chance, 4)} {digits(chance, 4)}"  # three groups
        yield f"password: {chance.choice(('required', 'string', 'forgotten', '${DB_PASSWORD}', '<your-password>', 'os.environ[0]'))}"
        yield f"token = {chance.choice(('None', 'null', 'get_token()', 'tokenizer.pad_token', 'self.token'))}"
        yield f"the key: {letters(chance, 9)} and the secret: {letters(chance, 8)}"
        yield f"risk-{letters(chance, 8)}-assessment-of-{letters(chance, 9)}"
        yield f"task-{chance.randint(100, 999)} desk-{chance.randint(10, 99)}"
        yield f"-----BEGIN CERTIFICATE-----\n{letters(chance, 64, BASE64)}\n-----END CERTIFICATE-----"
        yield f"fl_{letters(chance, 12, BASE62)}_{letters(chance, 38, BASE62)}"  # the checksum is wrong
        yield f"x = [{', '.join(digits(chance, 4) for _ in range(6))}]"
        yield f"pi is 3.{digits(chance, 40)}"
        yield f"page {chance.randint(1, 400)}-{chance.randint(401, 900)}, chapter {chance.randint(1, 20)}.{chance.randint(1, 9)}"
        yield f"coordinates {chance.uniform(-90, 90):.6f}, {chance.uniform(-180, 180):.6f}"
        yield f"port 2{digits(chance, 3)} to 3{digits(chance, 3)}, pid {digits(chance, 5)}"
