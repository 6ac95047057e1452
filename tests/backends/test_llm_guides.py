"""Guides on their way through the model's threads: compiled beside the reader, refused as the request's own fault."""

import threading
import time
from typing import Any

import pytest

from fairlead.backends import engine_thread
from fairlead.backends.llm import BACKEND
from fairlead.cli.demo_models.tiny.checks import CHAT
from fairlead.core.errors import InvalidRequest, QueueFull, TimeoutExpired, Unsupported
from fairlead.core.generation import Chat, Generate, Guide, Message, Sampling
from fairlead.core.specs import LlmSpec, ModelSpec
from fairlead.llm.grammar import Grammar
from tests.backends.test_llm import SECONDS, Running

YES = Guide(kind="choice", text='["yes", "no"]', parameter="structured_outputs.choice")


def load(**spec: Any) -> Running:
    return Running(BACKEND.load_engine(CHAT, ModelSpec(name="m", backend="llm", llm=LlmSpec(kernels="torch", **spec)), 1))


@pytest.fixture(scope="module")
def running():
    engine = load()
    yield engine
    engine.close()


def asked(guide: Guide, **more: Any) -> Generate:
    return Generate(
        chat=Chat(messages=[Message(role="user", content="Is 3 odd?")]), sampling=Sampling(temperature=0.0), guide=guide, **more
    )


def test_an_answer_follows_its_guide_the_first_time_and_when_it_is_known(running):
    assert [running.ask(asked(YES)).text in ("yes", "no") for _ in range(2)] == [True, True]
    stats = running.engine.stats()
    assert (stats.num_grammars, stats.num_grammar_hits) == (1, 1) and stats.grammar_seconds > 0
    assert any("structured output" in line for line in running.engine.info.explain)


def test_a_completion_has_guides_too(running):
    assert running.ask(Generate(text="The answer is ", guide=YES)).text in ("yes", "no")


def test_what_cannot_be_followed_is_refused_by_name(running):
    schema = Guide(kind="json", text='{"properties": {"a": {"if": {}}}}', parameter="response_format.json_schema.schema")
    with pytest.raises(InvalidRequest, match=r"^`response_format\.json_schema\.schema` cannot be followed: /properties/a/if: "):
        running.ask(asked(schema))


def test_a_compilation_holds_up_no_other_request(running, monkeypatch: pytest.MonkeyPatch):
    # Given a grammar that is not compiled until another request has its answer
    grammars, answered = running.engine.engine.grammars, threading.Event()
    compiled = grammars.compile

    def slow(guide: Guide) -> Grammar:
        assert answered.wait(SECONDS)
        return compiled(guide)

    monkeypatch.setattr(grammars, "compile", slow)
    running.submit(1, asked(Guide(kind="regex", text="(on|off)")))
    # Then that one is read and computed meanwhile
    assert running.ask_past_others(2, Generate(text="3 plus 4", sampling=Sampling(max_tokens=1))).usage.completion_tokens == 1
    answered.set()
    work, answer = running.answers.get(timeout=SECONDS)
    assert work == 1 and answer.text in ("on", "off")


def test_only_so_many_wait_to_be_compiled(running, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_thread, "MAX_SLOW", 0)
    with pytest.raises(QueueFull):
        running.ask(asked(Guide(kind="regex", text="new")))
    assert running.ask(asked(YES)).text in ("yes", "no")  # it is known


def test_one_that_waited_too_long_is_not_compiled(running):
    known = running.engine.stats().num_grammars
    running.engine.submit(1, asked(Guide(kind="regex", text="late")), priority=0, arrived=0.0, deadline=time.perf_counter() - 1.0)
    _, answer = running.answers.get(timeout=SECONDS)
    assert isinstance(answer, TimeoutExpired) and running.engine.stats().num_grammars == known


def test_guides_that_are_off_are_refused():
    running = load(guides=False)
    with pytest.raises(Unsupported, match="off"):
        running.ask(asked(YES))
    running.close()
