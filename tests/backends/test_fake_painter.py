"""The image engine without a model, asked as a replica asks it: what jobs and doors are tested against keeps its word."""

import queue
import threading
import time
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fairlead.backends.fake_painter import FakePainter, PainterThread
from fairlead.core.errors import FairleadError, InvalidRequest, ModelError, QueueFull, ShuttingDown, TimeoutExpired, Unsupported
from fairlead.core.generation import Delta, Generate, Paint, Prompt
from fairlead.core.pictures import encode, metadata_of, read_header
from fairlead.core.specs import DiffusionSpec, ModelSpec

SECONDS = 30.0


class Painting:
    def __init__(self, spec: ModelSpec, **clock: Any) -> None:
        self.engine = PainterThread(FakePainter(spec, **clock))
        self.answers: queue.Queue[tuple[int, Delta | FairleadError]] = queue.Queue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.broke: BaseException | None = None
        self.thread.start()

    def _run(self) -> None:
        try:
            self.engine.run(lambda answers: [self.answers.put(answer) for answer in answers] and None)
        except BaseException as error:
            self.broke = error

    def submit(self, work: int, prompt: Prompt, *, deadline: float = 0.0, priority: int = 0) -> None:
        self.engine.submit(work, prompt, priority=priority, arrived=time.perf_counter(), deadline=deadline)

    def next(self) -> tuple[int, Delta | FairleadError]:
        return self.answers.get(timeout=SECONDS)

    def ask(self, prompt: Prompt, work: int = 1, **when: Any) -> list[Delta]:
        """All pieces of the answer, past what is left of others."""
        self.submit(work, prompt, **when)
        deltas: list[Delta] = []
        while not deltas or deltas[-1].usage is None:
            other, answer = self.next()
            if other != work:
                continue
            if isinstance(answer, FairleadError):
                raise answer
            deltas.append(answer)
        return deltas

    def close(self) -> None:
        self.engine.close()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture
def painting() -> Iterator[Painting]:
    painting = Painting(ModelSpec(name="art", parameters={"num_steps": 4, "size": 16}))
    yield painting
    painting.close()


@pytest.fixture
def paced() -> Iterator[tuple[Painting, threading.Semaphore]]:
    """Steps happen when the semaphore is released; two pictures at once."""
    steps = threading.Semaphore(0)
    spec = ModelSpec(name="art", parameters={"num_steps": 4, "size": 16}, diffusion=DiffusionSpec(max_num_seqs=2, max_waiting=2))
    painting = Painting(spec, sleep=lambda _: steps.acquire() and None)
    yield painting, steps
    painting.engine.close()
    steps.release(100)
    painting.close()


def colour(delta: Delta) -> tuple[int, ...]:
    assert delta.picture is not None
    with Image.open(BytesIO(delta.picture.data)) as image:
        assert image.size == (delta.picture.width, delta.picture.height)
        return tuple(np.asarray(image)[0, 0].tolist())


def test_a_picture_comes_after_a_word_on_every_step_and_the_last_piece_tells_what_was_used(painting):
    deltas = painting.ask(Paint(text="a seven", seed=3, n=2, preview_steps=2))
    for index in range(2):
        mine = [delta for delta in deltas if delta.index == index]
        assert [(delta.progress.step, delta.progress.num_steps) for delta in mine[:-1]] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert [bool(delta.progress.preview) for delta in mine[:-1]] == [False, True, False, True]
        assert read_header(mine[1].progress.preview, "preview").format == "jpeg"
        picture = mine[-1].picture
        assert (picture.width, picture.height, picture.seed, picture.num_steps, picture.scheduler) == (16, 16, 3 + index, 4, "euler")
        assert metadata_of(picture.data) == {
            "seed": 3 + index,
            "model": "art",
            "mode": "exact",
            "num_steps": 4,
            "guidance": 7.5,
            "scheduler": "euler",
        }
    assert [delta.usage is not None for delta in deltas] == [False] * 9 + [True]
    assert (deltas[-1].usage.num_steps, deltas[-1].usage.megapixels) == (8, pytest.approx(2 * 256 / 1e6))
    assert painting.engine.stats().num_pictures == 2 and painting.engine.stats().finished == {"stop": 1}


