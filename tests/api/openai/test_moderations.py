"""The bodies of `/v1/moderations`."""

import json

import msgspec
import pytest
from openai.types import ModerationCreateResponse

from fairlead.api.openai.errors import BadParameter
from fairlead.api.openai.moderations import MAX_INPUTS, ModerationBody, moderations


def body(input: object) -> ModerationBody:
    return msgspec.json.decode(json.dumps({"input": input}), type=ModerationBody)


@pytest.mark.parametrize(
    ("input", "texts"),
    [
        ("a text", ["a text"]),
        (["one", "two"], ["one", "two"]),
        ([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}], ["one\ntwo"]),
    ],
)
def test_a_text_many_or_the_parts_of_one_are_read(input: object, texts: list[str]) -> None:
    assert body(input).texts() == texts


@pytest.mark.parametrize(
    "input", [[], ["one", {"type": "text", "text": "two"}], [{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "text"}]]
)
def test_what_cannot_be_judged_is_refused_by_name(input: object) -> None:
    with pytest.raises(BadParameter) as refused:
        body(input).texts()
    assert refused.value.param is not None and refused.value.param.startswith("input")


@pytest.mark.parametrize("input", [None, 3, [3], ["x"] * (MAX_INPUTS + 1), [{"type": "text", "text": "x", "y": 1}]])
def test_another_shape_is_refused_when_it_is_read(input: object) -> None:
    with pytest.raises(msgspec.ValidationError):
        body(input)


def test_the_answer_is_one_that_openais_library_reads() -> None:
    answer = moderations("moderation", [{"violence": 0.75, "self-harm": 0.1}, {"violence": 0.2, "self-harm": 0.3}])
    read = ModerationCreateResponse.construct(**json.loads(msgspec.json.encode(answer)))
    assert read.id.startswith("modr-") and read.model == "moderation"
    assert [result.flagged for result in read.results] == [True, False]
    assert read.results[0].categories.violence and not read.results[0].categories.self_harm
    assert read.results[0].category_scores.violence == 0.75
    assert read.results[0].category_applied_input_types.self_harm == ["text"]
    # of what the model does not judge nothing is said
    assert read.results[0].categories.sexual_minors is None
