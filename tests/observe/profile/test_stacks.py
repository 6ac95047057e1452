"""Stacks, taken from within a process and read from py-spy's text."""

import threading
from collections import Counter

from fairlead.observe.profile.stacks import MAX_STACKS, StackSampler, hottest, parsed, written


def waits_for_the_end(ended: threading.Event, begun: threading.Event) -> None:
    begun.set()
    while not ended.is_set():
        sum(range(100))


def test_a_sampler_sees_what_other_threads_do_and_not_itself_or_those_that_wait() -> None:
    begun, ended, sampler = threading.Event(), threading.Event(), StackSampler()
    busy = threading.Thread(target=waits_for_the_end, args=(ended, begun), name="busy;one")
    idle = threading.Thread(target=ended.wait, name="idle")
    busy.start()
    idle.start()
    begun.wait(10)
    for _ in range(5):
        sampler.sample()
    ended.set()
    busy.join(10)
    idle.join(10)
    mine = [stack for stack in sampler.stacks if stack.startswith("busy,one;")]
    assert sum(sampler.stacks[stack] for stack in mine) == 5 and sampler.num_samples == 5
    assert all("waits_for_the_end (test_stacks.py:" in stack for stack in mine)
    assert not any(stack.startswith("idle") or "StackSampler" in stack for stack in sampler.stacks)


def test_a_sampler_ends_when_it_is_told_to() -> None:
    sampler = StackSampler(rate=1000)
    sampler.start()
    sampler.stop()
    assert not sampler._thread.is_alive()


def test_texts_are_read_back_and_what_is_no_stack_is_left_out() -> None:
    stacks = Counter({"main;a (x.py:1);b (y.py:2)": 3, "thread (7): x;a (x.py:1)": 1})
    assert parsed(written(stacks)) == stacks
    assert parsed("no count\n 12\nmain;a twelve\nmain;a 2\nmain;a 3\n") == Counter({"main;a": 5})
    many = "".join(f"main;f{number} 1\n" for number in range(MAX_STACKS + 10)) + "main;f1 5\n"
    assert len(parsed(many)) == MAX_STACKS and parsed(many)["main;f1"] == 6


def test_the_hottest_function_is_the_one_that_was_innermost_most_often() -> None:
    hot = hottest({"main;a;b": 6, "main;a;b;a": 3, "main;c": 1})
    assert [(name, round(own, 2), round(total, 2)) for name, own, total in hot] == [("b", 0.6, 0.9), ("a", 0.3, 0.9), ("c", 0.1, 0.1)]
    assert hottest({}) == []
