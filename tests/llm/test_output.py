"""The same text however the tokens cut it, whole characters only, and an end exactly where it was asked for."""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from fairlead.core.generation import Sampling
from fairlead.llm.output import OutputStream, Pushed, detokenizer
from fairlead.llm.tokenizer import Tokenizer
from tests.llm.test_tokenizer import byte_level, minilm, sentencepiece

EOS, STOP_TOKEN = 2, 4
VOCABULARIES = {
    "byte-level": byte_level,
    "sentencepiece": sentencepiece,
    "sentencepiece-no-strip": lambda: sentencepiece(strips=False),
}


def letters() -> Tokenizer:
    """A token for each byte and for some pairs: any text can be cut anywhere."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [one + other for one in "abcxyz" for other in "abcxyz"]
    backend = Backend(models.BPE({piece: id for id, piece in enumerate(alphabet + pairs)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)


LETTERS = letters()
ID_OF_BYTES = {LETTERS.token_bytes(id): id for id in range(LETTERS.vocab_size)}


def cut(text: str, choice: random.Random | None = None) -> list[int]:
    """The text as tokens of `LETTERS`: single bytes, and pairs where `choice` likes."""
    data, ids = text.encode(), []
    while data:
        size = 2 if choice and data[:2] in ID_OF_BYTES and len(data) > 1 and choice.random() < 0.5 else 1
        ids.append(ID_OF_BYTES[data[:size]])
        data = data[size:]
    return ids


def stream(
    tokenizer: Tokenizer = LETTERS, prompt_ids: list[int] | None = None, *, eos_ids: tuple[int, ...] = (), **asked: Any
) -> OutputStream:
    bound = asked.pop("max_model_len", 0)
    return OutputStream(tokenizer, prompt_ids or [], Sampling(**asked), eos_ids=eos_ids, max_model_len=bound)


def run(output: OutputStream, ids: list[int]) -> tuple[str, Pushed | None]:
    """All text, and the push that ended it."""
    text = ""
    for id in ids:
        pushed = output.push(id)
        text += pushed.text
        if pushed.finish_reason:
            return text, pushed
    return text + output.finish(), None


def decoded(tokenizer: Tokenizer, ids: list[int], prompt_ids: list[int] | None = None, **asked: Any) -> str:
    made = detokenizer(tokenizer, prompt_ids or [], **asked)
    return "".join(made.push(id) for id in ids) + made.finish()


# Text


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_pieces_together_are_the_decoded_whole(vocabulary: str, text: str) -> None:
    tokenizer = Tokenizer(VOCABULARIES[vocabulary]())
    ids = tokenizer.encode(text)
    for skip in (True, False):
        assert decoded(tokenizer, ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(0, 510), max_size=40), skip=st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_bytes_decode_as_the_library_does(ids: list[int], skip: bool) -> None:
    # most of these are no UTF-8, and the last ids are of no token
    tokenizer = Tokenizer(byte_level())
    assert decoded(tokenizer, ids, skip_special_tokens=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(st.integers(259, 399), max_size=40), broken=st.integers(0x80, 0xFF))
@settings(max_examples=50, deadline=None)
def test_a_byte_that_is_no_character_shows_as_unknown(ids: list[int], broken: int) -> None:
    tokenizer = Tokenizer(sentencepiece())
    ids = [*ids, tokenizer.backend.token_to_id(f"<0x{broken:02X}>"), *ids]
    assert decoded(tokenizer, ids) == tokenizer.decode(ids)


def test_bytes_after_a_broken_character_begin_a_new_one() -> None:
    tokenizer = Tokenizer(sentencepiece(strips=False))
    ids = [tokenizer.backend.token_to_id(f"<0x{byte:02X}>") for byte in b"\xf0\x9f" + "é".encode() + b"\xff"]
    assert decoded(tokenizer, ids) == "\ufffd\ufffdé\ufffd"


def test_vocabularies_that_only_the_library_knows() -> None:
    wordpiece = Tokenizer.load(minilm())
    ids = wordpiece.encode("Unbelievably long words, and antidisestablishmentarianism: naïve 日本")
    assert decoded(wordpiece, ids) == wordpiece.decode(ids)
    unigram = Backend(models.Unigram([("<unk>", 0.0), ("▁", -1.0), ("▁a", -1.0), ("b", -1.0), ("▁b", -2.0)], unk_id=0))
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = Tokenizer(unigram)
    assert tokenizer.spelling == "other"
    ids = tokenizer.encode("a b ab b a")
    assert decoded(tokenizer, ids) == "a b ab b a" == tokenizer.decode(ids)


def test_an_answer_keeps_the_space_that_parts_it_from_the_prompt() -> None:
    tokenizer = Tokenizer(sentencepiece())
    prompt, ids = tokenizer.encode("the dog"), tokenizer.encode("runs", add_special_tokens=False)
    assert decoded(tokenizer, ids) == "runs"
    assert decoded(tokenizer, ids, tokenizer.encode("")) == "runs"  # nothing but the first token
    assert decoded(tokenizer, ids, prompt) == " runs"
    assert decoded(tokenizer, ids, [*prompt, 1, 1, 1, 1, 1]) == " runs"


def test_a_character_that_the_prompt_began_is_completed() -> None:
    first, *rest = cut("😀")
    assert decoded(LETTERS, [*rest, *cut("!")], [first]) == "😀!"


def test_nothing_of_a_character_is_shown_before_it_is_whole() -> None:
    output = stream()
    assert [output.push(id).text for id in cut("aé😀b")] == ["a", "", "é", "", "", "", "😀", "b"]


def test_a_character_that_is_cut_off_shows_as_unknown_at_the_end_only() -> None:
    output = stream(max_tokens=3)
    assert [output.push(id) for id in cut("a😀")[:3]] == [Pushed("a"), Pushed(""), Pushed("\ufffd", "length")]
    output = stream()
    assert [output.push(id).text for id in cut("a😀")[:3]] == ["a", "", ""]
    assert output.finish() == "\ufffd"


# Ends


def test_end_of_sequence() -> None:
    tokenizer = Tokenizer(byte_level())
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    for asked, expected in [({}, "Hello"), ({"include_stop_str_in_output": True}, "Hello"), ({"skip_special_tokens": False}, "Hello")]:
        assert run(stream(tokenizer, eos_ids=(EOS,), **asked), [*hello, EOS]) == (expected, Pushed("", "stop", None))
    both = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    assert run(stream(tokenizer, eos_ids=(EOS,), **both), [*hello, EOS]) == ("Hello</s>", Pushed("</s>", "stop", None))
    assert run(stream(tokenizer, eos_ids=(EOS,), ignore_eos=True), [*hello, EOS, *hello]) == ("HelloHello", None)


def test_stop_tokens_say_which_one_it_was() -> None:
    tokenizer = Tokenizer(byte_level())
    hello = tokenizer.encode("Hello", add_special_tokens=False)
    assert run(stream(tokenizer, stop_token_ids=(STOP_TOKEN,)), [*hello, STOP_TOKEN]) == ("Hello", Pushed("", "stop", STOP_TOKEN))
    ended, pushed = run(stream(tokenizer, stop_token_ids=(hello[-1],)), hello)
    assert ended == tokenizer.decode(hello[:-1]) and pushed is not None and pushed.stop_reason == hello[-1]
    # ignore_eos is of the model's own tokens, not of those that were asked for
    assert run(stream(tokenizer, eos_ids=(EOS,), ignore_eos=True, stop_token_ids=(EOS,)), [EOS]) == ("", Pushed("", "stop", EOS))


def test_length() -> None:
    assert run(stream(max_tokens=3), cut("abcdef")) == ("abc", Pushed("c", "length"))
    assert run(stream(prompt_ids=cut("xyz"), max_model_len=5), cut("abcdef")) == ("ab", Pushed("b", "length"))
    assert run(stream(prompt_ids=cut("xyz"), max_model_len=5, max_tokens=1), cut("abcdef")) == ("a", Pushed("a", "length"))


def test_the_last_token_that_completes_a_stop_string_stops() -> None:
    assert run(stream(max_tokens=3, stop=("bc",)), cut("abc")) == ("a", Pushed("", "stop", "bc"))
    assert run(stream(max_tokens=3, eos_ids=tuple(cut("c"))), cut("abc")) == ("ab", Pushed("", "stop", None))


# Stop strings


def test_what_may_begin_a_stop_string_waits() -> None:
    output = stream(stop=("END", "ENOUGH"))
    assert [output.push(id).text for id in cut("aENEENOxEND")] == ["a", "", "", "EN", "E", "", "", "ENOx", "", "", ""]
    assert output.finished


def test_what_waited_comes_at_the_end() -> None:
    output = stream(stop=("abc",))
    assert [output.push(id).text for id in cut("xab")] == ["x", "", ""]
    assert output.finish() == "ab"
    assert run(stream(stop=("abc",), max_tokens=3), cut("xab")) == ("xab", Pushed("ab", "length"))
    assert run(stream(stop=("abc",), eos_ids=tuple(cut("z"))), cut("xabz")) == ("xab", Pushed("ab", "stop", None))


def test_the_stop_string_itself_is_shown_where_asked_for() -> None:
    assert run(stream(stop=("bc",), include_stop_str_in_output=True), cut("abcd")) == ("abc", Pushed("bc", "stop", "bc"))


def test_of_stop_strings_the_first_complete_one_counts() -> None:
    assert run(stream(stop=("bc", "abcd")), cut("xabcd")) == ("xa", Pushed("a", "stop", "bc"))
    assert run(stream(stop=("c", "abc")), cut("xabc")) == ("x", Pushed("", "stop", "abc"))  # at the same character, the longer


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    assert run(stream(stop=("ab",), min_tokens=4), cut("ababcab")) == ("ababc", Pushed("", "stop", "ab"))
    # one that begins in the first tokens and ends behind them does
    assert run(stream(stop=("ab",), min_tokens=3), cut("abab")) == ("ab", Pushed("", "stop", "ab"))
    # overlapping occurrences
    assert run(stream(stop=("aa",), min_tokens=2), cut("aaab")) == ("a", Pushed("", "stop", "aa"))


pieces = st.lists(st.sampled_from(["a", "b", "c", "ab", "abc", "é", "😀", "日", " ", "x", "\n"]), max_size=20).map("".join)
stops = st.lists(
    st.sampled_from(["abc", "ab", "aab", "b😀", "😀", "éé", "日 x", "xx", "abab", "caba"]), min_size=1, max_size=3, unique=True
)


@given(text=pieces, stops=stops, seed=st.integers(0, 2**32), include=st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_text_is_the_same_wherever_tokens_cut_it(text: str, stops: list[str], seed: int, include: bool) -> None:
    ends = [(text.find(stop) + len(stop), -len(stop), stop) for stop in stops if stop in text]
    expected, found = text, None
    if ends:
        end, _, found = min(ends)
        expected = text[: end if include else end - len(found)]
    for ids in (cut(text), cut(text, random.Random(seed))):
        ended, pushed = run(stream(stop=tuple(stops), include_stop_str_in_output=include), ids)
        assert ended == expected
        assert (pushed and (pushed.finish_reason, pushed.stop_reason)) == (("stop", found) if found else None)


@given(text=pieces, stop=st.sampled_from(["abc", "b😀", "abab", "xx"]))
@settings(max_examples=100, deadline=None)
def test_no_more_than_the_beginning_of_a_stop_string_waits(text: str, stop: str) -> None:
    output, ids, shown = stream(stop=(stop,)), cut(text), ""
    for at, id in enumerate(ids, 1):
        pushed = output.push(id)
        shown += pushed.text
        if pushed.finish_reason:
            return
        whole = b"".join(LETTERS.token_bytes(id) for id in ids[:at]).decode(errors="ignore")
        waiting = whole[len(shown) :]
        assert whole.startswith(shown) and stop.startswith(waiting) and waiting != stop


def test_a_long_stop_string_costs_no_more_than_its_length() -> None:
    stop = "a" * 1_000 + "b"
    output = stream(stop=(stop,))
    text = "".join(output.push(id).text for id in cut("a") * 30_000)  # each of them may begin it
    assert len(text) == 29_000
    assert output.finish() == "a" * 1_000
