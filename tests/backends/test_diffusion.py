"""An image model's threads over a real pipeline of diffusers, tiny and of random weights."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fairlead.backends import BACKENDS, detect
from fairlead.backends.diffusion import BACKEND, DiffusionThread
from fairlead.core.errors import FairleadError, InvalidRequest, LoadError, ShuttingDown, TooLarge, Unsupported
from fairlead.core.generation import Delta, Generate, Paint, Prompt
from fairlead.core.pictures import decode_image, encode, metadata_of, read_header
from fairlead.core.specs import DiffusionSpec, InstancesSpec, ModelSpec
from tests.diffusion import tiny

SECONDS = 60.0
SPEC = DiffusionSpec(num_steps=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sd", tmp_path_factory.mktemp("sd"))


class Painting:
    """An engine on its threads, asked as a replica asks it."""

    def __init__(self, engine: DiffusionThread) -> None:
        self.engine = engine
        self.answers: queue.Queue[tuple[int, Delta | FairleadError]] = queue.Queue()
        self.thread = threading.Thread(target=engine.run, args=(self._deliver,))
        self.thread.start()

    def _deliver(self, answers: list[tuple[int, Delta | FairleadError]]) -> None:
        for answer in answers:
            self.answers.put(answer)

    def submit(self, work: int, prompt: Prompt) -> None:
        self.engine.submit(work, prompt, priority=0, arrived=time.perf_counter(), deadline=0.0)

    def ask(self, *prompts: Prompt) -> Any:
        """The answers to all of them, each the list of its pieces."""
        for work, prompt in enumerate(prompts, 1):
            self.submit(work, prompt)
        pieces: dict[int, list[Delta]] = {work: [] for work in range(1, len(prompts) + 1)}
        while any(not deltas or deltas[-1].usage is None for deltas in pieces.values()):
            work, answer = self.answers.get(timeout=SECONDS)
            if isinstance(answer, FairleadError):
                raise answer
            pieces[work].append(answer)
        return list(pieces.values()) if len(prompts) > 1 else pieces[1]

    def close(self) -> None:
        self.engine.close()
        self.thread.join(SECONDS)
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def painting(folder: Path) -> Iterator[Painting]:
    painting = Painting(BACKEND.load_engine(folder, ModelSpec(name="art", diffusion=SPEC), 1, "7"))
    yield painting
    painting.close()


def pixels(delta: Delta) -> np.ndarray:
    assert delta.picture is not None
    return decode_image(delta.picture.data, "picture", delta.picture.width, delta.picture.height)


def test_a_folder_of_diffusers_is_an_image_model(folder, tmp_path):
    assert detect(folder, ModelSpec()) == (BACKENDS["diffusion"], folder)
    with pytest.raises(LoadError, match=r"is no pipeline of diffusers: it has no model_index\.json"):
        detect(tmp_path, ModelSpec(backend="diffusion"))


def test_pictures_asked_together_are_those_that_each_would_be_alone(painting):
    paints = [Paint(text=text, seed=seed, num_steps=steps) for text, seed, steps in (("a seven", 1, 3), ("a red two", 2, 6), ("one", 3, 4))]
    together = painting.ask(*paints)
    for paint, deltas in zip(paints, together, strict=True):
        alone = painting.ask(paint)
        assert np.abs(pixels(deltas[-1]).astype(int) - pixels(alone[-1])).max() <= 1
        assert [delta.progress.step for delta in deltas[:-1]] == list(range(1, paint.num_steps + 1))
    assert np.abs(pixels(together[0][-1]).astype(int) - pixels(together[1][-1])).max() > 20


def test_a_file_says_which_model_made_it_and_how(painting):
    deltas = painting.ask(Paint(text="a seven", seed=3, format="jpeg", preview_steps=1))
    told = metadata_of(deltas[-1].picture.data)
    assert (told["model"], told["seed"], told["mode"], told["num_steps"]) == ("art@7", 3, "exact", 4)
    assert deltas[-1].usage.compute_seconds > 0
    assert read_header(deltas[0].progress.preview, "preview").format == "jpeg"


def test_a_picture_is_painted_from_another_and_where_its_mask_is_white(painting):
    info = painting.engine.info.image
    ground = np.tile(np.linspace(0, 255, info.width).astype(np.uint8)[None, :, None], (info.height, 1, 3))
    mask = np.zeros((info.height, info.width), np.uint8)
    mask[:, : info.width // 2] = 255
    sent = {"image": encode(ground, "png"), "mask": encode(np.repeat(mask[..., None], 3, 2), "png")}
    near, far = (
        pixels(painting.ask(Paint(text="one", seed=1, image=sent["image"], strength=strength, num_steps=10))[-1]) for strength in (0.1, 1.0)
    )
    assert np.abs(near.astype(int) - far).mean() > 5
    assert painting.ask(Paint(text="one", seed=1, **sent))[-1].picture.width == info.width


def huge() -> bytes:
    """A bomb: 100 megapixels in a few kilobytes."""
    out = BytesIO()
    Image.new("1", (10_000, 10_000)).save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("prompt", "error", "said"),
    [
        (lambda: Paint(text="x", width=33), InvalidRequest, "`width` must be a multiple of"),
        (lambda: Paint(text="x", scheduler="magic"), InvalidRequest, "`scheduler` 'magic' is unknown"),
        (lambda: Paint(text="x", image=b"<svg/>"), InvalidRequest, "`image` must be a PNG, JPEG or WebP"),
        (lambda: Paint(text="x", image=huge()), TooLarge, "`image` has 10000x10000 pixels"),
        (lambda: Paint(text="x", mode="balanced"), Unsupported, "`mode`"),
        (lambda: Generate(text="x"), Unsupported, "makes pictures"),
    ],
)
def test_what_is_wrong_comes_back_as_its_error(painting, prompt: Callable[[], Prompt], error, said):
    with pytest.raises(error, match=said):
        painting.ask(prompt())
    assert painting.ask(Paint(text="a seven"))[-1].picture is not None


def test_a_cancelled_picture_says_nothing_more_and_frees_its_place(painting):
    painting.submit(9, Paint(text="a seven", num_steps=200))
    assert painting.answers.get(timeout=SECONDS)[0] == 9
    painting.engine.cancel(9)
    assert painting.answers.empty() or painting.answers.get()[0] == 9
    assert painting.ask(Paint(text="a seven"))[-1].picture is not None
    assert painting.engine.stats().num_running == 0


def test_an_engine_that_is_closed_tells_those_who_wait(folder):
    painting = Painting(BACKEND.load_engine(folder, ModelSpec(name="art", diffusion=SPEC), 1))
    painting.submit(1, Paint(text="a seven", num_steps=200))
    painting.answers.get(timeout=SECONDS)
    painting.close()
    answers = []
    while not painting.answers.empty():
        answers.append(painting.answers.get()[1])
    assert isinstance(answers[-1], ShuttingDown)


def test_a_device_that_is_not_there_is_refused(folder):
    with pytest.raises(LoadError, match="`device: cuda:63` is not there"):
        BACKEND.load_engine(folder, ModelSpec(name="art", instances=InstancesSpec(device="cuda:63")), 1)