def test_the_colour_is_the_seed_s_and_the_text_s(painting):
    one, again, other = (painting.ask(Paint(text=text, seed=5))[-1] for text in ("a seven", "a seven", "an eight"))
    assert one.picture == again.picture and colour(one) != colour(other)
    first, second = painting.ask(Paint(text="a seven", seed=4, n=2))[-2:]
    assert colour(second) == colour(one) != colour(first)
    assert colour(painting.ask(Paint(text="!unsafe", seed=5))[-1]) == (255, 0, 0)
    seeds = {painting.ask(Paint(text="a seven"))[-1].picture.seed for _ in range(3)}
    assert len(seeds) == 3


@pytest.mark.parametrize(("format", "content_type"), [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")])
def test_the_file_is_of_the_kind_that_was_asked_for(painting, format, content_type):
    picture = painting.ask(Paint(text="a seven", format=format, width=24, height=8, mode="turbo"))[-1].picture
    header = read_header(picture.data, "picture")
    assert (picture.content_type, picture.mode, header.format, header.width, header.height) == (content_type, "turbo", format, 24, 8)


def test_a_picture_to_begin_from_shines_through_and_saves_steps(painting):
    white = encode(np.full((16, 16, 3), 255, np.uint8), "png")
    deltas = painting.ask(Paint(text="a seven", seed=1, image=white, strength=0.5))
    assert deltas[-1].usage.num_steps == 2
    assert min(colour(deltas[-1])) >= 126


@pytest.mark.parametrize(
    ("prompt", "error", "said"),
    [
        (Paint(text="x", width=10), InvalidRequest, "`width` must be a multiple of 8"),
        (Paint(text="x", mode="balanced"), Unsupported, "`mode`"),
        (Paint(text="x", image=b"\x89PNG\r\n\x1a\n"), InvalidRequest, "`image` is cut short"),
        (Paint(text="x !raise"), ModelError, "it was asked to"),
        (Generate(text="x"), Unsupported, "makes pictures"),
    ],
)
def test_what_is_wrong_comes_back_as_its_error_and_hurts_nobody_else(painting, prompt, error, said):
    with pytest.raises(error, match=said):
        painting.ask(prompt)
    assert painting.ask(Paint(text="a seven"))[-1].picture is not None


def test_a_cancelled_picture_says_nothing_more_and_makes_room(paced):
    painting, steps = paced
    painting.submit(1, Paint(text="a seven", n=2))
    steps.release()
    assert painting.next()[1].progress.step == painting.next()[1].progress.step == 1
    painting.submit(2, Paint(text="an eight"))
    painting.engine.cancel(1)
    steps.release(10)
    assert {painting.next()[0] for _ in range(5)} == {2}
    assert painting.engine.stats().finished == {"abort": 1, "stop": 1}


def test_what_waits_goes_by_priority_gives_up_in_time_and_is_bounded():
    """Without threads: one step after the other."""
    now = [10.0]
    spec = ModelSpec(name="art", diffusion=DiffusionSpec(max_num_seqs=2, max_waiting=2, num_steps=2))
    painter = FakePainter(spec, clock=lambda: now[0], sleep=lambda _: None)
    thread = PainterThread(painter)

    def add(work: int, *, priority: int = 0, deadline: float = 0.0, n: int = 1) -> None:
        thread.add(work, thread.read(Paint(text="x", n=n)), {"priority": priority, "arrived": 0.0, "deadline": deadline})

    add(1, n=2)
    assert {work for work, _ in painter.step()} == {1}
    add(2, priority=2)
    add(3, priority=1, deadline=11.0)
    with pytest.raises(QueueFull, match="2 requests wait already"):
        add(4)
    assert painter.stats().num_waiting == 2
    now[0] = 12.0
    answers = painter.step()
    assert [(work, type(answer)) for work, answer in answers if isinstance(answer, FairleadError)] == [(3, TimeoutExpired)]
    add(5, priority=1)
    add(6, priority=3)
    assert {work for work, _ in painter.step()} == {2, 5}


def test_an_engine_that_is_closed_tells_those_who_wait(paced):
    painting, _ = paced
    painting.submit(1, Paint(text="a seven"))
    painting.engine.close()
    paced[1].release(5)
    answers = [painting.next()[1]]
    while not isinstance(answers[-1], FairleadError):
        answers.append(painting.next()[1])
    assert isinstance(answers[-1], ShuttingDown)


def test_it_breaks_where_it_is_asked_to():
    painting = Painting(ModelSpec(name="art"))
    painting.submit(1, Paint(text="!break"))
    painting.thread.join(SECONDS)
    assert isinstance(painting.broke, RuntimeError)
