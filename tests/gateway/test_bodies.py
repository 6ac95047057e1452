"""Texts of a sample of requests, in the log: only of whom the operator wants, without what is private, and never tensors."""

from collections.abc import MutableMapping
from typing import Any

import numpy as np
from structlog.testing import capture_logs

from fairlead.core.caller import Caller
from fairlead.core.errors import FairleadError, ModelError
from fairlead.core.generation import Chat, Delta, Generate, Message
from fairlead.core.logs import Bodies as Settings
from fairlead.core.policy import TenantPolicy
from fairlead.core.request import Raw, Request, Response
from fairlead.gateway.bodies import MARGIN, MAX_WAITING, Bodies, Sample, cut, texts_of


class Visited:
    def __init__(self, request: Request, error: FairleadError | None = None) -> None:
        self.request, self.model, self.version = request, request.model, "1"
        self.error: FairleadError | None = error


def chat(text: str) -> Request:
    caller = Caller(tenant="acme", policy=TenantPolicy())
    return Request(model="m", log_id="r1", caller=caller, prompt=Generate(chat=Chat(messages=[Message(role="user", content=text)])))


def delta(text: str) -> Response:
    return Response(model="m", version="1", delta=Delta(text=text))


def begun(bodies: Bodies) -> Sample:
    sample = bodies.begin("m")
    assert sample is not None
    return sample


def flushed(bodies: Bodies) -> list[MutableMapping[str, Any]]:
    with capture_logs() as lines:
        bodies.flush()
    return lines


def test_a_line_has_what_was_asked_and_answered_without_what_is_private() -> None:
    bodies = Bodies(Settings(share=1.0))
    sample = begun(bodies)
    sample.add([delta("Hello "), delta("Ann")])
    sample.add([delta("!")])
    bodies.finished(Visited(chat("I am ann@example.com, call me")), sample)
    (line,) = flushed(bodies)
    assert (line["event"], line["request_id"], line["tenant"], line["model"], line["version"]) == ("body", "r1", "acme", "m", "1")
    assert line["asked"] == ["I am [EMAIL], call me"] and line["answered"] == "Hello Ann!" and "error" not in line
    assert flushed(bodies) == []


def test_chance_and_the_models_named_decide_who_is_in_the_sample() -> None:
    chances = iter((0.05, 0.5))
    bodies = Bodies(Settings(share=0.1, models=("m",)), chance=lambda: next(chances))
    assert bodies.begin("other") is None
    assert bodies.begin("m") is not None
    assert bodies.begin("m") is None


def test_long_texts_are_cut_and_long_answers_are_not_even_kept() -> None:
    bodies = Bodies(Settings(share=1.0, max_bytes=10))
    sample = begun(bodies)
    for _ in range(1000):
        sample.add([delta("12345")])
    assert sample.num_bytes < 10 + MARGIN + 5
    bodies.finished(Visited(chat("äöü" * 100), ModelError("it broke")), sample)
    (line,) = flushed(bodies)
    assert (line["asked"], line["answered"], line["error"]) == (["äöüäö ..."], "1234512345 ...", "it broke")
    assert cut("ä" * 3, 3) == "ä ..."


def test_what_is_private_is_not_cut_in_two() -> None:
    bodies = Bodies(Settings(share=1.0, max_bytes=40))
    for secret in ("ann.of.somewhere@example.com", "4111 1111 1111 1111", "sk-abcdefghijklmnopqrstuv"):
        for before in range(10, 40):
            text = f"{'-' * before} {secret} {'and so on ' * 200}"
            sample = begun(bodies)
            for at in range(0, len(text), 7):
                sample.add([delta(text[at : at + 7])])
            bodies.finished(Visited(chat(text)), sample)
            (line,) = flushed(bodies)
            for shown in (*line["asked"], line["answered"]):
                assert secret[:7] not in shown and shown.endswith("...") and len(shown) <= 44


def test_tensors_never_stand_there() -> None:
    bodies = Bodies(Settings(share=1.0))
    sample = begun(bodies)
    texts = np.array([b"my illness"], dtype=object)
    sample.add([Response(model="m", version="1", outputs={"text_output": texts})])
    bodies.finished(Visited(Request(model="m", inputs={"text_input": texts})), sample)
    assert flushed(bodies) == []


def test_of_another_servers_bodies_the_texts_are_found() -> None:
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}'
    assert texts_of(Request(model="m", raw=Raw(path="/v1/chat/completions", body=body))) == ["hi"]
    assert texts_of(Request(model="m", raw=Raw(path="/v1/chat/completions", body=b"{"))) == []


def test_more_than_can_be_looked_through_is_dropped_and_told() -> None:
    bodies = Bodies(Settings(share=1.0))
    for _ in range(MAX_WAITING + 3):
        bodies.finished(Visited(chat("hi")), begun(bodies))
    lines = flushed(bodies)
    assert [line["event"] for line in lines].count("body") == MAX_WAITING
    assert lines[-1]["event"] == "bodies_dropped" and lines[-1]["num"] == 3
