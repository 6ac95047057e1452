"""Golden examples out of live traffic: what was asked and answered, not who asked, and nothing private."""

import numpy as np
import pytest

from fairlead.control.checks import Checks
from fairlead.control.checks_folder import read_checks, write_golden
from fairlead.control.recording import Recording, RecordingRules
from fairlead.core.caller import Caller
from fairlead.core.generation import Chat, Delta, Embed, Generate, Message, Paint, Sampling
from fairlead.core.request import Request, Response

GREEDY = Sampling(temperature=0.0, max_tokens=8)


def redact(text):
    return text.replace("Ada", "[NAME]")


def recording(**rules):
    return Recording(RecordingRules(**rules), redact)


def ask(value=1.0, **fields):
    return Request(model="m", inputs={"x": np.array([[value]], np.float32)}, **fields)


def tell(value=2.0):
    return [Response(model="m", version="3", outputs={"y": np.array([value])}, id="caller's")]


def say(*texts):
    return [Response(model="m", version="3", delta=Delta(text=text)) for text in texts]


def test_a_request_with_tensors_becomes_an_example_that_names_nobody():
    kept = recording()
    kept.offer(ask(caller=Caller(tenant="acme"), id="42", session="s", log_id="l", parameters={"k": 3}), tell())

    (example,) = kept.examples
    assert example.inputs[0].data == [1.0] and example.outputs[0].data == [2.0] and example.parameters == {"k": 3}
    assert not {"acme", "42", "s", "l", "caller's"} & set(str(example).replace("'", " ").split())


def test_what_is_recorded_is_read_as_checks(tmp_path):
    kept = recording()
    kept.offer(ask(), tell())
    kept.offer(Request(model="m", prompt=Generate(text="once", sampling=GREEDY)), say("up", "on"))
    kept.offer(Request(model="m", prompt=Embed(text="word")), [Response(model="m", version="3", delta=Delta(vector=b"\0\0\x80?"))])
    write_golden(tmp_path / "golden.jsonl", kept.examples)

    assert read_checks(tmp_path) == Checks(golden=tuple(kept.examples))
    assert [example.text for example in kept.examples] == [None, "upon", None]
    assert kept.examples[2].vector == (1.0,)


def test_a_private_question_is_asked_again_without_what_is_private():
    kept = recording()
    chat = Chat(messages=[Message(role="user", content="I am Ada", name="Ada")])
    kept.offer(Request(model="m", prompt=Generate(chat=chat, sampling=GREEDY)), say("Hello Ada"))

    assert kept.examples == []
    (question,) = kept.unanswered
    assert question.chat == (Message(role="user", content="I am [NAME]"),)

    assert kept.answer(question, say("Hello you"))
    assert kept.unanswered == [] and kept.examples[0].text == "Hello you"


def test_texts_in_tensors_are_redacted_too():
    kept = recording()
    kept.offer(Request(model="m", inputs={"t": np.array([b"by Ada"], object)}), tell())
    assert kept.unanswered[0].inputs[0].data == ["by [NAME]"]


def test_an_answer_that_holds_what_is_private_is_not_kept():
    kept = recording()
    kept.offer(Request(model="m", prompt=Generate(text="who?", sampling=GREEDY)), say("Ada"))
    assert (kept.examples, kept.unanswered, kept.skipped.private) == ([], [], 1)


def test_what_was_sampled_by_chance_is_asked_again():
    kept = recording()
    kept.offer(Request(model="m", prompt=Generate(text="once", sampling=Sampling(temperature=0.7, seed=1))), say("upon"))
    assert kept.unanswered[0].sampling == Sampling(temperature=0.0)


@pytest.mark.parametrize(
    ("request_", "responses"),
    [
        (Request(model="m", prompt=Paint(text="a boat")), []),
        (Request(model="m", prompt=Generate(token_ids=[1])), say("a")),
        (Request(model="m", prompt=Generate(text="a", sampling=Sampling(n=2))), say("a")),
        (Request(model="m", prompt=Generate(chat=Chat(messages=[Message(role="user")], tools=[{}]))), say("a")),
        (Request(model="m", prompt=Generate(text="a", sampling=GREEDY)), say("")),
        (Request(model="m", inputs={"t": np.array([b"\xff"], object)}), tell()),
        (ask(), tell(float("nan"))),
        (ask(), []),
    ],
)
def test_what_no_example_can_say_is_counted(request_, responses):
    kept = recording()
    kept.offer(request_, responses)
    assert (kept.examples, kept.unanswered, kept.skipped.unsuitable) == ([], [], 1)


def test_it_is_bounded_and_takes_each_question_once():
    kept = recording(every=2, max_examples=2)
    for value in (1, 9, 1, 9, 2, 9, 3):
        kept.offer(ask(value), tell(value))
    assert [example.inputs[0].data for example in kept.examples] == [[1.0], [2.0]]
    assert kept.full and kept.skipped.repeated == 1

    small = recording(max_bytes=300)
    for value in range(20):
        small.offer(ask(value), tell())
    assert 0 < small.num_bytes <= 300 and small.skipped.too_large == 20 - len(small.examples)

    large = recording()
    large.offer(Request(model="m", inputs={"x": np.zeros(1 << 20)}), tell())
    assert large.examples == [] and large.skipped.too_large == 1
