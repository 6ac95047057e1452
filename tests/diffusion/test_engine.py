"""The engine of pictures, step by step: what a request becomes, alone or among others, and what one that fails does to them."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from msgspec import structs

from fairlead.core.errors import Cancelled, FairleadError, InvalidRequest, ModelError, QueueFull, TimeoutExpired
from fairlead.core.generation import Paint
from fairlead.core.pictures import check, decode_image, metadata_of, read_header
from fairlead.diffusion.decoder import DecoderHere
from fairlead.diffusion.engine import MAX_FAILURES, DiffusionEngine, EngineBroken
from fairlead.diffusion.family import Inputs
from fairlead.diffusion.scheduler import Scheduler
from tests.diffusion.fake_family import INFO, FakeFamily


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Asking:
    """An engine, and what came out of it by request."""

    def __init__(self, *, max_num_seqs=8, max_batch_tokens=4096, max_waiting=100):
        self.clock = Clock()
        self.family = FakeFamily(self.clock)
        self.decoder = DecoderHere(self.family, "art@3")
        scheduler = Scheduler(max_num_seqs=max_num_seqs, max_batch_tokens=max_batch_tokens, max_waiting=max_waiting)
        self.engine = DiffusionEngine(self.family, scheduler, self.decoder, clock=self.clock)
        self.answers = defaultdict(list)
        self.num_steps = 0

    def add(self, work, text="a seven", inputs=None, *, priority=0, deadline=0.0, **fields):
        paint = check(Paint(text=text, seed=fields.pop("seed", work), **fields), INFO)
        if inputs is not None:
            paint = structs.replace(paint, image=b"given", strength=0.5)
        self.engine.add(work, paint, inputs, priority=priority, deadline=deadline)
        return self

    def step(self, count=1):
        for _ in range(count):
            self.num_steps += 1
            for work, answer in self.engine.step():
                self.answers[work].append(answer)
        return self

    def run(self, most=1000):
        while self.engine.has_work:
            assert self.num_steps < most
            self.step()
        return self

    def pictures(self, work):
        return [answer.picture for answer in self.answers[work] if not isinstance(answer, FairleadError) and answer.picture is not None]

    def error(self, work):
        return next(answer for answer in self.answers[work] if isinstance(answer, FairleadError))

    def free(self):
        """Nothing is left behind."""
        engine = self.engine
        assert not engine.has_work and not engine._works and not engine._pictures and not engine._suspects
        assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (0, 0)


def pixels(picture):
    return decode_image(picture.data, "picture", picture.width, picture.height)


def test_a_request_becomes_a_word_on_every_step_a_picture_and_its_cost():
    it = Asking().add(1, preview_steps=2, guidance=5.0, format="webp").run()
    *progress, last = it.answers[1]
    assert [(each.progress.step, each.progress.num_steps, bool(each.progress.preview)) for each in progress] == [
        (1, 4, False),
        (2, 4, True),
        (3, 4, False),
        (4, 4, True),
    ]
    assert read_header(progress[1].progress.preview, "preview").format == "jpeg"
    picture, usage = last.picture, last.usage
    assert (picture.content_type, picture.width, picture.height, picture.seed, picture.num_steps) == ("image/webp", 32, 32, 1, 4)
    assert metadata_of(picture.data) == {
        "seed": 1,
        "model": "art@3",
        "mode": "exact",
        "num_steps": 4,
        "guidance": 5.0,
        "scheduler": "euler",
    }
    assert (usage.megapixels, usage.num_steps) == (32 * 32 / 1e6, 4)
    assert usage.compute_seconds == pytest.approx(4.0, abs=0.5)
    assert b"seven" not in picture.data
    it.free()


def test_the_same_seed_is_the_same_picture_alone_or_among_others_at_other_steps():
    alone = Asking().add(1, seed=7, num_steps=9).run().pictures(1)[0]
    among = Asking()
    among.add(2, num_steps=20).step(3)
    among.add(3, "an eight", num_steps=5).step(1)
    among.add(1, seed=7, num_steps=9).run()
    assert np.array_equal(pixels(among.pictures(1)[0]), pixels(alone))
    assert {2, 3, 7} in [set(batch) for batch in among.family.batches]
    assert not np.array_equal(pixels(among.pictures(2)[0]), pixels(alone))


def test_several_pictures_of_one_request_share_forwards_and_have_seeds_that_follow():
    it = Asking().add(1, seed=5, n=3).run()
    assert it.family.batches == [[5, 6, 7]] * 4
    assert sorted(picture.seed for picture in it.pictures(1)) == [5, 6, 7]
    assert [answer.index for answer in it.answers[1] if answer.picture] == [0, 1, 2]
    assert [answer.usage is not None for answer in it.answers[1]] == [False] * 14 + [True]
    assert it.answers[1][-1].usage.num_steps == 12
    alone = Asking().add(1, seed=6).run().pictures(1)[0]
    assert np.array_equal(pixels(it.pictures(1)[1]), pixels(alone))


def test_the_time_of_a_step_is_shared_by_the_tokens_of_its_pictures():
    it = Asking().add(1, num_steps=6).add(2, num_steps=6).run()
    seconds = [it.answers[work][-1].usage.compute_seconds for work in (1, 2)]
    assert seconds == pytest.approx([3.0, 3.0], abs=0.5)


def test_pictures_of_two_sizes_take_turns():
    it = Asking().add(1, height=64).add(2, width=64).run()
    assert it.family.batches == [[1], [2]] * 4 and len(it.pictures(1)) == len(it.pictures(2)) == 1


def test_a_picture_larger_than_the_budget_is_computed_alone():
    it = Asking(max_batch_tokens=16).add(1).add(2).add(3, width=256, height=256).run()
    assert it.family.batches.count([3]) == 4 and [1, 2] in it.family.batches
    assert [len(it.pictures(work)) for work in (1, 2, 3)] == [1, 1, 1]


def test_guidance_that_needs_no_second_row_takes_no_room():
    it = Asking(max_batch_tokens=8)
    it.family.info = structs.replace(INFO, has_negative=False)
    for work in (1, 2):
        it.add(work, guidance=5.0)
    assert [row.num_tokens for row in it.engine.scheduler.admit()] == [4, 4]


def test_a_picture_to_begin_from_saves_steps_and_says_so():
    it = Asking().add(1, inputs=Inputs(np.zeros((32, 32, 3), np.uint8)), num_steps=10).run()
    assert it.answers[1][-1].usage.num_steps == 5 and it.answers[1][0].progress.num_steps == 5
    assert metadata_of(it.pictures(1)[0].data)["strength"] == 0.5


def test_an_abort_frees_within_a_step_and_nothing_more_is_said():
    it = Asking(max_num_seqs=1).add(1, num_steps=50).add(2).step(2)
    it.engine.abort(1)
    it.engine.abort(99)
    heard = len(it.answers[1])
    it.step()
    assert it.family.batches[-1] == [2]
    it.run()
    assert len(it.answers[1]) == heard and len(it.pictures(2)) == 1
    assert it.engine.stats().finished == {"abort": 1, "stop": 1}
    it.free()


def test_an_abort_reaches_what_waits_and_what_is_decoded():
    it = Asking(max_num_seqs=1).add(1).add(2).step(4)
    assert it.decoder.has_any
    it.engine.abort(1)
    it.engine.abort(2)
    it.run()
    assert not it.pictures(1) and not it.answers[2]
    it.free()


def test_a_short_job_begins_in_the_step_after_it_came():
    it = Asking().add(1, num_steps=50).step(10).add(2, num_steps=4).step()
    assert set(it.family.batches[-1]) == {1, 2}
    it.step(4)
    assert len(it.pictures(2)) == 1 and not it.pictures(1)


def test_a_better_priority_goes_first_and_the_other_goes_on_where_it_was():
    it = Asking(max_num_seqs=1, max_batch_tokens=8).add(1, num_steps=6, priority=2).step(3)
    it.add(2, priority=1).run()
    assert it.family.batches == [[1]] * 3 + [[2]] * 4 + [[1]] * 3
    assert it.family.encoded == [1, 2]
    alone = Asking().add(1, num_steps=6).run()
    assert np.array_equal(pixels(it.pictures(1)[0]), pixels(alone.pictures(1)[0]))
    assert it.engine.stats().num_preemptions == 1


def test_tenants_share_the_steps_however_much_each_asks_for():
    it = Asking(max_batch_tokens=8)
    for work in range(10):
        it.add(work, num_steps=10, tenant="much")
    it.add(50, num_steps=10, tenant="little").run()
    assert it.family.batches[:20].count([50]) == 10


def test_what_has_not_begun_in_time_fails_and_what_has_begun_is_finished():
    it = Asking(max_num_seqs=1)
    it.add(1, num_steps=8, n=2, deadline=101.5).add(2, num_steps=9, deadline=103.0).run()
    assert isinstance(it.error(2), TimeoutExpired) and len(it.pictures(1)) == 2
    it.free()


def test_a_request_too_many_is_refused():
    it = Asking(max_num_seqs=1, max_waiting=1).add(1).step().add(2)
    with pytest.raises(QueueFull):
        it.add(3)
    it.run().free()


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("!encode", InvalidRequest, "not to its taste"),
        ("!raise", ModelError, "the model failed on this request: RuntimeError: index out of range"),
        ("!nan", ModelError, "overflowed"),
        ("!step", ModelError, "no such timestep"),
        ("!decode", ModelError, "could not decode this picture: RuntimeError: no such pixel"),
    ],
)
def test_a_request_that_fails_fails_alone(text, error, said):
    it = Asking()
    for work in range(1, 6):
        it.add(work, text if work == 3 else "a seven", n=2)
    it.run()
    with pytest.raises(error, match=said):
        raise it.error(3)
    for work in (1, 2, 4, 5):
        assert len(it.pictures(work)) == 2
        alone = Asking().add(work, n=2).run()
        assert all(np.array_equal(pixels(one), pixels(two)) for one, two in zip(it.pictures(work), alone.pictures(work), strict=True))
    assert sum(isinstance(answer, FairleadError) for answer in it.answers[3]) == 1
    assert it.engine.stats().num_quarantined == (error is ModelError)
    it.free()


def test_while_it_looks_for_the_one_at_fault_it_says_so():
    it = Asking().add(1, "!raise").add(2).step()
    assert it.engine.stats().recovering
    it.run()
    assert not it.engine.stats().recovering and it.engine.stats().num_failed_steps == 2


def test_where_all_whom_it_suspects_have_left_it_has_recovered():
    it = Asking().add(1, "!raise").add(2).step()
    it.engine.abort(1)
    it.engine.abort(2)
    assert not it.engine.stats().recovering


def test_an_engine_in_which_nothing_works_gives_itself_up():
    it = Asking()
    for work in range(MAX_FAILURES):
        it.add(work, "!raise")
    with pytest.raises(EngineBroken, match="steps failed one after another, the last with RuntimeError: index out of range"):
        it.run()


def test_what_is_counted():
    it = Asking().add(1, n=2).add(2, width=64).run()
    stats = it.engine.stats()
    assert (stats.num_pictures, stats.num_denoising_steps, stats.num_steps, stats.finished) == (3, 12, 8, {"stop": 3})
    assert sum(stats.queue_time[0]) == 2 and sum(stats.step_time[0]) == 8


class Whole(FakeFamily):
    """All steps within one `denoise`."""

    def denoise(self, states):
        (state,) = states
        num_steps = len(state.timesteps)
        for step in range(num_steps):
            prediction = super().denoise([state])[0]
            if step < num_steps - 1:
                self.step(state, prediction)
            if state.between():
                raise Cancelled("stopped")
        return [prediction]


def test_a_pipeline_that_runs_whole_tells_of_every_step_and_can_be_stopped_after_each():
    it = Asking()
    it.engine.family = Whole(it.clock)
    told = []

    def breathe(answers):
        told.append([answer.progress.step for _, answer in answers])
        if len(told) == 6:
            it.engine.abort(2)
        return False

    it.engine.breathe = breathe
    it.add(1).run()
    assert told == [[1], [2], [3], []]
    assert [answer.progress.step for answer in it.answers[1] if answer.progress] == [4]
    assert it.answers[1][-1].usage.num_steps == 4
    it.add(2, num_steps=50).run()
    assert len(told) == 6 and not it.answers[2]
    it.free()


def test_the_last_piece_tells_where_the_time_went():
    it = Asking(max_num_seqs=2)
    it.add(1, n=2).add(2, n=1).run()
    for work, num_steps in ((1, 8), (2, 4)):
        *before, last = it.answers[work]
        assert not any(each.phases for each in before)
        waiting, encode, denoise, decode = last.phases
        assert [phase.name for phase in last.phases] == ["waiting", "encode", "denoise", "decode"]
        for phase, then in pairwise(last.phases):
            assert phase.start + phase.seconds == pytest.approx(then.start)
        assert denoise.num_steps == num_steps and denoise.seconds > 0
        assert (waiting.start, encode.seconds >= 0, decode.seconds >= 0) == (0.0, True, True)
    assert it.answers[1][-1].phases[2].max_seqs == 2
    assert it.answers[2][-1].phases[0].seconds > 0, "there was room for two only"
